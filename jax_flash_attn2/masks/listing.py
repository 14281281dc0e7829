"""How a sparse `Mask` is made: of lists that a caller has, of another mask. What is given is checked here."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from ..base import arguments, axes, known
from . import checks, entries

if TYPE_CHECKING:
    from .mask import Mask


def of_indices(
    cls: type["Mask"],
    shape: Sequence[int],
    indices: Array | np.ndarray,
    ptr: Array | np.ndarray,
    data: Array | np.ndarray | None,
    dtype: Any,
    canonical: bool,
) -> Any:
    """`Mask.from_indices`."""
    shape = arguments.four_lengths("shape", shape)
    rows, keys = math.prod(shape[:3]), shape[3]
    indices, ptr = checks.integers("indices", indices), checks.integers("ptr", ptr)
    if indices.ndim != 1:
        raise ValueError(f"indices must have one axis [size], got shape {indices.shape}; flatten them")
    if ptr.shape != (rows + 1,):
        raise ValueError(f"ptr must have shape [B * H * Sq + 1] = ({rows + 1},), got {ptr.shape}")
    data = checks.data_of(data, indices.shape, dtype)
    overflow = None
    if not known.is_known(ptr):
        overflow = ptr[-1] > indices.size
    else:
        counted = jax.device_get(ptr)
        falls = np.flatnonzero(counted[1:] < counted[:-1]) + 1
        if counted[0] != 0 or falls.size:
            at = 0 if counted[0] else falls[0]
            raise ValueError(f"ptr must rise from 0, got {counted[at]} at {at}; it counts the entries before each row")
        if counted[-1] > indices.size:
            raise ValueError(
                f"ptr[-1] must be at most the size of indices, {indices.size}, got {counted[-1]}; give more room"
            )
    if known.is_known((indices, ptr)):
        with known.now():
            inside, ascend = map(bool, entries.inspect(indices, ptr, keys=keys))
        ends = jax.device_get(ptr)
        if not inside:
            used = jax.device_get(indices)[: ends[-1]]
            raise ValueError(
                f"indices must be in [0, Sk) = [0, {keys}), got {used.min()} to {used.max()}; leave unused ones to ptr"
            )
        if canonical and not ascend:
            used, row = jax.device_get(indices)[: ends[-1]], np.repeat(np.arange(rows), np.diff(ends))
            at = np.flatnonzero((row[1:] == row[:-1]) & (used[1:] <= used[:-1]))[0]
            raise ValueError(
                f"canonical=True wants keys that ascend within each row, got {used[at]} before {used[at + 1]} in row "
                f"{row[at]}; leave it False"
            )
        canonical = ascend
    if not canonical:
        indices, ptr, data = entries.combine(entries.entry_rows(ptr, indices.size), indices, data, rows=rows)
    return entries.fit(cls, shape, (indices, ptr, data), indices.size, overflow)


def of_row_indices(
    cls: type["Mask"],
    shape: Sequence[int],
    row_indices: Array | np.ndarray,
    data: Array | np.ndarray | None,
    dtype: Any,
    size: int | None,
) -> Any:
    """`Mask.from_row_indices`."""
    shape = arguments.four_lengths("shape", shape)
    row_indices = checks.integers("row_indices", row_indices)
    if row_indices.ndim != 4 or row_indices.shape[:3] != shape[:3]:
        raise ValueError(f"row_indices must have shape [*{shape[:3]}, n], got {row_indices.shape}")
    checks.check_size("B * H * Sq * n", row_indices.size, "give row_indices fewer columns")
    data = checks.data_of(data, row_indices.shape, dtype)
    if known.is_known(row_indices) and row_indices.size:
        with known.now():
            largest = int(entries.largest(row_indices))
        if largest >= shape[3]:
            raise ValueError(f"row_indices must be below Sk = {shape[3]}, got {largest}; negative ones are unused")
    return entries.fit(cls, shape, entries.combine_rows(row_indices, data), size)


def of_mask(mask: "Mask", size: int | None) -> Any:
    """`Mask.to_indices`, of a mask that has not overflowed. With explicit axes each device has all entries."""
    types = lambda made: jax.tree.map(lambda _: PartitionSpec(), made)
    return axes.on_auto_axes(lambda mask: _of_mask(mask, size), mask, types)


def _of_mask(mask: "Mask", size: int | None) -> Any:
    if size is not None:
        size = checks.size_of(size)
    rows, keys = math.prod(mask.shape[:3]), mask.shape[3]
    if mask.kind == "sparse":
        return entries.fit(type(mask), mask.shape, (mask.indices, mask.ptr, mask.data), size, mask.overflow)
    if mask.kind == "empty":
        nothing = entries.none(rows, mask.dtype)
        return entries.fit(type(mask), mask.shape, nothing, size)
    checks.check_size("the number of weights", rows * keys, "make it of indices (from_indices) in the first place")
    if mask.kind == "full":
        checks.check_fits(rows * keys, size)
        return entries.fit(type(mask), mask.shape, entries.every(rows, keys, mask.dtype), size)
    if known.is_known(mask.dense):
        with known.now():
            count = int(entries.count(mask.dense))
        size = count if size is None else size
        checks.check_fits(count, size)
    elif size is None:
        raise ValueError(
            "size must be given where a dense mask is turned into indices under jit, as shapes cannot depend on "
            "values there, got None; pass to_indices an upper bound on the number of weights that are not 0"
        )
    indices, ptr, data = entries.entries_of(mask.dense, size=size)
    overflow = mask.overflow
    if not known.is_known(mask.dense) and size < rows * keys:
        overflow = entries.either(overflow, ptr[-1] > size)
    return entries.fit(type(mask), mask.shape, (indices, ptr, data), size, overflow)
