"""Which tiles a block meets, where that depends on data or on bounds (`Spec.spans`).

A block of rows (or of keys) meets the tiles `[begin, end)` of the other sequence; of these, `[full, stop)` show it all
that they hold and need no mask. Bounds (causal, window, lengths) are interval arithmetic on the block's ends. Segments
are compared by the least and the largest id of block and tile: right for ids in any order, tight for sorted ones; so
are positions that are data. A mask is reduced to any and all per tile.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base import positions
from ..base.operands import for_every_batch
from ..base.spec import Spec
from .kinds import EMPTY, FULL, PARTIAL


def query_spans(
    spec: Spec,
    operands: Mapping[str, Array],
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    starts_m: Any,
    block_m: int,
    block_n: int,
) -> Array:
    """The tiles of keys that each block of query rows meets.

    Args:
      spec: what is seen.
      operands: those of `base.operands.OPERANDS` that the call has.
      batch: B.
      seqlen_q: Sq, at least 1.
      seqlen_k: Sk, at least 1.
      starts_m: the first row of each block, `[blocks]`.
      block_m: rows per block; those past Sq do not count.
      block_n: keys per tile; tile j is `[j * block_n, (j + 1) * block_n)`.

    Returns:
      int32 `[1|B, 1|H, blocks, 4]`: begin, full, stop and end, numbers of tiles. The block meets the tiles
      `[begin, full)` and `[stop, end)` through the mask, sees `[full, stop)` whole, and no others at all. No tile of
      `[full, stop)` reaches past Sk. begin <= full <= stop <= end; (0, 0, 0, 0) where the block sees nothing.
    """
    rows, cols, bounds, tiles = _query_sides(spec, operands, batch, seqlen_q, seqlen_k, starts_m, block_m, block_n)
    return _spans(rows, cols, *bounds, tiles, whole_past_end=False)


def query_tiles(
    spec: Spec,
    operands: Mapping[str, Array],
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    starts_m: Any,
    block_m: int,
    block_n: int,
) -> Array:
    """What each tile of keys is to each block of query rows, over all batches and heads: not a span but a table.

    Args: as in `query_spans`.

    Returns:
      int32 `[blocks, tiles]`: `EMPTY`, `FULL` (no mask is needed; the tile does not reach past Sk) or `PARTIAL`.
    """
    rows, cols, bounds, tiles = _query_sides(spec, operands, batch, seqlen_q, seqlen_k, starts_m, block_m, block_n)
    met, whole = _met(rows, cols, *bounds), _whole(rows, cols, *bounds, whole_past_end=False)
    met, whole = _met_too(_in_tiles(met, cols), _in_tiles(whole, cols), rows, cols, tiles)
    met, whole = jnp.broadcast_arrays(met, whole)
    if met.shape[:2] == (1, 1):
        met, whole = met[0, 0], whole[0, 0]
    else:
        met, whole = met.any((0, 1)), whole.all((0, 1))
    return jnp.where(whole, FULL, jnp.where(met, PARTIAL, EMPTY))


def key_spans(
    spec: Spec,
    operands: Mapping[str, Array],
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    block_m: int,
    block_n: int,
) -> Array:
    """The tiles of query rows that each block of keys `[j * block_n, (j + 1) * block_n)` meets.

    Args:
      spec: as in `query_spans`, and so are operands, batch, seqlen_q and seqlen_k.
      operands: those that the call has.
      batch: B.
      seqlen_q: Sq.
      seqlen_k: Sk.
      block_m: rows per tile; tile i is `[i * block_m, (i + 1) * block_m)`.
      block_n: keys per block; those past Sk do not count.

    Returns:
      int32 `[1|B, 1|H, blocks, 4]` as in `query_spans`, but that a tile of `[full, stop)` may reach past Sq.
    """
    rows = _side(operands, "q", batch, _starts(seqlen_q, block_m), block_m, seqlen_q)
    cols = _side(operands, "kv", batch, _starts(seqlen_k, block_n), block_n, seqlen_k)
    tiles = [(some.swapaxes(2, 3), every.swapaxes(2, 3)) for some, every in _pairs(spec, operands, batch, rows, cols)]
    left, right, offset = _bounds(spec, operands, batch)
    # Row i sees keys from i + offset - left to i + offset + right: key j is seen from j - offset - right on.
    return _spans(cols, rows, right, left, -offset, tiles, whole_past_end=True)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two sequences, cut into blocks (or tiles): `[starts, starts + block)`, less what is past its end."""

    starts: Array
    block: int
    seqlen: int
    length: Array
    """`[n, 1, 1]`: what lies at or past it is hidden."""
    ids: tuple[Array, ...] | None
    """Of the segments in each block, `[n, 1, blocks]`: the least, the largest, and whether there is padding too."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.starts.shape[0]


def _starts(seqlen: int, block: int) -> Array:
    return jnp.arange(0, seqlen, block, dtype=jnp.int32)


def _side(operands: Mapping[str, Array], name: str, batch: int, starts: Array, block: int, seqlen: int) -> _Side:
    length, ids = operands.get(f"{name}_lengths"), operands.get(f"{name}_segments")
    length = jnp.full((1, 1, 1), seqlen) if length is None else length[..., 0]
    length = for_every_batch(jnp.clip(length, 0, seqlen).astype(jnp.int32), batch)
    if ids is not None:
        ids = _gather(ids.reshape(ids.shape[0], 1, seqlen), 2, starts, block)
        lowest = jnp.where(ids < 0, np.iinfo(np.int32).max, ids)
        inits = np.int32(np.iinfo(np.int32).max), np.int32(np.iinfo(np.int32).min), np.bool_(False)
        # One reduction: it is a kernel to compile, and three of them would be six more.
        ids = lax.reduce((lowest, ids, ids < 0), inits, _reduce_extremes_and_any, (ids.ndim - 1,))
        ids = tuple(for_every_batch(x, batch) for x in ids)
    return _Side(starts, block, seqlen, length, ids)


def _offset(operands: Mapping[str, Array], batch: int) -> Array:
    """`[1|B, 1, 1]`."""
    if "offset" not in operands:
        return jnp.zeros((1, 1, 1), jnp.int32)
    return for_every_batch(operands["offset"][..., 0], batch)


def _gather(x: Array, axis: int, starts: Array, block: int) -> Array:
    """An axis -> blocks, and what each holds; one that is cut short repeats the last element."""
    if starts.shape[0] * block == x.shape[axis]:  # none is cut short, nor moved back
        return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    index = starts[:, None] + jnp.arange(block, dtype=jnp.int32)
    return jnp.take(x, jnp.minimum(index, x.shape[axis] - 1), axis)


_Pairs = list[tuple[Array, Array]]
"""Of blocks and tiles: whether something shows each block any of each tile, and whether it shows all."""


def _spans(x: _Side, y: _Side, back, forth, shift: Array, tiles: _Pairs, whole_past_end: bool) -> Array:
    """Which of y's tiles x's blocks meet. Index i of x sees those of y from i + shift - back to i + shift + forth."""
    met, whole = _met(x, y, back, forth, shift), _whole(x, y, back, forth, shift, whole_past_end)
    if x.ids is not None or tiles:
        met, whole = _met_too(_in_tiles(met, y), _in_tiles(whole, y), x, y, tiles)
        met, whole = _hull(met), _longest_run(whole)
    (begin, end), (full, stop) = met, whole
    begin, end = (jnp.where(begin < end, n, 0) for n in (begin, end))
    full, stop = (jnp.where(full < stop, n, end) for n in (full, stop))
    return jnp.stack(jnp.broadcast_arrays(begin, full, stop, end), -1).astype(jnp.int32)


def _query_sides(spec, operands, batch, seqlen_q, seqlen_k, starts_m, block_m, block_n):
    """Rows, keys, what bounds them, and `_pairs`."""
    rows = _side(operands, "q", batch, jnp.asarray(starts_m, jnp.int32), block_m, seqlen_q)
    cols = _side(operands, "kv", batch, _starts(seqlen_k, block_n), block_n, seqlen_k)
    return rows, cols, _bounds(spec, operands, batch), _pairs(spec, operands, batch, rows, cols)


def _bounds(spec: Spec, operands: Mapping[str, Array], batch: int) -> tuple[int | None, int | None, Array]:
    """What a row sees to the left and right of its index and the offset, as far as indices say it."""
    rules = spec.rules
    left, right = (None, None) if "q_positions" in operands else (rules.left, rules.right)
    return left, right, _offset(operands, batch)


def _pairs(spec: Spec, operands: Mapping[str, Array], batch: int, rows: _Side, cols: _Side) -> _Pairs:
    """What mask and positions show of each block of rows and tile of keys: `[1|B, 1|H, .., ..]`."""
    pairs = [*_mask_tiles(operands, batch, rows, cols), *_position_tiles(spec, operands, batch, rows, cols)]
    if spec.by_function and not spec.listed:  # which may hide anything
        pairs.append((jnp.ones((1, 1, 1, 1), bool), jnp.zeros((1, 1, 1, 1), bool)))
    return pairs


def _in_tiles(span: tuple[Array, Array], y: _Side) -> Array:
    """Whether each of y's tiles is in a span."""
    start, stop = (x[..., None] for x in span)
    tile = jnp.arange(y.blocks, dtype=jnp.int32)
    return (start <= tile) & (tile < stop)


