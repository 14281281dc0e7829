"""One JAX primitive per pass: what it returns, how it lowers on each platform.

On NVIDIA and AMD GPUs a pass lowers to the Triton kernels, everywhere else to the blockwise XLA path. Triton is
imported only when something is lowered for a GPU (or interpreted), so CPU runs do not wait for it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from .. import xla
from ..base.arguments import accumulator
from ..base.config import PASSES
from ..base.errors import higher_order_error, narrow_pages_error, not_on_this_platform_error
from ..base.operands import for_every_batch, names_of, summed_to
from ..base.rounding import loses, lost_dtype
from ..base.spec import Spec
from ..gpu import interpret, passes, short, tuning
from ..gpu.loading import launcher
from ..gpu.target import INTERPRETED, of_platform
from . import sharding
from .call import Call


def forward(call: Call, q: Array, k: Array, v: Array, operands: Mapping[str, Array]) -> list[Array]:
    """o `[B, Sq, H, Dv]`, lse `[B, H, Sq]`; where lse is not enough for `backward` (`spec.alters_logits`), the
    statistics m and l of each row, which nothing else reads; and, if the rules want them, each row's largest logit
    `[B, H, Sq]`, and what o lost by rounding (`forward_and_lost`)."""
    names = names_of(operands)
    return forward_p.bind(q, k, v, *(operands[n] for n in names), call=call, names=names)


def forward_and_lost(
    call: Call, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> tuple[list[Array], Array | None]:
    """`forward`, and what o lost by rounding, `[B, Sq, H, Dv]`; None: nothing."""
    call = call.with_lost(loses(q.dtype))
    results = forward(call, q, k, v, operands)
    return (results[:-1], results[-1]) if call.rules.gives_lost else (results, None)


def backward(
    call: Call,
    q,
    k,
    v,
    operands: Mapping[str, Array],
    o,
    stats,
    do,
    dlse,
    *,
    wanted: tuple[str, ...],
    lost: Array | None = None,
    before: Array | None = None,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """dq, dk, dv, and the gradients of the `wanted` operands. stats: lse, or m and l, of `forward`. lost: what o lost.
    before: what dq is added to, if anything, in the dtype that the sum then has."""
    names = names_of(operands)
    extra = [*_present(lost), *stats, *(operands[n] for n in names), *_present(dlse, before)]
    groups, adds = (1,) * len(wanted), before is not None
    params = {
        "call": call.with_lost(lost is not None),
        "names": names,
        "wanted": wanted,
        "groups": groups,
        "adds": adds,
    }
    dq, dk, dv, *grads = backward_p.bind(q, k, v, o, do, *extra, **params)
    return dq, dk, dv, dict(zip(wanted, grads, strict=True))


def unit(call: Call, dtype: Any) -> Array:
    """How many nats there are to the unit of the statistic m of `forward`, with q of this dtype: the kernels compute in
    base 2. A 0-d array of m's dtype."""
    return unit_p.bind(call=call, dtype=jnp.dtype(dtype))


# Shapes and dtypes.


def _forward_shapes(q, k, v, *operands, call: Call, names):
    stats = accumulator(q.dtype)
    row = _aval((q.shape[0], q.shape[2], q.shape[1]), stats)
    o = _aval((*q.shape[:3], call.rules.v_dim(v)), call.rules.result(q.dtype))
    return [o, *[row] * call.row_results(names), *[_aval(o.shape, lost_dtype(o.dtype))] * call.rules.gives_lost]


def _backward_shapes(q, k, v, o, do, *rest, call: Call, names, wanted, groups, adds):
    operands = dict(zip(names, rest[call.before_operands(names) - 5 :], strict=False))
    grads = [(n * operands[w].shape[0], *operands[w].shape[1:]) for w, n in zip(wanted, groups, strict=True)]
    own = [(x.shape, x.dtype) for x in (q, k, v)]
    own += [(shape, operands[w].dtype) for w, shape in zip(wanted, grads, strict=True)]
    made = [_aval(shape, call.rules.result(dtype)) for shape, dtype in own]
    return [_aval(q.shape, rest[-1].dtype), *made[1:]] if adds else made


