"""`Mask`: weights in [0, 1] over `[B, H, Sq, Sk]`, held as an array, as a list of entries, or not at all."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Kind = Literal["dense", "sparse", "full", "empty"]
Mode = Literal["sparse", "dense"]

DEFAULT_MODE: Mode = "dense"
"""How masks are applied and merged where nobody says: `python -m benchmarks sparse_masks` checks this choice.

Reading an array in order beats gathering and scattering entries unless almost nothing is stored, and merging entries
has to sort them.
"""

_DTYPES = ("bool", "float16", "bfloat16", "float32", "float64")
_MAX_SIZE = 2**31 - 1  # places are int32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["dense", "indices", "ptr", "data", "overflow"],
    meta_fields=["shape", "kind", "dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Weights in [0, 1] over `[B, H, Sq, Sk]`: 0 hides a key from a row, 1 shows it.

    B and H may be 1 and then stand for any number. Made by `from_dense`, `from_indices`, `from_row_indices`, `full` and
    `empty`, which check what they are given; the class itself checks nothing. A pytree: shape, kind and dtype are
    static, arrays are leaves, so that a mask goes through `jax.jit` as an argument, a result or a constant.

    Sizes: how many entries a sparse mask has room for is part of its shapes, and so it is static. Outside jit it is
    found exactly where `size=None`; under jit it has to be given wherever it depends on values (`to_indices` of a dense
    mask). Entries that do not fit a size are never dropped in silence: outside jit they are a ValueError; under jit the
    result's `overflow` is a traced bool, and where it is True every weight, and all that is computed with one, is NaN.
    A mask that comes out of jit with `overflow` True raises a ValueError when it is used.
    """

    shape: tuple[int, int, int, int]
    """`(B, H, Sq, Sk)`."""
    kind: Kind
    """How it is held: "dense": `dense`; "sparse": `indices`, `ptr` and `data`; "full" and "empty": nothing."""
    dtype: np.dtype
    """Of the weights: bool (0 or 1), float16, bfloat16, float32 or float64."""
    dense: Any = None
    """Array `[B, H, Sq, Sk]`: the weights."""
    indices: Any = None
    """Array, int32 `[size]`: keys, ascending within a row, no key twice. What follows the first `ptr[-1]` is unused."""
    ptr: Any = None
    """Array, int32 `[B * H * Sq + 1]`: row r, counted in the order B, H, Sq, has entries `ptr[r]` to `ptr[r + 1]`."""
    data: Any = None
    """Array `[size]`: the weights of `indices`. All others are 0."""
    overflow: Any = None
    """Array, bool `[]`: whether there were more entries than room. None where there cannot have been."""

    def show(self, **options: Any) -> str:
        """A text picture; see `masks.show`."""
        from .show import show

        return show(self, **options)

    # Made from.

    @classmethod
    def from_dense(cls, dense: Array | np.ndarray, *, size: int | None = None) -> Self:
        """The mask of an array `[B, H, Sq, Sk]`, bool or floating, in [0, 1].

        Stays dense, and differentiable, unless `size` is given: then it is `to_indices(size)` of that.

        Raises:
          TypeError: not an array, or of another dtype.
          ValueError: not of four axes, or (if concrete) a weight is not in [0, 1].
        """
        dense = _weights("dense", dense)
        if dense.ndim != 4:
            raise ValueError(f"dense must have the axes [B, H, Sq, Sk], got shape {dense.shape}; add axes of length 1")
        mask = cls(_shape(dense.shape), "dense", dense.dtype, dense=dense)
        return mask if size is None else mask.to_indices(size)

    @classmethod
    def from_indices(
        cls,
        shape: Sequence[int],
        indices: Array | np.ndarray,
        ptr: Array | np.ndarray,
        data: Array | np.ndarray | None = None,
        dtype: Any = None,
        *,
        canonical: bool = False,
    ) -> Self:
        """The mask with the weights `data` at `indices`, 0 elsewhere.

        A key that a row names twice gets the sum of both weights, clipped to 1, as in `merge`.

        Args:
          shape: `(B, H, Sq, Sk)`.
          indices: integers `[size]`, the keys. What follows the first `ptr[-1]` is room that is not used, and is kept.
          ptr: integers `[B * H * Sq + 1]`: row r has the entries `ptr[r]` to `ptr[r + 1]`.
          data: `[size]`, bool or floating, in [0, 1]. Default: 1 everywhere.
          dtype: of the weights. Default: that of `data`, or float32.
          canonical: a promise that keys ascend within each row and none comes twice, which spares a sort under jit.
            Outside jit it is looked up, and kept to.

        Raises:
          TypeError: a dtype that does not fit.
          ValueError: shapes that do not fit; if concrete: weights outside [0, 1], `ptr` that does not rise from 0 to at
            most size, keys outside [0, Sk), a broken promise. Traced values are trusted, except that `ptr[-1]` above
            size sets `overflow`.
        """
        shape = _shape(shape)
        rows, keys = math.prod(shape[:3]), shape[3]
        indices, ptr = _integers("indices", indices), _integers("ptr", ptr)
        if indices.ndim != 1:
            raise ValueError(f"indices must have one axis [size], got shape {indices.shape}; flatten them")
        if ptr.shape != (rows + 1,):
            raise ValueError(f"ptr must have shape [B * H * Sq + 1] = ({rows + 1},), got {ptr.shape}")
        data = _data(data, indices.shape, dtype)
        overflow = None
        if not _known(ptr):
            overflow = ptr[-1] > indices.size
        else:
            counted = np.asarray(ptr)
            if counted[0] != 0 or (counted[1:] < counted[:-1]).any():
                raise ValueError("ptr must rise from 0, got values that do not; it counts the entries before each row")
            if counted[-1] > indices.size:
                raise ValueError(
                    f"ptr[-1] must be at most the size of indices, {indices.size}, got {counted[-1]}; give more room"
                )
        if _known(indices, ptr):
            with jax.ensure_compile_time_eval():
                inside, ascend = map(bool, _inspect(indices, ptr, keys=keys))
            if not inside:
                raise ValueError(f"indices must be in [0, Sk) = [0, {keys}), got others; leave unused ones to ptr")
            if canonical and not ascend:
                raise ValueError("canonical=True wants keys that ascend within each row, got others; leave it False")
            canonical = ascend
        if not canonical:
            indices, ptr, data = _combine(_entry_rows(ptr, indices.size), indices, data, rows=rows)
        return _fit(cls, shape, (indices, ptr, data), indices.size, overflow)

    @classmethod
    def from_row_indices(
        cls,
        shape: Sequence[int],
        row_indices: Array | np.ndarray,
        data: Array | np.ndarray | None = None,
        dtype: Any = None,
        *,
        size: int | None = None,
    ) -> Self:
        """The mask with the weights `data` at the keys `row_indices` of each row, 0 elsewhere.

        A key that a row names twice gets the sum of both weights, clipped to 1, as in `merge`.

        Args:
          shape: `(B, H, Sq, Sk)`.
          row_indices: integers `[B, H, Sq, n]`, the keys; negative ones are not used.
          data: `[B, H, Sq, n]`, bool or floating, in [0, 1]. Default: 1 everywhere.
          dtype: of the weights. Default: that of `data`, or float32.
          size: room for entries. Default: what is used, or under jit `B * H * Sq * n`, which always suffices.

        Raises:
          TypeError: a dtype that does not fit.
          ValueError: shapes that do not fit; if concrete: keys not below Sk, weights outside [0, 1], too small a size.
        """
        shape = _shape(shape)
        row_indices = _integers("row_indices", row_indices)
        if row_indices.ndim != 4 or row_indices.shape[:3] != shape[:3]:
            raise ValueError(f"row_indices must have shape [*{shape[:3]}, n], got {row_indices.shape}")
        check_size("B * H * Sq * n", row_indices.size, "give row_indices fewer columns")
        data = _data(data, row_indices.shape, dtype)
        if _known(row_indices) and row_indices.size:
            with jax.ensure_compile_time_eval():
                largest = int(row_indices.max())
            if largest >= shape[3]:
                raise ValueError(f"row_indices must be below Sk = {shape[3]}, got {largest}; negative ones are unused")
        entries = _combine_rows(row_indices, data)
        return _fit(cls, shape, entries, size)

    @classmethod
    def full(cls, shape: Sequence[int], dtype: Any = jnp.float32) -> Self:
        """The mask of weights 1 over `shape`, `(B, H, Sq, Sk)`."""
        return cls(_shape(shape), "full", _dtype(dtype))

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Any = jnp.float32) -> Self:
        """The mask of weights 0 over `shape`, `(B, H, Sq, Sk)`."""
        return cls(_shape(shape), "empty", _dtype(dtype))

    # Turned into.

    @property
    def size(self) -> int:
        """How many weights there is room for in memory."""
        held = self.data if self.kind == "sparse" else self.dense
        return 0 if held is None else held.size

    def to_dense(self, dtype: Any = None) -> Array:
        """The weights as an array `[B, H, Sq, Sk]`; `dtype` as in `astype`.

        Raises:
          TypeError: the result would be bool and the mask may have overflowed under jit: a bool cannot be NaN.
        """
        mask = self._usable()
        if dtype is not None:
            mask = mask.astype(dtype)
        if mask.overflow is not None and mask.dtype == bool:
            raise TypeError(
                "to_dense must say under jit whether entries overflowed their size, which a bool array cannot, got a "
                "bool mask; ask for to_dense(jnp.float32) (NaN then), or give a size that always suffices"
            )
        return mask.dense if mask.kind == "dense" and mask.overflow is None else _to_dense(mask)

    def to_indices(self, size: int | None = None) -> Self:
        """The same mask, held as `indices`, `ptr` and `data`, with room for `size` entries.

        A dense mask keeps its weights that are not 0, a full one all. `size=None` is what is stored; under jit, where
        that is not known of a dense mask, `size` must be given. A sparse mask is resized, or stays as it is under jit.

        Raises:
          ValueError: too small a size (if the count is concrete), none where one is needed, or more than 2**31 - 1.
        """
        mask = self._usable()
        if size is not None:
            size = _size(size)
        rows, keys = math.prod(mask.shape[:3]), mask.shape[3]
        if mask.kind == "sparse":
            return _fit(type(mask), mask.shape, (mask.indices, mask.ptr, mask.data), size, mask.overflow)
        if mask.kind == "empty":
            nothing = jnp.zeros(0, jnp.int32), jnp.zeros(rows + 1, jnp.int32), jnp.zeros(0, mask.dtype)
            return _fit(type(mask), mask.shape, nothing, size)
        check_size("the number of weights", rows * keys, "make it of indices (from_indices) in the first place")
        if mask.kind == "full":
            every = jnp.tile(jnp.arange(keys, dtype=jnp.int32), rows)
            ptr = jnp.arange(rows + 1, dtype=jnp.int32) * keys
            _check_fits(rows * keys, size)
            return _fit(type(mask), mask.shape, (every, ptr, jnp.ones(every.size, mask.dtype)), size)
        if _known(mask.dense):
            with jax.ensure_compile_time_eval():
                count = int(jnp.count_nonzero(mask.dense))
            size = count if size is None else size
            _check_fits(count, size)
        elif size is None:
            raise ValueError(
                "size must be given where a dense mask is turned into indices under jit, as shapes cannot depend on "
                "values there, got None; pass an upper bound on the number of weights that are not 0"
            )
        indices, ptr, data = _entries(mask.dense, size=size)
        overflow = mask.overflow
        if not _known(mask.dense) and size < rows * keys:
            overflow = _either(overflow, ptr[-1] > size)
        return _fit(type(mask), mask.shape, (indices, ptr, data), size, overflow)

    def astype(self, dtype: Any) -> Self:
        """The same mask with weights of another dtype; bool stands for weights that are not 0."""
        dtype = _dtype(dtype)
        cast = lambda x: None if x is None else _poisoned(x.astype(dtype), self.overflow)
        return dataclasses.replace(self, dtype=dtype, dense=cast(self.dense), data=cast(self.data))

    def broadcast_to(self, shape: Sequence[int]) -> Self:
        """The same mask over `shape`, which may have any B and H where this one has 1. Held as this one is."""
        shape, mask = _shape(shape), self._usable()
        if shape == mask.shape:
            return mask
        if shape[2:] != mask.shape[2:] or any(m not in (1, n) for m, n in zip(mask.shape[:2], shape[:2], strict=True)):
            raise ValueError(
                f"shape must have the Sq and Sk of the mask, and its B and H where they are not 1, got {shape} for a "
                f"mask of {mask.shape}"
            )
        if mask.kind == "sparse":
            check_size("the number of entries", mask.size * _times(mask.shape, shape), "merge or apply it densely")
        return _broadcast(mask, shape=shape)

    # Used.

    def density(self) -> Array:
        """The share of the weights that are not 0: float32 `[]`."""
        mask = self._usable()
        if mask.kind in ("full", "empty"):
            return jnp.float32(mask.kind == "full" and math.prod(mask.shape) > 0)
        return _density(mask)

    def apply(self, x: Array | np.ndarray, mode: Mode = DEFAULT_MODE, *, size: int | None = None) -> Array:
        """x · weight; 0 where the weight is 0, whatever x is there.

        Args:
          x: floating, `[B, H, Sq, Sk]` as the mask's, with any B and H where the mask's are 1.
          mode: "dense" multiplies arrays, "sparse" gathers and scatters the entries that are stored; either turns the
            mask into what it needs first. Dense is the default because it is faster unless almost nothing is stored
            (`DEFAULT_MODE`). Gradients reach the weights that are stored: in "dense" that is all of them.
          size: with "sparse", the room for the entries of a dense mask, as in `to_indices`.

        Returns:
          An array like x. Computed in the wider dtype of x and the weights, then rounded to that of x.

        Raises:
          TypeError: x is not a floating array.
          ValueError: x does not have a shape that fits.
        """
        return self._weigh(x, mode, size, inverse=False)

    def apply_inverse(self, x: Array | np.ndarray, mode: Mode = DEFAULT_MODE, *, size: int | None = None) -> Array:
        """x / weight where the weight is not 0, else 0; in all else as `apply`."""
        return self._weigh(x, mode, size, inverse=True)

    def merge(self, other: "Mask", mode: Mode = DEFAULT_MODE, *, size: int | None = None) -> "Mask":
        """The mask of the sums of both masks' weights, clipped to 1.

        Weights become the wider dtype of both (bool and bool: or). A full mask makes all full and an empty one changes
        nothing, whatever the mode, without a look at the other mask's arrays.

        Args:
          other: a mask with the same Sq and Sk, and the same B and H where neither is 1.
          mode: "dense" adds arrays, "sparse" sorts the entries of both; either turns the masks into what it needs
            first. Dense is the default because it is faster unless almost nothing is stored (`DEFAULT_MODE`).
          size: with "sparse", the room of the result. Default: what is used, or under jit the sum of both rooms, which
            always suffices; a dense mask that is traced needs it.

        Raises:
          TypeError: other is not a mask.
          ValueError: shapes that do not fit; sizes as in `to_indices`.
        """
        if not isinstance(other, Mask):
            raise TypeError(f"other must be a Mask, got {type(other).__name__}; make one with Mask.from_dense")
        _check_mode(mode, size)
        shape = _common_shape(self.shape, other.shape)
        dtype = _wider(self.dtype, other.dtype)
        if "full" in (self.kind, other.kind):
            return type(self).full(shape, dtype)
        if "empty" in (self.kind, other.kind):
            only = (other if self.kind == "empty" else self).astype(dtype).broadcast_to(shape)
            return only if size is None else only.to_indices(size)
        # What is room enough for the result is enough for each of the two.
        a, b = (mask.astype(dtype)._held(mode, size) for mask in (self, other))
        overflow = _either(a.overflow, b.overflow)
        if mode == "dense":
            return type(self)(shape, "dense", dtype, dense=_add_dense(a.dense, b.dense), overflow=overflow)
        a, b = a.broadcast_to(shape), b.broadcast_to(shape)
        check_size("the number of entries of both", a.size + b.size, 'use mode="dense"')
        return _fit(type(self), shape, _add_sparse(a, b), size, overflow)

    def __repr__(self) -> str:
        room = f", size={self.size}" if self.kind == "sparse" else ""
        return f"Mask({list(self.shape)}, {self.kind}, {self.dtype}{room})"

    def _weigh(self, x: Any, mode: Mode, size: int | None, inverse: bool) -> Array:
        _check_mode(mode, size)
        if not isinstance(x, Array | np.ndarray):
            raise TypeError(f"x must be an array, got {type(x).__name__}")
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating, got {x.dtype}; cast it first")
        fits = x.ndim == 4 and _fits(self.shape, x.shape)
        if not fits:
            raise ValueError(f"x must have the mask's shape {self.shape} (any B, H where that is 1), got {x.shape}")
        if self.kind == "full":
            return x
        if self.kind == "empty":
            return jnp.zeros_like(x)
        mask = self._held(mode, size)
        return _weigh(mask if mask.kind == "dense" else mask.broadcast_to(x.shape), x, inverse=inverse)

    def _held(self, mode: Mode, size: int | None) -> "Mask":
        """This mask as the mode needs it."""
        mask = self._usable()
        if mode == "sparse":
            return mask if mask.kind == "sparse" else mask.to_indices(size)
        if mask.kind == "dense":
            return mask
        return type(mask)(mask.shape, "dense", mask.dtype, dense=_to_dense(mask), overflow=mask.overflow)

    def _usable(self) -> Self:
        """This mask, if it is known not to have overflowed, or not known."""
        if self.overflow is None or not _known(self.overflow):
            return self
        if bool(self.overflow):
            raise ValueError(
                f"the mask had more entries than its size under jit, got overflow=True and size={self.size}; "
                f"make it with a larger size="
            )
        return dataclasses.replace(self, overflow=None)


