"""What a tile is to those who look at it: met by nobody, seen whole by all, or neither."""

from typing import Any

import jax.numpy as jnp

EMPTY, FULL, PARTIAL = 0, 1, 2

NO_TILE, NO_MASK = -2, -1
"""In place of the number of an element mask (`block_lists.parts`): that of an empty tile, that of a full one."""


def of_parts(part: Any, xp: Any = jnp) -> Any:
    """What tiles are, of the numbers of their element masks; in JAX, or in NumPy."""
    return xp.where(part == NO_TILE, EMPTY, xp.where(part == NO_MASK, FULL, PARTIAL))