def _met_too(met: Array, whole: Array, x: _Side, y: _Side, tiles: _Pairs) -> tuple[Array, Array]:
    """What bounds let through, less what segments and `tiles` hide."""
    for some, every in (*_segment_tiles(x, y), *tiles):
        met, whole = met & some, whole & every
    return met, whole


def _met(x: _Side, y: _Side, back, forth, shift: Array) -> tuple[Array, Array]:
    """The tiles where some index of a block sees something, as far as bounds and lengths know."""
    first, last = x.starts, jnp.minimum(x.starts + x.block, x.length) - 1
    begin = 0 if back is None else jnp.maximum(first + shift - back, 0)
    end = y.length if forth is None else jnp.minimum(last + shift + forth + 1, y.length)
    end = jnp.where((first <= last) & (begin < end), end, 0)
    return jnp.minimum(begin, end) // y.block, -(-end // y.block)


def _whole(x: _Side, y: _Side, back, forth, shift: Array, whole_past_end: bool) -> tuple[Array, Array]:
    """The tiles where every index of a block sees everything, likewise."""
    first, last = x.starts, jnp.minimum(x.starts + x.block, x.seqlen) - 1
    begin = jnp.zeros((1, 1, 1), jnp.int32) if back is None else jnp.maximum(last + shift - back, 0)
    end = y.length if forth is None else jnp.clip(first + shift + forth + 1, 0, y.length)
    end = jnp.where(last < x.length, end, 0)
    stop = jnp.where(whole_past_end & (end == y.seqlen), y.blocks, end // y.block)
    return -(-begin // y.block), stop


def _segment_tiles(x: _Side, y: _Side) -> list[tuple[Array, Array]]:
    """Whether ids may be equal somewhere in block and tile, and whether they surely are everywhere."""
    if x.ids is None or y.ids is None:
        return []
    (x_low, x_high, x_padded), (y_low, y_high, y_padded) = (
        [n[..., None] for n in x.ids],
        [n[:, :, None] for n in y.ids],
    )
    some = (x_low <= y_high) & (y_low <= x_high)
    every = (x_low == x_high) & (y_low == y_high) & (x_low == y_low) & ~x_padded & ~y_padded
    return [(some, every)]


def _position_tiles(spec: Spec, operands: Mapping[str, Array], batch: int, rows: _Side, cols: _Side) -> _Pairs:
    """Whether positions that are data let some row of a block see some key of a tile, and surely each row each key."""
    left, right = spec.rules.left, spec.rules.right
    if "q_positions" not in operands or (left, right) == (None, None):
        return []
    (q_low, q_high), (k_low, k_high) = (
        _least_largest(for_every_batch(operands[f"{name}_positions"].reshape(-1, 1, side.seqlen), batch), side)
        for name, side in (("q", rows), ("kv", cols))
    )
    (q_low, q_high), (k_low, k_high) = (q_low[..., None], q_high[..., None]), (k_low[:, :, None], k_high[:, :, None])
    some, every = [], []
    if right is not None:
        some.append(k_low <= positions.after(q_high, right))
        every.append(k_high <= positions.after(q_low, right))
    if left is not None:
        some.append(k_high >= positions.before(q_low, left))
        every.append(k_low >= positions.before(q_high, left))
    return [(functools.reduce(operator.and_, some), functools.reduce(operator.and_, every))]


def _least_largest(x: Array, side: _Side) -> tuple[Array, Array]:
    """Of `[n, 1, seqlen]`, by block."""
    x = _gather(x, 2, side.starts, side.block)
    inits = np.int32(np.iinfo(np.int32).max), np.int32(np.iinfo(np.int32).min)
    return tuple(lax.reduce((x, x), inits, _reduce_extremes, (x.ndim - 1,)))


def _mask_tiles(operands: Mapping[str, Array], batch: int, rows: _Side, cols: _Side) -> _Pairs:
    """Whether the mask shows some, and every, element of each block of rows and tile of keys."""
    if "mask" not in operands:
        return []
    mask = lax.optimization_barrier(operands["mask"])  # XLA would take minutes to fold a large constant's reduction
    some, every = mask, mask
    if mask.shape[3] > 1:  # keys first, so that rows are gathered from little
        whole = cols.seqlen // cols.block * cols.block
        tiles = [_any_all(*[mask[..., :whole].reshape(*mask.shape[:3], -1, cols.block)] * 2)]
        if whole < cols.seqlen:  # apart, so that the array is never padded, which would copy it
            tiles.append(_any_all(*[mask[..., None, whole:]] * 2))
        some, every = (jnp.concatenate(x, -1) for x in zip(*tiles, strict=True))
    if mask.shape[2] > 1:
        some, every = _any_all(*(_gather(x, 2, rows.starts, rows.block).swapaxes(3, 4) for x in (some, every)))
    return [(for_every_batch(some, batch), for_every_batch(every, batch))]


def _any_all(some: Array, every: Array) -> tuple[Array, Array]:
    """`some.any(-1)` and `every.all(-1)` in one reduction: a kernel where two of them would be four, and faster."""
    inits = np.bool_(False), np.bool_(True)
    return tuple(lax.reduce((some, every), inits, _reduce_any_all, (some.ndim - 1,)))


# What is done in reductions is named: a function made anew would be compiled anew outside jit.


def _reduce_extremes(x, y):
    return jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1])


def _reduce_extremes_and_any(x, y):
    return jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1]), x[2] | y[2]


def _reduce_any_all(x, y):
    return x[0] | y[0], x[1] & y[1]


def _hull(x: Array) -> tuple[Array, Array]:
    """From the first True of the last axis to behind the last; (0, 0) where there is none."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(x.any(-1), x.argmax(-1).astype(jnp.int32), 0), jnp.where(x, index + 1, 0).max(-1)


def _longest_run(x: Array) -> tuple[Array, Array]:
    """The first of the longest runs of True along the last axis; of length 0 where there is none."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    length = index - lax.cummax(jnp.where(x, -1, index), x.ndim - 1)  # of the run that ends here
    stop = length.argmax(-1).astype(jnp.int32) + 1
    return stop - length.max(-1), stop
