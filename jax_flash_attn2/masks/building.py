"""How a block mask is built: each tile is classified, partial ones are kept as bits, and lists say which there are.

Where nothing is traced NumPy does all of it but evaluating a predicate: operations on arrays of tiles cost less than
compiling them.
"""

from typing import Any

import jax
import numpy as np

from ..base import arguments, known
from ..base.layout import next_power_of_two
from ..tiles import block_lists, kinds
from ..tiles.kinds import EMPTY, FULL, NO_MASK, NO_TILE, PARTIAL
from . import building_under_jit, checks
from .sources import AT_ONCE, packed_here

DEFAULT_BLOCK = 128
"""Rows and keys of a tile: what the kernels' own tiles are at most, but for few."""


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
@jax.numpy_dtype_promotion("standard")
def build(source: Any, shape, block_m, block_n, max_tiles, max_parts) -> dict[str, Any]:
    """The fields of a `BlockMask`, of a source and the arguments of `from_predicate`."""
    block_m, block_n = block_size("block_m", block_m, shape[2], 16), block_size("block_n", block_n, shape[3], 32)
    check_sizes(max_tiles, max_parts)
    check_shape(shape)
    sizes, fields = (shape, block_m, block_n), {"shape": shape, "block_m": block_m, "block_n": block_n}
    if not known.is_known(source):
        return building_under_jit.build(source, *sizes, max_tiles, max_parts) | fields
    with known.now():
        return jax.device_put(_build(source, *sizes, max_tiles, max_parts)) | {"overflow": None} | fields


def _build(source: Any, shape, block_m, block_n, max_tiles, max_parts) -> dict[str, np.ndarray | None]:
    status, bits, weights = _classified(source, shape, block_m, block_n)
    check_most("max_parts", max_parts, len(bits))
    number = np.arange(len(bits), dtype=np.int32)
    if weights is not None and not weights.any():
        weights = None  # all of them 1
    if weights is None and len(bits):  # tiles that look alike, as those on a diagonal do, are stored once
        bits, number = distinct(bits)
    bits = padded(bits, max_parts)
    weights = None if weights is None else padded(weights, max_parts)
    part = np.where(status == FULL, np.int32(NO_MASK), np.int32(NO_TILE))
    part[status == PARTIAL] = number
    return listed(part, max_tiles) | {"tile_bits": bits, "tile_weights": weights}


def listed(part: np.ndarray, max_tiles: int | None) -> dict[str, np.ndarray]:
    """The lists of a mask of the number of each tile's element mask (see `block_lists.parts`)."""
    status = kinds.of_parts(part, np)
    size = int((status != EMPTY).sum((2, 3)).max())
    check_most("max_tiles", max_tiles, size)
    return block_lists.both(status, part, max_tiles or max(size, 1), lists)


