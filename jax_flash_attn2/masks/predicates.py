"""Element predicates: who sees whom, as functions of one batch, head, row and key, and how they combine.

A predicate is any function `predicate(b, h, i, j) -> bool` of four 0-d int32 indices: batch, query head, query row and
key. The indices are traced, so it branches with `jnp.where` and `&`, `|`, `~`, never with `if`, `and`, `or`, `not`.
Lists and arrays of NumPy that it indexes have to be JAX's: `ids = jnp.asarray(ids)`.

What is built here also combines with `&`, `|` and `~` (`and`, `or` and `not` raise), hashes, and is a pytree (arrays
are its leaves), so that it may be closed over by a jitted function, be its argument, or be a cache's key: predicates
that hold static values only are equal where these are, those that hold arrays where they are the same object. Arrays of
NumPy are copied when a predicate is made of them.

Where a mask is made, arrays that a predicate holds must have its lengths (`Predicate.check_shape`). `evaluate` knows
indices only: beyond the end of an array nothing is seen there; but what `~` makes of that is seen, so whoever evaluates
more indices than there are rows and keys has to cut off the rest himself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments
from .combining import All, ElementPredicate, Predicate, all_of, any_of, as_predicate, negate, pytree
from .evaluation import evaluate, integers, take, with_axes

__all__ = [
    "ElementPredicate",
    "Predicate",
    "all_of",
    "any_of",
    "as_predicate",
    "causal",
    "dilated",
    "documents",
    "evaluate",
    "from_dense",
    "negate",
    "padding",
    "prefix_lm",
    "sinks",
    "sliding_window",
]


# What they are made of. Static values are part of a pytree's structure, arrays its leaves.


class _Fixed(Predicate):
    """One of static values, or of arrays that nobody writes to."""

    @property
    def is_fixed(self) -> bool:
        return True


@pytree()
@dataclasses.dataclass(frozen=True)
class _Causal(_Fixed):
    offset: int

    def __call__(self, b, h, i, j):
        return j <= i + self.offset


@pytree()
@dataclasses.dataclass(frozen=True)
class _SlidingWindow(_Fixed):
    left: int | None
    right: int | None
    offset: int

    def __call__(self, b, h, i, j):
        ahead = i + self.offset - j
        left = True if self.left is None else ahead <= self.left
        right = True if self.right is None else -ahead <= self.right
        return jnp.logical_and(left, right)


@pytree()
@dataclasses.dataclass(frozen=True)
class _Dilated(_Fixed):
    window: int
    dilation: int
    offset: int

    def __call__(self, b, h, i, j):
        ahead = i + self.offset - j
        return (ahead >= 0) & (ahead % self.dilation == 0) & (ahead // self.dilation <= self.window)


@pytree()
@dataclasses.dataclass(frozen=True)
class _Sinks(_Fixed):
    size: int

    def __call__(self, b, h, i, j):
        return j < self.size


class _OfArrays(_Fixed):
    """One that holds arrays; the dataclasses derived from it compare by identity."""

    def __repr__(self) -> str:
        shapes = (
            f"{n}={x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"{n}={x!r}" for n, x in vars(self).items()
        )
        return f"{type(self).__name__}({', '.join(shapes)})"


@pytree("size")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Prefix(_OfArrays):
    size: Any  # [1 or B]

    def check_shape(self, shape):
        _check("prefix", self.size, shape, "B")

    def __call__(self, b, h, i, j):
        return j < take(self.size, (b,), 0)


@pytree("q_ids", "kv_ids")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Documents(_OfArrays):
    q_ids: Any  # [1 or B, Sq]
    kv_ids: Any  # [1 or B, Sk]

    def check_shape(self, shape):
        _check("q_ids of documents", self.q_ids, shape, "B", "Sq")
        _check("kv_ids of documents", self.kv_ids, shape, "B", "Sk")

    def __call__(self, b, h, i, j):
        mine = take(self.q_ids, (b, i), -1)
        return (mine >= 0) & (mine == take(self.kv_ids, (b, j), -1))


@pytree("mask")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Padding(_OfArrays):
    mask: Any  # [1 or B, Sk]

    def check_shape(self, shape):
        _check("mask of padding", self.mask, shape, "B", "Sk")

    def __call__(self, b, h, i, j):
        return take(self.mask, (b, j), False)


@pytree("mask")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Dense(_OfArrays):
    mask: Any  # [1 or B, 1 or H, 1 or Sq, 1 or Sk]

    def check_shape(self, shape):
        _check("mask of from_dense", self.mask, shape, *_AXES, broadcast=_AXES)

    def __call__(self, b, h, i, j):
        own = tuple(0 if n == 1 else x for n, x in zip(self.mask.shape, (b, h, i, j), strict=True))
        return take(self.mask, own, False, first_varies=False)


def split_documents(predicate: Predicate) -> tuple[Predicate | None, tuple[Array, Array] | None]:
    """A predicate as what is left beside its documents (None: nothing), and their ids of rows and of keys."""
    parts = list(predicate.parts) if isinstance(predicate, All) else [predicate]
    found = next((part for part in parts if isinstance(part, _Documents)), None)
    if found is None:
        return predicate, None
    rest = [part for part in parts if part is not found]
    return all_of(*rest) if rest else None, (found.q_ids, found.kv_ids)


# How they are built.


def causal(offset: int = 0) -> Predicate:
    """Row i sees keys j <= i + offset; offset Sk - Sq lets the last row see the last key ("bottom_right").

    Examples:
      >>> evaluate(causal(), *map(np.arange, (1, 1, 2, 3)))[0, 0].astype(int)
      Array([[1, 0, 0],
             [1, 1, 0]], dtype=int32)
    """
    return _Causal(_offset(offset))


def sliding_window(left: int | None, right: int | None = 0, offset: int = 0) -> Predicate:
    """Row i, at i' = i + offset, sees keys i' - left <= j <= i' + right; None: no bound on that side.

    As in `flash_attention`'s window_size, left and right do not count the row's own position: it sees left + 1 + right
    keys. What is called a window of 256 is `sliding_window(255)`, and, where Sq == Sk, `LocalMasker(256)`, which counts
    keys.

    Examples:
      >>> evaluate(sliding_window(1), *map(np.arange, (1, 1, 3, 4)))[0, 0].astype(int)
      Array([[1, 0, 0, 0],
             [1, 1, 0, 0],
             [0, 1, 1, 0]], dtype=int32)
    """
    return _SlidingWindow(_bound("left", left), _bound("right", right), _offset(offset))


def dilated(window: int, dilation: int, offset: int = 0) -> Predicate:
    """Row i, at i' = i + offset, sees keys i', i' - dilation, ..., i' - window * dilation: window + 1 of them.

    `dilated(n, 1)` is `sliding_window(n)`.

    Examples:
      >>> evaluate(dilated(2, 3), *map(np.arange, (1, 1, 10, 10)))[0, 0, 9].astype(int)
      Array([0, 0, 0, 1, 0, 0, 1, 0, 0, 1], dtype=int32)
    """
    return _Dilated(_natural("window", window), _natural("dilation", dilation, least=1), _offset(offset))


def sinks(size: int) -> Predicate:
    """Every row sees the first keys, j < size.

    Examples:
      >>> local = causal() & (sliding_window(255) | sinks(64))
    """
    return _Sinks(_natural("size", size))


def prefix_lm(prefix: int | Array | np.ndarray, offset: int = 0) -> Predicate:
    """Causal, and every row sees the first keys: j <= i + offset or j < prefix; prefix an integer or integers [B].

    Examples:
      >>> evaluate(prefix_lm(2), *map(np.arange, (1, 1, 3, 4)))[0, 0].astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 1, 0]], dtype=int32)
    """
    seen = (
        _Prefix(integers("prefix", prefix, ("B",), least=0))
        if arguments.is_array(prefix)
        else _Sinks(_natural("prefix", prefix))
    )
    return any_of(causal(offset), seen)


def documents(q_ids: Array | np.ndarray, kv_ids: Array | np.ndarray | None = None) -> Predicate:
    """Rows see the keys of their own segment: equal ids that are not negative (negative is padding).

    Args:
      q_ids: integers `[Sq]`, or `[B or 1, Sq]`, that fit int32.
      kv_ids: integers `[Sk]`, or `[B or 1, Sk]`; q_ids if left out.

    Examples:
      >>> evaluate(documents(jnp.array([0, 0, 1, -1])), *map(np.arange, (1, 1, 4, 4)))[0, 0].astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [0, 0, 1, 0],
             [0, 0, 0, 0]], dtype=int32)
    """
    q_ids = integers("q_ids", q_ids, ("B", "Sq"))
    kv_ids = q_ids if kv_ids is None else integers("kv_ids", kv_ids, ("B", "Sk"))
    batches = q_ids.shape[0], kv_ids.shape[0]
    if 1 not in batches and batches[0] != batches[1]:
        raise ValueError(f"q_ids and kv_ids must have one batch size (or 1), got shapes {q_ids.shape}, {kv_ids.shape}")
    return _Documents(q_ids, kv_ids)


def padding(mask: Array | np.ndarray) -> Predicate:
    """Rows see the keys that are real: mask `[B or 1, Sk]` or `[Sk]`, bool or integers, True or nonzero = real.

    Examples:
      >>> evaluate(padding(jnp.array([[1, 1, 0]])), *map(np.arange, (1, 1, 1, 3)))[0, 0]
      Array([[ True,  True, False]], dtype=bool)
    """
    arguments.flags("mask", mask, "[B, Sk]")
    return _Padding(_kept(with_axes("mask", mask if mask.dtype == jnp.bool_ else _nonzero(mask), ("B", "Sk"))))


def from_dense(mask: Array | np.ndarray) -> Predicate:
    """A dense mask as a predicate: bool, broadcasts to `[B, H, Sq, Sk]` (axes of length 1, or left out, do).

    Examples:
      >>> strided = from_dense(jnp.eye(128, dtype=bool)) | causal()
    """
    if not arguments.is_array(mask) or mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be an array of booleans (True: seen), got {arguments.describe(mask)}; of numbers, mask != 0"
        )
    return _Dense(_kept(with_axes("mask", mask, _AXES, least=0)))


# One argument each.


_AXES = "B", "H", "Sq", "Sk"


def _check(name: str, x: Any, shape: tuple[int, ...], *axes: str, broadcast: tuple[str, ...] = ("B",)) -> None:
    """Raises unless x has the lengths of a mask's axes, or 1 along those that broadcast."""
    want = tuple(shape[_AXES.index(axis)] for axis in axes)
    ones = tuple(axis in broadcast for axis in axes)
    if any(n != m and not (one and n == 1) for n, m, one in zip(x.shape, want, ones, strict=True)):
        wanted = ", ".join(f"{axis} or 1" if one else axis for axis, one in zip(axes, ones, strict=True))
        raise ValueError(
            f"{name} must have shape [{wanted}] = {want}, as the mask [B, H, Sq, Sk] is {tuple(shape)}, got shape "
            f"{tuple(x.shape)}"
        )


def _offset(offset: Any) -> int:
    if not arguments.is_integer(offset):
        raise TypeError(
            f"offset must be an integer (static under jit), got {arguments.describe(offset)}; for a traced one write "
            f"the predicate as a function: lambda b, h, i, j: j <= i + offset"
        )
    if abs(offset) > arguments.FAR:
        raise ValueError(f"offset must be within ±2**30, got {offset}")
    return int(offset)


def _bound(name: str, n: Any) -> int | None:
    return None if n is None else _natural(name, n, none=" or None (no bound)")


def _natural(name: str, n: Any, least: int = 0, none: str = "") -> int:
    if not arguments.is_integer(n):
        raise TypeError(f"{name} must be an integer{none} (static under jit), got {arguments.describe(n)}")
    if n < least:
        raise ValueError(f"{name} must be at least {least}{none}, got {n}")
    return min(int(n), arguments.FAR)


def _kept(x: Any) -> Any:
    """x as it is now: an array of NumPy's may be written to later."""
    return x.copy() if isinstance(x, np.ndarray) else x


def _nonzero(x: Any) -> Any:
    return x != 0 if isinstance(x, np.ndarray) else _not_0(x)


_not_0 = jax.jit(lambda x: x != 0, inline=True)
