"""Several arrays of rows in one message: what travels at once costs one latency, and XLA hides it as one."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def packed(rows: Mapping[str, Array]) -> Array:
    """Arrays `[B, S, Hkv, ...]` side by side, in words of the smallest: `[B, S, Hkv, words]`, so that batches and heads
    may be divided further. It has no derivative."""
    word = jnp.dtype(f"uint{8 * _size(rows)}")
    words = [lax.bitcast_convert_type(x, word).reshape(*x.shape[:3], -1) for x in rows.values()]
    return jnp.concatenate(words, -1)


def unpacked(message: Array, like: Mapping[str, Any]) -> dict[str, Array]:
    """`packed` undone; there may be another number of rows. like: arrays of these widths and dtypes."""
    size, at, rows = _size(like), 0, {}
    for name, x in like.items():
        words = x.dtype.itemsize // size
        own = lax.slice_in_dim(message, at, at + x.shape[3] * words, axis=3)
        at += own.shape[3]
        own = own.reshape(*own.shape[:3], -1, words) if words > 1 else own
        rows[name] = lax.bitcast_convert_type(own, x.dtype)
    return rows


def _size(rows: Mapping[str, Any]) -> int:
    return min(x.dtype.itemsize for x in rows.values())
