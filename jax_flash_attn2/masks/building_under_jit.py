"""How a block mask is built under jit, of a source that depends on traced values: in sizes that are given."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base import errors
from ..tiles import block_lists, kinds
from ..tiles.kinds import EMPTY, FULL, NO_MASK, NO_TILE, PARTIAL
from . import weighing
from .sources import packed

_AT_ONCE = 2**20
"""How many elements of a mask are looked at together while it is classified: 1 MiB of booleans, or 4 of weights."""


def build(
    source: Callable, shape: tuple[int, ...], block_m: int, block_n: int, max_tiles: int | None, max_parts: int | None
) -> dict[str, Any]:
    """The arrays of a `BlockMask`."""
    if max_tiles is None or max_parts is None:
        raise errors.traced_mask_error()
    return _build(source, shape, block_m, block_n, max_tiles, max_parts)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _build(source, shape, block_m, block_n, max_tiles, max_parts) -> dict[str, Any]:
    status = _status(source, shape, block_m, block_n)
    partial = status == PARTIAL
    overflow = partial.sum() > max_parts
    at = jnp.stack(jnp.nonzero(partial, size=max_parts, fill_value=0), -1)
    part = jnp.cumsum(partial.ravel(), dtype=jnp.int32).reshape(status.shape) - 1
    part = jnp.where(partial, part, jnp.where(status == FULL, NO_MASK, NO_TILE))
    bits, weights = elements(source, at, shape, block_m, block_n)
    lists, more = listed(part, max_tiles)
    weights = None if weights is None else weights[None, None]
    return lists | {"tile_bits": bits[None, None], "tile_weights": weights, "overflow": overflow | more}


def listed(part: Array, max_tiles: int) -> tuple[dict[str, Array], Array]:
    """The lists of a mask of the number of each tile's element mask (see `block_lists.parts`); and whether there are
    more tiles than fit them."""
    status = kinds.of_parts(part)
    more = (status != EMPTY).sum((2, 3)).max() > max_tiles
    return block_lists.both(status, part, max_tiles), more


def _status(source: Callable, shape: tuple[int, ...], block_m: int, block_n: int) -> Array:
    """What each tile is, `[B, H, row blocks, key blocks]`; some tiles beside one another at a time."""
    batch, heads, seqlen_q, seqlen_k = shape
    blocks_q, blocks_k = -(-seqlen_q // block_m), -(-seqlen_k // block_n)
    together = min(max(_AT_ONCE // (block_m * block_n), 1), blocks_k)
    steps = -(-blocks_k // together)

    def step(n):
        n, step = n // steps, n % steps
        n, i = n // blocks_q, n % blocks_q
        rows, cols = i * block_m + jnp.arange(block_m), step * together * block_n + jnp.arange(together * block_n)
        x = source(n // heads, n % heads, rows, cols)
        row_in, col_in = (rows < seqlen_q)[:, None], cols < seqlen_k
        seen, whole = (x, x) if x.dtype == jnp.bool_ else (x != 0, x == 1)
        some, every = seen & row_in & col_in, whole & col_in | ~row_in
        some, every = (y.reshape(block_m, together, block_n) for y in (some, every))
        return jnp.where(every.all((0, 2)), FULL, jnp.where(some.any((0, 2)), PARTIAL, EMPTY)).astype(jnp.int8)

    status = lax.map(step, jnp.arange(batch * heads * blocks_q * steps, dtype=jnp.int32))
    return status.reshape(batch, heads, blocks_q, -1)[..., :blocks_k]


def elements(
    source: Callable, at: Array, shape: tuple[int, ...], block_m: int, block_n: int
) -> tuple[Array, Array | None]:
    """The bits `[parts, block_m * block_n / 32]` of the tiles `at` `[parts, 4]`, and the logs of their weights."""

    def tile(at):
        b, h, i, j = at
        rows, cols = i * block_m + jnp.arange(block_m), j * block_n + jnp.arange(block_n)
        x = source(b, h, rows, cols)
        inside = (rows < shape[2])[:, None] & (cols < shape[3])
        seen = inside & (x if x.dtype == jnp.bool_ else x != 0)
        if x.dtype == jnp.bool_:
            return packed(seen), None
        return packed(seen), -weighing.correction_of(jnp.where(inside, x, 0), jnp.dtype(jnp.float32)).ravel()

    return lax.map(tile, at, batch_size=min(max(_AT_ONCE // (block_m * block_n), 1), at.shape[0]))
