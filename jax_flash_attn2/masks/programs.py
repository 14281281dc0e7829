"""Functions as data: a function of arrays is traced once, and equals whatever computes the same from the same.

What it closes over is read anew at each trace, so that nothing is taken for equal that has changed meanwhile.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import Array

from ..base import known
from ..functions.keys import Same, contents, key_of


class Steps:
    """What a program does: a jaxpr, which equals another of the same operations. Static under jit."""

    def __init__(self, jaxpr: Any):
        """A jaxpr with constants, which become its first arguments, so that none is kept."""
        self.args = len(jaxpr.invars)
        self.jaxpr = jex.ClosedJaxpr(jaxpr, [])
        self.key = key_of(self.jaxpr)
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
        return self.steps, tuple(Same(x) if isinstance(x, Array) else contents(x) for x in self.arrays)

    def held(self) -> tuple[Array, ...]:
        """The arrays that its key keeps alive."""
        return tuple(x for x in self.arrays if isinstance(x, Array))

    def on_device(self) -> "Program":
        """The same with its arrays on the device."""
        with known.now():
            arrays = tuple(x if isinstance(x, Array) else jax.device_put(x) for x in self.arrays)
        return dataclasses.replace(self, arrays=arrays)
