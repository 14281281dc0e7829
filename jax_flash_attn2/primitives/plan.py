"""Which mesh axes divide what of a call among devices, chosen by the bytes that move.

The axes of every array have a letter: b batch, h query heads, x key/value heads, i query rows, j keys, d and v the
widths of a row, 1 an axis along which an operand does not vary.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from ..base.arguments import accumulator

WHOLE = "*"
"""The letter of an axis along which a result does not vary, and that all devices which share the keys have all of."""


@dataclasses.dataclass(frozen=True)
class Division:
    """What there is to divide."""

    sizes: Mapping[str, int]
    """Of the letters that may be divided."""
    operands: Sequence[str]
    """The letters of each. q comes first, and has the first word."""
    results: Sequence[str]
    """The letters of each."""
    groups: int = 0
    """What a batch may be divided by where gradients are summed in groups of batches; 0: by anything."""
    merged: int | None = None
    """Of the forward pass, whose first result is merged over keys: with how many numbers of each row. None: results are
    sums, of which a device may get its part alone."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which mesh axes divide b, i, h and j, and x if key heads are divided too."""

    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, mesh: Mesh, what: Division, operands: Sequence[Any], results: Sequence[Any]) -> "Plan":
        """What moves least of what is asked for by how operands lie, and results shall lie."""
        plans = cls.possible(mesh, what, operands, results)
        return min(plans, key=lambda plan: plan.moves(what, operands, results))

    @classmethod
    def possible(cls, mesh: Mesh, what: Division, operands: Sequence[Any], results: Sequence[Any]) -> list["Plan"]:
        """Keys divided by what q leaves, keys whole, heads divided by what keys leave; of two that move as much the
        first, as it repeats no work. Rows are divided as q's are: keys are too long to have them all in one place."""
        orders = (("bih", "j"), ("bih",), ("bi", "j", "h")) if "j" in what.sizes else (("bih",),)
        arrays = [*zip(what.operands, operands, strict=True), *zip(what.results, results, strict=True)]
        return [cls(mesh, _asked(mesh, what, arrays, order), what.sizes) for order in orders]

    def spec(self, letters: str) -> PartitionSpec:
        """How an array of these letters is divided."""
        return PartitionSpec(*(self.axes.get(letter) or None for letter in letters))

    def parts(self, letter: str) -> int:
        """How many shares an axis is divided into."""
        return devices(self.mesh, self.axes[letter])

    def first(self, letter: str) -> Array:
        """The first batch, head, row or key of this device."""
        if not self.axes[letter]:
            return jnp.zeros((), jnp.int32)
        return (lax.axis_index(self.axes[letter]) * (self.sizes[letter] // self.parts(letter))).astype(jnp.int32)

    # What is summed.

    def summed(self, letters: str) -> tuple[str, ...]:
        """The axes over which what devices make of a result of these letters is summed: they do not divide it, though
        they divide the logits."""
        if "x" in letters:
            return self.axes["i"] + (self.axes["h"] if self.axes["x"] != self.axes["h"] else ())
        missing = (letter for letter in "bihj" if letter not in letters and not (letter == "j" and WHOLE in letters))
        return tuple(a for letter in missing for a in self.axes[letter])

    def made(self, what: Division, results: Sequence[Any]) -> list[tuple[tuple[str, ...], ...]]:
        """By what each axis of each result is divided."""
        if what.merged is not None:
            return [tuple(self.axes.get(letter, ()) for letter in letters) for letters in what.results]
        return [self._scattered(letters, x) for letters, x in zip(what.results, results, strict=True)]

    def _scattered(self, letters: str, asked: Any) -> tuple[tuple[str, ...], ...]:
        """Of a result that lies as it is asked for, as far as the axes over which it is summed can make it so: each
        device then gets the sum of its own part alone."""
        left, made = {*self.summed(letters)}, []
        for letter, size, names in zip(letters, asked.shape, axes_of(asked), strict=True):
            own = self.axes.get(letter, ())
            more = names[len(own) :] if names[: len(own)] == own else ()
            fits = left.issuperset(more) and size % devices(self.mesh, own + more) == 0
            made.append(own + more if fits else own)
            left -= {*made[-1]}
        return tuple(made)

    def sum(self, x: Array, letters: str, divided: Sequence[tuple[str, ...]], dtype: Any) -> Array:
        """What devices make of a result, summed in fp32 (fp64). divided: of `made`."""
        left = self.summed(letters)
        if not left:
            return x.astype(dtype)
        x = x.astype(accumulator(x.dtype))
        for axis, (letter, names) in enumerate(zip(letters, divided, strict=True)):
            more = names[len(self.axes.get(letter, ())) :]
            if more:
                x = lax.psum_scatter(x, more, scatter_dimension=axis, tiled=True)
                left = tuple(a for a in left if a not in more)
        return (lax.psum(x, left) if left else x).astype(dtype)

    # What that moves.

    def moves(self, what: Division, operands: Sequence[Any], results: Sequence[Any]) -> float:
        """Bytes that a device receives: what it lacks of its operands, what is summed, what is asked for of results and
        not made here."""
        own = [[self.axes.get(letter, ()) for letter in letters] for letters in what.operands]
        moved = sum(self._lacks(x, axes_of(x), wanted) for x, wanted in zip(operands, own, strict=True))
        of_results = [*zip(what.results, results, self.made(what, results), strict=True)]
        moved += sum(self._lacks(x, made, axes_of(x)) for _, x, made in of_results)
        if what.merged is not None:
            of_results = [of_results[0], *[of_results[1]] * what.merged]
        return moved + sum(self._reduced(*each) for each in of_results)

    def _lacks(self, x: Any, held: Sequence[tuple[str, ...]], wanted: Sequence[tuple[str, ...]]) -> float:
        """Of an array that a device holds a part of, what it does not of the part that it shall have."""
        each = x.dtype.itemsize * math.prod(x.shape)
        part = math.prod(devices(self.mesh, names) for names in wanted)
        common = math.prod(devices(self.mesh, {*a, *b}) for a, b in zip(held, wanted, strict=True))
        return each / part - each / common

    def _reduced(self, letters: str, x: Any, made: Sequence[tuple[str, ...]]) -> float:
        """Of a sum: a ring of n devices takes (n - 1) / n of an array to scatter its sums, and again to gather them."""
        own = [self.axes.get(a, ()) for a in letters]
        part = max(x.dtype.itemsize, 4) * math.prod(x.shape) / math.prod(devices(self.mesh, names) for names in own)
        scattered = [a for names, mine in zip(made, own, strict=True) for a in names[len(mine) :]]
        n = devices(self.mesh, scattered)
        rest = devices(self.mesh, [a for a in self.summed(letters) if a not in scattered])
        return part * (1 - 1 / n) + 2 * part / n * (1 - 1 / rest)


def devices(mesh: Mesh, names: Any) -> int:
    """How many parts these mesh axes make."""
    return math.prod(mesh.shape[name] for name in names)


def axes_of(x: Any) -> list[tuple[str, ...]]:
    """The mesh axes by which each axis of x is divided, as its sharding says."""
    spec = (*(getattr(x.sharding, "spec", None) or ()),)
    names = [n if isinstance(n, tuple) else () if n is None else (n,) for n in spec]
    return names + [()] * (len(x.shape) - len(names))


def _asked(
    mesh: Mesh, what: Division, arrays: Sequence[tuple[str, Any]], order: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """What the arrays' shardings ask for, as far as it goes together: of the first letters first, and of these what the
    first array asks."""
    axes: dict[str, tuple[str, ...]] = {}
    asked = [(letter, names) for letters, x in arrays for letter, names in zip(letters, axes_of(x), strict=True)]
    for turn, (letter, names) in itertools.product(order, asked):
        letter = "h" if letter == "x" else letter
        taken = {name for other in axes.values() for name in other}
        if letter == "j":  # of which the others may have taken some
            names = tuple(a for a in names if a not in taken and mesh.shape[a] > 1)
        if letter not in turn or letter not in what.sizes or not names or axes.get(letter) or taken & {*names}:
            continue
        parts = devices(mesh, names)
        if what.sizes[letter] % parts == 0 and not (letter == "b" and what.groups % parts):
            axes[letter] = names
    axes = {letter: axes.get(letter, ()) for letter in "bihj"}
    axes["x"] = axes["h"] if what.sizes["x"] % devices(mesh, axes["h"]) == 0 else ()
    return axes
