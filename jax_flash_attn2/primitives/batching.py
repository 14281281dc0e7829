"""`jax.vmap` of the two primitives: the new axis joins the batch, and what is not mapped is not copied."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import batching

from ..base.operands import is_read
from .call import Call
from .define import backward_p, forward_p


def _fold(size: int, x: Array, dim: int | None) -> Array:
    """`[B, ...]` with a mapped axis somewhere, or none -> `[size * B, ...]`."""
    x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _fold_operand(size: int, batch: int, x: Array, dim: int | None) -> Array:
    """An operand likewise. One that is not mapped stays as it is: batch s * B + b reads it at b % n, as b did."""
    if dim is None:
        return x
    x = jnp.moveaxis(x, dim, 0)
    x = jnp.broadcast_to(x[:, None], (size, batch // x.shape[1] if x.shape[1] else 1, *x.shape[1:]))
    return x.reshape(-1 if x.size else size * batch, *x.shape[3:])


def _periods(call: Call, batch: int, names) -> list[int]:
    """For each operand how many places its first axis may have: batches, or the calls whose batches these are."""
    calls = batch // call.rules.own_batch
    return [calls if is_read(name) else batch for name in names]


def _mapped_size(operands, dims) -> int:
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def _own_length(x: Array, dim: int | None) -> int:
    """The length of the first axis that each of the mapped calls sees; of none of them it is known too."""
    return x.shape[1 if dim == 0 else 0]


def _batch_forward(args, dims, *, call: Call, names):
    size = _mapped_size(args, dims)
    if "page_table" in names:
        return _batch_paged(size, args, dims, call=call, names=names)
    q, k, v = (_fold(size, x, d) for x, d in zip(args[:3], dims[:3], strict=True))
    batch = _own_length(args[0], dims[0])
    periods = _periods(call, batch, names)
    operands = (_fold_operand(size, n, x, d) for n, x, d in zip(periods, args[3:], dims[3:], strict=True))
    out = forward_p.bind(q, k, v, *operands, call=call, names=names)
    return [x.reshape(size, batch, *x.shape[1:]) for x in out], [0] * len(out)


def _batch_paged(size, args, dims, *, call: Call, names):
    """More sequences over the same pages are a batch. Pages or ragged rows of their own come one after the other."""
    bind = functools.partial(forward_p.bind, call=call, names=names)
    own = [dim is not None for name, dim in zip(("k", "v", *names), dims[1:], strict=True) if name in _OF_PAGES]
    if any(own) or "cu_q_lens" in names:
        mapped = [None if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
        at_once = lambda own: bind(*(x if y is None else y for x, y in zip(args, own, strict=True)))
        out = jax.lax.map(at_once, mapped)
        return out, [0] * len(out)
    q = _fold(size, args[0], dims[0])
    batch = _own_length(args[0], dims[0])
    operands = [
        x if name in _OF_PAGES else _fold(size, x, dim) if name == "page_table" else _fold_operand(size, batch, x, dim)
        for name, x, dim in zip(names, args[3:], dims[3:], strict=True)
    ]
    out = bind(q, *args[1:3], *operands)
    return [x.reshape(size, batch, *x.shape[1:]) for x in out], [0] * len(out)


_OF_PAGES = ("k", "v", "k_scale", "v_scale")


def _batch_backward(args, dims, *, call: Call, names, wanted, groups, adds):
    size, first = _mapped_size(args, dims), call.before_operands(names)
    end = first + len(names)
    arrays = [_fold(size, x, d) for x, d in zip(args[:first], dims[:first], strict=True)]
    batch = _own_length(args[0], dims[0])
    periods = _periods(call, batch, names)
    mapped = zip(periods, args[first:end], dims[first:end], strict=True)
    operands = [_fold_operand(size, n, x, d) for n, x, d in mapped]
    others = [_fold(size, x, d) for x, d in zip(args[end:], dims[end:], strict=True)]
    # Each of the mapped calls has gradients of its own. An operand that is not mapped is summed apart for each; one
    # that is has them in its batch axis, which may now be longer than it was.
    mapped = [dims[first + names.index(name)] is not None for name in wanted]
    inner = tuple(1 if m else n * size for m, n in zip(mapped, groups, strict=True))
    params = {"call": call, "names": names, "wanted": wanted, "groups": inner, "adds": adds}
    out = backward_p.bind(*arrays, *operands, *others, **params)
    results = [x.reshape(size, batch, *x.shape[1:]) for x in out[:3]]
    for x, name, n in zip(out[3:], wanted, groups, strict=True):
        i = first + names.index(name)
        results.append(_unfolded(x, size, n, _own_length(args[i], dims[i])))
    return results, [0] * len(results)


def _unfolded(x: Array, size: int, n: int, own: int) -> Array:
    """A gradient `[size * n * rest * own, ...]` -> `[size, n * own, ...]`: what each of the mapped calls has for its
    operand `[own, ...]`, in n groups of batches; the rest are batches that read the same."""
    rest = x.shape[0] // max(size * n * own, 1)
    if rest > 1:
        x = x.reshape(size, n, rest, own, *x.shape[1:]).sum(2)
        return x.reshape(size, n * own, *x.shape[3:])
    return x.reshape(size, n * own, *x.shape[1:])


batching.primitive_batchers[forward_p] = _batch_forward
batching.primitive_batchers[backward_p] = _batch_backward
