"""The passes of attention as kernel launches: which kernel, over how many programs, with which operands.

A pass does not know how a kernel is run. It is given a `run` that does: `launch.run` binds jax-triton's custom
call, `interpret.run` calls Triton's interpreter, and the codegen check compiles without running.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..base.config import Tuned
from ..base.layout import next_power_of_two
from ..base.operands import is_score_array, summed_to
from ..base.rounding import lost_dtype
from ..base.spec import Operand, Spec, length_of_keys, sequences
from ..tiles import block_lists, ragged, spans
from . import functions, short

LN2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class Rows:
    """An operand `[B, S, H, D]` that a loop reads in tiles: a pointer or a descriptor, as `run` decides.

    What is read once per program stays a pointer: a descriptor's four axes keep Triton from leaving that tile in
    shared memory, and then ptxas serialises wgmma.
    """

    array: Array
    rows: int
    cols: int

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """The tile, as a block of the four axes."""
        return (1, self.rows, 1, self.cols)


Run = Callable[..., Any]
"""run(kernel, programs, operands, outputs, spec, config) -> the outputs, in order.

An operand is an array, `Rows`, a tuple of arrays, an int or None; an output of None is not computed."""


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def forward(run: Run, spec: Spec, config: Tuned, q, k, v, operands: Mapping[str, Array]) -> tuple[Array | None, ...]:
    """One launch, or two where programs share keys (`num_splits`): o `[B, Sq, H, Dv]`, lse `[B, H, Sq]`, what
    `backward` needs of each row (`define.forward`), and, if wanted, each row's largest logit, and what o lost."""
    from ..kernels import combine, fwd

    gives_lost, spec = spec.rules.gives_lost, _without_lost(spec)
    spec, operands = block_lists.for_kernels(spec, operands, q, k, v)
    batch, seqlen_q, heads, _ = q.shape
    row = _struct((batch, heads, seqlen_q), jnp.float32)
    own = row if spec.alters_logits else None
    o = _struct((*q.shape[:3], spec.v_dim), spec.rules.result(q.dtype))
    lost = _struct(o.shape, lost_dtype(o.dtype)) if gives_lost else None
    results = (o, row, own, own, row if spec.rules.max_logits else None, lost)
    splits = config.num_splits
    part = lambda x: _struct((splits, *x.shape), jnp.float32)
    read = _read(
        spec, operands, (*_query_spans(spec, config, q, k, operands), *_ragged_blocks(spec, config, q, operands))
    )
    sizes = (batch, seqlen_q, length_of_keys(k, operands))
    sizes += (k.shape[0], sequences(q, operands)) if spec.page_size else ()
    translated = functions.for_kernels(spec, operands, batch)
    made = run(
        fwd.attn_fwd_kernel,
        short.programs(spec, config, q, operands) * splits,
        (
            q,
            Rows(k, config.block_n, spec.k_rows.cols),
            None if spec.latent and spec.rest is None else Rows(v, config.block_n, spec.v_rows.cols),
            read,
            sizes,
        ),
        results if splits == 1 else (part(o), None, part(row), part(row), None, None),
        translated.told_apart(config),
        config,
    )
    if splits == 1:
        return made
    o_parts, _, m_parts, l_parts, *_ = made
    return run(
        combine.attn_combine_kernel,
        seqlen_q * heads * batch,
        (o_parts, m_parts, l_parts, read, sizes),
        results,
        combined(translated),
        Tuned(16, next_power_of_two(splits), 4, 1, num_splits=splits),
    )


