"""What a call would do, and why, without doing it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import primitives, xla
from ..base import errors, names
from ..base.arguments import KERNEL_HEAD_DIM
from ..base.config import PASSES, Tuned
from ..base.known import full, is_known, now
from ..base.operands import HIDING
from ..base.rounding import loses, lost_dtype
from ..base.spec import Spec
from ..gpu import functions, interpret, passes, short, tuning
from ..gpu.loading import launcher
from ..gpu.target import INTERPRETED, Target, is_default, of_default_backend
from ..primitives.call import Call
from ..tiles import block_lists, spans
from ..xla import by_head
from . import inputs
from .api import defaults


@dataclasses.dataclass(frozen=True)
class Pass:
    """One kernel, or one pass of the XLA path, over one call."""

    name: str
    """"fwd", "dq", "dkdv" or "dbias", which is run for a bias and for each element that a score function reads; the XLA
    path has "fwd" and "bwd"."""
    config: Tuned | None
    """What the kernel is compiled with; None on the XLA path."""
    block_m: int
    block_n: int
    tiles: int
    """Tiles `[block_m, block_n)` of logits that there are, over all batches and heads."""
    visited: int | None
    """Of these, how many are computed. None: that depends on data that is not known yet (traced)."""
    masked: int | None
    """Of these, how many go through the mask."""
    flops: int | None
    """Floating point operations of the matrix products in the tiles visited (a multiply-add is 2)."""
    bytes: int
    """What must move at least: every operand read and every result written once, but for numbers of rows. Of the
    forward pass also what o loses by rounding, as where a backward pass reads it."""
    packed: int = 1
    """Query heads whose rows one tile has, where they are few; it counts once."""


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a call would do; its text says it."""

    implementation: str
    """"triton" or "xla"."""
    where: str
    """The GPU that the kernels are made for, or the platform that XLA compiles for."""
    passes: tuple[Pass, ...]
    reasons: tuple[str, ...]
    """Why it is not something else."""
    source: str | None = None
    """The Triton source of a score function, of its derivative by the score if that is not 1, and of a mask function
    that is evaluated where it masks."""

    def __str__(self) -> str:
        lines = [f"{self.implementation} on {self.where}", *(f"  {reason}" for reason in self.reasons)]
        for p in self.passes:
            how = f"{p.block_m}x{p.block_n}"
            if p.config is not None:
                c = p.config
                how += f" warps {c.num_warps} stages {c.num_stages} {'block-ptr' if c.block_ptr else 'ptr-block'}"
                how += " overlaps" * c.overlaps + " specialized" * c.warp_specialize
                how += f" {p.packed} heads in a tile" if p.packed > 1 else ""
                how += f" {c.num_splits} splits" if c.num_splits > 1 else ""
            if p.visited is None:
                tiles = f"{p.tiles} tiles, how many are visited depends on the data"
            else:
                share = p.visited / max(p.tiles, 1)
                tiles = f"{p.visited} of {p.tiles} tiles visited ({share:.1%}), {p.masked} through the mask"
            work = "" if p.flops is None else f", {p.flops / 1e9:.4g} GFLOP"
            lines.append(f"  {p.name:5} {how}: {tiles}{work}, {p.bytes / 2**20:.4g} MiB")
        if self.source is not None:
            lines += [f"    {line}".rstrip() for line in self.source.splitlines()]
        return "\n".join(lines)

    __repr__ = __str__


