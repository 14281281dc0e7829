"""Arithmetic of positions that are data: any numbers that int32 has, the first and the last too."""

import jax.numpy as jnp
import numpy as np
from jax import Array

_INT32 = np.iinfo(np.int32)


def after(x: Array, n: int) -> Array:
    """x + n, n >= 0; no further than int32 goes, instead of from its beginning again."""
    return jnp.minimum(x, jnp.int32(_INT32.max - n)) + jnp.int32(n)


def before(x: Array, n: int) -> Array:
    """x - n, likewise."""
    return jnp.maximum(x, jnp.int32(_INT32.min + n)) - jnp.int32(n)


def apart(x: Array, y: Array) -> Array:
    """|x - y|, in uint32, which has all of them."""
    return (jnp.maximum(x, y) - jnp.minimum(x, y)).astype(jnp.uint32)