# Arguments.


def _known(*arrays: Any) -> bool:
    """Whether values can be looked at."""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def _shape(shape: Any) -> tuple[int, int, int, int]:
    if (
        not isinstance(shape, Sequence)
        or len(shape) != 4
        or not all(isinstance(n, int | np.integer) and n >= 0 for n in shape)
    ):
        raise ValueError(f"shape must be four lengths (B, H, Sq, Sk), got {shape!r}")
    b, h, sq, sk = (int(n) for n in shape)
    return b, h, sq, sk


def _dtype(dtype: Any) -> np.dtype:
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if dtype.name not in _DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype.name}")
    return dtype


def _wider(a: Any, b: Any) -> np.dtype:
    """The dtype that holds both, also where JAX is set to refuse to choose one."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def _size(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"size must be an int from 0 to {_MAX_SIZE}, or None, got {size!r}")
    return int(size)


def _check_mode(mode: Any, size: Any) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f'mode must be "sparse" or "dense", got {mode!r}')
    if mode == "dense" and size is not None:
        raise ValueError(f'size means nothing to mode="dense", got size={size!r}; leave it out, or use mode="sparse"')


def check_size(name: str, n: int, instead: str) -> None:
    """Raises where the places among n entries do not fit an int32."""
    if n > _MAX_SIZE:
        raise ValueError(f"{name} of a sparse mask must be at most {_MAX_SIZE} (int32), got {n}; {instead}")


def _check_fits(count: int, size: int | None) -> None:
    if size is not None and count > size:
        raise ValueError(f"size must be at least the number of entries, {count}, got {size}; give more, or None")


def _weights(name: str, x: Any) -> Array:
    """x as a JAX array, if its dtype is one of weights and, as far as is known, all are in [0, 1]."""
    if not isinstance(x, Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if x.dtype.name not in _DTYPES:
        raise TypeError(f"{name} must be bool or floating, got {x.dtype.name}; compare with 0, or cast it")
    if _known(x) and x.dtype != bool:
        with jax.ensure_compile_time_eval():
            good = bool(_are_weights(x) if isinstance(x, Array) else ((x >= 0) & (x <= 1)).all())
        if not good:
            raise ValueError(f"{name} must have weights in [0, 1], got others (or NaN); clip or divide them")
    return _converted(x)


def _data(data: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """The weights of entries of the given shape."""
    if data is None:
        return jnp.ones(shape, jnp.float32 if dtype is None else _dtype(dtype))
    data = _weights("data", data)
    if data.shape != shape:
        raise ValueError(f"data must have the shape of the indices, {shape}, got {data.shape}")
    return data if dtype is None else data.astype(_dtype(dtype))


def _integers(name: str, x: Any) -> Array:
    if not isinstance(x, Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers, got {getattr(x, 'dtype', type(x).__name__)}; cast it")
    if _known(x) and x.dtype.itemsize >= 4 and x.dtype != np.int32 and x.size:
        values = np.asarray(x)
        largest, least = int(values.max()), int(values.min())
        if largest > _MAX_SIZE or least < -_MAX_SIZE:
            raise ValueError(f"{name} must fit int32, got values from {least} to {largest}")
    return _converted(x, jnp.int32)


def _converted(x: Array | np.ndarray, dtype: Any = None) -> Array:
    """x as a JAX array, of known values if they are known: also under jit, which would make a tracer of them."""
    if not _known(x):
        return jnp.asarray(x, dtype)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(x, dtype)


def _fits(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    """Whether a mask of `shape` stands for one of the shape `onto`."""
    return shape[2:] == onto[2:] and all(m in (1, n) for m, n in zip(shape[:2], onto[:2], strict=True))


def _common_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The shape that masks of both shapes stand for."""
    batch, heads = (n if m == 1 else m for m, n in zip(a[:2], b[:2], strict=True))
    shape = (batch, heads, a[2], a[3])
    if not (_fits(a, shape) and _fits(b, shape)):
        raise ValueError(f"other must have the shape {a} (B and H may be 1), got {b}")
    return shape


