"""What is read off a block mask, on the device: its tiles, its elements, how many there are."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..tiles import block_lists, kinds
from ..tiles.kinds import NO_MASK, NO_TILE
from . import entries
from .mask import Mask

if TYPE_CHECKING:
    from .block import BlockMask


@jax.jit
def tiles(mask: "BlockMask") -> Array:
    """`BlockMask.tiles`."""
    return kinds.of_parts(block_lists.parts(mask.operands())).astype(jnp.int8)


def as_mask(mask: "BlockMask") -> Mask:
    """The same as a dense `Mask`, which has overflowed where the block mask has."""
    dense = _elements(mask)
    return Mask(mask.shape, "dense", dense.dtype, dense=dense, overflow=mask.overflow)


@jax.jit
@jax.numpy_rank_promotion("allow")
def _elements(mask: "BlockMask") -> Array:
    operands, size = mask.operands(), (mask.block_m, mask.block_n)
    part = block_lists.parts(operands)
    shown = block_lists.element_masks(operands, part, *size)
    if mask.tile_weights is not None:
        shown = jnp.where(shown, jnp.exp(block_lists.log_weights(operands, part, *size)), 0)
    return shown[:, :, : mask.shape[2], : mask.shape[3]]


@jax.jit
def sparsity(mask: "BlockMask") -> Array:
    """`BlockMask.sparsity`."""
    share = (block_lists.parts(mask.operands()) == NO_TILE).mean(dtype=jnp.float32)
    return entries.poisoned(100 * share, mask.overflow)


@jax.jit
@jax.numpy_rank_promotion("allow")
def density(mask: "BlockMask") -> Array:
    """`BlockMask.density`."""
    part = block_lists.parts(mask.operands())
    full = _held(mask.shape[2], mask.block_m)[:, None] * _held(mask.shape[3], mask.block_n)
    partial = lax.population_count(mask.tile_bits).sum(-1).reshape(-1)
    seen = jnp.where(part >= 0, partial[jnp.maximum(part, 0)], jnp.where(part == NO_MASK, full, 0))
    share = seen.astype(jnp.float32).sum() / np.float32(np.prod(np.asarray(mask.shape, np.float64)))
    return entries.poisoned(share, mask.overflow)


def _held(seqlen: int, block: int) -> Array:
    """How many of a sequence each block holds."""
    return jnp.minimum(seqlen - jnp.arange(0, seqlen, block), block)
