"""Entries of a sparse `Mask`: `indices`, `ptr` and `data`, made canonical, fitted to a size, and where they are.

What runs on the device is under jit of its own, so that a call from outside compiles once and not operation by
operation. Rows are always kept apart from keys: B * H * Sq * Sk may not fit an int32.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base import known
from . import checks

if TYPE_CHECKING:
    from .mask import Mask


@functools.partial(jax.jit, static_argnames="keys")
def inspect(indices: Array, ptr: Array, keys: int) -> tuple[Array, Array]:
    """Whether all used indices are keys, and whether they ascend within each row."""
    row = entry_rows(ptr, indices.size)
    unused = row == ptr.size - 1
    first = (row != jnp.roll(row, 1)) | (jnp.arange(indices.size) == 0)
    inside = unused | ((indices >= 0) & (indices < keys))
    return inside.all(), (unused | first | (indices > jnp.roll(indices, 1))).all()


@functools.partial(jax.jit, static_argnames="size")
def entry_rows(ptr: Array, size: int) -> Array:
    """The row of each entry, int32 `[size]`; for unused ones the number of rows."""
    # As many places as there are rows, which may be divided among devices: XLA counts uneven shares' padding too.
    row = jnp.cumsum(jnp.zeros(size, jnp.int32).at[ptr[1:]].add(1, mode="drop"))
    return jnp.where(jnp.arange(size) < ptr[-1], row, ptr.size - 1)


@functools.partial(jax.jit, static_argnames="rows")
def combine(row: Array, index: Array, data: Array, rows: int) -> tuple[Array, Array, Array]:
    """`indices`, `ptr` and `data` of entries `[n]` in any order, the row of unused ones being `rows`.

    Two keys of the sort, since row * Sk + index may not fit an int32. Entries of one key of one row are summed, in
    their order, and clipped to 1.
    """
    row, index, data = lax.sort((row, index, data), num_keys=2)
    n = row.size
    first = (row != jnp.roll(row, 1)) | (index != jnp.roll(index, 1)) | (jnp.arange(n) == 0)
    first &= row < rows
    at = jnp.where(row < rows, jnp.cumsum(first, dtype=jnp.int32) - 1, n)
    indices = jnp.zeros(n, jnp.int32).at[at].set(index, mode="drop")
    sums = jnp.zeros(n, data.dtype).at[at]
    sums = sums.max(data, mode="drop") if data.dtype == bool else jnp.minimum(sums.add(data, mode="drop"), 1)
    counts = jnp.zeros(rows, jnp.int32).at[row].add(first.astype(jnp.int32), mode="drop")
    return indices, ptr_of(counts), sums


@jax.jit
def combine_rows(row_indices: Array, data: Array) -> tuple[Array, Array, Array]:
    """`combine` of `[B, H, Sq, n]` keys and weights, negative keys being unused."""
    rows = math.prod(row_indices.shape[:3])
    row = jnp.arange(rows, dtype=jnp.int32).reshape(*row_indices.shape[:3], 1)
    row = jnp.where(row_indices < 0, rows, row)
    return combine(row.reshape(-1), row_indices.reshape(-1), data.reshape(-1), rows=rows)


def ptr_of(counts: Array) -> Array:
    """`ptr` of the number of entries in each row."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])


@functools.partial(jax.jit, static_argnames="size")
def entries_of(dense: Array, size: int) -> tuple[Array, Array, Array]:
    """The weights that are not 0: `indices` and `data` with room for `size`, `ptr` as if there were room for all."""
    dense = dense.reshape(math.prod(dense.shape[:3]), dense.shape[3])
    shown = dense.astype(bool)
    ptr = ptr_of(shown.sum(1, dtype=jnp.int32))
    at = jnp.where(shown, ptr[:-1, None] + jnp.cumsum(shown, 1, dtype=jnp.int32) - 1, size)
    keys = jnp.broadcast_to(jnp.arange(dense.shape[1], dtype=jnp.int32), dense.shape)
    indices = jnp.zeros(size, jnp.int32).at[at].set(keys, mode="drop")
    return indices, ptr, jnp.zeros(size, dense.dtype).at[at].set(dense, mode="drop")


