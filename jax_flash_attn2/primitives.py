"""One JAX primitive per pass: what it returns, how it lowers on each platform, how it batches.

On NVIDIA and AMD GPUs a pass lowers to the Triton kernels, everywhere else to the blockwise XLA path. Triton is
imported only when something is lowered for a GPU (or interpreted), so CPU runs do not wait for it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import interpret, passes, tuning, xla
from .inputs import Call, missing_triton_error, not_on_this_platform_error
from .target import Target, present


def forward(call: Call, q: Array, k: Array, v: Array, scale: Array, bias: Array | None) -> list[Array]:
    """o `[B, Sq, H, Dv]`, lse `[B, H, Sq]`, and the row statistics m and l that only `backward` reads."""
    return _forward_p.bind(*_pack(q, k, v, scale, bias), call=call)


def backward(
    call: Call,
    q, k, v, scale, bias, o, m, l, do, dlse,
    *,
    bias_grad: bool,
    scale_grad: bool,
) -> tuple[Array, Array, Array, Array | None, Array | None]:  # fmt: skip
    """dq, dk, dv, dbias (or None), dscale `[B]` (or None): what each batch contributes to the scale's gradient."""
    has_dlse = dlse is not None
    out = iter(
        _backward_p.bind(
            *_pack(q, k, v, scale, o, m, l, do, bias, dlse),
            call=call, has_dlse=has_dlse, bias_grad=bias_grad, scale_grad=scale_grad,
        )
    )  # fmt: skip
    dq, dk, dv = next(out), next(out), next(out)
    return dq, dk, dv, next(out) if bias_grad else None, next(out) if scale_grad else None


def _pack(*operands: Array | None) -> list[Array]:
    return [x for x in operands if x is not None]


# Shapes and dtypes.


def _forward_shapes(q, k, v, scale, *bias, call: Call):
    stats = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    row = _aval((q.shape[0], q.shape[2], q.shape[1]), stats)
    return [_aval((*q.shape[:3], v.shape[3]), q.dtype), row, row, row]


def _backward_shapes(q, k, v, scale, o, m, l, do, *rest, call: Call, has_dlse, bias_grad, scale_grad):
    out = [_aval(x.shape, x.dtype) for x in (q, k, v, *rest[: int(bias_grad)])]
    return [*out, _aval((q.shape[0],), scale.dtype)] if scale_grad else out


def _aval(shape, dtype):
    return jax.core.ShapedArray(shape, jnp.dtype(dtype))


# The maths on each platform. `run` launches a kernel; None asks for the XLA path.


def _forward(run, target, q, k, v, scale, *bias, call: Call):
    bias = bias[0] if bias else None
    if q.size == 0 or k.size == 0 or v.size == 0:  # no rows, or rows that see nothing
        o, lse, m, l = (jnp.zeros(x.shape, x.dtype) for x in _forward_shapes(q, k, v, scale, call=call))
        return [o, lse - jnp.inf, m - jnp.inf, l]
    if run is None:
        return xla.forward(call.spec, call.config("fwd"), q, k, v, scale, bias)
    config = tuning.choose("fwd", call.spec, q.dtype, target, call.config("fwd"))
    return passes.forward(functools.partial(run, target), call.spec, config, q, k, v, scale, bias)


def _backward(
    run,
    target,
    q,
    k,
    v,
    scale,
    o,
    m,
    l,
    do,
    *rest,
    call: Call,
    has_dlse: bool,
    bias_grad: bool,
    scale_grad: bool,
):
    rest = list(rest)
    bias = rest.pop(0) if call.spec.has_bias else None
    dlse = rest.pop(0) if has_dlse else None
    if q.size == 0 or k.size == 0 or v.size == 0:
        shapes = _backward_shapes(
            q,
            k,
            v,
            scale,
            o,
            m,
            l,
            do,
            bias,
            call=call,
            has_dlse=has_dlse,
            bias_grad=bias_grad,
            scale_grad=scale_grad,
        )
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]
    grads = {"bias_grad": bias_grad, "scale_grad": scale_grad}
    operands = (q, k, v, scale, bias, o, m, l, do, dlse)
    if run is None:
        return _pack(*xla.backward(call.spec, call.config("dkdv"), *operands, **grads))
    configs = {p: tuning.choose(p, call.spec, q.dtype, target, call.config(p)) for p in passes.PASSES[1:]}
    return _pack(*passes.backward(functools.partial(run, target), call.spec, configs, *operands, **grads))


def _on_gpu(maths, platform: str):
    def lowered(*operands, call: Call, **params):
        if not call.wants_triton(operands[0].dtype):
            return maths(None, None, *operands, call=call, **params)
        try:
            from . import launch
        except ImportError as error:
            raise missing_triton_error(error) from error
        target = call.target or (present() if platform == "cuda" else Target(0))
        return maths(launch.run, target, *operands, call=call, **params)

    return lowered


