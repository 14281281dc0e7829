"""How Triton writes what JAX computes element by element: of scalars in a kernel, the text of each primitive."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

TYPES = {"float32": "tl.float32", "int32": "tl.int32", "uint32": "tl.uint32", "bool": "tl.int1"}
"""What a kernel computes in."""
HELPERS = (
    *("int_div", "int_rem", "float_rem", "sign", "float_sign", "round_to_even", "round_from_zero", "exp_minus_1"),
    *("log_of_1_plus", "power", "uint_div", "uint_rem", "erfc"),
)
"""The functions of `kernels.scalar` that a text may name, besides tanh and tl."""

_LARGER, _SMALLER = (f"tl.{x}imum({{}}, {{}}, propagate_nan=tl.PropagateNan.ALL)" for x in ("max", "min"))
_FLOAT = {
    **{"exp": "tl.exp({})", "exp2": "tl.exp2({})", "log": "tl.log({})", "sqrt": "tl.sqrt({})", "rsqrt": "tl.rsqrt({})"},
    **{"sin": "tl.sin({})", "cos": "tl.cos({})", "tan": "(tl.sin({0}) / tl.cos({0}))", "tanh": "tanh({})"},
    **{"erf": "tl.erf({})", "erfc": "erfc({})", "logistic": "(1.0 / (1.0 + tl.exp(-({}))))"},
    **{"floor": "tl.floor({})", "ceil": "tl.ceil({})", "expm1": "exp_minus_1({})", "log1p": "log_of_1_plus({})"},
    **{"pow": "power({}, {})", "div": "({} / {})", "rem": "float_rem({}, {})", "sign": "float_sign({})"},
    **{
        "exp_neg_sq": "tl.exp(-({0} * {0}))",
        "is_finite": '(tl.abs({}) < float("inf"))',
        "max": _LARGER,
        "min": _SMALLER,
    },
}
_INTEGER = {
    **{"div": "int_div({}, {})", "rem": "int_rem({}, {})", "sign": "sign({})", "not": "(~{})"},
    **{"max": "tl.maximum({}, {})", "min": "tl.minimum({}, {})"},
    **{"shift_left": "({} << {})", "shift_right_arithmetic": "({} >> {})"},
}
_UNSIGNED = {name: text for name, text in _INTEGER.items() if name != "shift_right_arithmetic"} | {
    **{"div": "uint_div({}, {})", "rem": "uint_rem({}, {})", "shift_right_logical": "({} >> {})"},
}
_BOOLEAN = {"not": "({} == 0)", "max": "({} | {})", "min": "({} & {})"}
_ANY = {
    **{"add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "neg": "(-({}))", "abs": "tl.abs({})"},
    **{"square": "({0} * {0})", "one_minus_square": "(1 - {0} * {0})", "add_any": "({} + {})"},
    **{"and": "({} & {})", "or": "({} | {})", "xor": "({} ^ {})", "stop_gradient": "{}", "copy": "{}"},
    **{"lt": "({} < {})", "le": "({} <= {})", "gt": "({} > {})", "ge": "({} >= {})"},
    **{"eq": "({} == {})", "ne": "({} != {})"},
}
_OWN = {"float32": _FLOAT, "int32": _INTEGER, "uint32": _UNSIGNED, "bool": _BOOLEAN}
REDUCTIONS = {
    **{"reduce_sum": "({} + {})", "reduce_prod": "({} * {})", "reduce_and": "({} & {})", "reduce_or": "({} | {})"},
    **{"reduce_max": _LARGER, "reduce_min": _SMALLER},
}
"""What makes one of two elements."""


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A value in the kernel."""

    text: str
    dtype: np.dtype
    number: Any = None
    """Itself, if it is known while translating."""
    factors: tuple[str, str] | None = None
    """Of what it is the product, in fp32, if it is one: added to something, it is one FMA, as in what XLA compiles."""


def number(value: Any) -> Scalar:
    """A number that is written into the source."""
    value = np.asarray(value)
    plain = value.item()
    text = repr(plain) if not isinstance(plain, float) or math.isfinite(plain) else f'float("{plain}")'
    return Scalar(f"({text})" if text.startswith("-") else text, value.dtype, value)


def is_number(x: Any) -> bool:
    """Whether x is known while translating."""
    return isinstance(x, Scalar) and x.number is not None


def chosen(which: Scalar, cases: Sequence[Scalar]) -> str:
    """The case of this number; the last one, if there are fewer."""
    text = cases[-1].text
    for n, case in reversed([*enumerate(cases[:-1])]):
        shown = f"{which.text} == 0" if which.dtype.name == "bool" else f"{which.text} <= {n}"
        text = f"tl.where({shown}, {case.text}, {text})"
    return text


