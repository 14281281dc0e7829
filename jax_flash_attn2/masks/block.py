"""Block masks: which tiles of the logits are empty, full or partial, as the kernels want to know it.

A mask costs what it lets through: empty tiles are not visited, full ones need no mask, and of partial ones the elements
are stored, a bit each (`block_lists.py` has the format). Made once, used in every layer and pass.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base.spec import BLOCK_LISTS, next_power_of_two
from ..tiles import block_lists
from ..tiles.block_lists import EMPTY, FULL, PARTIAL
from . import predicates
from .mask import Mask

DEFAULT_BLOCK = 128
"""Rows and keys of a tile: what the kernels' own tiles are at most, but for few."""

_AT_ONCE = 2**20
"""How many elements of a mask are looked at together while it is classified."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask over `[B, H, Sq, Sk]`, by tiles `[block_m, block_n)`. B and H may be 1, and hold for all then.

    Made by `from_predicate` and `from_mask`; a pytree, so it may be an argument of a jitted function.
    """

    row_ends: Array
    row_tiles: Array
    col_ends: Array
    col_tiles: Array
    tile_bits: Array
    tile_weights: Array | None
    overflow: Array | None
    """Whether it had more tiles than `max_tiles` or `max_parts` allow (made under jit); attention is NaN then."""
    shape: tuple[int, int, int, int] = dataclasses.field(metadata={"static": True})
    block_m: int = dataclasses.field(metadata={"static": True})
    block_n: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_predicate(
        cls,
        predicate: predicates.ElementPredicate,
        shape: tuple[int, int, int, int],
        *,
        block_m: int | None = None,
        block_n: int | None = None,
        max_tiles: int | None = None,
        max_parts: int | None = None,
    ) -> "BlockMask":
        """The mask of `predicate(b, h, i, j)`, evaluated tile by tile: the dense mask never exists.

        Args:
          predicate: whether row i of head h of batch b sees key j; see `predicates`.
          shape: (B, H, Sq, Sk). B and H of 1 have the predicate asked for b = 0, h = 0 only.
          block_m: rows per tile, a power of two from 16 to 512; None: 128, or less where Sq is.
          block_n: keys per tile, a power of two from 32 to 512, likewise.
          max_tiles: how many tiles of a batch and head may be other than empty. None: as many as are. Needed under jit
            where the mask depends on traced values, as sizes must be known there; and masks of one size share what
            jit compiled for them.
          max_parts: how many tiles may be partial, over all batches and heads; likewise.

        Raises:
          ValueError: sizes that do not fit, or that are missing under jit; more tiles than allowed, if that can be
            known (under jit `overflow` says so, and attention gives NaN).
        """
        predicate = predicates.as_predicate(predicate)
        return _build(_OfPredicate(predicate), _shape(shape), block_m, block_n, max_tiles, max_parts)

    @classmethod
    def from_mask(
        cls,
        mask: "Mask | Array | np.ndarray",
        *,
        block_m: int | None = None,
        block_n: int | None = None,
        max_tiles: int | None = None,
        max_parts: int | None = None,
    ) -> "BlockMask":
        """The mask of a `Mask`, or of a dense array `[B, H, Sq, Sk]` of booleans or weights in [0, 1].

        Weights other than 0 and 1 are kept beside the bits, in fp32; they have no gradient. A `Mask` that is held as an
        index list is read as such. The other arguments are as in `from_predicate`.
        """
        if isinstance(mask, Array | np.ndarray):
            mask = Mask.from_dense(jnp.asarray(mask))
        if not isinstance(mask, Mask):
            raise TypeError(
                f"mask must be a Mask or an array [B, H, Sq, Sk], got {type(mask).__name__}; functions go to "
                f"BlockMask.from_predicate"
            )
        sizes = block_m, block_n, max_tiles, max_parts
        if mask.kind in ("full", "empty"):
            of_all = predicates.all_of() if mask.kind == "full" else predicates.any_of()
            return _build(_OfPredicate(of_all), mask.shape, *sizes)
        if mask.kind == "sparse" and not _traced(mask):
            mask = mask.to_indices()  # which checks it
            return _build(_sparse_source(mask, _block("block_m", block_m, mask.shape[2], 16)), mask.shape, *sizes)
        return _build(_OfArray(jnp.asarray(mask.to_dense())), mask.shape, *sizes)

    def tiles(self) -> Array:
        """int8 `[B, H, row blocks, key blocks]`: 0 where a tile is empty, 1 full, 2 partial."""
        return _tiles(self)

    def to_dense(self) -> Array:
        """`[B, H, Sq, Sk]`: booleans, or fp32 weights if it has any."""
        return _to_dense(self)

    def density(self) -> float | Array:
        """The share of elements that are seen."""
        share = _density(self)
        return share if isinstance(share, jax.core.Tracer) else float(share)

    def operands(self) -> dict[str, Array]:
        """What `spec.BLOCK_LISTS` calls them."""
        held = {name: getattr(self, name) for name in BLOCK_LISTS}
        return {name: x for name, x in held.items() if x is not None}

    def show(self, **options: Any) -> str:
        """A text picture; see `masks.show`."""
        from .show import show

        return show(self, **options)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block_m={self.block_m}, block_n={self.block_n})"