def _elsewhere(maths):
    def lowered(*operands, call: Call, **params):
        if call.implementation != "triton":
            return maths(None, None, *operands, call=call, **params)
        if not interpret.enabled():
            raise not_on_this_platform_error()
        return maths(interpret.run, call.target or Target(80), *operands, call=call, **params)

    return lowered


def _primitive(name: str, shapes, maths) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    primitive.def_impl(lambda *operands, **params: _eager(primitive, tuple(params.items()))(*operands))
    mlir.register_lowering(primitive, mlir.lower_fun(_elsewhere(maths), multiple_results=True))
    for platform in ("cuda", "rocm"):
        mlir.register_lowering(
            primitive, mlir.lower_fun(_on_gpu(maths, platform), multiple_results=True), platform=platform
        )
    return primitive


@functools.lru_cache(maxsize=1024)
def _eager(primitive: Primitive, params: tuple[tuple[str, Any], ...]):
    """Outside jit a pass is a jitted function of its own, so that it is compiled once."""
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


_forward_p = _primitive("flash_attention_fwd", _forward_shapes, _forward)
_backward_p = _primitive("flash_attention_bwd", _backward_shapes, _backward)


# jax.vmap: the new axis joins the batch.


def _fold(size: int, operands, dims):
    """Operands `[B, ...]` with a mapped axis somewhere, or none -> `[size * B, ...]`."""

    def fold(x, dim):
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return x.reshape(size * x.shape[1], *x.shape[2:])

    return [fold(x, dim) for x, dim in zip(operands, dims, strict=True)]


def _fold_bias(size: int, batch: int, call: Call, bias, dim, shared: bool):
    """A bias `[1 or B, ...]` likewise. One without a batch axis stays as it is if it may be `shared`."""
    if shared and dim is None and bias.shape[0] == 1:
        return bias, call
    bias = jnp.broadcast_to(bias, (size, *bias.shape)) if dim is None else jnp.moveaxis(bias, dim, 0)
    bias = jnp.broadcast_to(bias, (size, batch, *bias.shape[2:])).reshape(size * batch, *bias.shape[2:])
    axes = (size * batch > 1, *(call.spec.bias_axes or ())[1:])
    return bias, dataclasses.replace(call, spec=dataclasses.replace(call.spec, bias_axes=axes))


def _map_scale(primitive, operands, dims, params):
    """A scale that is itself mapped: the kernels know one scale, so the calls follow each other."""
    operands = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
    mapped = [x for x, d in zip(operands, dims, strict=True) if d is not None]

    def one(mapped):
        rest = iter(mapped)
        return primitive.bind(*(x if d is None else next(rest) for x, d in zip(operands, dims, strict=True)), **params)

    out = jax.lax.map(one, mapped)
    return out, [0] * len(out)


def _batch_forward(operands, dims, *, call: Call):
    if dims[3] is not None:
        return _map_scale(_forward_p, operands, dims, {"call": call})
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    q, k, v = _fold(size, operands[:3], dims[:3])
    bias = operands[4:]
    if bias:
        biased, call = _fold_bias(size, q.shape[0] // size, call, bias[0], dims[4], shared=True)
        bias = [biased]
    out = _forward_p.bind(q, k, v, operands[3], *bias, call=call)
    return [x.reshape(size, -1, *x.shape[1:]) for x in out], [0] * 4


def _batch_backward(operands, dims, *, call: Call, has_dlse: bool, bias_grad: bool, scale_grad: bool):
    params = {"has_dlse": has_dlse, "bias_grad": bias_grad, "scale_grad": scale_grad}
    if dims[3] is not None:
        return _map_scale(_backward_p, operands, dims, {"call": call, **params})
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    q, k, v, o, m, l, do = _fold(size, [*operands[:3], *operands[4:8]], [*dims[:3], *dims[4:8]])
    batch, rest, rest_dims = q.shape[0] // size, list(operands[8:]), list(dims[8:])
    bias, own = [], None
    if call.spec.has_bias:
        own = rest[0].shape[0] if rest_dims[0] is None else jnp.moveaxis(rest[0], rest_dims[0], 0).shape[1]
        # Each mapped call has a bias gradient of its own, so a bias that is differentiated is not shared.
        biased, call = _fold_bias(size, batch, call, rest.pop(0), rest_dims.pop(0), shared=not bias_grad)
        bias = [biased]
    dlse = _fold(size, rest, rest_dims)
    out = _backward_p.bind(q, k, v, operands[3], o, m, l, do, *bias, *dlse, call=call, **params)
    out = [x.reshape(size, -1, *x.shape[1:]) for x in out]
    if bias_grad and own == 1:
        out[3] = out[3].sum(1, keepdims=True)
    return out, [0] * len(out)


batching.primitive_batchers[_forward_p] = _batch_forward
batching.primitive_batchers[_backward_p] = _batch_backward
