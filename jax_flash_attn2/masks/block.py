"""Block masks: which tiles of the logits are empty, full or partial, as the kernels want to know it.

A mask costs what it lets through: empty tiles are not visited, full ones need no mask, and of partial ones the elements
are stored, a bit each (`block_lists.py` has the format). Made once, used in every layer and pass.
"""

import collections
import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base import arguments
from ..base.spec import BLOCK_LISTS
from ..tiles import block_lists
from ..tiles.block_lists import EMPTY, FULL, PARTIAL
from . import building, predicates, sources
from .mask import Mask


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
        shape, sizes = arguments.four_lengths("shape", shape), (block_m, block_n, max_tiles, max_parts)
        return cls(*building.build(sources.OfPredicate(predicate), shape, *sizes))

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
            return cls(*building.build(sources.OfPredicate(of_all), mask.shape, *sizes))
        if mask.kind == "sparse" and not _traced(mask):
            mask = mask.to_indices()  # which checks it
            rows = building.block_size("block_m", block_m, mask.shape[2], 16)
            return cls(*building.build(sources.of_sparse(mask, rows), mask.shape, *sizes))
        return cls(*building.build(sources.OfArray(jnp.asarray(mask.to_dense())), mask.shape, *sizes))

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


def _traced(x: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))


def _held(seqlen: int, block: int) -> Array:
    """How many of a sequence each block holds."""
    return jnp.minimum(seqlen - jnp.arange(0, seqlen, block), block)


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
