"""Block masks of tiles that somebody chose: seen whole, or as far as a predicate or another block mask lets them be.

Choosing is arithmetic on tables of tiles. Elements are looked at only of a predicate, and only in the tiles chosen.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import known
from ..base.layout import next_power_of_two
from ..tiles import block_lists
from ..tiles.kinds import NO_MASK, NO_TILE
from . import building, building_under_jit, checks, evaluation, sources
from .programs import Program

_BITS_AT_ONCE = 2**24
"""How many elements of a predicate are looked at together: they come as bits, of which these are 2 MiB."""


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
@jax.numpy_dtype_promotion("standard")
def build(
    whole: Any, divided: Any, by: Any, shape: tuple[int, int, int, int], block_m: int, block_n: int,
    max_tiles: int | None, max_parts: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a `BlockMask`.

    Args:
      whole: tiles, as `table` gives them, that are seen whole; None: none.
      divided: tiles that are seen as far as `by` says; None: none. What is in both is seen whole.
      by: a program of known values (`evaluation.trace`), where tiles are known; or the operands of a block mask of the
        same lengths and tiles.
      shape: (B, H, Sq, Sk). The mask has the B and H of what it is made of, which may be 1.
      max_tiles, max_parts: as in `BlockMask.from_predicate`; None under jit: as many as there can be.
    """
    sizes = shape, block_m, block_n
    if known.is_known((whole, divided, by)):
        with known.now():
            whole, divided = (None if x is None else np.asarray(jax.device_get(x)) for x in (whole, divided))
            part, bits, weights = _combined(np, whole, divided, _found(by, divided, *sizes), *sizes)
            building.check_most("max_parts", max_parts, len(bits))
            bits, weights = (None if x is None else building.padded(x, max_parts) for x in (bits, weights))
            arrays = building.listed(part, max_tiles) | {"tile_bits": bits, "tile_weights": weights}
            arrays = jax.device_put(arrays) | {"overflow": None}
    else:
        arrays = _under_jit(whole, divided, by, *sizes, max_tiles, max_parts)
    planes = arrays["row_ends"].shape[:2]
    return arrays | {"shape": (*planes, *shape[2:]), "block_m": block_m, "block_n": block_n}


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _under_jit(whole, divided, by, shape, block_m, block_n, max_tiles, max_parts) -> dict[str, Any]:
    sizes = shape, block_m, block_n
    part, bits, weights = _combined(jnp, whole, divided, _held(by), *sizes)
    building.check_most("max_parts", max_parts, len(bits))
    more = ((0, (max_parts or max(len(bits), 1)) - len(bits)), (0, 0))
    bits, weights = (None if x is None else jnp.pad(x, more)[None, None] for x in (bits, weights))
    every = part.shape[2] * part.shape[3]
    lists, more = building_under_jit.listed(part, max_tiles or every)
    overflow = None if (max_tiles or every) >= every else more
    return lists | {"tile_bits": bits, "tile_weights": weights, "overflow": overflow}


def _combined(xp: Any, whole: Any, divided: Any, held: Any, shape, block_m: int, block_n: int) -> tuple[Any, ...]:
    """The number of each tile's element mask, as in `block_lists.parts`, and these, with their weights."""
    part, bits, weights = held
    if divided is not None:
        part = xp.where(divided, part, NO_TILE)
    if whole is not None:
        edges, number = _edges(shape, block_m, block_n)
        if divided is not None:
            part = xp.where(part >= 0, part + len(edges), part)
        part = xp.where(whole, number, part)
        bits = edges if bits is None else xp.concatenate([edges, bits])
        if weights is not None:
            weights = xp.concatenate([np.zeros((len(edges), weights.shape[1]), np.float32), weights])
    return part.astype(np.int32), bits, weights


