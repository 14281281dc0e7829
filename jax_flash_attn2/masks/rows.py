"""Some rows of a block mask as a mask of their own, as decoding needs them: where they begin may be traced."""

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments, known
from ..tiles import block_lists
from ..tiles.kinds import NO_MASK, NO_TILE
from . import building, building_under_jit, entries

if TYPE_CHECKING:
    from .block import BlockMask


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def build(mask: "BlockMask", start: Any, count: Any) -> dict[str, Any]:
    """The fields of `mask.rows(start, count)`."""
    batch, heads, seqlen_q, seqlen_k = mask.shape
    if not arguments.is_integer(count) or not 1 <= count <= seqlen_q:
        raise ValueError(f"count must be an integer from 1 to the mask's {seqlen_q} rows, got {count!r}")
    start, missing = _first_rows(start, int(count), batch, seqlen_q)
    block_m = building.block_size("block_m", None, int(count), 16)
    with known.now() if known.is_known((mask, start)) else contextlib.nullcontext():
        arrays = _rows(mask, start, int(count), block_m)
    shape = max(batch, len(start)), heads, int(count), seqlen_k
    fields = {"overflow": entries.either(mask.overflow, missing), "shape": shape}
    return arrays | fields | {"block_m": block_m, "block_n": mask.block_n}


def _first_rows(start: Any, count: int, batch: int, seqlen_q: int) -> tuple[Any, Array | None]:
    """int32 `[1|B]`; and, where they are traced, whether any of these rows does not exist."""
    start = np.asarray(start) if arguments.is_integer(start) else start
    start = arguments.int32_array("start", start, "[] or [B]").astype(np.int32)
    if start.ndim > 1 or (batch > 1 and start.size not in (1, batch)) or not start.size:
        wanted = "[] or [B]" if batch == 1 else f"[] or [{batch}]"
        raise ValueError(f"start must have shape {wanted}, a row for all batches or for each, got {start.shape}")
    start = start.reshape(-1)
    if not known.is_known(start):
        return start, ((start < 0) | (start > seqlen_q - count)).any()
    first, last = int(start.min()), int(start.max())
    if first < 0 or last > seqlen_q - count:
        raise ValueError(
            f"start must be from 0 to {seqlen_q - count}, so that {count} of the mask's {seqlen_q} rows follow, got "
            f"{first if first < 0 else last}"
        )
    return start, None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rows(mask: "BlockMask", start: Array, count: int, block_m: int) -> dict[str, Any]:
    part = block_lists.parts(mask.operands())  # [b, h, blocks, key blocks]
    tall = -(-count // block_m) * block_m
    row = start[:, None] + jnp.arange(tall, dtype=jnp.int32)  # [n, tall]: n is 1 or the batch
    inside = (jnp.arange(tall) < count)[:, None, None]
    block, at = row // mask.block_m, (row % mask.block_m)[:, None, :, None]
    part = jnp.broadcast_to(part, (max(part.shape[0], len(start)), *part.shape[1:]))
    # Of each row and key block: the number of the element mask that it is a row of.
    part = jnp.take_along_axis(part, block[:, None, :, None], axis=2, mode="clip")

    def held(x: Array, other: Any) -> Array:
        """`[b, h, tall, key blocks, ...]`: rows of what element masks have; `other` where there is none."""
        x = x[0, 0].reshape(x.shape[2], mask.block_m, -1)
        return jnp.where(part[..., None] >= 0, x[jnp.maximum(part, 0), at], other)

    def in_tiles(x: Array) -> Array:
        """`[b, h, row blocks, key blocks, block_m, ...]`."""
        b, h, _, tiles, size = x.shape
        return x.reshape(b, h, -1, block_m, tiles, size).swapaxes(3, 4)

    words = held(mask.tile_bits, jnp.where(part == NO_MASK, -1, 0)[..., None])
    some = in_tiles(jnp.where(inside, words != 0, False)).any((4, 5))
    whole = words == -1
    weights = None
    if mask.tile_weights is not None:
        weights = held(mask.tile_weights, 0.0)
        whole &= (weights == 0).all(-1, keepdims=True)
        weights = in_tiles(weights).reshape(1, 1, some.size, -1)
    every = in_tiles(whole | ~inside).all((4, 5))
    # Each tile has room for an element mask: how many are partial need not be known.
    number = jnp.arange(some.size, dtype=jnp.int32).reshape(some.shape)
    number = jnp.where(every, NO_MASK, jnp.where(some, number, NO_TILE))
    lists, _ = building_under_jit.listed(number, some.shape[2] * some.shape[3])
    bits = in_tiles(jnp.where(inside, words, 0)).reshape(1, 1, some.size, -1)
    return lists | {"tile_bits": bits, "tile_weights": weights}
