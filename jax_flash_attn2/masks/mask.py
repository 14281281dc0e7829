"""`Mask`: weights in [0, 1] over `[B, H, Sq, Sk]`, held as an array, as a list of entries, or not at all."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments, known
from . import checks, entries, listing, weighing
from .checks import Mode

Kind = Literal["dense", "sparse", "full", "empty"]

DEFAULT_MODE: Mode = "dense"
"""How masks are applied and merged where nobody says: `python -m benchmarks sparse_masks` checks this choice.

Reading an array in order beats gathering and scattering entries unless almost nothing is stored, and merging entries
has to sort them.
"""


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

    Examples:
      >>> mask = Mask.from_dense(jnp.array([[[[1.0, 0.0], [0.5, 1.0]]]]))
      >>> mask.to_indices()
      Mask([1, 1, 2, 2], sparse, float32, size=3)
      >>> mask.merge(Mask.full((1, 1, 2, 2)))
      Mask([1, 1, 2, 2], full, float32)
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
        from .text import show

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
        dense = checks.weights_of("dense", dense)
        if dense.ndim != 4:
            raise ValueError(f"dense must have the axes [B, H, Sq, Sk], got shape {dense.shape}; add axes of length 1")
        mask = cls(arguments.four_lengths("shape", dense.shape), "dense", dense.dtype, dense=dense)
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
        return listing.of_indices(cls, shape, indices, ptr, data, dtype, canonical)

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
        return listing.of_row_indices(cls, shape, row_indices, data, dtype, size)

    @classmethod
    def full(cls, shape: Sequence[int], dtype: Any = jnp.float32) -> Self:
        """The mask of weights 1 over `shape`, `(B, H, Sq, Sk)`."""
        return cls(arguments.four_lengths("shape", shape), "full", checks.dtype_of(dtype))

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: Any = jnp.float32) -> Self:
        """The mask of weights 0 over `shape`, `(B, H, Sq, Sk)`."""
        return cls(arguments.four_lengths("shape", shape), "empty", checks.dtype_of(dtype))

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
        return mask.dense if mask.kind == "dense" and mask.overflow is None else weighing.to_dense(mask)

    def to_indices(self, size: int | None = None) -> Self:
        """The same mask, held as `indices`, `ptr` and `data`, with room for `size` entries.

        A dense mask keeps its weights that are not 0, a full one all. `size=None` is what is stored; under jit, where
        that is not known of a dense mask, `size` must be given. A sparse mask is resized, or stays as it is under jit.

        Raises:
          ValueError: too small a size (if the count is concrete), none where one is needed, or more than 2**31 - 1.
        """
        return listing.of_mask(self._usable(), size)

    def astype(self, dtype: Any) -> Self:
        """The same mask with weights of another dtype; bool stands for weights that are not 0."""
        dtype = checks.dtype_of(dtype)
        cast = lambda x: None if x is None else entries.poisoned(checks.cast(x, dtype), self.overflow)
        return dataclasses.replace(self, dtype=dtype, dense=cast(self.dense), data=cast(self.data))

    def broadcast_to(self, shape: Sequence[int]) -> Self:
        """The same mask over `shape`, which may have any B and H where this one has 1. Held as this one is."""
        shape, mask = arguments.four_lengths("shape", shape), self._usable()
        if shape == mask.shape:
            return mask
        if not checks.fits(mask.shape, shape):
            raise ValueError(
                f"shape must have the Sq and Sk of the mask, and its B and H where they are not 1, got {shape} for a "
                f"mask of {mask.shape}"
            )
        if mask.kind == "sparse":
            checks.check_size(
                "the number of entries", mask.size * checks.times(mask.shape, shape), "merge or apply it densely"
            )
        return weighing.broadcast(mask, shape=shape)

    # Used.

    def density(self) -> Array:
        """The share of the weights that are not 0: float32 `[]`."""
        mask = self._usable()
        if mask.kind in ("full", "empty"):
            share = float(mask.kind == "full" and math.prod(mask.shape) > 0)
            return known.full(share, jnp.dtype(jnp.float32))
        return weighing.density(mask)

    def apply(self, x: Array | np.ndarray, mode: Mode = DEFAULT_MODE) -> Array:
        """x · weight; 0 where the weight is 0, whatever x is there.

        Args:
          x: floating, `[B, H, Sq, Sk]` as the mask's, with any B and H where the mask's are 1.
          mode: "dense" multiplies arrays, "sparse" gathers and scatters the entries that are stored; either turns the
            mask into what it needs first. Dense is the default because it is faster unless almost nothing is stored
            (`DEFAULT_MODE`). Gradients reach the weights that are stored: in "dense" that is all of them.

        Returns:
          An array like x. Computed in the wider dtype of x and the weights, then rounded to that of x.

        Raises:
          TypeError: x is not a floating array.
          ValueError: x does not have a shape that fits; under jit, "sparse" of a dense mask, whose entries nobody has
            counted: make it one with `to_indices(size)` first.
        """
        return self._weigh(x, mode, inverse=False)

    def apply_inverse(self, x: Array | np.ndarray, mode: Mode = DEFAULT_MODE) -> Array:
        """x / weight where the weight is not 0, else 0; in all else as `apply`."""
        return self._weigh(x, mode, inverse=True)

    def merge(self, other: "Mask", mode: Mode = DEFAULT_MODE) -> "Mask":
        """The mask of the sums of both masks' weights, clipped to 1.

        Weights become the wider dtype of both (bool and bool: or). A full mask makes all full and an empty one changes
        nothing, whatever the mode, without a look at the other mask's arrays.

        Args:
          other: a mask with the same Sq and Sk, and the same B and H where neither is 1.
          mode: "dense" adds arrays, "sparse" sorts the entries of both; either turns the masks into what it needs
            first. Dense is the default because it is faster unless almost nothing is stored (`DEFAULT_MODE`).

        Returns:
          A mask, held as the mode says. A sparse one has room for what is used, or under jit for what both have room
          for; `to_indices(size)` gives it another.

        Raises:
          TypeError: other is not a mask.
          ValueError: shapes that do not fit; under jit, "sparse" of a dense mask, as in `apply`.
        """
        if not isinstance(other, Mask):
            raise TypeError(f"other must be a Mask, got {type(other).__name__}; make one with Mask.from_dense")
        checks.check_mode(mode)
        shape = checks.common_shape(self.shape, other.shape)
        dtype = checks.wider(self.dtype, other.dtype)
        if "full" in (self.kind, other.kind):
            return type(self).full(shape, dtype)
        if "empty" in (self.kind, other.kind):
            return (other if self.kind == "empty" else self).astype(dtype).broadcast_to(shape)
        a, b = (mask.astype(dtype)._held(mode) for mask in (self, other))
        overflow = entries.either(a.overflow, b.overflow)
        if mode == "dense":
            return type(self)(shape, "dense", dtype, dense=weighing.add_dense(a.dense, b.dense), overflow=overflow)
        a, b = a.broadcast_to(shape), b.broadcast_to(shape)
        checks.check_size("the number of entries of both", a.size + b.size, 'use mode="dense"')
        return entries.fit(type(self), shape, weighing.add_sparse(a, b), None, overflow)

    def __repr__(self) -> str:
        room = f", size={self.size}" if self.kind == "sparse" else ""
        return f"Mask({list(self.shape)}, {self.kind}, {self.dtype}{room})"

    def _weigh(self, x: Any, mode: Mode, inverse: bool) -> Array:
        checks.check_mode(mode)
        if not isinstance(x, Array | np.ndarray):
            raise TypeError(f"x must be an array, got {type(x).__name__}")
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating, got {x.dtype}; cast it first")
        fits = x.ndim == 4 and checks.fits(self.shape, x.shape)
        if not fits:
            raise ValueError(f"x must have the mask's shape {self.shape} (any B, H where that is 1), got {x.shape}")
        if self.kind == "full":
            return x
        if self.kind == "empty":
            return weighing.zeros_like(x)
        mask = self._held(mode)
        return weighing.weigh(mask if mask.kind == "dense" else mask.broadcast_to(x.shape), x, inverse=inverse)

    def _held(self, mode: Mode) -> "Mask":
        """This mask as the mode needs it."""
        mask = self._usable()
        if mode == "sparse":
            return mask if mask.kind == "sparse" else mask.to_indices()
        if mask.kind == "dense":
            return mask
        return type(mask)(mask.shape, "dense", mask.dtype, dense=weighing.to_dense(mask), overflow=mask.overflow)

    def _usable(self) -> Self:
        """This mask, if it is known not to have overflowed, or not known."""
        if self.overflow is None or not known.is_known(self.overflow):
            return self
        if bool(self.overflow):
            raise ValueError(
                f"the mask had more entries than its size under jit, got overflow=True and size={self.size}; "
                f"make it with a larger size="
            )
        return dataclasses.replace(self, overflow=None)
