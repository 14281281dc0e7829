"""Functions of scalars, mapped over tiles; and what a tile adds to the gradients of the arrays that they read."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .function import Bound, Function


def over(function: Callable[..., Any], score: Array, *place: Array) -> Any:
    """function, of scalars, of each element of its arguments: arrays of equal rank that broadcast to each other.
    Results have all axes, also those of length 1, without which XLA:CPU would not fuse them with the product before."""
    args = (score, *place)
    sizes = [max(x.shape[axis] for x in args) for axis in range(score.ndim)]
    mapped = [[x.shape[axis] == n and (n > 1 or x is score) for axis, n in enumerate(sizes)] for x in args]
    for axis in reversed(range(score.ndim)):
        function = jax.vmap(function, tuple(0 if own[axis] else None for own in mapped))
    kept = ([n for n, has in zip(x.shape, own, strict=True) if has] for x, own in zip(args, mapped, strict=True))
    return function(*(x.reshape(shape) if len(shape) < x.ndim else x for x, shape in zip(args, kept, strict=True)))


def held(function: Callable[..., Any], floats: int) -> Callable[..., Any]:
    """`over` of (seen, *args), for JAX to differentiate by the first `floats` of args, to any order, with derivatives
    of 0 where seen is False, whatever they are. Each is held on its own: what masks a gradient would come before a
    product with an infinite slope, or after it, as JAX goes through the function backward or forward."""

    @jax.custom_jvp
    def value(seen: Any, *args: Any) -> Any:
        return over(function, *args)

    @value.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        seen, *args = primals
        result = value(seen, *args)
        along = jnp.zeros_like(result)
        for n in range(floats):
            slope = held(jax.grad(function, n), floats)(seen, *args)
            along += (jnp.where(seen, slope, 0) * tangents[1 + n]).astype(along.dtype)
        return result, along

    return value


def add_gradient(
    grad: Array, function: Function, bound: Bound, k: int, part: Array, score: Any, place: Sequence[Any], groups: int,
    in_order: bool = True,
) -> Array:  # fmt: skip
    """Adds what a read gives to the gradient of its array.

    Args:
      grad: `[groups * n, ...]`, for an array `[n, ...]`.
      function: what reads.
      bound: the same, with its arrays.
      k: which of `function.reads`.
      part: the gradient of what it read, `[B, H, M, N]`; an axis along which it does not vary may have been summed.
      score: `[B, H, M, N]`, or None if it does not decide what is read.
      place: b `[B, 1, 1, 1]`, h `[1, H, 1, 1]`, i `[1, 1, M, 1]` and j `[1, 1, 1, N]`, int32.
      groups: how many parts of the batch have a gradient of their own.
      in_order: whether i and j are consecutive numbers.
    """
    read = function.reads[k]
    varies = {*read.varies}
    if "score" in varies:
        varies |= {"b", "h", "i", "j"}
    elif grad.shape[0] > 1:  # each call, or part of the batch, has its own
        varies.add("b")
    place = [x if name in varies else x[:1, :1, :1, :1] for name, x in zip("bhij", place, strict=True)]
    part = part.sum([axis for axis, name in enumerate("bhij") if name not in varies], keepdims=True)
    if {"i", "j"} <= varies and read.relative and in_order and "score" not in varies:
        b, h, i, j = place
        part = diagonal_sums(part)
        place = [b, h, i[:, :, -1:], j[..., :1] + jnp.arange(part.shape[3], dtype=jnp.int32)]
    if "score" not in varies:
        score = jnp.zeros((1, 1, 1, 1), jnp.float32)
    at = [jnp.asarray(x) for x in over(lambda *scalars: bound.places(*scalars)[k], score, *place)]
    if groups > 1:
        b = lax.broadcasted_iota(jnp.int32, part.shape, 0)
        at[0] = at[0] + b // (part.shape[0] // groups) * (grad.shape[0] // groups)
    return _scattered(grad, at, part)


def _scattered(grad: Array, at: Sequence[Array], part: Array) -> Array:
    """grad with parts added at their places. The same sum each time: XLA adds in order on CPUs, and elsewhere in none,
    so that there the parts of one place are brought together and summed first."""
    at = [jnp.broadcast_to(x, part.shape).ravel() for x in at]
    part = part.ravel().astype(grad.dtype)
    in_order = lambda grad, part, *at: grad.at[at].add(part, mode="promise_in_bounds")
    if part.size == 1:
        return in_order(grad, part, *at)
    return lax.platform_dependent(grad, part, *at, cpu=in_order, default=sorted_sum)


def sorted_sum(grad: Array, part: Array, *at: Array) -> Array:
    """grad with parts added at their places: sorted by these, summed by a scan that starts anew at each place, and the
    last of each taken."""
    *places, part = lax.sort((*at, part), num_keys=len(at), is_stable=True)

    def join(left, right):
        same = functools.reduce(operator.and_, map(jnp.equal, left[:-1], right[:-1]))
        return (*right[:-1], right[-1] + jnp.where(same, left[-1], 0))

    *_, sums = lax.associative_scan(join, (*places, part))
    differs = functools.reduce(operator.or_, (x[1:] != x[:-1] for x in places))
    last = jnp.concatenate([differs, jnp.ones(1, bool)])
    first, *others = places
    return grad.at[(jnp.where(last, first, grad.shape[0]), *others)].add(sums, mode="drop")


def diagonal_sums(x: Array) -> Array:
    """`[B, H, M, N]` -> `[B, H, 1, M + N - 1]`: its sums along diagonals. The last row's key 0 is on the first."""
    *planes, m, n = x.shape
    x = jnp.pad(x[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, m)))  # row r of the reversed ones is to move r to the right
    x = x.reshape(*planes, m * (n + m))[..., : m * (n + m - 1)]
    return x.reshape(*planes, m, n + m - 1).sum(2, keepdims=True)