def _classified(
    source: Any, shape: tuple[int, int, int, int], block_m: int, block_n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What each tile is, int8 `[B, H, row blocks, key blocks]`; and, of the partial ones in that order, the bits, int32
    `[parts, block_m * block_n / 32]`, and the logarithms of their weights, fp32 `[parts, block_m * block_n]`."""
    batch, heads, seqlen_q, seqlen_k = shape
    blocks_q, blocks_k = -(-seqlen_q // block_m), -(-seqlen_k // block_n)
    width = blocks_k * block_n
    together = min(max(AT_ONCE // (block_m * width), 1), blocks_q)
    status = np.empty((batch, heads, blocks_q, blocks_k), np.int8)
    bits, weights = [], []

    def tiles(x: np.ndarray, beyond: int) -> np.ndarray:
        """Rows as `[row blocks, key blocks, rows of a tile, ...]`, those past the end being `beyond`."""
        x = np.pad(x, ((0, -len(x) % block_m), (0, 0)), constant_values=beyond)
        return x.reshape(-1, block_m, blocks_k, x.shape[1] // blocks_k).swapaxes(1, 2)

    for b, h, i in np.ndindex(batch, heads, -(-blocks_q // together)):
        first = i * together * block_m
        x = source.band(b, h, first, together * block_m, width)[: seqlen_q - first]
        words, ones = (x, x) if x.dtype == np.uint32 else (packed_here(x != 0), packed_here(x == 1))
        every = (tiles(ones, 2**32 - 1) == 2**32 - 1).all((2, 3))
        some = tiles(words, 0).any((2, 3))
        found = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
        status[b, h, i * together : i * together + len(found)] = found
        at = found == PARTIAL
        bits.append(tiles(words, 0)[at].reshape(-1, block_m * block_n // 32))
        if x.dtype != np.uint32:
            logs = np.log(np.where(x == 0, 1, x).astype(checks.wider(x.dtype, np.float32)))
            weights.append(tiles(logs.astype(np.float32), 0)[at].reshape(-1, block_m * block_n))
    return status, np.concatenate(bits).view(np.int32), np.concatenate(weights) if weights else None


def lists(status: np.ndarray, part: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`block_lists.lists` in NumPy."""
    *planes, blocks, tiles = status.shape
    block, tile = np.indices((blocks, tiles), np.int32)
    rank = np.where(status == EMPTY, 2 * blocks, 2 * block + (status == FULL)).reshape(*planes, -1)
    order = np.argsort(rank, -1, kind="stable")[..., :size]
    tile = np.broadcast_to(tile, status.shape).reshape(rank.shape)
    listed = np.stack([np.take_along_axis(x.reshape(rank.shape), order, -1) for x in (tile, part)], -1)
    listed = np.pad(listed, (*((0, 0) for _ in planes), (0, size - listed.shape[-2]), (0, 0)))
    counts = np.stack([(status == PARTIAL).sum(-1), (status == FULL).sum(-1)], -1)
    ends = counts.reshape(*planes, -1).cumsum(-1).reshape(counts.shape)
    ends = np.concatenate([ends[..., :1] - counts[..., :1], ends], -1)
    return np.minimum(ends, size).astype(np.int32), listed.astype(np.int32)


def distinct(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of `bits`, and which of them each row is."""
    whole = np.ascontiguousarray(bits).view(np.dtype((np.void, bits.dtype.itemsize * bits.shape[1]))).ravel()
    _, first, number = np.unique(whole, return_index=True, return_inverse=True)
    return bits[first], number.astype(np.int32)


def padded(x: np.ndarray, rows: int | None) -> np.ndarray:
    """`[n, size]` -> `[1, 1, rows, size]`; None: n, and at least 1."""
    return np.pad(x, ((0, (rows or max(len(x), 1)) - len(x)), (0, 0)))[None, None]


# One argument each.


def block_size(name: str, block: Any, seqlen: int, least: int) -> int:
    """`block_m` or `block_n`: a power of two; None: what suits the sequence."""
    if block is None:
        return min(max(next_power_of_two(seqlen), least), DEFAULT_BLOCK)
    if not arguments.is_integer(block) or not least <= block <= 512 or block & (block - 1):
        raise ValueError(f"{name} must be a power of two from {least} to 512, or None, got {block!r}")
    return int(block)


def check_sizes(max_tiles: Any, max_parts: Any) -> None:
    """Raises unless both are numbers, or None."""
    for name, n in (("max_tiles", max_tiles), ("max_parts", max_parts)):
        if n is not None and not (arguments.is_integer(n) and n >= 1):
            raise ValueError(f"{name} must be a positive integer or None (counted), got {n!r}")


def check_shape(shape: tuple[int, int, int, int]) -> None:
    """Raises where there is nothing to mask."""
    if 0 in shape:
        raise ValueError(f"a block mask needs at least one batch, head, row and key, got shape {shape}")


def check_most(name: str, limit: int | None, n: int) -> None:
    """Raises where a mask has more than it may have."""
    if limit is not None and n > limit:
        raise ValueError(f"{name} must be at least {n}, which is what the mask has, got {limit}")
