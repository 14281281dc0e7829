"""Which tiles a block meets, where a block mask says it: lists of tiles in place of spans of them.

A block mask cuts the logits into tiles `[block_m, block_n]`, each empty, full or partial. For every block of rows it
lists the tiles of keys that are not empty, the partial ones first; for every block of keys, the tiles of rows. The
operands, after the two axes of batch and heads:

- row_ends `[.., row blocks, 3]` int32: where in row_tiles the block's partial tiles begin, its full ones, and what
  follows (CSR); row_tiles `[.., size, 2]` int32: the number of the tile, and of its element mask (-1, `NO_MASK`: full);
- col_ends `[.., key blocks, 3]`, col_tiles `[.., size, 2]`: the same, transposed;
- tile_bits `[.., parts, block_m * block_n / 32]` int32: element masks, 32 keys to a word, lowest bit first;
- tile_weights `[.., parts, block_m * block_n]` fp32, where weights are not all 0 or 1: their logarithms.

Tiles past the end of the keys are never full, so that what is full needs no bounds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base.operands import BLOCK_LISTS, for_every_batch
from ..base.spec import Spec
from . import kinds, spans
from .kinds import EMPTY, FULL, NO_MASK, NO_TILE, PARTIAL


def lists(status: Array, part: Array, size: int) -> tuple[Array, Array]:
    """The tiles that are not empty, by blocks.

    Args:
      status: `[.., blocks, tiles]`: `EMPTY`, `FULL` (no element mask is needed) or `PARTIAL`.
      part: int32, the same shape: the number of a tile's element mask, `NO_MASK` for none.
      size: how many tiles fit a list; those that do not are left out.

    Returns:
      The ends `[.., blocks, 3]` and the tiles `[.., size, 2]`, int32.
    """
    *planes, blocks, tiles = status.shape
    status, part = status.reshape(-1, blocks, tiles), part.reshape(-1, blocks, tiles)

    def plane(status, part):
        block, tile = lax.broadcasted_iota(jnp.int32, status.shape, 0), lax.broadcasted_iota(jnp.int32, status.shape, 1)
        rank = jnp.where(status == EMPTY, 2 * blocks, 2 * block + (status == FULL).astype(jnp.int32))
        _, *listed = lax.sort((rank.ravel(), tile.ravel(), part.ravel()), num_keys=1, is_stable=True)
        listed = jnp.stack([_resize(x, size) for x in listed], -1)
        counts = jnp.stack([(status == PARTIAL).sum(1), (status == FULL).sum(1)], -1).astype(jnp.int32)
        ends = jnp.cumsum(counts.ravel(), dtype=jnp.int32).reshape(blocks, 2)
        begin = ends[:, 0] - counts[:, 0]
        return jnp.minimum(jnp.stack([begin, ends[:, 0], ends[:, 1]], -1), size), listed

    ends, listed = jax.vmap(plane)(status, part)
    return ends.reshape(*planes, blocks, 3), listed.reshape(*planes, size, 2)


def both(status: Any, part: Any, size: int, lists: Callable[..., Any] = lists) -> dict[str, Any]:
    """The lists by rows and by keys, as the operands that they are."""
    by_row, by_col = lists(status, part, size), lists(status.swapaxes(2, 3), part.swapaxes(2, 3), size)
    return dict(zip(BLOCK_LISTS, (*by_row, *by_col), strict=False))


def _resize(x: Array, size: int) -> Array:
    return x[:size] if size <= x.shape[0] else jnp.pad(x, (0, size - x.shape[0]))


def parts(operands: Mapping[str, Array]) -> Array:
    """`[n, 1|H, row blocks, key blocks]` int32: the number of each tile's element mask, or `NO_MASK`, or `NO_TILE`."""
    ends, tiles = operands["row_ends"], operands["row_tiles"]
    blocks_q, blocks_k = ends.shape[2], operands["col_ends"].shape[2]

    def plane(ends, tiles):
        place = jnp.arange(tiles.shape[0], dtype=jnp.int32)
        row = jnp.searchsorted(ends[:, 2], place, side="right")  # blocks_q for what no block has: dropped
        table = jnp.full((blocks_q, blocks_k), NO_TILE, jnp.int32)
        return table.at[row, tiles[:, 0]].set(tiles[:, 1], mode="drop")

    return jax.vmap(jax.vmap(plane))(ends, tiles)


def status(
    spec: Spec, operands: Mapping[str, Array], batch: int, seqlen_q: int, seqlen_k: int, part: Array, *, bounded: bool
) -> Array:
    """`[n, 1|H, row blocks, key blocks]`: what each tile is, from `parts`.

    bounded: where causality, bounds, lengths and segments have a say too. A full tile that these cut is `PARTIAL`, but
    has no element mask.
    """
    if not bounded:
        return kinds.of_parts(part)
    block_m, block_n = spec.tile_rows, spec.tile_keys
    starts = jnp.arange(0, seqlen_q, block_m, dtype=jnp.int32)
    table = spans.query_spans(spec, operands, batch, seqlen_q, seqlen_k, starts, block_m, block_n)
    begin, full, stop, end = (x[..., None] for x in jnp.moveaxis(table, -1, 0))
    tile = jnp.arange(part.shape[3], dtype=jnp.int32)
    met, whole = (begin <= tile) & (tile < end), (full <= tile) & (tile < stop)
    part = for_every_batch(part, batch) if met.shape[0] > 1 else part
    return jnp.where((part == NO_TILE) | ~met, EMPTY, jnp.where((part == NO_MASK) & whole, FULL, PARTIAL))


