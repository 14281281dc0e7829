"""How a block mask is built: each tile is classified, partial ones are evaluated, and both become lists and bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base.spec import next_power_of_two
from ..tiles import block_lists
from ..tiles.block_lists import EMPTY, FULL, PARTIAL

DEFAULT_BLOCK = 128
"""Rows and keys of a tile: what the kernels' own tiles are at most, but for few."""

_AT_ONCE = 2**20
"""How many elements of a mask are looked at together while it is classified."""


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
@jax.numpy_dtype_promotion("standard")
def build(source, shape, block_m, block_n, max_tiles, max_parts) -> tuple[Any, ...]:
    """The fields of a `BlockMask`, in their order, of a source (`sources.py`) and the arguments of `from_predicate`."""
    block_m, block_n = block_size("block_m", block_m, shape[2], 16), block_size("block_n", block_n, shape[3], 32)
    for name, n in (("max_tiles", max_tiles), ("max_parts", max_parts)):
        if n is not None and not (isinstance(n, int | np.integer) and n >= 1):
            raise ValueError(f"{name} must be a positive integer or None (counted), got {n!r}")
    if 0 in shape:
        raise ValueError(f"a block mask needs at least one batch, head, row and key, got shape {shape}")
    status = _status(source, shape, block_m, block_n)
    if isinstance(status, jax.core.Tracer):
        if max_tiles is None or max_parts is None:
            raise ValueError(
                "this block mask depends on traced values, so that jit cannot know how many tiles it has: pass "
                "max_tiles and max_parts to BlockMask, or make it outside of jit and pass it in as an argument"
            )
        partial = status == PARTIAL
        overflow = (partial.sum() > max_parts) | ((status != EMPTY).sum((2, 3)).max() > max_tiles)
        at = jnp.stack(jnp.nonzero(partial, size=max_parts, fill_value=0), -1)
        part = jnp.cumsum(partial.ravel(), dtype=jnp.int32).reshape(status.shape) - 1
        bits, weights = _elements(source, at, shape, block_m, block_n)
        size = max_tiles
    else:
        known = np.asarray(status)
        partial, size, overflow = known == PARTIAL, int((known != EMPTY).sum((2, 3)).max()), None
        _check_most("max_tiles", max_tiles, size)
        _check_most("max_parts", max_parts, int(partial.sum()))
        at = np.argwhere(partial).astype(np.int32)
        padded = np.zeros((next_power_of_two(max(len(at), 1)), 4), np.int32)  # fewer sizes to compile for
        padded[: len(at)] = at
        found = _elements(source, jnp.asarray(padded), shape, block_m, block_n)
        bits, number = np.asarray(found[0])[: max(len(at), 1)], np.arange(len(at), dtype=np.int32)
        weights = None if found[1] is None else found[1][: max(len(at), 1)]
        if weights is not None and not isinstance(weights, jax.core.Tracer) and not np.any(weights[: len(at)]):
            weights = None  # all of them 1
        if weights is None:  # tiles that look alike, as those on a diagonal do, are stored once
            bits, number = _distinct(bits)
        if max_parts is not None:
            bits, weights = (None if x is None else _padded(x, max_parts) for x in (bits, weights))
        part = np.full(known.shape, -1, np.int32)
        part[partial] = number[: len(at)]
        size, part = max_tiles or max(size, 1), jnp.asarray(part)
    part = jnp.where(partial, part, -1)
    row_ends, row_tiles = _lists(status, part, size)
    col_ends, col_tiles = _lists(status.swapaxes(2, 3), part.swapaxes(2, 3), size)
    planes = None if weights is None else jnp.asarray(weights)[None, None]
    arrays = row_ends, row_tiles, col_ends, col_tiles, jnp.asarray(bits)[None, None], planes
    return *arrays, overflow, shape, block_m, block_n


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
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


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _elements(
    source: Callable, at: Array, shape: tuple[int, ...], block_m: int, block_n: int
) -> tuple[Array, Array | None]:
    """The bits `[parts, block_m * block_n / 32]` of the tiles `at` `[parts, 4]`, and the logs of their weights."""

    def tile(at):
        b, h, i, j = at
        rows, cols = i * block_m + jnp.arange(block_m), j * block_n + jnp.arange(block_n)
        x = source(b, h, rows, cols)
        inside = (rows < shape[2])[:, None] & (cols < shape[3])
        seen = inside & (x if x.dtype == jnp.bool_ else x != 0)
        weights = None if x.dtype == jnp.bool_ else jnp.log(jnp.where(seen, x, 1).astype(jnp.float32)).ravel()
        return _packed(seen), weights

    return lax.map(tile, at, batch_size=min(max(_AT_ONCE // (block_m * block_n), 1), at.shape[0]))


def _packed(x: Array) -> Array:
    """Booleans `[..]` as int32 words, lowest bit first."""
    words = x.reshape(-1, 32).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words.sum(1, dtype=jnp.uint32), jnp.int32)


_lists = jax.jit(block_lists.lists, static_argnums=2)


def _distinct(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of `bits`, and which of them each row is."""
    whole = np.ascontiguousarray(bits).view(np.dtype((np.void, bits.dtype.itemsize * bits.shape[1]))).ravel()
    _, first, number = np.unique(whole, return_index=True, return_inverse=True)
    return bits[first], number.astype(np.int32)


def _padded(x: Any, rows: int) -> Array:
    """`[n, size]` -> `[rows, size]`."""
    return jnp.pad(jnp.asarray(x), ((0, max(rows - x.shape[0], 0)), (0, 0)))


# One argument each.


def block_size(name: str, block: Any, seqlen: int, least: int) -> int:
    """`block_m` or `block_n`: a power of two; None: what suits the sequence."""
    if block is None:
        return min(max(next_power_of_two(seqlen), least), DEFAULT_BLOCK)
    if not isinstance(block, int | np.integer) or not least <= block <= 512 or block & (block - 1):
        raise ValueError(f"{name} must be a power of two from {least} to 512, or None, got {block!r}")
    return int(block)


def _check_most(name: str, limit: int | None, n: int) -> None:
    if limit is not None and n > limit:
        raise ValueError(f"{name} must be at least {n}, which is what the mask has, got {limit}")