@jax.jit
def _tiles(mask: BlockMask) -> Array:
    part = block_lists.parts(mask.operands())
    return jnp.where(part >= 0, PARTIAL, jnp.where(part == -1, FULL, EMPTY)).astype(jnp.int8)


@jax.jit
@jax.numpy_rank_promotion("allow")
def _to_dense(mask: BlockMask) -> Array:
    operands, size = mask.operands(), (mask.block_m, mask.block_n)
    part = block_lists.parts(operands)
    shown = block_lists.element_masks(operands, part, *size)
    if mask.tile_weights is not None:
        shown = jnp.where(shown, jnp.exp(block_lists.log_weights(operands, part, *size)), 0)
    return shown[:, :, : mask.shape[2], : mask.shape[3]]


@jax.jit
@jax.numpy_rank_promotion("allow")
def _density(mask: BlockMask) -> Array:
    part = block_lists.parts(mask.operands())
    full = _held(mask.shape[2], mask.block_m)[:, None] * _held(mask.shape[3], mask.block_n)
    partial = lax.population_count(mask.tile_bits).sum(-1).reshape(-1)
    seen = jnp.where(part >= 0, partial[jnp.maximum(part, 0)], jnp.where(part == -1, full, 0))
    return seen.astype(jnp.float32).sum() / np.float32(np.prod(np.asarray(mask.shape, np.float64)))


