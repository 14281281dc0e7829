"""Jaxprs as keys: equal where they compute the same, whenever they were traced."""

import dataclasses
import hashlib
from collections.abc import Hashable
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import Array

ONLY_FOR_DERIVATIVES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")
"""Parameters of equations that do not matter to values, and are other ones at each trace."""


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """An array as a key: it equals itself only."""

    array: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


def contents(x: np.ndarray) -> Hashable:
    """What an array of NumPy holds, as a key."""
    x = np.ascontiguousarray(x)
    if x.nbytes <= 64:
        return x.shape, x.dtype.name, x.tobytes()
    return x.shape, x.dtype.name, hashlib.blake2b(x.reshape(-1).view(np.uint8), digest_size=32).digest()


def key_of(jaxpr: Any) -> Hashable:
    """What a jaxpr does; its variables are numbered, as they are others at each trace."""
    number: dict[int, int] = {}

    def new(variables: Any) -> tuple[Any, ...]:
        for x in variables:
            number[id(x)] = len(number)
        return tuple((x.aval.shape, x.aval.dtype, getattr(x.aval, "weak_type", False)) for x in variables)

    def read(x: Any) -> Hashable:
        if not isinstance(x, jex.Literal):
            return number[id(x)]
        return str(x.aval), contents(np.asarray(x.val))

    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
    key: list[Hashable] = [new(jaxpr.constvars), new(jaxpr.invars)]
    for eqn in jaxpr.eqns:
        params = tuple((n, _parameter(x)) for n, x in sorted(eqn.params.items()) if n not in ONLY_FOR_DERIVATIVES)
        key.append((eqn.primitive.name, tuple(map(read, eqn.invars)), params, len(eqn.outvars)))
        new(eqn.outvars)
    return (*key, tuple(map(read, jaxpr.outvars)))


def _parameter(x: Any) -> Hashable:
    if isinstance(x, jex.ClosedJaxpr | jex.Jaxpr):
        return key_of(x), tuple(map(_parameter, getattr(x, "consts", ())))
    if isinstance(x, jax.core.Tracer):
        return Same(x)
    if isinstance(x, Array | np.ndarray):
        return Same(x) if isinstance(x, Array) else contents(x)
    if isinstance(x, tuple | list):
        return tuple(map(_parameter, x))
    try:
        hash(x)
    except TypeError:
        return _Unlike()
    return type(x), x  # 1, 1.0 and True are equal in Python


class _Unlike:
    """What nothing equals."""
