"""What is known when Python runs: made at once, whatever is being traced, and never sent to the device call by call.

Outside jit each number that an operation is given is sent to the device, at each call. What is known is a program of
its own instead (and under jit a part of the program); a number that only the caller knows is put on the device
explicitly (`sent`), so that transfer guards allow it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

now = jax.core.eval_context
"""A context in which nothing is traced: what is computed of known values is known, under jit too."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def full(value: float, dtype: Any, shape: tuple[int, ...] = ()) -> Array:
    """`jnp.full(shape, value, dtype)` of a value that is known."""
    return jnp.full(shape, value, dtype)


def sent(x: np.ndarray | np.generic) -> Any:
    """A number that the caller gave: an array on the device, or under jit a constant."""
    return np.asarray(x) if under_jit() else jax.device_put(x)


def under_jit() -> bool:
    """Whether whatever is computed now becomes a part of a program."""
    return isinstance(full(0, jnp.dtype(jnp.int32)), jax.core.Tracer)


def is_known(x: Any) -> bool:
    """Whether no array of a pytree is being traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
