"""Element predicates: who sees whom, as functions of one batch, head, row and key, and how they combine.

A predicate is any function `predicate(b, h, i, j) -> bool` of four 0-d int32 indices: batch, query head, query row and
key. The indices are traced, so it branches with `jnp.where` and `&`, `|`, `~`, never with `if`, `and`, `or`, `not`.
What is built here also combines with `&`, `|` and `~`, hashes, and is a pytree (arrays are its leaves), so that it may
be closed over by a jitted function, be its argument, or be a cache's key: predicates that hold static values only are
equal where these are, those that hold arrays where they are the same object.

Beyond the end of an array that a predicate holds, nothing is seen; but what `~` makes of that is seen, so whoever
evaluates more indices than there are rows and keys has to cut off the rest himself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_FAR = 2**30  # a bound that no index reaches, and that can be added to one


class Predicate:
    """A predicate that combines with others, and with plain functions, by `&`, `|` and `~`.

    To write your own with parameters, derive a frozen dataclass from it and define `__call__(self, b, h, i, j)`; a
    plain function does as well. As an argument of a jitted function it also has to be a pytree
    (`jax.tree_util.register_dataclass`).
    """

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Whether row i of head h of batch b sees key j: a 0-d bool of 0-d int32."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, b, h, i, j)")

    def __and__(self, other: Any) -> "Predicate":
        return all_of(self, other) if callable(other) else NotImplemented

    def __rand__(self, other: Any) -> "Predicate":
        return all_of(other, self) if callable(other) else NotImplemented

    def __or__(self, other: Any) -> "Predicate":
        return any_of(self, other) if callable(other) else NotImplemented

    def __ror__(self, other: Any) -> "Predicate":
        return any_of(other, self) if callable(other) else NotImplemented

    def __invert__(self) -> "Predicate":
        return negate(self)


ElementPredicate = Predicate | Callable[[Any, Any, Any, Any], Any]
"""What is accepted wherever a predicate is."""


# What they are made of. Static values are part of a pytree's structure, arrays its leaves.


def _pytree(*data: str) -> Callable[[type], type]:
    """Registers a frozen dataclass as a pytree: these fields are its children, the others part of its structure."""

    def register(cls: type) -> type:
        meta = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        return jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=meta)

    return register


@_pytree()
@dataclasses.dataclass(frozen=True)
class _Causal(Predicate):
    offset: int

    def __call__(self, b, h, i, j):
        return j <= i + self.offset


@_pytree()
@dataclasses.dataclass(frozen=True)
class _SlidingWindow(Predicate):
    left: int | None
    right: int | None
    offset: int

    def __call__(self, b, h, i, j):
        ahead = i + self.offset - j
        left = True if self.left is None else ahead <= self.left
        right = True if self.right is None else -ahead <= self.right
        return jnp.logical_and(left, right)


@_pytree()
@dataclasses.dataclass(frozen=True)
class _Dilated(Predicate):
    window: int
    dilation: int
    offset: int

    def __call__(self, b, h, i, j):
        ahead = i + self.offset - j
        return (ahead >= 0) & (ahead % self.dilation == 0) & (ahead // self.dilation <= self.window)


@_pytree()
@dataclasses.dataclass(frozen=True)
class _Sinks(Predicate):
    size: int

    def __call__(self, b, h, i, j):
        return j < self.size


@_pytree()
@dataclasses.dataclass(frozen=True)
class _Function(Predicate):
    function: Callable[[Any, Any, Any, Any], Any]

    def __call__(self, b, h, i, j):
        return self.function(b, h, i, j)


class _OfArrays(Predicate):
    """One that holds arrays; the dataclasses derived from it compare by identity."""

    def __repr__(self) -> str:
        shapes = (
            f"{n}={x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"{n}={x!r}" for n, x in vars(self).items()
        )
        return f"{type(self).__name__}({', '.join(shapes)})"


@_pytree("size")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Prefix(_OfArrays):
    size: Any  # [1 or B]

    def __call__(self, b, h, i, j):
        return j < _take(self.size, (b,), 0)


@_pytree("q_ids", "kv_ids")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Documents(_OfArrays):
    q_ids: Any  # [1 or B, Sq]
    kv_ids: Any  # [1 or B, Sk]

    def __call__(self, b, h, i, j):
        mine = _take(self.q_ids, (b, i), -1)
        return (mine >= 0) & (mine == _take(self.kv_ids, (b, j), -1))


@_pytree("mask")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Padding(_OfArrays):
    mask: Any  # [1 or B, Sk]

    def __call__(self, b, h, i, j):
        return _take(self.mask, (b, j), False)


@_pytree("mask")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Dense(_OfArrays):
    mask: Any  # [1 or B, 1 or H, 1 or Sq, 1 or Sk]

    def __call__(self, b, h, i, j):
        own = tuple(0 if n == 1 else x for n, x in zip(self.mask.shape, (b, h, i, j), strict=True))
        return _take(self.mask, own, False, first_varies=False)


@_pytree("parts")
@dataclasses.dataclass(frozen=True)
class _All(Predicate):
    parts: tuple[Predicate, ...]

    def __call__(self, b, h, i, j):
        seen = jnp.asarray(True)
        for part in self.parts:
            seen = seen & _seen(part, b, h, i, j)
        return seen


@_pytree("parts")
@dataclasses.dataclass(frozen=True)
class _Any(Predicate):
    parts: tuple[Predicate, ...]

    def __call__(self, b, h, i, j):
        seen = jnp.asarray(False)
        for part in self.parts:
            seen = seen | _seen(part, b, h, i, j)
        return seen


@_pytree("part")
@dataclasses.dataclass(frozen=True)
class _Not(Predicate):
    part: Predicate

    def __call__(self, b, h, i, j):
        return ~_seen(self.part, b, h, i, j)


# How they are built.


def causal(offset: int = 0) -> Predicate:
    """Row i sees keys j <= i + offset; offset Sk - Sq lets the last row see the last key ("bottom_right")."""
    return _Causal(_offset(offset))


def sliding_window(left: int | None, right: int | None = 0, offset: int = 0) -> Predicate:
    """Row i, at i' = i + offset, sees keys i' - left <= j <= i' + right; None: no bound on that side."""
    return _SlidingWindow(_bound("left", left), _bound("right", right), _offset(offset))


