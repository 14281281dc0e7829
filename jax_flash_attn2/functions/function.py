"""A function of one logit and its place, as a part of a call: what it is, and what is made of it.

A `Function` is a jaxpr of (score, b, h, i, j, *arrays) that reads arrays by elements (`views.element`). What it makes
of a score, its derivatives, and where it reads are functions of the same scalars, which the XLA path maps over a tile
and `gpu.translate` writes as Triton source.

Under `vmap` the batch of a call is that of several: batch b of them all is batch `b % Function.batch` of the call
`b // Function.batch`. So an array gets one axis more in front, of length n: call g reads `array[g % n]`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import source_info_util
from jax.extend.core import Literal

from ..base import axes
from . import views
from .keys import key_of

SCALARS = ("score", "b", "h", "i", "j")

_LIGHT = {"add", "sub", "mul", "neg", "abs", "max", "min", "clamp", "sign", "floor", "convert_element_type"}
_LIGHT |= {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "select_n"}
_SHAPES = {"squeeze", "reshape", "stack", "concatenate", "slice", "broadcast_in_dim"}
_LIGHT |= {"gather", *_SHAPES}
"""What costs little beside a product."""

_CALLS = {"jit": "jaxpr", "remat2": "jaxpr"}
_RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Read(NamedTuple):
    """One read of an element of a floating array, whose gradient it is a part of."""

    array: int
    """Which of the function's arrays."""
    varies: frozenset[str]
    """Which of `SCALARS` decide which element."""
    relative: bool
    """Whether i and j decide by their difference alone."""


