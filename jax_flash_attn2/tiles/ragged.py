"""Rows of many sequences, one behind the other: whose each row is, and how each sequence is cut into blocks."""

import jax.numpy as jnp
from jax import Array, lax


def sequence_of_rows(starts: Array, rows: int) -> Array:
    """int32 `[rows]`: which sequence each row belongs to, where B begin and end at starts `[B + 1]`; B: none."""
    row = jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.asarray(starts)[1:], row, side="right", method="compare_all").astype(jnp.int32)


def risen(starts: Array, rows: int) -> Array:
    """`starts` made non-decreasing and within [0, rows], so that whoever indexes by them stays in bounds. Where that
    changed something, results are replaced by NaN afterwards."""
    return lax.cummax(jnp.clip(starts, 0, rows))


def blocks_of_rows(starts: Array, total: int, rows: int) -> Array:
    """int32 `[blocks, 4]`: of each block of rows its sequence, its first row there, where the sequence begins, and how
    many rows it has. The rows behind the last sequence, and blocks without rows, are of sequence -1.

    starts: `[B + 1]`. total: rows of all. rows: of a block. There are `cdiv(total, rows) + B + 1` blocks.
    """
    ends = jnp.append(risen(starts, total), jnp.full(1, total, jnp.int32))  # what is behind is one more sequence
    batch, lengths = ends.shape[0] - 2, jnp.diff(ends)
    blocks = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum((lengths + rows - 1) // rows, dtype=jnp.int32))
    count = -(-total // rows) + batch + 1
    whose = sequence_of_rows(blocks, count)
    own = jnp.minimum(whose, batch)
    first = (jnp.arange(count, dtype=jnp.int32) - blocks[own]) * rows
    length = jnp.where(whose > batch, 0, lengths[own])
    return jnp.stack([jnp.where(whose < batch, whose, -1), first, ends[own], length], -1)