def _edges(shape: tuple[int, int, int, int], block_m: int, block_n: int) -> tuple[np.ndarray, np.ndarray]:
    """The element masks of whole tiles that have one, as those past the end of the keys must; and their numbers,
    `[row blocks, key blocks]`."""
    seqlen_q, seqlen_k = shape[2:]
    number = np.full((-(-seqlen_q // block_m), -(-seqlen_k // block_n)), NO_MASK, np.int32)
    if seqlen_k % block_n == 0:
        return np.zeros((0, block_m * block_n // 32), np.int32), number
    rows = np.stack([np.arange(block_m) < n for n in (block_m, seqlen_q % block_m) if n])
    number[:, -1], number[-1, -1] = 0, len(rows) - 1
    inside = rows[:, :, None] & (np.arange(block_n) < seqlen_k % block_n)
    return sources.packed_here(inside.reshape(len(rows), -1)).view(np.int32), number


def _held(by: Mapping[str, Array] | None) -> tuple[Any, Any, Any]:
    """What a block mask has of each tile: numbers, element masks and their weights."""
    if by is None:
        return np.int32(NO_TILE), None, None
    return block_lists.parts(by), by["tile_bits"][0, 0], by["tile_weights"][0, 0] if "tile_weights" in by else None


_held_under_jit = jax.jit(_held)


def _found(by: Any, tiles: np.ndarray | None, shape, block_m: int, block_n: int) -> tuple[Any, Any, Any]:
    """The same, known; a program's are found in these tiles."""
    if not isinstance(by, Program):
        return _held(by) if by is None else jax.device_get(_held_under_jit(by))
    assert tiles is not None
    for axis, (n, used) in enumerate(zip(shape[:2], by.steps.reads(), strict=False)):
        # What it does not depend on, it is asked for once.
        tiles = np.repeat(tiles, n // tiles.shape[axis], axis) if used else tiles.any(axis, keepdims=True)
    part = np.full(tiles.shape, NO_TILE, np.int32)
    at = np.argwhere(tiles).astype(np.int32)
    source = sources.OfPredicate(by.on_device(), shape[3])
    together = min(max(_BITS_AT_ONCE // (block_m * block_n), 1), next_power_of_two(max(len(at), 1)))
    whole, divided, masks = [np.zeros(0, bool)], [np.zeros(0, bool)], [np.zeros((0, block_m * block_n // 32), np.int32)]
    for first in range(0, len(at), together):
        some = at[first : first + together]
        asked = np.pad(some, ((0, together - len(some)), (0, 0)))
        bits = jax.device_get(_elements(source, jax.device_put(asked), shape, block_m, block_n))[: len(some)]
        beyond = some[:, 2, None] * block_m + np.arange(block_m) >= shape[2]
        full = ((bits.reshape(len(some), block_m, -1) == -1) | beyond[:, :, None]).all((1, 2))
        partial = bits.any(1) & ~full
        whole.append(full)
        divided.append(partial)
        masks.append(bits[partial])
    whole, divided, bits = (np.concatenate(x) for x in (whole, divided, masks))
    found = np.where(whole, np.int32(NO_MASK), np.int32(NO_TILE))
    if len(bits):
        bits, found[divided] = building.distinct(bits)
    part[tuple(at.T)] = found
    return part, bits, None


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _elements(source: sources.OfPredicate, at: Array, shape, block_m: int, block_n: int) -> Array:
    return building_under_jit.elements(source, at, shape, block_m, block_n)[0]


# Tables.


def blocks(shape: tuple[int, int, int, int], block_m: int, block_n: int) -> tuple[int, int, int, int]:
    """How many batches, heads, row blocks and key blocks there are."""
    return *shape[:2], -(-shape[2] // block_m), -(-shape[3] // block_n)


def table(tiles: Any, blocks: tuple[int, int, int, int]) -> Any:
    """`tiles` as booleans `[1|B, 1|H, row blocks, key blocks]`, if a mask of so many batches, heads and blocks can have
    them."""
    if not isinstance(tiles, Array | np.ndarray) or tiles.dtype != bool:
        raise TypeError(
            f"tiles must be an array of booleans (True: visited), got "
            f"{getattr(tiles, 'dtype', type(tiles).__name__)}; compare scores with a threshold"
        )
    tiles = evaluation.with_axes("tiles", tiles, ("B", "H", "row blocks", "key blocks"), 2)
    _check_blocks("tiles", tiles.shape, blocks)
    return tiles


def table_of_lists(
    prefix: str, counts: Any, indices: Any, blocks: tuple[int, int, int, int]
) -> tuple[Any, Array | None]:
    """The same of the first counts `[1|B, 1|H, row blocks]` of indices `[1|B, 1|H, row blocks, n]`; and, where they are
    traced, whether there are some that do not exist."""
    count, index = f"{prefix}kv_num_blocks", f"{prefix}kv_indices"
    counts = evaluation.integers(count, counts, ("B", "H", "row blocks"))
    indices = evaluation.integers(index, indices, ("B", "H", "row blocks", "n"), 2)
    room = indices.shape[3]
    _check_blocks(count, counts.shape, blocks[:3])
    _check_blocks(index, indices.shape, (*blocks[:3], room))
    if not known.is_known((counts, indices)):
        return _scattered(counts, indices, blocks[3])
    counts, indices = (np.asarray(jax.device_get(x)) for x in (counts, indices))
    if counts.min() < 0 or counts.max() > room:
        raise ValueError(
            f"{count} must be from 0 to {room}, for which {index} has room, got {counts.min()} to {counts.max()}; give "
            f"{index} more room"
        )
    used, indices = np.broadcast_arrays(np.arange(room) < counts[..., None], indices)
    own = indices[used]
    if own.size and not 0 <= own.min() <= own.max() < blocks[3]:
        raise ValueError(
            f"{index} must be numbers of key blocks, from 0 to {blocks[3] - 1}, got {own.min()} to {own.max()}; what"
            f" follows the first {count} of a row is not read"
        )
    tiles = np.zeros((*used.shape[:3], blocks[3]), bool)
    tiles[(*np.nonzero(used)[:3], own)] = True
    return tiles, None


@functools.partial(jax.jit, static_argnums=2)
@jax.numpy_rank_promotion("allow")
def _scattered(counts: Array, indices: Array, blocks_k: int) -> tuple[Array, Array]:
    room = indices.shape[3]
    bad = ((counts < 0) | (counts > room)).any()
    used, indices = jnp.broadcast_arrays(jnp.arange(room, dtype=jnp.int32) < counts[..., None], indices)
    there = (indices >= 0) & (indices < blocks_k)
    at = jnp.where(used & there, indices, blocks_k).reshape(-1, room)
    tiles = jax.vmap(lambda at: jnp.zeros(blocks_k, bool).at[at].set(True, mode="drop"))(at)
    return tiles.reshape(*used.shape[:3], blocks_k), bad | (used & ~there).any()


def _check_blocks(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if not checks.fits(shape, wanted):
        raise ValueError(f"{name} must have shape {wanted} (B and H may be 1), got {shape}")