def _aval(shape, dtype):
    return jax.core.ShapedArray(shape, jnp.dtype(dtype))


# The maths on each platform. `run` launches a kernel; None asks for the XLA path.


def _forward(run, target, q, k, v, *rest, call: Call, names):
    operands = dict(zip(names, rest, strict=True))
    if nothing_to_see(q, k, v):
        return forward_of_nothing(call, q, k, v, operands)
    spec = Spec.of(call.rules, q, k, v, operands)
    if run is None:
        return _present(*xla.forward(spec, call.config("fwd"), q, k, v, operands))
    spec, config = short.choose(spec, q, k, operands, target, call.config("fwd"))
    return _present(*passes.forward(functools.partial(run, target), spec, config, q, k, v, operands))


def _backward(run, target, q, k, v, o, do, *rest, call: Call, names, wanted, groups, adds):
    *rest, before = (*rest, None) if not adds else rest
    lost, *rest = rest if call.rules.lost else (None, *rest)
    n = call.row_stats(names)
    stats, operands = rest[:n], dict(zip(names, rest[n:], strict=False))
    dlse = rest[n + len(names)] if len(rest) > n + len(names) else None
    if nothing_to_see(q, k, v):
        params = {"call": call, "names": names, "wanted": wanted, "groups": groups, "adds": False}
        grads = [
            jnp.zeros(x.shape, x.dtype) for x in _backward_shapes(q, k, v, o, do, *_present(lost), *rest, **params)
        ]
        grads[0] = grads[0] if before is None else before
        if "sinks" in wanted and dlse is not None:  # lse is the sink itself
            i, shape = wanted.index("sinks"), operands["sinks"].shape
            empty = stats[1] == 0 if n == 2 else stats[0] == -jnp.inf
            per_head = jnp.where(empty, 0, dlse).sum(-1)[..., None, None]
            grads[3 + i] = summed_to(per_head, shape, groups[i]).astype(grads[3 + i].dtype)
        return grads
    spec = Spec.of(call.rules, q, k, v, operands)
    args, options = (q, k, v, operands, o, stats, do, dlse), {"wanted": wanted, "groups": groups, "lost": lost}
    if run is None:
        dq, *others = xla.backward(spec, call.config("dkdv"), *args, **options)
        return [dq if before is None else before + dq.astype(before.dtype), *others]
    configs = {p: tuning.choose(p, spec, q.dtype, target, call.config(p)) for p in PASSES[1:]}
    options["one_head"] = tuning.one_head(spec, configs["dkdv"], q.shape[0], k.shape[1], target)
    return list(passes.backward(functools.partial(run, target), spec, configs, *args, before=before, **options))


def _present(*results: Array | None) -> list[Array]:
    return [x for x in results if x is not None]


def nothing_to_see(q, k, v) -> bool:
    """Whether there are no rows, or no keys for them."""
    return q.size == 0 or k.size == 0 or v.size == 0


def forward_of_nothing(call: Call, q, k, v, operands: Mapping[str, Array]) -> list[Array]:
    """`forward` where there is nothing to see."""
    names = names_of(operands)
    o, row, *_ = (jnp.zeros(x.shape, x.dtype) for x in _forward_shapes(q, k, v, call=call, names=names))
    lse = _lse_of_nothing(operands, row)
    stats = [lse, jnp.where(lse == -jnp.inf, 0, jnp.ones_like(lse))] if call.row_stats(names) == 2 else []
    return [
        *(o, lse, *stats),
        *([row - jnp.inf] if call.rules.max_logits else []),
        *([jnp.zeros(o.shape, lost_dtype(o.dtype))] if call.rules.gives_lost else []),
    ]