class Bound(NamedTuple):
    """A function with its arrays: of scalars (score, b, h, i, j)."""

    value: Callable[..., Any]
    """To the score that it makes."""
    slope: Callable[..., Any]
    """To that one's derivative by the score."""
    given: Callable[..., Any]
    """To value, from (score, *elements, b, h, i, j), with what each of `Function.reads` reads."""
    elements: Callable[..., Any]
    """To what each of them reads, a tuple."""
    slopes: Callable[..., Any]
    """To its derivatives by each of `Function.reads`, a tuple."""
    places: Callable[..., Any]
    """To the element that each of `Function.reads` reads: a tuple of tuples of int32, the call first."""


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function of (score, b, h, i, j), and of arrays. Equal ones compute the same, wherever they were traced."""

    jaxpr: Any
    batch: int = 1
    """How many batches b counts."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def spelled_as(self) -> tuple[Any, ...]:
        """What `base.spelling` knows it by."""
        return self._key

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        """What it computes, and its derivatives if it has functions whose derivatives are given (`jax.custom_jvp`)."""
        key = (self.batch, key_of(self.jaxpr))
        if not self.has_rules or self.jaxpr.outvars[0].aval.dtype == jnp.bool_:
            return key
        args = [v.aval for v in self.jaxpr.invars]
        n = len(SCALARS)
        of = lambda x: self.bound(x[n:], False, False)
        slopes = [lambda *x: of(x).slope(*x[:n]), lambda *x: of(x).slopes(*x[:n])]
        return (*key, *(key_of(jax.make_jaxpr(f)(*args).jaxpr) for f in slopes))

    @property
    def arrays(self) -> int:
        """How many arrays it reads."""
        return len(self.jaxpr.invars) - len(SCALARS)

    @property
    def has_rules(self) -> bool:
        """Whether it has functions whose derivatives are given (`jax.custom_jvp`): equal ones have equal first
        derivatives, no more."""
        return _has_rules(self.jaxpr)

    def bound(self, arrays: Sequence[Any], mapped: bool, grouped: bool = True) -> Bound:
        """With its arrays.

        Args:
          arrays: `[n, ...]` each; `[...]` if not grouped. One of half precision may come in fp32: a gradient by it then
            is summed in that.
          mapped: whether there are more batches than `batch`.
          grouped: see arrays.
        """

        def evaluated(read: Callable[..., Any]) -> Callable[..., Any]:
            """The function, each of its reads done by `read(array, index, ordinary)`."""

            def function(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                call = np.int32(0)
                if mapped:
                    call, b = lax.div(b, np.int32(self.batch)), lax.rem(b, np.int32(self.batch))

                def own(n: int) -> list[Any]:
                    length = arrays[n].shape[0]
                    return [lax.rem(call, np.int32(length)) if mapped and length > 1 else np.int32(0)] * grouped

                dtype = lambda n: self.jaxpr.invars[len(SCALARS) + n].aval.dtype
                whole = lambda n: (arrays[n][own(n)[0]] if grouped else arrays[n]).astype(dtype(n))
                return self._evaluated((score, b, h, i, j), lambda n, index: read(n, [*own(n), *index]), whole)

            return function

        value = evaluated(lambda n, index: views.element(arrays[n], index))

        def given(score: Any, *rest: Any) -> Any:
            waiting = iter(rest[: len(self.reads)])
            read = lambda n, index: next(waiting) if self._is_float(n) else views.element(arrays[n], index)
            return evaluated(read)(score, *rest[len(self.reads) :])

        def places(*scalars: Any) -> tuple[Any, ...]:
            found: list[Any] = []

            def read(n: int, index: list[Any]) -> Any:
                if self._is_float(n):
                    found.append(tuple(index))
                return views.element(arrays[n], index)

            evaluated(read)(*scalars)
            return tuple(found)

        def elements(*scalars: Any) -> tuple[Any, ...]:
            at = zip(self._floats, places(*scalars), strict=True)
            return tuple(views.element(arrays[n], index) for n, index in at)

        def slopes(score: Any, *place: Any) -> tuple[Any, ...]:
            reads = tuple(x.astype(score.dtype) for x in elements(score, *place))
            return jax.grad(given, range(1, 1 + len(reads)))(score, *reads, *place) if reads else ()

        return Bound(value, jax.grad(value), given, elements, slopes, places)

    @functools.cached_property
    def _floats(self) -> tuple[int, ...]:
        """The array of each read of a floating one."""
        return tuple(read.array for read in self.reads)

    def _is_float(self, n: int) -> bool:
        return jnp.issubdtype(self.jaxpr.invars[len(SCALARS) + n].aval.dtype, jnp.floating)

    def _is_read(self, eqn: Any) -> bool:
        arrays = self.jaxpr.invars[len(SCALARS) :]
        return (
            eqn.primitive.name == "gather"
            and any(eqn.invars[0] is v for v in arrays)
            and eqn.params["mode"] == lax.GatherScatterMode.PROMISE_IN_BOUNDS
            and eqn.outvars[0].aval.shape == ()
        )

    @functools.cached_property
    def reads(self) -> tuple[Read, ...]:
        """The reads of floating arrays."""
        return tuple(read for read in self.every_read if self._is_float(read.array))

    def _varies(self) -> dict[Any, "_Varies"]:
        """What each value depends on."""
        varies = dict(zip(self.jaxpr.invars, map(_Varies.of, SCALARS), strict=False))
        for eqn in self.jaxpr.eqns:
            inputs = [_Varies() if isinstance(v, Literal) else varies.get(v, _Varies()) for v in eqn.invars]
            own = _Varies.of_equation(eqn, inputs)
            varies.update(dict.fromkeys(eqn.outvars, own))
        return varies

    @functools.cached_property
    def every_read(self) -> tuple[Read, ...]:
        """The reads of all arrays."""
        found, varies = [], self._varies()
        for eqn in self.jaxpr.eqns:
            if self._is_read(eqn):
                own = varies[eqn.outvars[0]]
                found.append(Read(self.jaxpr.invars.index(eqn.invars[0]) - len(SCALARS), own.by, own.relative))
        return tuple(found)

    @functools.cached_property
    def per_element(self) -> int:
        """How many operations it takes for each pair of row and key; what it makes of one of them is shared by many."""
        varies = self._varies()
        both = [eqn for eqn in self.jaxpr.eqns if {"i", "j"} <= varies[eqn.outvars[0]].by]
        return sum(eqn.primitive.name not in _SHAPES for eqn in both)

    @functools.cached_property
    def heavy(self) -> bool:
        """Whether a tile of it takes as many registers as a second tile of logits: it reads one, or computes more than
        a few sums and products."""
        names = [eqn.primitive.name for eqn in self.jaxpr.eqns]
        return any({"i", "j"} <= read.varies for read in self.every_read) or not _LIGHT.issuperset(names)

    @functools.cached_property
    def whole(self) -> tuple[int, ...]:
        """The floating arrays that are not only read by elements."""
        found = set()
        for eqn in self.jaxpr.eqns:
            if not self._is_read(eqn):
                found |= {n for n, v in enumerate(self.jaxpr.invars[len(SCALARS) :]) if any(v is x for x in eqn.invars)}
        return tuple(sorted(n for n in found if self._is_float(n)))

    def _evaluated(self, scalars: Sequence[Any], read: Callable[..., Any], whole: Callable[..., Any]) -> Any:
        """Its value. read: (number of an array, index) -> element; whole: number -> array."""
        env: dict[Any, Any] = dict(zip(self.jaxpr.invars, scalars, strict=False))
        at = {v: n for n, v in enumerate(self.jaxpr.invars[len(SCALARS) :])}
        wider: dict[Any, Any] = {}  # elements of half precision, where fp32 is given for them

        def get(v: Any) -> Any:
            if isinstance(v, Literal):
                return v.val
            if v in wider:
                return wider[v].astype(v.aval.dtype)
            return whole(at[v]) if v in at else env[v]

        for eqn in self.jaxpr.eqns:
            with source_info_util.user_context(eqn.source_info.traceback):
                if self._is_read(eqn):
                    index = get(eqn.invars[1])
                    each = [lax.index_in_dim(index, k, keepdims=False) for k in range(index.shape[0])]
                    results = [read(at[eqn.invars[0]], each)]
                    if results[0].dtype != eqn.outvars[0].aval.dtype:
                        wider[eqn.outvars[0]] = results[0]
                elif eqn.primitive.name == "convert_element_type" and _is_given(eqn, wider):
                    results = [wider[eqn.invars[0]]]
                else:
                    results = evaluated_equation(eqn, [*map(get, eqn.invars)])
            env.update(zip(eqn.outvars, results, strict=True))
        return get(self.jaxpr.outvars[0])


def _is_given(eqn: Any, wider: dict[Any, Any]) -> bool:
    (x,) = eqn.invars
    return not isinstance(x, Literal) and x in wider and wider[x].dtype == eqn.params["new_dtype"]


def _has_rules(jaxpr: Any) -> bool:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = (x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else [p]))
        if eqn.primitive.name in _RULES or any(hasattr(x, "eqns") and _has_rules(x) for x in inner):
            return True
    return False