def dilated(window: int, dilation: int, offset: int = 0) -> Predicate:
    """Row i, at i' = i + offset, sees keys i', i' - dilation, ..., i' - window * dilation: window + 1 of them.

    `dilated(n, 1)` is `sliding_window(n)`.
    """
    return _Dilated(_natural("window", window), _natural("dilation", dilation, least=1), _offset(offset))


def sinks(size: int) -> Predicate:
    """Every row sees the first keys, j < size."""
    return _Sinks(_natural("size", size))


def prefix_lm(prefix: int | Array | np.ndarray, offset: int = 0) -> Predicate:
    """Causal, and every row sees the first keys: j <= i + offset or j < prefix; prefix an integer or integers [B]."""
    seen = (
        _Prefix(_integers("prefix", prefix, ("B",), least=0))
        if _is_array(prefix)
        else _Sinks(_natural("prefix", prefix))
    )
    return any_of(causal(offset), seen)


def documents(q_ids: Array | np.ndarray, kv_ids: Array | np.ndarray | None = None) -> Predicate:
    """Rows see the keys of their own segment: equal ids that are not negative (negative is padding).

    Args:
      q_ids: integers `[Sq]`, or `[B or 1, Sq]`.
      kv_ids: integers `[Sk]`, or `[B or 1, Sk]`; q_ids if left out.
    """
    q_ids = _integers("q_ids", q_ids, ("B", "Sq"))
    kv_ids = q_ids if kv_ids is None else _integers("kv_ids", kv_ids, ("B", "Sk"))
    batches = q_ids.shape[0], kv_ids.shape[0]
    if 1 not in batches and batches[0] != batches[1]:
        raise ValueError(f"q_ids and kv_ids must have one batch size (or 1), got shapes {q_ids.shape}, {kv_ids.shape}")
    return _Documents(q_ids, kv_ids)


def padding(mask: Array | np.ndarray) -> Predicate:
    """Rows see the keys that are real: mask `[B or 1, Sk]` or `[Sk]`, bool or integers, True or nonzero = real."""
    if not _is_array(mask) or not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(f"mask must be an array of booleans or integers [B, Sk], got {_describe(mask)}")
    return _Padding(_axes("mask", mask if mask.dtype == jnp.bool_ else mask != 0, ("B", "Sk")))


def from_dense(mask: Array | np.ndarray) -> Predicate:
    """A dense mask as a predicate: bool, broadcasts to `[B, H, Sq, Sk]` (axes of length 1, or left out, do)."""
    if not _is_array(mask) or mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be an array of booleans (True: seen), got {_describe(mask)}; of numbers, mask != 0")
    return _Dense(_axes("mask", mask, ("B", "H", "Sq", "Sk"), least=0))


def all_of(*predicates: ElementPredicate) -> Predicate:
    """What all of them let through: `&`; everything if there are none."""
    return _combined(_All, predicates)


def any_of(*predicates: ElementPredicate) -> Predicate:
    """What any of them lets through: `|`; nothing if there are none."""
    return _combined(_Any, predicates)


def negate(predicate: ElementPredicate) -> Predicate:
    """What it does not let through: `~`."""
    part = as_predicate(predicate)
    return part.part if isinstance(part, _Not) else _Not(part)


def as_predicate(predicate: ElementPredicate) -> Predicate:
    """`predicate` itself, or a plain function as a `Predicate`, which equals others of the same function.

    Raises:
      TypeError: it is not callable.
    """
    if isinstance(predicate, Predicate):
        return predicate
    if not callable(predicate):
        raise TypeError(
            f"predicate must be a function of (b, h, i, j), got {_describe(predicate)}; a dense mask is a predicate "
            f"through from_dense"
        )
    return _Function(predicate)