def with_shapes[T](function: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """The function of these arguments, those that are a `jax.ShapeDtypeStruct` being arrays that nobody knows."""
    unknown = {name: x for name, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
    if not unknown:
        return function(**arguments)
    made: list[T] = []
    jax.eval_shape(lambda unknown: made.append(function(**{**arguments, **unknown})), unknown)
    return made[0]


def explain(q, k, v, bias=None, **options: Any) -> Explanation:
    """Of a call on one device, or under plain jit; see `context.explaining.explain`."""
    names.check("explain", options, defaults())
    return with_shapes(explained, {"q": q, "k": k, "v": v, "bias": bias, **options})


def explained(q, k, v, bias=None, **options: Any) -> Explanation:
    """`explain` of arrays, traced ones too."""
    call, (q, k, v, operands), _ = inputs.prepare(q, k, v, bias, **defaults() | options)
    if "offset" in operands:  # which lengths decide: known, whatever is traced
        with now():
            operands["offset"] = full(k.shape[1] - q.shape[1], jnp.dtype(jnp.int32), (1, 1, 1, 1))
    natively = bool(options.get("higher_order"))
    call = call.with_lost(loses(q.dtype) and not natively)
    spec = Spec.of(call.rules, q, k, v, operands)
    target, reasons = _target(call, q, v, natively)
    if not natively:
        reasons += primitives.said_of_keys(call, q, k, v, operands)
    if target is None:
        made = _native_passes if natively else _xla_passes
        result = Explanation("xla", jax.default_backend(), made(call, spec, q, k, v, operands), reasons)
    else:
        dq_does = "bias" in operands and passes.gives_dbias(spec, operands["bias"].shape, q, k)
        summed = "bias" in operands and not dq_does
        reads = 0 if call.rules.score is None else len(call.rules.score.reads)
        few, config = short.choose(spec, q, k, operands, target, call.config("fwd"))
        kernels = [_kernel("fwd", config, few, q, k, v, operands)]
        kernels += [
            _kernel(name, tuning.choose(name, spec, q.dtype, target, call.config(name)), spec, q, k, v, operands)
            for name in (*PASSES[1:3], *["dbias"] * (summed + reads))
        ]
        result = Explanation("triton", target.name, tuple(kernels), reasons)
    if spec.scores or spec.by_function:
        result = _with_source(result, spec, operands, q.shape[0])
    return result


def _with_source(result: Explanation, spec: Spec, operands: Mapping[str, Array], batch: int) -> Explanation:
    """With what kernels make of score and mask functions; with why that is nothing, where XLA runs them."""
    try:
        made = functions.for_kernels(spec, operands, batch, backward=True, places=True)
    except TypeError as error:
        if result.implementation == "triton":
            raise
        return dataclasses.replace(result, reasons=(*result.reasons, f"on a GPU this would raise: {error}"))
    sources = [made.score and made.score.source, made.score and made.score.slope_source]
    sources.append(made.mask_function and made.mask_function.source)
    return dataclasses.replace(result, source="\n".join(x for x in sources if x is not None))


def supported(q, k, v, bias=None, **options: Any) -> bool:
    """Whether `flash_attention` takes these arguments on this machine; does not raise for what it would refuse.

    That a config's tiles are too large for the GPU's shared memory is found only when a call is compiled.

    Args:
      q, k, v, bias, **options: as for `flash_attention`; arrays, or `jax.ShapeDtypeStruct`s in their place.

    Raises:
      TypeError: it has no argument of that name.

    Examples:
      >>> x = jnp.zeros((1, 64, 4, 32))
      >>> supported(x, x, x, causal=True), supported(x, x[:, :, :3], x[:, :, :3])
      (True, False)
    """
    names.check("supported", options, defaults())
    try:
        with_shapes(explained, {"q": q, "k": k, "v": v, "bias": bias, **options})
    except (TypeError, ValueError, ImportError):
        return False
    return True


def _target(call: Call, q: Array, v: Array, higher_order: bool) -> tuple[Target | None, tuple[str, ...]]:
    """The GPU that would run it, or None for XLA; and why."""
    gpu = is_default()
    if higher_order:
        return None, ("higher_order=True runs on XLA, which differentiates it to any order",)
    if inputs.is_wide(q, v) and call.implementation == "xla":
        return None, (f"the Triton kernels have heads of up to {KERNEL_HEAD_DIM}",)
    if call.implementation == "xla":
        return None, ('implementation="xla" was asked for',)
    if call.implementation == "triton" and not gpu and call.target is None:
        if not interpret.enabled():
            raise errors.not_on_this_platform_error()
        return INTERPRETED, ("TRITON_INTERPRET=1: the kernels run in Triton's interpreter",)
    if q.dtype == jnp.float64:
        return None, ("the Triton kernels have no float64",)
    if call.target is None and not gpu:
        return None, (f"the Triton kernels need a GPU, and JAX's default backend is {jax.default_backend()}",)
    if gpu or call.implementation == "triton":
        launcher()
    reason = "an enclosing gpu_target names it" if call.target else "JAX's default backend is this GPU"
    return call.target or of_default_backend(), (reason,)


def _kernel(name: str, config: Tuned, spec: Spec, q, k, v, operands) -> Pass:
    rows = config.block_m // spec.packed
    starts = np.arange(0, q.shape[1], rows)
    counts = _count(spec, q, k, operands, starts, rows, config.block_n)
    return _pass(name, config, config.block_m, config.block_n, counts, spec, q, k, v, operands)


def _xla_passes(call: Call, spec: Spec, q, k, v, operands) -> tuple[Pass, ...]:
    made = []
    for name, config in (("fwd", "fwd"), ("bwd", "dkdv")):
        block_m, block_n, counts = 0, 0, (0, 0, 0)
        if not primitives.nothing_to_see(q, k, v):
            forward = name == "fwd"
            starts, block_m, block_n = xla.tiles(spec, call.config(config), q, k, operands, forward=forward)
            wanted = () if forward else tuple(operands)
            by_heads = by_head.pays(spec, q, operands, wanted)
            counts = _count(spec, q, k, operands, starts, block_m, block_n, spec.kv_heads if by_heads else 1)
        made.append(_pass(name, None, block_m, block_n, counts, spec, q, k, v, operands))
    return tuple(made)


def _native_passes(call: Call, spec: Spec, q, k, v, operands) -> tuple[Pass, ...]:
    """With higher_order=True: whole rows, of which nothing is skipped."""
    block_m, block_n, counts = 0, 0, (0, 0, 0)
    if not primitives.nothing_to_see(q, k, v):
        t = xla.whole_rows(spec, call.config("fwd"), q, k, operands)
        tiles = q.shape[0] * spec.heads * t.blocks_q
        block_m, block_n, counts = t.block_m, t.block_n, (tiles, tiles, tiles * t.masked)
    return tuple(
        _pass(name, None, block_m, block_n, counts, spec, q, k, v, operands, products)
        for name, products in (("fwd", (1, 1)), ("bwd", (3, 3)))  # JAX computes o again, too
    )


# Matrix products of each pass, as multiples of D (q k', ds k, ds' q) and of Dv (p v, do v', p' do).
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkdv": (2, 2), "dbias": (1, 1), "bwd": (3, 2)}


def _pass(name, config, block_m, block_n, counts, spec: Spec, q, k, v, operands, products=None) -> Pass:
    tiles, visited, masked = counts
    with_d, with_dv = products or _PRODUCTS[name]
    flops = None
    if visited is not None:
        flops = 2 * visited * block_m * block_n * (with_d * spec.head_dim + with_dv * spec.v_dim)
    o = q.size // spec.head_dim * spec.v_dim
    sizes = {
        "fwd": q.size + k.size + v.size + o,
        "dq": 2 * q.size + k.size + v.size + 2 * o,
        "dkdv": q.size + 2 * (k.size + v.size) + o,
        "dbias": q.size + k.size + v.size + o,
        "bwd": 2 * (q.size + k.size + v.size) + 2 * o,
    }
    extra = sum(x.size * x.dtype.itemsize for x in operands.values())
    if spec.rules.lost and name in ("fwd", "dq", "bwd"):
        extra += o * lost_dtype(q.dtype).itemsize
    moved = sizes[name] * q.dtype.itemsize + extra
    return Pass(name, config, block_m, block_n, tiles, visited, masked, flops, moved, spec.heads_packed)


def _count(
    spec: Spec, q, k, operands, starts, block_m, block_n, together: int = 0
) -> tuple[int, int | None, int | None]:
    """Tiles in all, visited and masked. together: in how many groups of heads a tile is met for all of them and all
    batches, or for none; 0: each head meets its own."""
    batch, seqlen_q, heads = q.shape[0], q.shape[1], spec.heads // spec.heads_packed
    seqlen_k = k.shape[1]
    tiles = batch * heads * len(starts) * -(-seqlen_k // block_n) if seqlen_k else 0
    if not tiles:
        return 0, 0, 0
    hiding = {name: x for name, x in operands.items() if name in HIDING}
    with now() if is_known(hiding) else contextlib.nullcontext():
        if spec.listed:
            return tiles, *_count_listed(spec, q, k, operands, block_m, block_n, together)
        look_up = spans.query_tiles if together else spans.query_spans
        table = look_up(spec, operands, batch, seqlen_q, seqlen_k, starts, block_m, block_n)
    if isinstance(table, jax.core.Tracer):
        return tiles, None, None
    table = np.asarray(table, np.int64)
    if together:
        visited, masked = (int(np.sum(x)) for x in (table != spans.EMPTY, table == spans.PARTIAL))
        return tiles, visited * batch * heads, masked * batch * heads
    begin, full, stop, end = np.moveaxis(table, -1, 0)
    copies = batch * heads * len(starts) // begin.size
    return tiles, int((end - begin).sum()) * copies, int((full - begin + end - stop).sum()) * copies


def _count_listed(spec: Spec, q, k, operands, block_m, block_n, together: int) -> tuple[int | None, int | None]:
    """Tiles visited and masked where there is a block mask, of whose tiles these are pieces."""
    batch, seqlen_q, heads = q.shape[0], q.shape[1], spec.heads // spec.heads_packed
    parts, bounded = block_lists.parts(operands), spec.causal or spec.bounded
    status = block_lists.status(spec, operands, batch, seqlen_q, k.shape[1], parts, bounded=bounded)
    if isinstance(status, jax.core.Tracer):
        return None, None
    if together:
        status = block_lists.union_by_head(status, together)
    status = np.asarray(status)
    rows = np.minimum(seqlen_q - np.arange(0, seqlen_q, spec.tile_rows), spec.tile_rows)
    pieces = -(-rows // block_m)[:, None] * max(spec.tile_keys // block_n, 1)
    copies = batch * heads // (status.shape[0] * status.shape[1])
    visited, masked = (int((met * pieces).sum()) * copies for met in (status != 0, status == block_lists.PARTIAL))
    return visited, masked