def union(status: Array) -> Array:
    """`[row blocks, key blocks]`: a tile is empty, or full, where it is that in every batch and head."""
    return union_by_head(status, 1)[0, 0]


def union_by_head(status: Array, heads: int) -> Array:
    """`[1, heads, row blocks, key blocks]`: the same of so many heads, each of some that follow each other."""
    status = status.reshape(status.shape[0], heads, -1, *status.shape[2:])
    empty, full = ((status == x).all((0, 2))[None] for x in (EMPTY, FULL))
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL))


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def for_kernels(
    spec: Spec, operands: Mapping[str, Array], q: Array, k: Array, v: Array
) -> tuple[Spec, dict[str, Array]]:
    """Operands as kernels take them: what else bounds the logits shortens the lists, and numbers count all planes.

    Raises:
      ValueError: int32 cannot count the places in all lists.
    """
    operands = dict(operands)
    if not spec.listed:
        return spec, operands
    if spec.causal or spec.bounded:
        part = parts(operands)
        cut = status(spec, operands, q.shape[0], q.shape[1], k.shape[1], part, bounded=True)
        part = _in_planes(part, list(cut.shape[:2]))
        operands |= both(cut, part, part.shape[2] * part.shape[3])
    bits = operands.get("tile_bits", jnp.zeros((1, 1, 0, 0), jnp.int32))
    planes = [max(operands[name].shape[axis] for name in BLOCK_LISTS if name in operands) for axis in (0, 1)]
    size = max(operands[f"{side}_tiles"].shape[2] for side in ("row", "col"))
    places = planes[0] * planes[1] * size * (max(spec.tile_rows, spec.tile_keys) // 16)  # of a kernel's smallest tiles
    if places >= 2**31:
        raise ValueError(
            f"mask has too many tiles for the kernels, which count fewer than 2**31 of 16 rows or keys, got {places}: "
            f"{planes[0]} * {planes[1]} planes of batches and heads, with lists of up to {size} tiles; make its tiles "
            'larger, give fewer heads or batches a mask of their own, or use implementation="xla"'
        )
    number = jnp.arange(planes[0] * planes[1], dtype=jnp.int32).reshape(*planes, 1, 1)
    own = jnp.arange(bits.shape[0] * bits.shape[1], dtype=jnp.int32).reshape(*bits.shape[:2], 1, 1)
    for side in ("row", "col"):
        ends, tiles = (_in_planes(operands[f"{side}_{what}"], planes) for what in ("ends", "tiles"))
        operands[f"{side}_ends"] = ends + number * tiles.shape[2]
        if own.size > 1:
            part = tiles[..., 1:]
            part = jnp.where(part < 0, NO_MASK, part + _in_planes(own, planes) * bits.shape[2])
            tiles = jnp.concatenate([tiles[..., :1], part], -1)
        operands[f"{side}_tiles"] = tiles
    return Spec.of(spec.rules, q, k, v, operands), operands


def _in_planes(x: Array, planes: list[int]) -> Array:
    """`[n, h, ...]` as `[*planes, ...]`: batch b reads b % n, heads as they broadcast."""
    return jnp.broadcast_to(for_every_batch(x, planes[0]), (*planes, *x.shape[2:]))


def element_masks(operands: Mapping[str, Array], part: Array, block_m: int, block_n: int) -> Array:
    """What tiles show: bool `[n, h, rows * block_m, cols * block_n]` of parts `[n, h, rows, cols]` (see `parts`)."""
    words = _taken(operands["tile_bits"], part).reshape(*part.shape, block_m, block_n // 32, 1)
    bits = (words >> jnp.arange(32, dtype=jnp.int32)) & 1
    part = part[..., None, None]
    shown = jnp.where(part < 0, part == NO_MASK, bits.reshape(*part.shape[:-2], block_m, block_n) != 0)
    return _joined(shown)


def log_weights(operands: Mapping[str, Array], part: Array, block_m: int, block_n: int) -> Array:
    """The logarithms of the weights of tiles, likewise; 0 where a tile has no element mask."""
    weights = _taken(operands["tile_weights"], part).reshape(*part.shape, block_m, block_n)
    return _joined(jnp.where(part[..., None, None] < 0, 0, weights))


def _taken(x: Array, part: Array) -> Array:
    """`[n, h, parts, size]` at `[n', h', rows, cols]` -> `[n', h', rows, cols, size]`."""
    if x.shape[0] * x.shape[1] == 1:
        return x[0, 0][jnp.maximum(part, 0)]
    planes = [max(a, b) for a, b in zip(x.shape[:2], part.shape[:2], strict=True)]
    one = jax.vmap(jax.vmap(lambda x, part: x[jnp.maximum(part, 0)]))
    return one(_in_planes(x, planes), _in_planes(part, planes))


def _joined(x: Array) -> Array:
    """`[n, h, rows, cols, M, N]` -> `[n, h, rows * M, cols * N]`."""
    n, h, rows, cols, m, k = x.shape
    return x.swapaxes(3, 4).reshape(n, h, rows * m, cols * k)


def of_rows(operands: Mapping[str, Array], blocks: Array) -> dict[str, Array]:
    """The lists of some blocks of rows, in this order: as if there were no others. blocks: int32, their numbers."""
    part = jnp.take(parts(operands), blocks, axis=2)
    return dict(operands) | both(kinds.of_parts(part), part, part.shape[2] * part.shape[3])