def evaluate(
    predicate: ElementPredicate,
    b: Array | np.ndarray,
    h: Array | np.ndarray,
    i: Array | np.ndarray,
    j: Array | np.ndarray,
) -> Array:
    """The predicate of every combination of batches b `[B]`, heads h `[H]`, rows i `[Q]` and keys j `[K]`.

    What a predicate does not depend on is computed once: ids of rows are read Q times, not Q * K times.

    Args:
      predicate: a `Predicate`, or a function of four 0-d int32 that returns a 0-d bool.
      b, h, i, j: integers, 1-D; traced ones too.

    Returns:
      bool `[B, H, Q, K]`.

    Raises:
      TypeError: the predicate returns something else than a bool.
      ValueError: it does not return a single one, or indices are not 1-D.
    """
    predicate = as_predicate(predicate)
    indices = [_integers(name, x, (name.upper(),), least=1) for name, x in zip("bhij", (b, h, i, j), strict=True)]

    def element(b, h, i, j):
        return _seen(predicate, b, h, i, j)

    for axis in (3, 2, 1, 0):  # the innermost first, so that it ends up last
        element = jax.vmap(element, [0 if n == axis else None for n in range(4)])
    return element(*(jnp.asarray(x) for x in indices))


def window_pair(name: str, window: Any) -> tuple[int | None, int | None]:
    """`flash_attention`'s window_size, named `name` here, as (left, right); an integer is both."""
    pair = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(n is None or _is_integer(n) for n in pair):
        raise TypeError(
            f"{name} must be an integer, a pair (left, right) of integers or None (no bound), got {window!r}"
        )
    if any(n is not None and n < 0 for n in pair):
        raise ValueError(f"{name} must not be negative, got {window!r}; None means that there is no bound")
    left, right = (None if n is None else min(int(n), _FAR) for n in pair)
    return left, right


# One argument each.


def _seen(predicate: Predicate, b: Any, h: Any, i: Any, j: Any) -> Array:
    """The predicate's answer, checked: a 0-d bool."""
    answer = predicate(b, h, i, j)
    if not isinstance(answer, bool | np.bool_) and (not _is_array(answer) or answer.dtype != jnp.bool_):
        raise TypeError(f"{predicate!r} must return a bool, got {_describe(answer)}; of a number, return x != 0")
    answer = jnp.asarray(answer)
    if answer.shape != ():
        raise ValueError(
            f"{predicate!r} must return a single bool of four 0-d indices, got shape {answer.shape}; index its arrays "
            f"with all of (b, h, i, j) that they have axes for"
        )
    return answer


def _take(x: Any, where: tuple[Any, ...], beyond: Any, first_varies: bool = True) -> Array:
    """One element of x, `beyond` if it has none there; a batch axis of length 1 is everyone's."""
    if first_varies and x.shape[0] == 1:
        where = (0, *where[1:])
    if x.size == 0:
        return jnp.asarray(beyond, x.dtype)
    return jnp.asarray(x).at[where].get(mode="fill", fill_value=beyond, wrap_negative_indices=False)


def _combined(kind: type[_All] | type[_Any], predicates: tuple[ElementPredicate, ...]) -> Predicate:
    parts = [as_predicate(predicate) for predicate in predicates]
    flat = [p for part in parts for p in (part.parts if isinstance(part, kind) else (part,))]
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def _integers(name: str, x: Any, axes: tuple[str, ...], least: int = 1) -> Any:
    if not _is_array(x) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers [{', '.join(axes)}], got {_describe(x)}")
    return _axes(name, x, axes, least).astype(jnp.int32)


def _axes(name: str, x: Any, axes: tuple[str, ...], least: int = 1) -> Any:
    """x with all its axes, those left out in front being 1. NumPy stays NumPy: inside jit, jnp would trace it."""
    if not least <= x.ndim <= len(axes):
        raise ValueError(f"{name} must have axes [{', '.join(axes)}] (leading ones may be left out), got {x.shape}")
    return x.reshape((1,) * (len(axes) - x.ndim) + x.shape)


def _offset(offset: Any) -> int:
    if not _is_integer(offset):
        raise TypeError(
            f"offset must be an integer (static under jit), got {_describe(offset)}; for a traced one write the "
            f"predicate as a function: lambda b, h, i, j: j <= i + offset"
        )
    if abs(offset) > _FAR:
        raise ValueError(f"offset must be within ±2**30, got {offset}")
    return int(offset)


def _bound(name: str, n: Any) -> int | None:
    return None if n is None else _natural(name, n, none=" or None (no bound)")


def _natural(name: str, n: Any, least: int = 0, none: str = "") -> int:
    if not _is_integer(n):
        raise TypeError(f"{name} must be an integer{none} (static under jit), got {_describe(n)}")
    if n < least:
        raise ValueError(f"{name} must be at least {least}{none}, got {n}")
    return min(int(n), _FAR)


def _is_integer(n: Any) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def _is_array(x: Any) -> bool:
    return isinstance(x, Array | np.ndarray)


def _describe(x: Any) -> str:
    return f"{type(x).__name__} of dtype {x.dtype.name} and shape {x.shape}" if _is_array(x) else repr(x)