def combined(spec: Spec) -> Spec:
    """The spec for the kernel that merges splits, without the fields that it does not read: fewer are compiled. That
    logits are more than products, as a score function says, it is to know."""
    rules = dataclasses.replace(spec.rules, left=None, right=None, tiles=None, precise=spec.alters_logits)
    return dataclasses.replace(
        spec, rules=rules, score=None, mask_function=None, multiple_q=1, multiple_k=1, packed=1, page_size=0
    )


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def backward(
    run: Run,
    spec: Spec,
    configs: Mapping[str, Tuned],
    q, k, v, operands: Mapping[str, Array], o, stats: Sequence[Array], do, dlse,
    *,
    wanted: tuple[str, ...],
    groups: tuple[int, ...],
    lost: Array | None = None,
    before: Array | None = None,
    one_head: bool = False,
):  # fmt: skip
    """Two launches, and a third for the gradient of a bias that is summed: dq, dk, dv and the gradients of the `wanted`
    operands.

    stats: what `forward` returned of each row. lost: what o lost, likewise. before: what dq is added to, in fp32, and
    dq then comes as the sum; it is rounded before that, as always, and is there before dk and dv are begun, so that
    less is held. one_head: dk and dv are computed for each query head by itself (`tuning.one_head`).

    The gradient of an operand `[n, ...]` is `[groups * n, ...]`: the batch, seen as (groups, rest, n), is summed over
    its middle.
    """
    from ..kernels import bwd

    spec, operands = block_lists.for_kernels(_without_lost(spec), operands, q, k, v)
    rules = dataclasses.replace(spec.rules, max_logits=False)  # the forward pass's alone
    result = rules.result
    # A list of tiles has all pieces of its last one. All are powers of two.
    padded = max(spec.tile_rows, *(config.block_m for config in configs.values()))
    spec = dataclasses.replace(spec, rules=rules, padded=padded)
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    sizes = batch, seqlen_q, seqlen_k
    row = _struct((batch, heads, seqlen_q), jnp.float32)
    translated = functions.for_kernels(spec, operands, batch, backward=True)

    config = configs["dq"]
    each = "bias" in wanted and gives_dbias(spec, operands["bias"].shape, q, k)
    of_dq = dataclasses.replace(
        translated, dlse=dlse is not None, dbias=Operand(0, 0, True, True, True) if each else None
    )
    dq, constants, dscale, dslopes, dbias = run(
        bwd.attn_bwd_dq_kernel,
        _cdiv(seqlen_q, config.block_m) * heads * batch,
        (
            Rows(k, config.block_n, spec.block_d),
            Rows(v, config.block_n, spec.block_dv),
            _read(spec, operands, _query_spans(spec, config, q, k, operands)),
            sizes,
            (q, do, o, *stats, *([] if dlse is None else [dlse])),
            lost,
        ),
        (
            _struct(q.shape, q.dtype if before is not None else result(q.dtype)),
            _struct((batch, heads, spec.constants, _cdiv(seqlen_q, padded) * padded), jnp.float32),
            *(row if name in wanted else None for name in ("scale", "slopes")),
            _struct(operands["bias"].shape, result(operands["bias"].dtype)) if each else None,
        ),
        of_dq.told_apart(config),
        config,
    )

    if before is not None:
        dq, constants = jax.lax.optimization_barrier((before + dq.astype(before.dtype), constants))
    config = configs["dkdv"]
    of_dkdv = dataclasses.replace(translated, one_head=one_head)
    dk, dv = run(
        bwd.attn_bwd_dkdv_kernel,
        _cdiv(seqlen_k, config.block_n) * (heads // of_dkdv.summed) * batch,
        (
            Rows(q, config.block_m, spec.block_d),
            *(k, v, _read(spec, operands, _key_spans(spec, config, q, k, operands)), sizes),
            Rows(do, config.block_m, spec.block_dv),
            constants,
        ),
        tuple(
            _struct((*x.shape[:2], heads, x.shape[3]), jnp.float32) if one_head else _struct(x.shape, result(x.dtype))
            for x in (k, v)
        ),
        of_dkdv.told_apart(config),
        config,
    )
    if one_head:
        by_group = (y.reshape(*x.shape[:3], spec.group, x.shape[3]) for x, y in ((k, dk), (v, dv)))
        dk, dv = (y.sum(3).astype(result(k.dtype)) for y in by_group)

    def summed(axes: Operand, out: jax.ShapeDtypeStruct, first: Array | None = None, read: int | None = None) -> Array:
        """What the last kernel makes: of a bias, or of what a score function read, from row `first` on."""
        config = configs["dbias"]
        of_read = functions.for_kernels(spec, operands, batch, backward=True, read=read)
        (made,) = run(
            bwd.attn_bwd_dbias_kernel,
            math.prod((*out.shape[:2], _cdiv(out.shape[2], config.block_m), _cdiv(out.shape[3], config.block_n))),
            (
                *(q, k, v, _read(spec, operands, _query_spans(spec, config, q, k, operands)), sizes, do, constants),
                None if first is None else (first, out.shape[2]),
            ),
            (out,),
            dataclasses.replace(of_read, dbias=axes).told_apart(config),
            config,
        )
        return made

    def bias(groups: int) -> Array:
        if dbias is not None:
            return dbias
        own = operands["bias"].shape
        in_kernel = own[2:] == (seqlen_q, seqlen_k)
        shape = (1 if in_kernel and own[0] * groups == 1 else batch, own[1] if in_kernel else heads, *own[2:])
        out = Operand(0, 1 if shape[0] == 1 else 0, *(n > 1 for n in shape[1:]))
        whole = shape == (
            groups * own[0],
            *own[1:],
        )  # nothing left to sum: the kernel may round to the bias's own dtype
        return summed(out, _struct(shape, result(operands["bias"].dtype) if whole else jnp.float32))

    def sinks() -> Array:  # a logit like any other, with nothing that it multiplies
        shift, delta, *norm = jnp.moveaxis(constants[..., :seqlen_q], 2, 0)
        p = jnp.exp2(operands["sinks"][:, :, 0] / LN2 - shift)
        return -(p * delta * (norm[0] if norm else 1)).sum(-1)[..., None, None]

    partials = {
        "scale": lambda _: dscale.sum((1, 2))[:, None, None, None],
        "bias": bias,
        "sinks": lambda _: sinks(),
        "slopes": lambda _: dslopes.sum(-1)[..., None, None],
    }
    read = {name: n for name, n in zip(wanted, groups, strict=True) if is_score_array(name)}
    of_reads = lambda axes, shape, first, n: summed(axes, _struct(shape, jnp.float32), first, n)
    grads_of_reads = functions.gradients(of_reads, spec, configs["dbias"], operands, q, k, read) if read else {}
    grads = (
        grads_of_reads[name].astype(result(operands[name].dtype))
        if name in read
        else summed_to(partials[name](n), operands[name].shape, n).astype(result(operands[name].dtype))
        for name, n in zip(wanted, groups, strict=True)
    )
    return dq, dk, dv, *grads


def _without_lost(spec: Spec) -> Spec:
    """The spec as kernels have it: whether they are given what o lost says the same, and not all of them are."""
    return dataclasses.replace(spec, rules=dataclasses.replace(spec.rules, lost=False))


def gives_dbias(spec: Spec, bias: tuple[int, ...], q: Any, k: Any) -> bool:
    """Whether dq writes the gradient of a bias of this shape as it goes: nothing is summed for it, so it is ds itself.

    Not under a block mask, whose list does not name the tiles that nobody sees.
    """
    return bias == (q.shape[0], q.shape[2], q.shape[1], k.shape[1]) and not spec.listed


def _read(spec: Spec, operands: Mapping[str, Array], table: tuple[Array, ...]) -> tuple[Array, ...]:
    """What kernels read besides q, k and v: operands, the table of spans if there is one, and what functions read."""
    return (*(operands[name] for name, _ in spec.operands), *table, *functions.arrays_of(spec, operands))


def _query_spans(spec: Spec, config: Tuned, q, k, operands: Mapping[str, Array]) -> tuple[Array, ...]:
    if not spec.looks_up:
        return ()
    rows = config.block_m // spec.packed
    starts = jnp.arange(0, q.shape[1], rows, dtype=jnp.int32)  # no constant, which cannot be divided
    table = spans.query_spans(spec, operands, q.shape[0], q.shape[1], k.shape[1], starts, rows, config.block_n)
    return (_every_batch(spec, table, q.shape[0]),)


def _ragged_blocks(spec: Spec, config: Tuned, q, operands: Mapping[str, Array]) -> tuple[Array, ...]:
    if spec.cu_q_lens is None:
        return ()
    return (ragged.blocks_of_rows(operands["cu_q_lens"].ravel(), q.shape[1], config.block_m // spec.packed),)


def _key_spans(spec: Spec, config: Tuned, q, k, operands: Mapping[str, Array]) -> tuple[Array, ...]:
    if not spec.spans:
        return ()
    table = spans.key_spans(spec, operands, q.shape[0], q.shape[1], k.shape[1], config.block_m, config.block_n)
    return (_every_batch(spec, table, q.shape[0]),)


def _every_batch(spec: Spec, table: Array, batch: int) -> Array:
    return jnp.broadcast_to(table, (batch, spec.heads if spec.span_heads else 1, *table.shape[2:]))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
