"""Reads of an array, brought into one form: one element, by one index for each axis, all of which exist.

JAX writes `table[h, i - j]` and `table[h][i - j]` as slices, gathers and squeezes with rules of their own for what is
out of range. A `View` follows them; where it has come down to one element, `element` reads that.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_FEW = 16
"""Up to how many elements that are used together are read one by one."""


@dataclasses.dataclass(frozen=True)
class View:
    """A part of an array: along each axis one index, or all."""

    array: Any
    index: tuple[Any, ...]
    """For each axis of the array an int32 within it, or None: all."""
    dims: tuple[int | None, ...]
    """For each dimension of the view its axis of the array, or None: it has length 1."""
    outside: tuple[Any, Any] | None = None
    """What is there instead, and where that is so."""

    @classmethod
    def of(cls, array: Any, ndim: int) -> "View":
        """All of it. One of no dimensions has been made an array of one element."""
        return cls(array, (None,) * ndim or (np.int32(0),), tuple(range(ndim)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return tuple(1 if axis is None else self.array.shape[axis] for axis in self.dims)


def element(array: Any, index: Sequence[Any]) -> Any:
    """array[index], of int32 within its axes: the one form in which a `Function` reads."""
    axes = tuple(range(array.ndim))
    at = jnp.stack([jnp.asarray(x, jnp.int32) for x in index])
    numbers = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=axes, start_index_map=axes)
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(array, at, numbers, slice_sizes=(1,) * array.ndim, mode=mode)


def plain(x: Any) -> Any:
    """A value as an operation takes it."""
    if not isinstance(x, View):
        return x
    free = [axis for axis in x.dims if axis is not None]
    if math.prod(x.shape) > _FEW:
        sizes = [n if axis in free else 1 for axis, n in enumerate(x.array.shape)]
        made = x.array
        if sizes != [*x.array.shape]:
            made = lax.dynamic_slice(made, [np.int32(0) if at is None else at for at in x.index], sizes)
        made = lax.reshape(made, x.shape) if made.shape != x.shape else made
    else:
        places = itertools.product(*(range(x.array.shape[axis]) for axis in free))
        items = []
        for place in places:
            at = dict(zip(free, map(np.int32, place), strict=True))
            items.append(element(x.array, [at.get(axis, own) for axis, own in enumerate(x.index)]))
        made = items[0] if x.shape == () else jnp.stack(items).reshape(x.shape)
    return made if x.outside is None else lax.select(*_alike(x.outside[1], x.outside[0], made))


def _alike(which: Any, value: Any, like: Array) -> tuple[Array, Array, Array]:
    return jnp.broadcast_to(which, like.shape), jnp.full(like.shape, value, like.dtype), like


def narrowed(eqn: Any, view: View, rest: Sequence[Any]) -> View | None:
    """What an equation makes of a view, if that is one."""
    name, params = eqn.primitive.name, eqn.params
    if name == "squeeze" and all(view.shape[d] == 1 for d in params["dimensions"]):
        return _fixed(view, params["dimensions"], {})
    if name == "dynamic_slice":
        return _sliced(view, params["slice_sizes"], rest)
    if name == "slice" and params["strides"] is None:
        starts = params["start_indices"]
        return _sliced(view, [n - m for m, n in zip(starts, params["limit_indices"], strict=True)], starts)
    if name == "gather" and math.prod(rest[0].shape[:-1]) == 1:
        return _gathered(view, params, rest[0])
    return None


def _sliced(view: View, sizes: Sequence[int], starts: Sequence[Any]) -> View | None:
    if any(size not in (1, n) for size, n in zip(sizes, view.shape, strict=True)):
        return None
    at = {d: x for d, x in enumerate(starts) if sizes[d] == 1}
    return _fixed(view, (), at)


def _gathered(view: View, params: Any, indices: Any) -> View | None:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims or any(size not in (1, n) for size, n in zip(sizes, view.shape, strict=True)):
        return None
    index = lax.reshape(indices, indices.shape[-1:])
    starts = {d: _wide(lax.index_in_dim(index, n, keepdims=False)) for n, d in enumerate(numbers.start_index_map)}
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        if view.outside is not None:
            return None
        beyond = [(x < 0) | (x > view.shape[d] - sizes[d]) for d, x in starts.items()]
        view = dataclasses.replace(view, outside=(params["fill_value"], functools.reduce(operator.or_, beyond)))
    made = _fixed(view, numbers.collapsed_slice_dims, {d: x for d, x in starts.items() if sizes[d] == 1})
    kept, rank = iter(made.dims), indices.ndim - 1 + len(numbers.offset_dims)
    return dataclasses.replace(made, dims=tuple(next(kept) if d in numbers.offset_dims else None for d in range(rank)))


def _fixed(view: View, dropped: Sequence[int], at: dict[int, Any]) -> View:
    """Along the dimensions in `at` one index, out of range the nearest; without the dimensions `dropped`."""
    index, dims = [*view.index], []
    for d, axis in enumerate(view.dims):
        if axis is not None and (d in at or d in dropped):
            n = view.array.shape[axis]
            index[axis] = _within(at[d], n) if d in at and n > 1 else np.int32(0)
            axis = None
        if d not in dropped:
            dims.append(axis)
    return dataclasses.replace(view, index=tuple(index), dims=tuple(dims))


def _within(x: Any, n: int) -> Any:
    """An index as an int32 of those that there are."""
    if isinstance(x, np.generic | int):
        return np.int32(min(max(int(x), 0), n - 1))
    x = _wide(x)
    return lax.clamp(jnp.asarray(0, x.dtype), x, jnp.asarray(n - 1, x.dtype)).astype(jnp.int32)


def _wide(x: Any) -> Any:
    """An index in a type that has all numbers of elements."""
    return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x
