"""From a caller's Python function to a `Function` and the arrays that it reads.

Two walks over the function's jaxpr. The first, among the caller's own arrays, computes what depends on none of (score,
b, h, i, j): JAX differentiates, batches and divides that by itself. The second records the rest, as a function of these
five and of the arrays that it reads, and brings every read of an element into one form (`views.py`).
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src import source_info_util  # so that what is recorded again keeps the caller's lines
from jax.extend.core import Literal

from ..base import errors, names
from . import views
from .function import SCALARS, Function, callers_line, evaluated_equation, inner_of

ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]
"""(score, b, h, i, j) -> score, of scalars: what a caller writes."""


@dataclasses.dataclass(frozen=True)
class _Number:
    """Made of numbers in the source alone: a part of the function, computed beforehand only where that is needed."""

    eqn: Any
    inputs: tuple[Any, ...]
    place: int

    def value(self) -> Any:
        return evaluated_equation(self.eqn, [*map(_value, self.inputs)])[self.place]


_TYPES_OF_DEVICES = ("pvary", "pbroadcast")
"""Within `shard_map` these say over which devices a value differs, which is no matter to what is computed of it."""
# What the first walk says of a value that it does not compute, and of an equation that was taken apart.
_COMPUTED, _APART = object(), object()


def trace(function: Any, argument: str, dtype: Any, beside: Any = None) -> tuple[Function, list[Array]]:
    """`function(score, b, h, i, j)`, of scalars, and the arrays that it reads.

    Args:
      function: of a score in `dtype` and four int32, to a score.
      argument: what the caller calls it, for messages.
      dtype: fp32, or fp64.
      beside: an array on whose devices those must be that it reads; None: on any.

    Raises:
      TypeError: it is no such function; the message says what it is, and where in the caller's code.
      ValueError: it reads an array of another device, or of 2**31 elements.
    """
    if not callable(function):
        raise TypeError(f"{argument} must be a function (score, b, h, i, j) -> score of scalars, got {function!r}")
    _check_arity(function, argument)
    return _traced(function, argument, jnp.dtype(dtype), jnp.dtype(dtype), beside)


def _traced(function: Any, argument: str, dtype: Any, result: Any, beside: Any) -> tuple[Function, list[Array]]:
    scalars = [jax.ShapeDtypeStruct((), dtype), *[jax.ShapeDtypeStruct((), jnp.int32)] * 4]

    def anew(*args: Any) -> Any:  # JAX keeps what it traced, by function
        try:
            return function(*args)
        except errors.UNTRACEABLE as error:
            what = f"{argument}, {names.of_function(function)},"
            raise errors.untraceable_error(what, "a score and indices", error) from error

    with jax.numpy_rank_promotion("allow"):
        closed = jax.make_jaxpr(anew)(*scalars)
        _check(closed, argument, result, function)
        walk = _Walk()
        results = walk.beforehand(closed.jaxpr, closed.consts, [_COMPUTED] * len(SCALARS))
        walk.use(results)
        walk.check_arrays(argument, beside)
        arrays = [x if isinstance(x, Array) else jax.device_put(x) for x in walk.used]
        arrays = [x.reshape(1) if x.ndim == 0 else x for x in arrays]
        again = lambda *args: walk.again(closed.jaxpr, closed.consts, args[: len(SCALARS)], args[len(SCALARS) :])
        made = jax.make_jaxpr(again)(*scalars, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    return Function(made.jaxpr), arrays


def trace_mask(predicate: Callable[..., Any], argument: str, beside: Any = None) -> tuple[Function, list[Array]]:
    """`trace` of (b, h, i, j) -> bool, which has been checked: a function that looks at no score."""
    given = lambda score, *place: predicate(*place)
    return _traced(given, argument, jnp.dtype(jnp.float32), jnp.dtype(bool), beside)


def _check_arity(function: Any, argument: str) -> None:
    try:
        inspect.signature(function).bind(*SCALARS)
    except TypeError as error:
        raise TypeError(
            f"{argument} must take five arguments, (score, b, h, i, j), got {names.of_function(function)}: {error}"
        ) from error
    except ValueError:  # it has no signature
        pass


def _check(closed: Any, argument: str, dtype: Any, function: Any) -> None:
    for eqn in closed.jaxpr.eqns:
        if eqn.effects:
            raise TypeError(
                f"{argument} has a side effect, {eqn.primitive.name} ({callers_line(eqn)}): it is computed of every "
                "logit, in no order, and again in the backward pass; leave it out"
            )
    if [(x.shape, x.dtype) for x in closed.out_avals] != [((), dtype)]:
        got = ", ".join(f"{np.dtype(x.dtype).name}{[*x.shape]}" for x in closed.out_avals) or "nothing"
        line = f" ({callers_line(closed.jaxpr.eqns[-1])})" if closed.jaxpr.eqns else ""
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"{argument} must return one scalar of {dtype.name}, and {name} returned {got}{line}")


class _Walk:
    """What the first walk found, for the second."""

    def __init__(self):
        self.used: list[Any] = []
        """The arrays that the function reads."""
        self._readers: list[Any] = []
        self._found: list[Any] = []
        """What became of each equation, in the order in which they are met."""
        self._replay: Iterator[Any] = iter(())
        self._arrays: Sequence[Any] = ()

    def use(self, values: Sequence[Any], reader: Any = None) -> None:
        """Notes the arrays among values that an equation reads."""
        for x in values:
            if _is_array(x) and not any(known is x for known in self.used):
                self.used.append(x)
                self._readers.append(reader)

    def check_arrays(self, argument: str, beside: Any) -> None:
        """Raises unless all arrays are where that one is (those that are being traced, or bound to no device, are), and
        int32 counts their elements."""
        there = _devices(beside)
        for x, reader in zip(self.used, self._readers, strict=True):
            if math.prod(np.shape(x)) >= 2**31:
                raise ValueError(
                    f"{argument} reads an array of 2**31 elements or more, {np.shape(x)} ({callers_line(reader)})"
                )
            own = _devices(x)
            if own is not None and there is not None and own != there:
                raise ValueError(
                    f"{argument} reads an array of shape {x.shape} on {sorted(map(str, own))} "
                    f"({callers_line(reader)}), and q is on {sorted(map(str, there))}; jax.device_put it there"
                )

    # The first walk.

    def beforehand(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """What is known of a jaxpr's results."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
        for eqn in jaxpr.eqns:
            inputs = [_literal(v) if isinstance(v, Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, self._beforehand(eqn, inputs), strict=True))
        return [_literal(v) if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def _beforehand(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        computed = [_COMPUTED] * len(eqn.outvars)
        if any(x is _COMPUTED for x in inputs):
            inner = inner_of(eqn)
            branches = eqn.params["branches"] if eqn.primitive.name == "cond" else ()
            if inner is None and not branches:
                self.use(inputs, eqn)
                self._found.append(computed)
                return computed
            self._found.append(_APART)
            if inner is not None:
                return self.beforehand(*inner, inputs)
            self.use(inputs[:1], eqn)
            for branch in branches:
                self.use(self.beforehand(branch.jaxpr, branch.consts, inputs[1:]), eqn)
            return computed
        if all(map(_is_number, inputs)) and all(v.aval.shape == () for v in eqn.outvars):
            results: list[Any] = [_Number(eqn, tuple(inputs), n) for n in range(len(eqn.outvars))]
        else:
            results = evaluated_equation(eqn, [*map(_value, inputs)])
        self._found.append(results)
        return results

    # The second.

    def again(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], arrays: Sequence[Any]) -> Any:
        """The result, of the arguments and of the arrays in `used`."""
        self._replay, self._arrays = iter(self._found), arrays
        try:
            (result,) = self._again(jaxpr, constants, arguments)
            return views.plain(self._operand(result))
        finally:  # tracers must not outlive their trace
            self._replay, self._arrays = iter(()), ()

    def _again(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
        for eqn in jaxpr.eqns:
            inputs = [_literal(v) if isinstance(v, Literal) else env[v] for v in eqn.invars]
            with source_info_util.user_context(eqn.source_info.traceback):
                env.update(zip(eqn.outvars, self._recorded(eqn, inputs), strict=True))
        return [_literal(v) if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def _recorded(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        found = next(self._replay)
        if found is _APART:
            inner = inner_of(eqn)
            if inner is not None:
                return self._again(*inner, inputs)
            return self._chosen(eqn.params["branches"], inputs)
        if not (found and (found[0] is _COMPUTED or isinstance(found[0], _Number))):
            return found
        inputs = [*map(self._operand, inputs)]
        if eqn.primitive.name in _TYPES_OF_DEVICES:
            return inputs
        if inputs and isinstance(inputs[0], views.View):
            view = views.narrowed(eqn, inputs[0], [*map(views.plain, inputs[1:])])
            if view is not None:
                return [view]
        return evaluated_equation(eqn, [*map(views.plain, inputs)])

    def _chosen(self, branches: Sequence[Any], inputs: list[Any]) -> list[Any]:
        """A `cond` or `switch`: every branch is computed, and one of them taken."""
        which = views.plain(self._operand(inputs[0]))
        made = [self._again(branch.jaxpr, branch.consts, inputs[1:]) for branch in branches]
        which = lax.clamp(np.int32(0), lax.convert_element_type(which, jnp.int32), np.int32(len(branches) - 1))
        which = which != 0 if len(branches) == 2 else which
        cases = ([views.plain(self._operand(x)) for x in outcomes] for outcomes in zip(*made, strict=True))
        return [lax.select_n(which, *map(jnp.asarray, x)) if len(x) > 1 else x[0] for x in cases]

    def _operand(self, x: Any) -> Any:
        """A value of the second walk: an array that was there beforehand is one of the arguments."""
        if not _is_array(x) or isinstance(x, views.View):
            return x
        n = next((n for n, known in enumerate(self.used) if known is x), None)
        return x if n is None else views.View.of(self._arrays[n], np.ndim(x))


def _devices(x: Any) -> frozenset[Any] | None:
    """Of an array that is there, and bound to them."""
    if not isinstance(x, Array) or isinstance(x, jax.core.Tracer) or not x.committed:
        return None
    return frozenset(x.devices())


def _literal(v: Any) -> Any:
    return v.val if np.ndim(v.val) else np.asarray(v.val, v.aval.dtype)[()]


def _is_number(x: Any) -> bool:
    return isinstance(x, _Number | np.generic)


def _is_array(x: Any) -> bool:
    return x is not _COMPUTED and not _is_number(x)


def _value(x: Any) -> Any:
    return x.value() if isinstance(x, _Number) else x
