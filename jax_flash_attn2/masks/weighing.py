"""What masks do to arrays, on the device: multiplied, divided, added, counted, made dense."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from . import checks, entries

if TYPE_CHECKING:
    from .mask import Mask


@functools.partial(jax.jit, static_argnames="shape")
def broadcast(mask: "Mask", shape: tuple[int, int, int, int]) -> "Mask":
    """`Mask.broadcast_to`, of what fits."""
    if mask.kind == "dense":
        return dataclasses.replace(mask, shape=shape, dense=jnp.broadcast_to(mask.dense, shape))
    if mask.kind != "sparse":
        return dataclasses.replace(mask, shape=shape)
    # Each row of the result reads the one row that it stands for.
    rows = math.prod(mask.shape[:3])
    source = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32).reshape(mask.shape[:3]), shape[:3]).reshape(-1)
    ptr = entries.ptr_of(jnp.diff(mask.ptr)[source])
    size = mask.size * checks.times(mask.shape, shape)
    row = entries.entry_rows(ptr, size)
    at = jnp.arange(size, dtype=jnp.int32)
    at = at + (mask.ptr[:-1][source] - ptr[:-1]).at[row].get(mode="fill", fill_value=checks.MAX_SIZE // 2)
    indices, data = (x.at[at].get(mode="fill", fill_value=0) for x in (mask.indices, mask.data))
    data = entries.poisoned(data, mask.overflow)
    return dataclasses.replace(mask, shape=shape, indices=indices, ptr=ptr, data=data)


@jax.jit
def to_dense(mask: "Mask") -> Array:
    """The weights `[B, H, Sq, Sk]`; NaN where entries were lost, unless they are bool."""
    if mask.kind in ("full", "empty"):
        return jnp.full(mask.shape, mask.kind == "full", mask.dtype)
    if mask.kind == "dense":
        return entries.poisoned(mask.dense, mask.overflow)
    return entries.poisoned(entries.scatter(mask.data, entries.places_of(mask), mask.shape), mask.overflow)


@jax.jit
def density(mask: "Mask") -> Array:
    """The share of weights that are not 0, of a dense mask or a sparse one."""
    if mask.kind == "dense":
        count = mask.dense.astype(bool).sum(-1, dtype=jnp.int32)
    else:
        count = (mask.data.astype(bool) & (jnp.arange(mask.size) < mask.ptr[-1])).sum(dtype=jnp.int32)
    total = math.prod(mask.shape)
    if total > checks.MAX_SIZE:  # the count of all may not fit an int32
        count = count.astype(jnp.float32)
    share = count.sum().astype(jnp.float32) / float(max(total, 1))
    return entries.poisoned(share, mask.overflow)


@functools.partial(jax.jit, static_argnames="inverse")
def weigh(mask: "Mask", x: Array, inverse: bool) -> Array:
    """x · weight or x / weight: all of x under a dense mask, the entries of a sparse one."""
    if mask.kind == "dense":
        return entries.poisoned(_weighed(x, mask.dense, inverse), mask.overflow)
    flat = x.reshape(math.prod(x.shape[:3]), x.shape[3])
    places = entries.places_of(mask)
    weighed = _weighed(entries.gather(flat, places), mask.data, inverse)
    return entries.poisoned(entries.scatter(weighed, places, x.shape), mask.overflow)


def _weighed(x: Array, weight: Array, inverse: bool) -> Array:
    """x · weight or x / weight, 0 where the weight is 0, without a NaN in any gradient."""
    if weight.dtype == bool:
        return jnp.where(weight, x, 0)
    dtype = checks.wider(x.dtype, weight.dtype)
    hidden, y, weight = weight == 0, x.astype(dtype), weight.astype(dtype)
    if inverse:
        y = jnp.where(hidden, 0, y / jnp.where(hidden, 1, weight))
    else:
        # A finite x stays, for the gradient of a weight that is 0.
        y = jnp.where(hidden & ~jnp.isfinite(y), 0, y) * weight
    return y.astype(x.dtype)


@jax.jit
def add_dense(a: Array, b: Array) -> Array:
    """The sums of weights, clipped to 1."""
    return a | b if a.dtype == bool else jnp.minimum(a + b, 1)


@jax.jit
def add_sparse(a: "Mask", b: "Mask") -> tuple[Array, Array, Array]:
    """The entries of two masks of one shape as one list."""
    (row, index), (other_row, other_index) = entries.places_of(a), entries.places_of(b)
    join = lambda *parts: jnp.concatenate(parts)
    return entries.combine(
        join(row, other_row), join(index, other_index), join(a.data, b.data), rows=math.prod(a.shape[:3])
    )


zeros_like = jax.jit(jnp.zeros_like, inline=True)


@functools.partial(jax.jit, inline=True)
def seen_of(weights: Array) -> Array:
    """Which weights are not 0."""
    return weights.astype(bool)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def correction_of(weights: Array, dtype: Any) -> Array:
    """What logits get for their key's weight: -log(w), 0 where it is 0 and the key not seen anyway. Taken in the wider
    dtype: a weight may be 0 in the narrower one."""
    weights = jnp.where(weights != 0, weights, 1).astype(checks.wider(weights.dtype, dtype))
    return -jnp.log(weights).astype(dtype)