def cached(predicate: predicates.ElementPredicate, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> BlockMask:
    """`BlockMask.from_predicate`, made once for a predicate and shape, also under jit. The last 32 are kept.

    Batches and heads that the predicate does not look at are not asked about. Predicates are told apart by `==`: a
    function equals itself only, so one that is written anew for each call is evaluated anew.

    Raises:
      ValueError: the predicate depends on traced values.
    """
    predicate = predicates.as_predicate(predicate)
    with jax.ensure_compile_time_eval():
        uses_b, uses_h = _uses(predicate)
        shape = batch if uses_b else 1, heads if uses_h else 1, seqlen_q, seqlen_k
        key = (predicate, shape, jax.config.jax_enable_x64)
        with _lock:
            if key in _cache:
                _cache.move_to_end(key)
                return _cache[key]
        mask = BlockMask.from_predicate(predicate, shape)
    with _lock:
        _cache[key] = mask
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    return mask


_CACHED = 32
_cache: "collections.OrderedDict[Any, BlockMask]" = collections.OrderedDict()
_lock = threading.Lock()


def clear_cache() -> None:
    """Forget the block masks that `flash_attention(mask=predicate)` made."""
    with _lock:
        _cache.clear()


def _uses(predicate: predicates.Predicate) -> tuple[bool, bool]:
    """Whether the predicate looks at the batch and at the head."""
    jaxpr = jax.make_jaxpr(predicate)(*[jnp.int32(0)] * 4).jaxpr
    read = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | {id(x) for x in jaxpr.outvars}
    return id(jaxpr.invars[0]) in read, id(jaxpr.invars[1]) in read


# Where the elements come from: source(b, h, rows, cols) -> [rows, cols], booleans or weights. Indices past the end of
# the sequences may be asked for; what comes is ignored.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OfPredicate:
    predicate: predicates.Predicate

    def __call__(self, b, h, rows, cols):
        return predicates.evaluate(self.predicate, b[None], h[None], rows, cols)[0, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OfArray:
    array: Array  # [B, H, Sq, Sk]

    def __call__(self, b, h, rows, cols):
        plane = self.array[b % self.array.shape[0], h % self.array.shape[1]]
        return plane.at[rows].get(mode="clip").at[:, cols].get(mode="clip")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OfIndices:
    mask: Mask
    longest: int = dataclasses.field(metadata={"static": True})
    """The entries of the rows that are asked for together, at most."""

    def __call__(self, b, h, rows, cols):
        _, heads, seqlen_q, _ = self.mask.shape
        ptr = self.mask.ptr
        first = (b * heads + h) * seqlen_q + jnp.minimum(rows, seqlen_q)  # ptr's row; rows past the end are empty
        begin, end = ptr[first[0]], ptr[jnp.minimum(first[-1] + 1, (b * heads + h + 1) * seqlen_q)]
        place = begin + jnp.arange(self.longest, dtype=jnp.int32)
        row = jnp.searchsorted(ptr[first], place, side="right") - 1
        col = self.mask.indices.at[place].get(mode="fill", fill_value=-1) - cols[0]
        inside = (place < end) & (col >= 0) & (col < cols.shape[0])
        data = self.mask.data.at[place].get(mode="fill", fill_value=0)
        tile = jnp.zeros((rows.shape[0], cols.shape[0]), jnp.float32)
        tile = tile.at[row, jnp.where(inside, col, cols.shape[0])].add(data.astype(jnp.float32), mode="drop")
        tile = jnp.minimum(tile, 1)
        return tile != 0 if self.mask.dtype == jnp.bool_ else tile


def _sparse_source(mask: Mask, block_m: int) -> _OfIndices:
    ptr = np.asarray(mask.ptr)
    planes, seqlen_q = mask.shape[0] * mask.shape[1], mask.shape[2]
    starts = np.arange(0, seqlen_q, block_m)
    first = np.arange(planes)[:, None] * seqlen_q
    counts = ptr[first + np.minimum(starts + block_m, seqlen_q)] - ptr[first + starts]
    return _OfIndices(mask, next_power_of_two(max(int(counts.max(initial=0)), 1)))  # few sizes to compile for


# How it is built.


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
@jax.numpy_dtype_promotion("standard")
def _build(source, shape, block_m, block_n, max_tiles, max_parts) -> BlockMask:
    block_m, block_n = _block("block_m", block_m, shape[2], 16), _block("block_n", block_n, shape[3], 32)
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
        _check_fits("max_tiles", max_tiles, size)
        _check_fits("max_parts", max_parts, int(partial.sum()))
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
    return BlockMask(*arrays, overflow, shape, block_m, block_n)


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


def _shape(shape: Any) -> tuple[int, int, int, int]:
    if (
        not isinstance(shape, tuple | list)
        or len(shape) != 4
        or not all(isinstance(n, int | np.integer) for n in shape)
    ):
        raise ValueError(f"shape must be (B, H, Sq, Sk), got {shape!r}")
    batch, heads, seqlen_q, seqlen_k = map(int, shape)
    return batch, heads, seqlen_q, seqlen_k


def _block(name: str, block: Any, seqlen: int, least: int) -> int:
    if block is None:
        return min(max(next_power_of_two(seqlen), least), DEFAULT_BLOCK)
    if not isinstance(block, int | np.integer) or not least <= block <= 512 or block & (block - 1):
        raise ValueError(f"{name} must be a power of two from {least} to 512, or None, got {block!r}")
    return int(block)


def _check_fits(name: str, limit: int | None, n: int) -> None:
    if limit is not None and n > limit:
        raise ValueError(f"{name} must be at least {n}, which is what the mask has, got {limit}")


def _traced(x: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))


def _held(seqlen: int, block: int) -> Array:
    """How many of a sequence each block holds."""
    return jnp.minimum(seqlen - jnp.arange(0, seqlen, block), block)