def _times(shape: tuple[int, ...], onto: tuple[int, ...]) -> int:
    """How many times a mask is repeated when it is broadcast."""
    return math.prod(n for m, n in zip(shape[:2], onto[:2], strict=True) if m == 1)


def _either(a: Array | None, b: Array | None) -> Array | None:
    """Whether one of two masks overflowed."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


# What runs on the device. Under jit of their own, so that a call from outside compiles once and not operation by
# operation. Rows are always kept apart from keys: B * H * Sq * Sk may not fit an int32.


@jax.jit
def _are_weights(x: Array) -> Array:
    return ((x >= 0) & (x <= 1)).all()


@functools.partial(jax.jit, static_argnames="keys")
def _inspect(indices: Array, ptr: Array, keys: int) -> tuple[Array, Array]:
    """Whether all used indices are keys, and whether they ascend within each row."""
    row = _entry_rows(ptr, indices.size)
    unused = row == ptr.size - 1
    first = (row != jnp.roll(row, 1)) | (jnp.arange(indices.size) == 0)
    inside = unused | ((indices >= 0) & (indices < keys))
    return inside.all(), (unused | first | (indices > jnp.roll(indices, 1))).all()


@functools.partial(jax.jit, static_argnames="size")
def _entry_rows(ptr: Array, size: int) -> Array:
    """The row of each entry, int32 `[size]`; for unused ones the number of rows."""
    row = jnp.cumsum(jnp.zeros(size, jnp.int32).at[ptr[1:-1]].add(1, mode="drop"))
    return jnp.where(jnp.arange(size) < ptr[-1], row, ptr.size - 1)


@functools.partial(jax.jit, static_argnames="rows")
def _combine(row: Array, index: Array, data: Array, rows: int) -> tuple[Array, Array, Array]:
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
    return indices, _ptr(counts), sums


@jax.jit
def _combine_rows(row_indices: Array, data: Array) -> tuple[Array, Array, Array]:
    """`_combine` of `[B, H, Sq, n]` keys and weights, negative keys being unused."""
    rows = math.prod(row_indices.shape[:3])
    row = jnp.arange(rows, dtype=jnp.int32).reshape(*row_indices.shape[:3], 1)
    row = jnp.where(row_indices < 0, rows, row)
    return _combine(row.reshape(-1), row_indices.reshape(-1), data.reshape(-1), rows=rows)


def _ptr(counts: Array) -> Array:
    """`ptr` of the number of entries in each row."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])


