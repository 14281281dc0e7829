"""A function of JAX scalars as the source of a Triton function. Knows jaxprs and Triton's language, and nothing else.

`translate(f)` walks the jaxpr of f(score, b, h, i, j). What does not depend on these five is computed by JAX, before
the kernel, and handed to it as arrays; each of the other equations becomes a line. Scalars become tiles by themselves:
Triton broadcasts. The text is made of templates (`elementwise.py`), of numbers, and of the names of arguments: nothing
that is in an array can reach it.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import source_info_util
from jax.extend.core import Literal

from . import elementwise
from .elementwise import REDUCTIONS, TYPES, Scalar, chosen, is_number, number, place_of_largest

ARGUMENTS = ("score", "b", "h", "i", "j")
"""What the function is given: an fp32 score, and int32 numbers of batch, head, row and key."""

_STORED = ("float16", "bfloat16")
"""What an array may hold besides `TYPES`: it is read, and made fp32."""
_CALLS = {"pjit": "jaxpr", "jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat": "jaxpr"}
_CALLS |= {"checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call_jaxpr": "fun_jaxpr"}
_WHOLE = ("exp_neg_sq",)
"""Functions of JAX's own that are made of bits (jax 0.12's derivative of erf), by name."""
_SHAPES = ("squeeze", "reshape", "broadcast_in_dim", "expand_dims")


@dataclasses.dataclass(frozen=True)
class Translation:
    """A function, translated."""

    source: str
    """`def NAME(score, b, h, i, j, x)`; x: pointers to `arrays`."""
    arrays: tuple[Array, ...]
    """What it reads: arrays that the function closes over, or that JAX made of them. Row-major."""


@dataclasses.dataclass(frozen=True)
class _Vector:
    """A few of them, in an array of this shape: the indices of an element, mostly."""

    items: tuple[Scalar, ...]
    shape: tuple[int, ...]


_Known = Array | np.ndarray
"""What depends on none of the arguments: JAX computes it."""


def translate(function: Callable[..., Any], name: str = "score_mod", *, argument: str = "score_mod") -> Translation:
    """The Triton source of `function(score, b, h, i, j)`.

    Args:
      function: of an fp32 and four int32 scalars, to one; may close over arrays, traced ones too, and index them.
      name: of the Triton function.
      argument: what the caller calls it, for messages.

    Raises:
      TypeError: it cannot be traced like that, or uses something that has no translation; the message says what, where
        in the caller's code, and what to do.
    """
    scalars = [jax.ShapeDtypeStruct((), jnp.float32)] + [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    closed = jax.make_jaxpr(function)(*scalars)
    writer = _Writer(argument)
    given = [Scalar(n, np.dtype(x.dtype)) for n, x in zip(ARGUMENTS, scalars, strict=True)]
    results = writer.walk(closed.jaxpr, closed.consts, given)
    if len(results) != 1 or _shape(results[0]) != ():
        raise TypeError(f"{argument} must return one scalar, got {len(results)} of shapes {[*map(_shape, results)]}")
    result = writer.scalar(results[0])
    body = "".join(f"    {line}\n" for line in [*writer.lines, f"return {result.text}"])
    return Translation(f"def {name}({', '.join(ARGUMENTS)}, x):\n{body}", tuple(writer.arrays))


class _Writer:
    """Lines, and the arrays that they read."""

    def __init__(self, argument: str):
        self.argument = argument
        self.lines: list[str] = []
        self.arrays: list[Any] = []
        self._names: Iterator[str] = (f"t{n}" for n in itertools.count())

    def walk(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The values of a jaxpr's results."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
        for eqn in jaxpr.eqns:
            inputs = [_literal(v) if isinstance(v, Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [_literal(v) if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """The values of one equation's results."""
        name = eqn.primitive.name
        if eqn.effects:
            raise self.refusal(eqn, "has a side effect")
        if all(isinstance(x, _Known) or is_number(x) for x in inputs):
            known = [x.number if isinstance(x, Scalar) else x for x in inputs]
            if not all(map(is_number, inputs)):
                return _computed(eqn, known)
            with jax.ensure_compile_time_eval():  # now, under jit too
                made = _computed(eqn, known)
            return [number(x) if x.shape == () else x for x in made]
        if name in _CALLS:
            inner = eqn.params[_CALLS[name]]
            jaxpr, constants = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            if _function(jaxpr) in _WHOLE:
                text = elementwise.expression(_function(jaxpr), {}, [*map(self.scalar, inputs)])
                return [self.line(eqn, text or "")]
            return self.walk(jaxpr, constants, inputs)
        if name == "cond":
            return self.branches(eqn, inputs)
        if name in _SHAPES:
            return [self.reshaped(eqn, inputs[0])]
        if name in ("concatenate", "stack"):
            items = tuple(item for x in inputs for item in self.vector(x).items)
            return [_Vector(items, eqn.outvars[0].aval.shape)]
        if name in ("argmax", "argmin"):
            return [self.largest(eqn, self.vector(inputs[0]).items)]
        if name in REDUCTIONS:
            return [self.reduced(eqn, self.vector(inputs[0]).items)]
        if name in ("dynamic_slice", "gather"):
            return [self.element(eqn, inputs)]
        if any(_shape(x) != () for x in inputs):
            return [self.each(eqn, inputs)]
        return [self.line(eqn, self.expression(eqn, [*map(self.scalar, inputs)]))]

    def line(self, eqn: Any, text: str) -> Scalar:
        """A name for an expression, with the caller's line beside it."""
        dtype = np.dtype(eqn.outvars[0].aval.dtype)
        reads = eqn.primitive.name in ("dynamic_slice", "gather")
        if dtype.name not in TYPES and not (reads and dtype.name in _STORED):
            raise self.refusal(eqn, f"makes {dtype.name}, where a kernel has {', '.join(TYPES)}")
        name = next(self._names)
        self.lines.append(f"{name} = {text}  # {_where(eqn)}")
        return Scalar(name, dtype)

    def expression(self, eqn: Any, inputs: Sequence[Scalar]) -> str:
        """What an elementwise equation computes."""
        if (made := np.dtype(eqn.outvars[0].aval.dtype).name) not in TYPES:
            raise self.refusal(eqn, f"makes {made}, where a kernel has {', '.join(TYPES)}")
        text = elementwise.expression(eqn.primitive.name, eqn.params, inputs)
        if text is None:
            raise self.refusal(eqn, "has no translation into a kernel")
        return text

    def branches(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """A `cond` or `switch`: every branch is computed, and one of them taken."""
        which, *operands = inputs
        index = self.scalar(which)
        results = [self.walk(branch.jaxpr, branch.consts, operands) for branch in eqn.params["branches"]]
        made = []
        for n, outcomes in enumerate(zip(*results, strict=True)):
            text = chosen(index, [*map(self.scalar, outcomes)])
            dtype = np.dtype(eqn.outvars[n].aval.dtype)
            name = next(self._names)
            self.lines.append(f"{name} = {text}  # {_where(eqn)}")
            made.append(Scalar(name, dtype))
        return made

    def reshaped(self, eqn: Any, x: Any) -> Any:
        """The same elements in another shape."""
        shape, vector = eqn.outvars[0].aval.shape, self.vector(x)
        if math.prod(shape) != len(vector.items):
            if len(vector.items) != 1 or math.prod(shape) > 8:
                raise self.refusal(eqn, f"makes an array of shape {shape}, where a kernel has scalars")
            vector = _Vector(vector.items * math.prod(shape), shape)
        return vector.items[0] if shape == () else _Vector(vector.items, shape)

    def each(self, eqn: Any, inputs: list[Any]) -> _Vector:
        """An elementwise equation of a few elements."""
        shape = eqn.outvars[0].aval.shape
        vectors = [self.vector(x).items for x in inputs]
        if {len(x) for x in vectors} - {1, math.prod(shape)}:
            raise self.refusal(eqn, f"makes an array of shape {shape}, where a kernel has scalars")
        columns = [x * math.prod(shape) if len(x) == 1 else x for x in vectors]
        return _Vector(tuple(self.line(eqn, self.expression(eqn, [*row])) for row in zip(*columns, strict=True)), shape)

    def largest(self, eqn: Any, items: Sequence[Scalar]) -> Scalar:
        """The place of the first of the largest, or least, of a few elements."""
        return self.line(eqn, place_of_largest(items, ">" if eqn.primitive.name == "argmax" else "<"))

    def reduced(self, eqn: Any, items: Sequence[Scalar]) -> Scalar:
        """A few elements made one."""
        if eqn.outvars[0].aval.shape != ():
            raise self.refusal(eqn, "makes an array, where a kernel has scalars")
        template = REDUCTIONS[eqn.primitive.name]
        return self.line(eqn, functools.reduce(template.format, [x.text for x in items]))

    def element(self, eqn: Any, inputs: list[Any]) -> Any:
        """One element of an array: `array[h, i - j]`, by JAX's rules for what is out of range."""
        array, *where = inputs
        if not isinstance(array, _Known):
            raise self.refusal(eqn, "indexes what depends on score, b, h, i or j; index an array of its own")
        if math.prod(eqn.outvars[0].aval.shape) != 1 or math.prod(eqn.params["slice_sizes"]) != 1:
            raise self.refusal(eqn, "takes more than one element at a time; index every axis: table[h, i - j]")
        numbers = [item for x in where for item in self.vector(x).items]
        fill = None
        if eqn.primitive.name == "gather":
            axes, mode = eqn.params["dimension_numbers"].start_index_map, eqn.params["mode"]
            by_axis = dict(zip(axes, numbers, strict=True))
            numbers = [by_axis.get(axis, number(np.int32(0))) for axis in range(array.ndim)]
            if mode == lax.GatherScatterMode.FILL_OR_DROP:
                fill = _fill(eqn.params["fill_value"], array.dtype)
        text = self.load(eqn, array, numbers, fill)
        found = self.line(eqn, text)
        shape = eqn.outvars[0].aval.shape
        return found if shape == () else _Vector((found,), shape)

    def load(self, eqn: Any, array: Any, numbers: list[Scalar], fill: Scalar | None) -> str:
        """The text that reads array[numbers]: out of range the nearest element, or `fill`."""
        at = self.operand(eqn, array)
        wide = ".to(tl.int64)" if array.size >= 2**31 else ""
        strides = [math.prod(array.shape[k + 1 :]) for k in range(array.ndim)]
        near = [f"tl.minimum(tl.maximum({x.text}, 0), {n - 1})" for x, n in zip(numbers, array.shape, strict=True)]
        terms = [f"{x}{wide} * {s}" if s != 1 else x for x, s in zip(near, strides, strict=True)]
        text = f"tl.load(x[{at}] + ({' + '.join(terms) or '0'}))"
        text = f"({text} != 0)" if array.dtype.name == "bool" else text
        if fill is not None:
            inside = [f"({x.text} >= 0) & ({x.text} < {n})" for x, n in zip(numbers, array.shape, strict=True)]
            text = f"tl.where({' & '.join(inside)}, {text}, {fill.text})"
        return text

    def operand(self, eqn: Any, array: Any) -> int:
        """The place of an array among those that are read."""
        if np.dtype(array.dtype).name not in (*TYPES, *_STORED):
            raise self.refusal(eqn, f"reads an array of {array.dtype}, where a kernel has {', '.join(TYPES)}")
        for n, known in enumerate(self.arrays):
            if known is array:
                return n
        self.arrays.append(array)
        return len(self.arrays) - 1

    def scalar(self, x: Any) -> Scalar:
        """A value as one of the kernel's."""
        if isinstance(x, Scalar):
            return x
        if isinstance(x, _Vector):
            (item,) = x.items
            return item
        assert x.ndim == 0, "an array was taken for one of its elements"
        at = self.operand(None, x)
        name = next(self._names)
        self.lines.append(f"{name} = tl.load(x[{at}])" + (" != 0" if x.dtype.name == "bool" else ""))
        return Scalar(name, np.dtype(x.dtype))

    def vector(self, x: Any) -> _Vector:
        """A value as a few of the kernel's."""
        if isinstance(x, _Vector):
            return x
        if isinstance(x, _Known) and x.ndim:
            return _Vector(tuple(self.scalar(x.reshape(-1)[n]) for n in range(x.size)), x.shape)
        return _Vector((self.scalar(x),), ())

    def refusal(self, eqn: Any, why: str) -> TypeError:
        """What is raised for what cannot be translated."""
        return TypeError(
            f"{self.argument} uses {eqn.primitive.name}, which {why} ({_where(eqn)}); write it another way, or pass "
            f'implementation="xla", which runs every function'
        )


def _literal(v: Any) -> Scalar | np.ndarray:
    value = np.asarray(v.val, v.aval.dtype)
    return number(value) if value.shape == () else value


def _shape(x: Any) -> tuple[int, ...]:
    return () if isinstance(x, Scalar) else x.shape


def _computed(eqn: Any, inputs: list[Any]) -> list[Any]:
    """By JAX."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # the latter from jax 0.11 on
    made = eqn.primitive.bind(*functions, *map(jnp.asarray, inputs), **params)
    return [*made] if eqn.primitive.multiple_results else [made]


def _fill(value: Any, dtype: Any) -> Scalar:
    """What a gather gives out of range."""
    if value is None:
        kind = np.dtype(dtype)
        value = np.nan if jnp.issubdtype(kind, jnp.floating) else False if kind.name == "bool" else jnp.iinfo(kind).min
    return number(np.asarray(value, np.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype))


def _function(jaxpr: Any) -> str:
    """What the function is called that a jaxpr is of, if JAX wrote it."""
    info = getattr(jaxpr, "debug_info", None)
    file = getattr(info, "func_filename", None) or ""
    return getattr(info, "func_name", "") if file.startswith(os.path.dirname(jax.__file__)) else ""


def _where(eqn: Any) -> str:
    """The caller's line."""
    text = source_info_util.summarize(eqn.source_info) if eqn is not None else "unknown"
    return "".join(c if c.isprintable() else "?" for c in text) or "JAX keeps no line of it"


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def jitted(source: str) -> Any:
    """The `triton.JITFunction` of a translation's source: the same text, the same function."""
    import linecache

    import triton

    filename = f"<translated {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {**elementwise.names(), "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[source[4 : source.index("(")]])
