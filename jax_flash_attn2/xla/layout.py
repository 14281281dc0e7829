"""How rows, row statistics and the tiles of an array lie in memory, and the way there and back."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def rows(x: Array, kv_heads: int, dtype) -> Array:
    """`[B, S, Hkv * G, D]` -> `[B, Hkv, S * G, D]`."""
    b, s, h, d = x.shape  # G as an axis, even of 1, saves XLA:CPU a copy, as in `rows_out`
    return x.astype(dtype).reshape(b, s, kv_heads, h // kv_heads, d).swapaxes(1, 2).reshape(b, kv_heads, -1, d)


def rows_out(x: Array, seqlen: int) -> Array:
    """`[B, Hkv, S * G, D]` -> `[B, S, Hkv * G, D]`: `rows` undone."""
    b, n, _, d = x.shape
    return x.reshape(b, n, seqlen, -1, d).swapaxes(1, 2).reshape(b, seqlen, -1, d)


def stats(x: Array, kv_heads: int) -> Array:
    """`[B, H, S]` -> `[B, Hkv, S * G]`."""
    b, _, s = x.shape
    return x.reshape(b, kv_heads, -1, s).swapaxes(2, 3).reshape(b, kv_heads, -1)


def stats_out(x: Array, seqlen: int) -> Array:
    """`[B, Hkv, S * G]` -> `[B, H, S]`: `stats` undone."""
    b, n, _ = x.shape
    return x.reshape(b, n, seqlen, -1).swapaxes(2, 3).reshape(b, -1, seqlen)


def cut_rows(x: Array, size: int) -> Array:
    """`[B, H, S, D]` -> `[blocks, B, H, size, D]`: a row axis as blocks, the last moved back if need be."""
    whole = x.shape[2] // size * size
    blocks = jnp.moveaxis(x[:, :, :whole].reshape(*x.shape[:2], -1, size, x.shape[3]), 2, 0)
    return blocks if whole == x.shape[2] else jnp.concatenate([blocks, x[None, :, :, -size:]])


def join_rows(x: Array, rows: int) -> Array:
    """`[blocks, B, H, size, ...]` -> `[B, H, rows, ...]`: `cut_rows` undone."""
    x = jnp.moveaxis(x, 0, 2)
    before = (x.shape[2] - 1) * x.shape[3]
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    last = before - rows  # negative: that many rows of the last block are its own
    return jnp.concatenate([x[:, :, :before], x[:, :, last:]], 2)


def by_heads(x: Array, rows: int) -> Array:
    """`[B, Hkv, M * G, N]` -> `[B, H, M, N]`, of M rows."""
    b, heads, _, keys = x.shape
    return x.reshape(b, heads, rows, -1, keys).swapaxes(2, 3).reshape(b, -1, rows, keys)


def int32(x: Any) -> Array:
    """Numbers of rows or keys, which are int32 under x64 too, as lengths and offsets are."""
    return jnp.asarray(x, jnp.int32)


def take(x: Array, start, size: int, axis: int) -> Array:
    """What of x begins at `start`, which is not negative: there is no code for starts that are."""
    return lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)


def put(x: Array, tile: Array, start, axis: int) -> Array:
    """x with the tile in place of what begins at `start`."""
    return lax.dynamic_update_slice_in_dim(x, tile, start, axis, allow_negative_indices=False)


def add(x: Array, tile: Array, start, axis: int) -> Array:
    """x with the tile added to what begins at `start`."""
    return put(x, take(x, start, tile.shape[axis], axis) + tile, start, axis)
