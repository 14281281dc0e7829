"""A function of JAX scalars as the source of a Triton function. Knows jaxprs and Triton's language, and nothing else.

`translate(f, arrays)` walks the jaxpr of f(score, b, h, i, j, *arrays), and each equation becomes a line. Scalars
become tiles by themselves: Triton broadcasts. The text is made of templates (`elementwise.py`), of numbers that are in
the caller's source, and of the names of arguments: nothing that is in an array can reach it.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal

from ..functions.function import SCALARS, callers_line, evaluated_equation, inner_of
from . import elementwise
from .elementwise import REDUCTIONS, TYPES, Scalar, chosen, is_number, number, place_of_largest

_STORED = ("float16", "bfloat16")
"""What an array may hold besides `TYPES`: it is read, and made fp32."""
_WHOLE = ("exp_neg_sq",)
"""Functions of JAX's own that are made of bits (jax 0.12's derivative of erf), by name."""
_SHAPES = ("squeeze", "reshape", "broadcast_in_dim")


@dataclasses.dataclass(frozen=True)
class _Vector:
    """A small array, element by element."""

    items: tuple[Scalar, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Given:
    """One of the arrays."""

    at: int
    shape: tuple[int, ...]
    dtype: np.dtype


def translate(
    function: Callable[..., Any], arrays: Sequence[Any], name: str = "score_mod", *, argument: str = "score_mod",
    places: bool = True,
) -> str:  # fmt: skip
    """The Triton source of a function: `def NAME(score, b, h, i, j, x)`, x being pointers to row-major arrays.

    Args:
      function: of an fp32 and four int32 scalars, and of arrays, to one scalar. It reads arrays by elements.
      arrays: their shapes and dtypes.
      name: of the Triton function.
      argument: what the caller calls it, for messages.
      places: whether the file and line of the caller's code stand behind each line.

    Raises:
      TypeError: it uses something that has no translation; the message says what, where in the caller's code, and what
        to do.
    """
    scalars = [jax.ShapeDtypeStruct((), jnp.float32)] + [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    closed = jax.make_jaxpr(function)(*scalars, *arrays)
    given = [Scalar(n, np.dtype(x.dtype)) for n, x in zip(SCALARS, scalars, strict=True)]
    given += [_Given(n, x.shape, np.dtype(x.dtype)) for n, x in enumerate(arrays)]
    writer = _Writer(argument, places)
    (result,) = writer.walk(closed.jaxpr, closed.consts, given)
    result = writer.scalar(result)
    lines = _needed(writer.lines, result.text)
    body = "".join(f"    {line}\n" for line in [*lines, f"return {result.text}"])
    return f"def {name}({', '.join(SCALARS)}, x):\n{body}"


def is_one(source: str) -> bool:
    """Whether a source says that the function is 1, whatever it is given."""
    return source.partition("\n")[2].strip() == "return 1.0"


def _needed(lines: Sequence[str], result: str) -> list[str]:
    """The lines that the result depends on."""
    needed, names = [], set(re.findall(r"\bt\d+\b", result))
    for line in reversed(lines):
        name, _, text = line.partition(" = ")
        if name in names:
            needed.append(line)
            names |= set(re.findall(r"\bt\d+\b", text.partition("  # ")[0]))
    return needed[::-1]


class _Writer:
    """Lines, and their names."""

    def __init__(self, argument: str, places: bool):
        self.argument, self.places = argument, places
        self.lines: list[str] = []
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
        if all(map(is_number, inputs)) and all(v.aval.shape == () for v in eqn.outvars):
            with jax.ensure_compile_time_eval():  # now, under jit too
                return [number(x) for x in evaluated_equation(eqn, [jnp.asarray(x.number) for x in inputs])]
        if (inner := inner_of(eqn, rules=True)) is not None:
            jaxpr, constants = inner
            if _function(jaxpr) in _WHOLE:
                text = elementwise.expression(_function(jaxpr), {}, [*map(self.scalar, inputs)])
                return [self.line(eqn, text or "")]
            return self.walk(jaxpr, constants, inputs)
        if name == "cond":
            return self.branches(eqn, inputs)
        if any(isinstance(x, _Given) for x in inputs) and name != "gather":
            raise self.refusal(
                eqn, "takes a whole array, where a kernel reads elements: index every axis, table[h, i - j]"
            )
        if name == "slice":
            return [self.sliced(eqn, self.vector(inputs[0]))]
        if name in _SHAPES:
            return [self.reshaped(eqn, inputs[0])]
        if name in ("concatenate", "stack"):
            items = tuple(item for x in inputs for item in self.vector(x).items)
            return [_Vector(items, eqn.outvars[0].aval.shape)]
        if name in ("argmax", "argmin"):
            return [self.largest(eqn, self.vector(inputs[0]).items)]
        if name in REDUCTIONS:
            return [self.reduced(eqn, self.vector(inputs[0]).items)]
        if name == "gather":
            return [self.element(eqn, inputs)]
        if any(_shape(x) != () for x in inputs):
            return [self.each(eqn, inputs)]
        scalars = [*map(self.scalar, inputs)]
        made = self.line(eqn, self.expression(eqn, scalars))
        if name == "mul" and made.dtype == np.float32:
            made = dataclasses.replace(made, factors=(scalars[0].text, scalars[1].text))
        return [made]

    def line(self, eqn: Any, text: str, out: int = 0) -> Scalar:
        """A name for an expression, one of an equation's results."""
        dtype = np.dtype(eqn.outvars[out].aval.dtype)
        if dtype.name not in TYPES and not (eqn.primitive.name == "gather" and dtype.name in _STORED):
            raise self.refusal(eqn, f"makes {dtype.name}, where a kernel has {', '.join(TYPES)}")
        name = next(self._names)
        self.lines.append(f"{name} = {text}{_comment(eqn) if self.places else ''}")
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
        outcomes = [[*map(self.scalar, x)] for x in zip(*results, strict=True)]
        return [self.line(eqn, chosen(index, x), n) for n, x in enumerate(outcomes)]

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

    def sliced(self, eqn: Any, x: _Vector) -> _Vector:
        """Some of a few elements."""
        if len(x.shape) != 1:
            raise self.refusal(eqn, "takes a part of an array, where a kernel has scalars")
        (start,), (limit,) = eqn.params["start_indices"], eqn.params["limit_indices"]
        (step,) = eqn.params["strides"] or (1,)
        return _Vector(x.items[start:limit:step], eqn.outvars[0].aval.shape)

    def element(self, eqn: Any, inputs: list[Any]) -> Scalar:
        """One element of an array, at an index that there is (`functions.views.element`)."""
        array, at = inputs
        if not isinstance(array, _Given) or eqn.outvars[0].aval.shape != ():
            raise self.refusal(eqn, "takes more than one element at a time; index every axis: table[h, i - j]")
        if array.dtype.name not in (*TYPES, *_STORED):
            raise self.refusal(
                eqn, f"reads an array of {array.dtype}, where a kernel reads {', '.join((*TYPES, *_STORED))}"
            )
        wide = ".to(tl.int64)" if math.prod(array.shape) >= 2**31 else ""
        strides = [math.prod(array.shape[k + 1 :]) for k in range(len(array.shape))]
        places = [x for x in zip(self.vector(at).items, strides, strict=True) if not _is_zero(x[0])]
        terms = [f"{x.text}{wide}{f' * {stride}' if stride != 1 else ''}" for x, stride in places]
        text = f"tl.load(x[{array.at}]{''.join(f' + {x}' for x in terms)})"
        return self.line(eqn, f"({text} != 0)" if array.dtype.name == "bool" else text)

    def scalar(self, x: Any) -> Scalar:
        """A value as one of the kernel's."""
        if isinstance(x, Scalar):
            return x
        (item,) = self.vector(x).items
        return item

    def vector(self, x: Any) -> _Vector:
        """A value as a few of the kernel's."""
        if isinstance(x, _Vector):
            return x
        if isinstance(x, np.ndarray | Array):  # in the caller's source
            return _Vector(tuple(number(n) for n in np.asarray(x).ravel()), x.shape)
        return _Vector((x,), ())

    def refusal(self, eqn: Any, why: str) -> TypeError:
        """What is raised for what cannot be translated."""
        return TypeError(
            f"{self.argument} uses {eqn.primitive.name}, which {why} ({callers_line(eqn)}); write it another way, or "
            f'pass implementation="xla", which runs every function'
        )


def _literal(v: Any) -> Scalar | np.ndarray:
    value = np.asarray(v.val, v.aval.dtype)
    return number(value) if value.shape == () else value


def _shape(x: Any) -> tuple[int, ...]:
    return () if isinstance(x, Scalar) else x.shape


def _comment(eqn: Any) -> str:
    """The caller's line, where JAX knows it."""
    line = re.search(r"[^/\\\\]*:\d+", callers_line(eqn))
    return f"  # {line[0]}" if line else ""


def _is_zero(x: Scalar) -> bool:
    return x.number is not None and x.number == 0


def _function(jaxpr: Any) -> str:
    """What the function is called that a jaxpr is of, if JAX wrote it."""
    info = getattr(jaxpr, "debug_info", None)
    file = getattr(info, "func_filename", None) or ""
    return getattr(info, "func_name", "") if file.startswith(os.path.dirname(jax.__file__)) else ""


@functools.lru_cache(maxsize=256)
def jitted(source: str) -> Any:
    """The `triton.JITFunction` of a translation's source: the same text, the same function."""
    import linecache

    import triton

    filename = f"<translated {hashlib.sha256(source.encode()).hexdigest()}>"  # equal sources are kept as one
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {**elementwise.names(), "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[source[4 : source.index("(")]])