def evaluated_equation(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The results of an equation of other inputs, which within `shard_map` need not vary alike."""
    inputs = axes.vary_alike([*inputs])
    results = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return [*results] if eqn.primitive.multiple_results else [results]


def inner_of(eqn: Any, rules: bool = False) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr of a call, and its constants. rules: of a function with a derivative of its own too."""
    name = _CALLS.get(eqn.primitive.name) or (_RULES.get(eqn.primitive.name) if rules else None)
    if name is None:
        return None
    inner = eqn.params[name]
    return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())


def callers_line(eqn: Any) -> str:
    """The caller's line."""
    text = source_info_util.summarize(eqn.source_info) if eqn is not None else "unknown"
    return "".join(c if c.isprintable() else "?" for c in text) or "JAX keeps no line of it"


class _Varies(NamedTuple):
    """What a value depends on."""

    by: frozenset[str] = frozenset()
    """Which of `SCALARS`."""
    relative: bool = True
    """i and j by their difference alone, if at all."""
    shifted: bool = False
    """It is one of i and j, plus what depends on nothing."""

    @classmethod
    def of(cls, name: str) -> "_Varies":
        return cls(frozenset([name]), name not in "ij", name in "ij")

    @classmethod
    def of_equation(cls, eqn: Any, inputs: Sequence["_Varies"]) -> "_Varies":
        by: frozenset[str] = frozenset().union(*(x.by for x in inputs))
        name = eqn.primitive.name
        difference = name == "sub" and all(x.shifted for x in inputs) and by == {"i", "j"}
        dependent = [x for x in inputs if x.by]
        moved = len(dependent) == 1 and dependent[0].shifted and (name == "add" or (name == "sub" and inputs[0].by))
        return cls(by, difference or all(x.relative for x in inputs), bool(moved))