def place_of_largest(items: Sequence[Scalar], sign: str) -> str:
    """The place of the first of the largest (">") or least ("<") of a few elements; of the first NaN, if any is."""
    texts = [f"{x.text}.to(tl.int32)" if x.dtype.name == "bool" and x.number is None else x.text for x in items]
    best, place = texts[0], "0"
    for n, other in enumerate(texts[1:], 1):
        better = f"{other} {sign} {best}"
        if items[0].dtype == np.float32:
            better = f"({better}) | (({other} != {other}) & ({best} == {best}))"
        best, place = f"tl.where({better}, {other}, {best})", f"tl.where({better}, {n}, {place})"
    return place


def expression(name: str, params: Mapping[str, Any], inputs: Sequence[Scalar]) -> str | None:
    """What a primitive makes of scalars; None if that has no text."""
    special = _SPECIAL.get(name)
    if special is not None:
        return special(params, *inputs)
    dtype = inputs[-1].dtype.name
    if name == "div" and dtype == "float32" and is_number(inputs[1]) and inputs[1].number != 0:
        with np.errstate(over="ignore"):  # as XLA does; a subnormal has no reciprocal
            inverse = np.float32(1) / np.float32(inputs[1].number)
        if np.isfinite(inverse):
            return f"({inputs[0].text} * {number(inverse).text})"
    if name in ("add", "sub", "add_any") and (fused := _fused(name == "sub", *inputs)) is not None:
        return fused
    own = _OWN.get(dtype)
    template = None if own is None else own.get(name) or _ANY.get(name)
    if template is None:
        return None
    helper = template.partition("(")[0] in HELPERS
    return template.format(*(_typed(x) if helper else x.text for x in inputs))


def _fused(less: bool, a: Scalar, b: Scalar) -> str | None:
    """A product and something else as one FMA, if either is one: a + b, or a - b."""
    sign = "-" if less else ""
    if a.factors is not None:
        return f"tl.fma({a.factors[0]}, {a.factors[1]}, {sign}{b.text})"
    if b.factors is not None:
        return f"tl.fma({sign}{b.factors[0]}, {b.factors[1]}, {a.text})"
    return None


def _typed(x: Scalar) -> str:
    """A helper is a function of values that have a type: a number has none."""
    return f"tl.full((), {x.text}, {TYPES[x.dtype.name]})" if is_number(x) else x.text


def _clamped(_: Any, low: Scalar, x: Scalar, high: Scalar) -> str:
    larger, smaller = (_LARGER, _SMALLER) if x.dtype == np.float32 else (_INTEGER["max"], _INTEGER["min"])
    return smaller.format(larger.format(x.text, low.text), high.text)


def _converted(params: Mapping[str, Any], x: Scalar) -> str | None:
    wanted = np.dtype(params["new_dtype"]).name
    if wanted not in TYPES:
        return None
    return f"({x.text} != 0)" if wanted == "bool" else f"{x.text}.to({TYPES[wanted]})"


def _bits(params: Mapping[str, Any], x: Scalar) -> str | None:
    wanted = np.dtype(params["new_dtype"])
    if wanted.name not in TYPES or wanted.itemsize != x.dtype.itemsize:
        return None
    return f"{_typed(x)}.to({TYPES[wanted.name]}, bitcast=True)"


def _rounded(params: Mapping[str, Any], x: Scalar) -> str:
    even = params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN
    return f"{'round_to_even' if even else 'round_from_zero'}({x.text})"


def _integer_power(x: str, y: int) -> str:
    if y < 0:
        return f"(1.0 / {_integer_power(x, -y)})"
    if y == 0:
        return f"({x} * 0 + 1)"
    half = _integer_power(x, y // 2) if y > 1 else ""
    return x if y == 1 else f"({half} * {half}{f' * {x}' if y % 2 else ''})"


_SPECIAL: dict[str, Callable[..., str | None]] = {
    "select_n": lambda _, which, *cases: chosen(which, cases),
    "clamp": _clamped,
    "convert_element_type": _converted,
    "bitcast_convert_type": _bits,
    "integer_pow": lambda params, x: _integer_power(x.text, params["y"]),
    "round": _rounded,
}


@functools.cache
def names() -> dict[str, Any]:
    """What a text may name."""
    import triton.language as tl

    from ..kernels import fwd, scalar

    return {"tl": tl, "tanh": fwd.tanh} | {name: getattr(scalar, name) for name in HELPERS}