def _lse_of_nothing(operands: Mapping[str, Array], row: Array) -> Array:
    """lse where there are no keys: the sink alone, if any, in the rows that there are."""
    lse = row - jnp.inf
    if "sinks" in operands:
        lse = jnp.maximum(lse, for_every_batch(operands["sinks"], row.shape[0])[..., 0].astype(row.dtype))
    if "q_lengths" in operands:
        ends = for_every_batch(operands["q_lengths"], row.shape[0])[..., 0]
        lse = jnp.where(jnp.arange(row.shape[2], dtype=jnp.int32) < ends, lse, -jnp.inf)
    return lse


def _on_gpu(maths, platform: str):
    def lowered(*operands, call: Call, **params):
        if not call.wants_triton(operands[0].dtype):
            return maths(None, None, *operands, call=call, **params)
        launch = launcher()
        target = call.target or of_platform(platform)
        if operands[1].dtype == jnp.float8_e4m3fn and 0 < target.capability < 89:
            raise narrow_pages_error(operands[1].dtype, target)
        return maths(launch.run, target, *operands, call=call, **params)

    return lowered


def _elsewhere(maths):
    def lowered(*operands, call: Call, **params):
        if call.implementation != "triton":
            return maths(None, None, *operands, call=call, **params)
        if not interpret.enabled():
            raise not_on_this_platform_error()
        return maths(interpret.run, call.target or INTERPRETED, *operands, call=call, **params)

    return lowered


def _primitive(name: str, shapes, maths, divided) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(sharding.varying_as_operands(shapes))
    primitive.def_impl(functools.partial(_run, primitive))
    sharding.name_devices(primitive)
    ad.primitive_jvps[primitive] = _refuse
    mlir.register_lowering(primitive, _lowering(_elsewhere(maths), divided))
    for platform in ("cuda", "rocm"):
        mlir.register_lowering(primitive, _lowering(_on_gpu(maths, platform), divided), platform=platform)
    return primitive


def _unit_primitive() -> Primitive:
    primitive = Primitive("flash_attention_unit")
    primitive.def_abstract_eval(lambda *, call, dtype: _aval((), accumulator(dtype)))
    primitive.def_impl(functools.partial(_run, primitive))

    def lowered(by_kernels):
        nats = lambda *, call, dtype: jnp.asarray(passes.LN2 if by_kernels(call, dtype) else 1, accumulator(dtype))
        return mlir.lower_fun(nats, multiple_results=False)

    mlir.register_lowering(primitive, lowered(lambda call, dtype: call.implementation == "triton"))
    for platform in ("cuda", "rocm"):
        mlir.register_lowering(primitive, lowered(Call.wants_triton), platform=platform)
    return primitive


def _refuse(*_, **__):
    raise higher_order_error()


def _lowering(maths, divided):
    alone = mlir.lower_fun(maths, multiple_results=True)
    together = mlir.lower_fun(functools.partial(divided, maths), multiple_results=True)

    def lower(ctx, *args, **params):
        with sharding.on_own_share(ctx) as own:
            return (together if sharding.is_divided(ctx) else alone)(own, *args, **params)

    return lower


def _run(primitive: Primitive, *operands, **params):
    """Outside jit. Under `jax.disable_jit` too: what a pass does is no user's code to step through."""
    with jax.disable_jit(False):
        return _eager(primitive, tuple(params.items()))(*operands)


@functools.lru_cache(maxsize=1024)
def _eager(primitive: Primitive, params: tuple[tuple[str, Any], ...]):
    """Outside jit a pass is a jitted function of its own, so that it is compiled once."""
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


forward_p = _primitive("flash_attention_fwd", _forward_shapes, _forward, functools.partial(sharding.forward, unit))
unit_p = _unit_primitive()
backward_p = _primitive("flash_attention_bwd", _backward_shapes, _backward, sharding.backward)