@functools.partial(jax.jit, static_argnames="size")
def _entries(dense: Array, size: int) -> tuple[Array, Array, Array]:
    """The weights that are not 0: `indices` and `data` with room for `size`, `ptr` as if there were room for all."""
    dense = dense.reshape(math.prod(dense.shape[:3]), dense.shape[3])
    shown = dense.astype(bool)
    ptr = _ptr(shown.sum(1, dtype=jnp.int32))
    at = jnp.where(shown, ptr[:-1, None] + jnp.cumsum(shown, 1, dtype=jnp.int32) - 1, size)
    keys = jnp.broadcast_to(jnp.arange(dense.shape[1], dtype=jnp.int32), dense.shape)
    indices = jnp.zeros(size, jnp.int32).at[at].set(keys, mode="drop")
    return indices, ptr, jnp.zeros(size, dense.dtype).at[at].set(dense, mode="drop")


def _fit(
    cls: type,
    shape: tuple[int, int, int, int],
    entries: tuple[Array, Array, Array],
    size: int | None,
    overflow: Array | None = None,
) -> Any:
    """The sparse mask of canonical `indices`, `ptr` and `data` with room for `size` of them.

    None is as many as there are or, if that is not known, as there is room for now.
    """
    indices, ptr, data = entries
    room, dtype = indices.size, data.dtype
    if size is not None:
        size = _size(size)
    if _known(ptr, overflow):
        count = int(np.asarray(ptr)[-1])  # not ptr[-1], which under jit would be a tracer
        _check_fits(count, size)
        size = count if size is None else size
    elif size is None:
        size = room
    elif size < room:
        overflow = _either(overflow, ptr[-1] > size)
    if size != room:
        indices, data = _resized(indices, data, size=size)
    if overflow is not None:
        ptr = jnp.minimum(ptr, size)
        data = _poisoned(data, overflow)
    return cls(shape, "sparse", dtype, indices=indices, ptr=ptr, data=data, overflow=overflow)


