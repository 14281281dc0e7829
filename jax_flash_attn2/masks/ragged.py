"""Sequences of many lengths: padded `[B, S, ...]`, or ragged, where the tokens of all are one row `[total, ...]`.

What a batch of them is told to attention by: lengths `[B]`; where each begins in the row (`cu_lens`); and of each token
the number of its sequence (`segment_ids`) and its place there (`positions`).

Under jit nobody can look at numbers: there a negative length counts as 0, and tokens past the end of an array are cut
off.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments
from ..base.known import is_known
from ..tiles.ragged import sequence_of_rows


def cu_lens(lengths: Array | np.ndarray) -> Array:
    """Where each sequence begins in a row that holds one behind the other, and where the last ends.

    Args:
      lengths: integers `[B]`: tokens of each sequence, at least 0.

    Returns:
      int32 `[B + 1]`, the first 0: `cu_q_lens` of `varlen_attention` and `paged_attention` (`cu_seqlens` elsewhere).

    Raises:
      TypeError, ValueError: lengths are no integers `[B]`; of those that are known one is negative, or int32 does not
        hold their sum.

    Examples:
      >>> cu_lens(jnp.array([3, 0, 2]))
      Array([0, 3, 3, 5], dtype=int32)
    """
    lengths = _lengths(lengths)
    if is_known(lengths) and (total := int(np.sum(np.asarray(lengths), dtype=np.int64))) > arguments.INT32.max:
        raise ValueError(f"lengths must sum to at most {arguments.INT32.max} (int32), got {total}; split the batch")
    return _cu_lens(lengths)


def segment_ids(lengths: Array | np.ndarray, total: int) -> Array:
    """Which sequence each token of the row belongs to: `q_segment_ids` of `flash_attention`.

    Args:
      lengths: integers `[B]`.
      total: tokens of the row (static under jit), at least the sum of lengths.

    Returns:
      int32 `[total]`, sorted from 0; -1: padding, behind the last sequence.

    Raises:
      TypeError, ValueError: as `cu_lens`; lengths that are known make more than total.

    Examples:
      >>> segment_ids(jnp.array([3, 2]), 6)
      Array([ 0,  0,  0,  1,  1, -1], dtype=int32)
    """
    return _segment_ids(cu_lens(lengths), _total(total, lengths))


def positions(lengths: Array | np.ndarray, total: int) -> Array:
    """The place of each token of the row in its own sequence, from 0: for rotary embeddings, and `q_positions`.

    Args:
      lengths: integers `[B]`.
      total: tokens of the row (static under jit), at least the sum of lengths.

    Returns:
      int32 `[total]`; 0 in padding.

    Raises:
      TypeError, ValueError: as `segment_ids`.

    Examples:
      >>> positions(jnp.array([3, 2]), 6)
      Array([0, 1, 2, 0, 1, 0], dtype=int32)
    """
    return _positions(cu_lens(lengths), _total(total, lengths))


def lengths_from(
    *,
    padding_mask: Array | np.ndarray | None = None,
    segment_ids: Array | np.ndarray | None = None,
    num_segments: int | None = None,
) -> Array:
    """How long sequences are, from a mask of padding or from segment ids.

    Args:
      padding_mask: bool or integers `[*batch, S]`, True or nonzero: a real token. Padding is on the right only.
      segment_ids: integers `[*batch, S]`, in place of a mask: from 0 rising, and negative (padding) only at the end.
      num_segments: with segment_ids: how many lengths there shall be (static under jit); None: the largest id and 1,
        which must be known.

    Returns:
      int32 `[*batch]`: `kv_lengths` of `flash_attention`; of segment ids `[*batch, num_segments]`, of each row.

    Raises:
      TypeError, ValueError: not one of the two is given; a mask that is known has a hole; ids that are known fall or
        reach num_segments. Under jit tokens are counted, wherever they are.

    Examples:
      >>> lengths_from(padding_mask=jnp.array([[1, 1, 0], [1, 1, 1]]))
      Array([2, 3], dtype=int32)
      >>> lengths_from(segment_ids=jnp.array([0, 0, 1, -1]))
      Array([2, 1], dtype=int32)
    """
    if (padding_mask is None) == (segment_ids is None):
        raise ValueError("lengths_from takes a padding_mask or segment_ids; give one of them")
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError(
                f"num_segments says how many lengths come of segment_ids, got {num_segments!r} with a padding_mask; "
                "leave it out"
            )
        return _lengths_of_mask(padding_mask)
    return _lengths_of_ids(segment_ids, num_segments)


def pack(x: Array | np.ndarray, lengths: Array | np.ndarray, total: int | None = None) -> Array:
    """Padded sequences as one row, without their padding. Differentiable.

    Args:
      x: `[B, S, ...]` of any dtype; sequence b is `x[b, :lengths[b]]`.
      lengths: integers `[B]`, at most S.
      total: tokens of the row (static under jit), at least the sum of lengths; None: that sum, which must be known.

    Returns:
      `[total, ...]` in x's dtype: the sequences one behind the other, then zeros.

    Raises:
      TypeError, ValueError: an argument does not fit, lengths that are known included.

    Examples:
      >>> pack(jnp.array([[1, 2, 0], [3, 0, 0]]), jnp.array([2, 1]))
      Array([1, 2, 3], dtype=int32)
    """
    x = _array("x", x, 2, "[B, S, ...]")
    lengths = _lengths(lengths, x.shape[0], "x")
    _check_within(lengths, x.shape[1], "the S tokens of x")
    if total is None:
        total = int(np.sum(_needed("total", lengths)))
    return _pack(x, _cu_lens(lengths), _total(total, lengths))


def unpack(x: Array | np.ndarray, lengths: Array | np.ndarray, seqlen: int | None = None) -> Array:
    """A row of sequences as a padded batch: `pack` backwards. Differentiable.

    Args:
      x: `[total, ...]` of any dtype: sequences one behind the other.
      lengths: integers `[B]`; their sum at most total.
      seqlen: S (static under jit), at least the largest length; None: that length, which must be known.

    Returns:
      `[B, S, ...]` in x's dtype, zeros behind each sequence.

    Raises:
      TypeError, ValueError: an argument does not fit, lengths that are known included.

    Examples:
      >>> unpack(jnp.array([1, 2, 3]), jnp.array([2, 1]))
      Array([[1, 2],
             [3, 0]], dtype=int32)
    """
    x = _array("x", x, 1, "[total, ...]")
    lengths = _lengths(lengths)
    _total(x.shape[0], lengths)
    if seqlen is None:
        seqlen = int(np.max(_needed("seqlen", lengths), initial=0))
    seqlen = _size("seqlen", seqlen)
    _check_within(lengths, seqlen, "seqlen")
    return _unpack(x, _cu_lens(lengths), seqlen)


_zero = functools.partial(jnp.zeros, (1,), jnp.int32)


@functools.partial(jax.jit, inline=True)
def _cu_lens(lengths: Array) -> Array:
    return jnp.concatenate([_zero(), jnp.cumsum(jnp.maximum(lengths, 0), dtype=jnp.int32)])


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _segment_ids(starts: Array, total: int) -> Array:
    whose = sequence_of_rows(starts, total)
    return jnp.where(whose < starts.shape[0] - 1, whose, -1)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _positions(starts: Array, total: int) -> Array:
    row = jnp.arange(total, dtype=jnp.int32)
    return jnp.where(row < starts[-1], row - starts[sequence_of_rows(starts, total)], 0)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _pack(x: Array, starts: Array, total: int) -> Array:
    place, ids = _positions(starts, total), _segment_ids(starts, total)
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    index = jnp.where((ids >= 0) & (place < x.shape[1]), ids * x.shape[1] + place, flat.shape[0])
    return jnp.take(flat, index, 0, mode="fill", fill_value=0)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _unpack(x: Array, starts: Array, seqlen: int) -> Array:
    index = starts[:-1, None] + jnp.arange(seqlen, dtype=jnp.int32)
    return jnp.take(x, jnp.where(index < starts[1:, None], index, x.shape[0]), 0, mode="fill", fill_value=0)


@functools.partial(jax.jit, inline=True)
def _count(mask: Array) -> Array:
    return jnp.sum(mask.astype(bool), -1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _count_ids(ids: Array, count: int) -> Array:
    return jnp.sum(ids[..., None, :] == jnp.arange(count, dtype=ids.dtype)[:, None], -1, dtype=jnp.int32)


def _lengths_of_mask(mask: Any) -> Array:
    arguments.flags("padding_mask", mask, "[*batch, S]")
    _array("padding_mask", mask, 1, "[*batch, S]")
    lengths = _count(mask)
    if is_known(mask):
        real, ends = np.asarray(mask) != 0, np.asarray(lengths)
        wrong = np.argwhere(real != (np.arange(mask.shape[-1]) < ends[..., None]))
        if wrong.size:
            *row, at = map(int, wrong[0])
            raise ValueError(
                f"padding_mask must have all its padding on the right, got padding at token {at}"
                f"{' of row ' + str(tuple(row)) if row else ''} and real tokens behind it; lengths cannot say that: "
                "use segment ids (-1: padding), or mask="
            )
    return lengths


def _lengths_of_ids(ids: Any, count: Any) -> Array:
    arguments.integer_array("segment_ids", ids, "[*batch, S]")
    _array("segment_ids", ids, 1, "[*batch, S]")
    if count is None:
        count = int(np.max(_needed("num_segments", ids, "segment_ids"), initial=-1)) + 1
    count = _size("num_segments", count)
    if is_known(ids):
        values = np.asarray(ids).astype(np.int64)
        if values.max(initial=-1) >= count:
            raise ValueError(f"segment_ids must be below num_segments, {count}, got {values.max()}; give more")
        rising = np.where(values < 0, np.iinfo(np.int64).max // 2, values)
        if (falls := np.argwhere(np.diff(rising, axis=-1) < 0)).size:
            *row, at = map(int, falls[0])
            raise ValueError(
                f"segment_ids must rise, with padding (negative ids) at the end only, got {values[*row, at + 1]} at "
                f"token {at + 1}{f' of row {tuple(row)}' if row else ''} behind {values[*row, at]}, which lengths "
                "cannot say; use the ids themselves"
            )
    return _count_ids(ids, count)


def _lengths(lengths: Any, batch: int | None = None, of: str = "") -> Any:
    """lengths as int32 `[B]`."""
    lengths = arguments.int32_array("lengths", lengths, "[B]")
    if lengths.ndim != 1 or batch not in (None, lengths.shape[0]):
        wanted = "[B]" if batch is None else f"[{batch}], as {of} has sequences"
        raise ValueError(f"lengths must have shape {wanted}, got {lengths.shape}")
    if is_known(lengths) and (np.asarray(lengths) < 0).any():
        raise ValueError(f"lengths must be at least 0, got {np.asarray(lengths).tolist()}")
    return lengths.astype(jnp.int32)


def _total(total: Any, lengths: Any) -> int:
    """total, if it holds the sequences."""
    total = _size("total", total)
    if is_known(lengths) and (used := int(np.sum(np.asarray(lengths).astype(np.int64)))) > total:
        raise ValueError(f"lengths must sum to at most the {total} tokens of the row, got {used}; give a longer one")
    return total


def _check_within(lengths: Any, largest: int, what: str) -> None:
    if is_known(lengths) and np.max(np.asarray(lengths), initial=0) > largest:
        raise ValueError(f"lengths must be at most {largest} ({what}), got {np.asarray(lengths).tolist()}")


def _size(name: str, n: Any) -> int:
    if not arguments.is_integer(n) or n < 0:
        raise ValueError(f"{name} must be an integer of at least 0 (it is static under jit), got {n!r}")
    return int(n)


def _needed(name: str, x: Any, of: str = "lengths") -> np.ndarray:
    """x, from which a size follows that was not given."""
    if not is_known(x):
        raise ValueError(f"{name} must be given under jit, where it cannot follow from {of}, which are traced")
    return np.asarray(x)


def _array(name: str, x: Any, axes: int, wanted: str) -> Any:
    if not arguments.is_array(x):
        raise TypeError(f"{name} must be an array {wanted}, got {arguments.describe(x)}")
    if x.ndim < axes:
        raise ValueError(f"{name} must have shape {wanted}, got {x.shape}")
    return x
