"""Functions as data: a function of arrays is traced once, and equals whatever computes the same from the same.

What it closes over is read anew at each trace, so that nothing is taken for equal that has changed meanwhile.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import Array

from ..base import known

_ONLY_FOR_DERIVATIVES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")
"""Parameters of equations that do not matter to values, and are other ones at each trace."""


class Steps:
    """What a program does: a jaxpr, which equals another of the same operations. Static under jit."""

    def __init__(self, jaxpr: Any):
        """A jaxpr with constants, which become its first arguments, so that none is kept."""
        self.args = len(jaxpr.invars)
        self.jaxpr = jex.ClosedJaxpr(jaxpr, [])
        self.key = _key(self.jaxpr)
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and (self is other or (self._hash == other._hash and self.key == other.key))

    def __hash__(self) -> int:
        return self._hash

    def reads(self) -> tuple[bool, ...]:
        """Of each argument, whether anything is made of it."""
        read = {id(x) for eqn in self.jaxpr.eqns for x in eqn.invars} | {id(x) for x in self.jaxpr.outvars}
        return tuple(id(x) in read for x in self.jaxpr.invars[-self.args :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function, traced: what it does, and the arrays that it holds. A pytree, whose leaves these are."""

    steps: Steps = dataclasses.field(metadata={"static": True})
    arrays: tuple[Any, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> "Program":
        """The program of `function(*args)`, which gives one array."""
        closed = jax.make_jaxpr(lambda *args: function(*args))(*args)  # anew: JAX keeps what it traced, by function
        arrays = tuple(x if isinstance(x, Array) else np.asarray(x) for x in closed.consts)
        return cls(Steps(closed), arrays)

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        return jex.jaxpr_as_fun(self.steps.jaxpr)(*self.arrays, *args)[0]

    def key(self) -> Hashable:
        """Equal for programs that give the same: JAX's arrays are told apart by which they are, NumPy's, which may be
        written to, by what they hold."""
        return self.steps, tuple(Same(x) if isinstance(x, Array) else _contents(x) for x in self.arrays)

    def held(self) -> tuple[Array, ...]:
        """The arrays that its key keeps alive."""
        return tuple(x for x in self.arrays if isinstance(x, Array))

    def on_device(self) -> "Program":
        """The same with its arrays on the device."""
        with known.now():
            arrays = tuple(x if isinstance(x, Array) else jax.device_put(x) for x in self.arrays)
        return dataclasses.replace(self, arrays=arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """An array as a key: it equals itself only."""

    array: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


def _contents(x: np.ndarray) -> Hashable:
    x = np.ascontiguousarray(x)
    if x.nbytes <= 64:
        return x.shape, x.dtype.name, x.tobytes()
    return x.shape, x.dtype.name, hashlib.blake2b(x.reshape(-1).view(np.uint8), digest_size=32).digest()


def _key(jaxpr: Any) -> Hashable:
    """What a jaxpr does; its variables are numbered, as they are others at each trace."""
    number: dict[int, int] = {}

    def new(variables: Any) -> tuple[Any, ...]:
        for x in variables:
            number[id(x)] = len(number)
        return tuple((x.aval.shape, x.aval.dtype, getattr(x.aval, "weak_type", False)) for x in variables)

    def read(x: Any) -> Hashable:
        if not isinstance(x, jex.Literal):
            return number[id(x)]
        return str(x.aval), _contents(np.asarray(x.val))

    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
    key: list[Hashable] = [new(jaxpr.constvars), new(jaxpr.invars)]
    for eqn in jaxpr.eqns:
        params = tuple((n, _parameter(x)) for n, x in sorted(eqn.params.items()) if n not in _ONLY_FOR_DERIVATIVES)
        key.append((eqn.primitive.name, tuple(map(read, eqn.invars)), params, len(eqn.outvars)))
        new(eqn.outvars)
    return (*key, tuple(map(read, jaxpr.outvars)))


def _parameter(x: Any) -> Hashable:
    if isinstance(x, jex.ClosedJaxpr | jex.Jaxpr):
        return _key(x), tuple(map(_parameter, getattr(x, "consts", ())))
    if isinstance(x, jax.core.Tracer):
        return Same(x)
    if isinstance(x, Array | np.ndarray):
        return Same(x) if isinstance(x, Array) else _contents(x)
    if isinstance(x, tuple | list):
        return tuple(map(_parameter, x))
    try:
        hash(x)
    except TypeError:
        return _Unlike()
    return type(x), x  # 1, 1.0 and True are equal in Python


class _Unlike:
    """What nothing equals."""