@functools.partial(jax.jit, static_argnames="size")
def _resized(indices: Array, data: Array, size: int) -> tuple[Array, Array]:
    more = (0, max(size - indices.size, 0))
    return jnp.pad(indices[:size], more), jnp.pad(data[:size], more)


def _poisoned(x: Array, overflow: Array | None) -> Array:
    """x, or NaN where entries were lost. Bools cannot be, and wait until they meet something that can."""
    return x if overflow is None or x.dtype == bool else jnp.where(overflow, jnp.nan, x)


@functools.partial(jax.jit, static_argnames="shape")
def _broadcast(mask: Mask, shape: tuple[int, int, int, int]) -> Mask:
    if mask.kind == "dense":
        return dataclasses.replace(mask, shape=shape, dense=jnp.broadcast_to(mask.dense, shape))
    if mask.kind != "sparse":
        return dataclasses.replace(mask, shape=shape)
    # Each row of the result reads the one row that it stands for.
    rows = math.prod(mask.shape[:3])
    source = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32).reshape(mask.shape[:3]), shape[:3]).reshape(-1)
    ptr = _ptr(jnp.diff(mask.ptr)[source])
    size = mask.size * _times(mask.shape, shape)
    row = _entry_rows(ptr, size)
    at = jnp.arange(size, dtype=jnp.int32)
    at = at + (mask.ptr[:-1][source] - ptr[:-1]).at[row].get(mode="fill", fill_value=_MAX_SIZE // 2)
    indices, data = (x.at[at].get(mode="fill", fill_value=0) for x in (mask.indices, mask.data))
    data = _poisoned(data, mask.overflow)
    return dataclasses.replace(mask, shape=shape, indices=indices, ptr=ptr, data=data)


def _places(mask: Mask) -> tuple[Array, Array]:
    """Row and key of each entry, int32 `[size]` each: ascending, no two the same, unused ones out of bounds."""
    row = _entry_rows(mask.ptr, mask.size)
    unused = row == mask.ptr.size - 1
    return row, jnp.where(unused, jnp.arange(mask.size, dtype=jnp.int32), mask.indices)


def _gather(x: Array, places: tuple[Array, Array]) -> Array:
    """`x[places]`, 0 for unused ones."""
    return x.at[places].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)


