"""What a predicate is, and how predicates combine. `predicates.py` says more, and has those that come with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ..base import names
from . import evaluation


class Predicate:
    """A predicate that combines with others, and with plain functions, by `&`, `|` and `~`.

    To write your own with parameters, derive a dataclass from it and define `__call__(self, b, h, i, j)`; a plain
    function does as well. Its fields may be anything, arrays and lists too (`jnp.asarray(self.ids)[i]`): what it does
    is looked at each time, not which object it is. As an argument of a jitted function it also has to be a pytree
    (`jax.tree_util.register_dataclass`).
    """

    def __call__(self, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Whether row i of head h of batch b sees key j: a 0-d bool of 0-d int32."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, b, h, i, j)")

    def check_shape(self, shape: tuple[int, int, int, int]) -> None:
        """Raises a ValueError where arrays that it holds do not have the lengths of a mask (B, H, Sq, Sk).

        Called before a mask of that shape is made. A predicate of your own that holds arrays may define it.
        """

    @property
    def is_fixed(self) -> bool:
        """Whether equal predicates always do the same, so that the predicate itself can be a cache's key."""
        return False

    def __bool__(self) -> bool:
        raise TypeError(
            f"a predicate is neither true nor false, got {self!r} where Python asks for one (and, or, not, if): "
            f"combine predicates by &, | and ~"
        )

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


def pytree(*data: str) -> Callable[[type], type]:
    """Registers a frozen dataclass as a pytree: these fields are its children, the others part of its structure."""

    def register(cls: type) -> type:
        meta = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        return jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=meta)

    return register


@pytree()
@dataclasses.dataclass(frozen=True, repr=False)
class _Function(Predicate):
    function: Callable[[Any, Any, Any, Any], Any]

    def __repr__(self) -> str:
        return names.of_function(self.function)

    def __call__(self, b, h, i, j):
        return self.function(b, h, i, j)


@dataclasses.dataclass(frozen=True)
class _OfParts(Predicate):
    parts: tuple[Predicate, ...]

    def check_shape(self, shape):
        for part in self.parts:
            part.check_shape(shape)

    @property
    def is_fixed(self):
        return all(part.is_fixed for part in self.parts)


@pytree("parts")
@dataclasses.dataclass(frozen=True)
class All(_OfParts):
    """What all parts let through."""

    def __call__(self, b, h, i, j):
        """As `Predicate` says."""
        seen = True
        for part in self.parts:
            seen = seen & evaluation.seen(part, b, h, i, j)
        return seen


@pytree("parts")
@dataclasses.dataclass(frozen=True)
class _Any(_OfParts):
    def __call__(self, b, h, i, j):
        seen = False
        for part in self.parts:
            seen = seen | evaluation.seen(part, b, h, i, j)
        return seen


@pytree("part")
@dataclasses.dataclass(frozen=True)
class _Not(Predicate):
    part: Predicate

    def check_shape(self, shape):
        self.part.check_shape(shape)

    @property
    def is_fixed(self):
        return self.part.is_fixed

    def __call__(self, b, h, i, j):
        return ~evaluation.seen(self.part, b, h, i, j)


def all_of(*predicates: ElementPredicate) -> Predicate:
    """What all of them let through: `&`; everything if there are none."""
    return _combined(All, predicates)


def any_of(*predicates: ElementPredicate) -> Predicate:
    """What any of them lets through: `|`; nothing if there are none."""
    return _combined(_Any, predicates)


def negate(predicate: ElementPredicate) -> Predicate:
    """What it does not let through: `~`."""
    part = as_predicate(predicate)
    return part.part if isinstance(part, _Not) else _Not(part)


def as_predicate(predicate: ElementPredicate, name: str = "predicate") -> Predicate:
    """`predicate` itself, or a plain function as a `Predicate`, which equals others of the same function. name: of the
    argument that it is.

    Raises:
      TypeError: it is not callable.
    """
    if isinstance(predicate, Predicate):
        return predicate
    evaluation.check_callable(predicate, name)
    return _Function(predicate)


def _combined(kind: type[All] | type[_Any], predicates: tuple[ElementPredicate, ...]) -> Predicate:
    parts = [as_predicate(predicate) for predicate in predicates]
    flat = [p for part in parts for p in (part.parts if isinstance(part, kind) else (part,))]
    return flat[0] if len(flat) == 1 else kind(tuple(flat))