@functools.partial(jax.jit, static_argnames="size")
def resized(indices: Array, data: Array, size: int) -> tuple[Array, Array]:
    """Entries with more room, or less."""
    more = (0, max(size - indices.size, 0))
    return jnp.pad(indices[:size], more), jnp.pad(data[:size], more)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def every(rows: int, keys: int, dtype: Any) -> tuple[Array, Array, Array]:
    """The entries of a full mask."""
    indices = jnp.tile(jnp.arange(keys, dtype=jnp.int32), rows)
    return indices, jnp.arange(rows + 1, dtype=jnp.int32) * keys, jnp.ones(indices.size, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def none(rows: int, dtype: Any) -> tuple[Array, Array, Array]:
    """The entries of an empty mask."""
    return jnp.zeros(0, jnp.int32), jnp.zeros(rows + 1, jnp.int32), jnp.zeros(0, dtype)


@jax.jit
def count(dense: Array) -> Array:
    """How many weights are not 0."""
    return jnp.count_nonzero(dense)


@jax.jit
def largest(indices: Array) -> Array:
    """The largest of integers."""
    return indices.max()


def places_of(mask: "Mask") -> tuple[Array, Array]:
    """Row and key of each entry, int32 `[size]` each: ascending, no two the same, unused ones out of bounds."""
    row = entry_rows(mask.ptr, mask.size)
    unused = row == mask.ptr.size - 1
    return row, jnp.where(unused, jnp.arange(mask.size, dtype=jnp.int32), mask.indices)


def gather(x: Array, places: tuple[Array, Array]) -> Array:
    """`x[places]`, 0 for unused ones."""
    return x.at[places].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)


def scatter(entries: Array, places: tuple[Array, Array], shape: tuple[int, ...]) -> Array:
    """The entries at their places in an array of `shape`, 0 elsewhere."""
    x = jnp.zeros((math.prod(shape[:3]), shape[3]), entries.dtype)
    return x.at[places].set(entries, mode="drop", unique_indices=True, indices_are_sorted=True).reshape(shape)


def either(a: Array | None, b: Array | None) -> Array | None:
    """Whether one of two masks overflowed."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


def poisoned(x: Array, overflow: Array | None) -> Array:
    """x, or NaN where entries were lost. Bools cannot be, and wait until they meet something that can."""
    return x if overflow is None or x.dtype == bool else _poisoned(x, overflow)


_poisoned = jax.jit(lambda x, overflow: jnp.where(overflow, jnp.nan, x), inline=True)


def fit(
    cls: type,
    shape: tuple[int, int, int, int],
    listed: tuple[Array, Array, Array],
    size: int | None,
    overflow: Array | None = None,
) -> Any:
    """The sparse mask of canonical `indices`, `ptr` and `data` with room for `size` of them.

    None is as many as there are or, if that is not known, as there is room for now.
    """
    indices, ptr, data = listed
    room, dtype = indices.size, data.dtype
    if size is not None:
        size = checks.size_of(size)
    if known.is_known((ptr, overflow)):
        count = int(jax.device_get(ptr)[-1])  # not ptr[-1], which under jit would be a tracer
        checks.check_fits(count, size)
        size = count if size is None else size
    elif size is None:
        size = room
    elif size < room:
        overflow = either(overflow, ptr[-1] > size)
    if size != room:
        indices, data = resized(indices, data, size=size)
    if overflow is not None:
        ptr = jnp.minimum(ptr, size)
        data = poisoned(data, overflow)
    return cls(shape, "sparse", dtype, indices=indices, ptr=ptr, data=data, overflow=overflow)