def _scatter(entries: Array, places: tuple[Array, Array], shape: tuple[int, ...]) -> Array:
    """The entries at their places in an array of `shape`, 0 elsewhere."""
    x = jnp.zeros((math.prod(shape[:3]), shape[3]), entries.dtype)
    return x.at[places].set(entries, mode="drop", unique_indices=True, indices_are_sorted=True).reshape(shape)


@jax.jit
def _to_dense(mask: Mask) -> Array:
    if mask.kind in ("full", "empty"):
        return jnp.full(mask.shape, mask.kind == "full", mask.dtype)
    if mask.kind == "dense":
        return _poisoned(mask.dense, mask.overflow)
    return _poisoned(_scatter(mask.data, _places(mask), mask.shape), mask.overflow)


@jax.jit
def _density(mask: Mask) -> Array:
    if mask.kind == "dense":
        count = mask.dense.astype(bool).sum(-1, dtype=jnp.int32)
    else:
        count = (mask.data.astype(bool) & (jnp.arange(mask.size) < mask.ptr[-1])).sum(dtype=jnp.int32)
    total = math.prod(mask.shape)
    if total > _MAX_SIZE:  # the count of all may not fit an int32
        count = count.astype(jnp.float32)
    share = count.sum().astype(jnp.float32) / float(max(total, 1))
    return _poisoned(share, mask.overflow)


@functools.partial(jax.jit, static_argnames="inverse")
def _weigh(mask: Mask, x: Array, inverse: bool) -> Array:
    """x · weight or x / weight: all of x under a dense mask, the entries of a sparse one."""
    if mask.kind == "dense":
        return _poisoned(_weighed(x, mask.dense, inverse), mask.overflow)
    flat = x.reshape(math.prod(x.shape[:3]), x.shape[3])
    places = _places(mask)
    entries = _weighed(_gather(flat, places), mask.data, inverse)
    return _poisoned(_scatter(entries, places, x.shape), mask.overflow)


def _weighed(x: Array, weight: Array, inverse: bool) -> Array:
    """x · weight or x / weight, 0 where the weight is 0, without a NaN in any gradient."""
    if weight.dtype == bool:
        return jnp.where(weight, x, 0)
    dtype = _wider(x.dtype, weight.dtype)
    hidden, y, weight = weight == 0, x.astype(dtype), weight.astype(dtype)
    if inverse:
        y = jnp.where(hidden, 0, y / jnp.where(hidden, 1, weight))
    else:
        # A finite x stays, for the gradient of a weight that is 0.
        y = jnp.where(hidden & ~jnp.isfinite(y), 0, y) * weight
    return y.astype(x.dtype)


@jax.jit
def _add_dense(a: Array, b: Array) -> Array:
    return a | b if a.dtype == bool else jnp.minimum(a + b, 1)


@jax.jit
def _add_sparse(a: Mask, b: Mask) -> tuple[Array, Array, Array]:
    """The entries of two masks of one shape as one list."""
    (row, index), (other_row, other_index) = _places(a), _places(b)
    join = lambda *parts: jnp.concatenate(parts)
    return _combine(join(row, other_row), join(index, other_index), join(a.data, b.data), rows=math.prod(a.shape[:3]))
