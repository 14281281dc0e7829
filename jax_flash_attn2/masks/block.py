"""Block masks: which tiles of the logits are empty, full or partial, as the kernels want to know it.

A mask costs what it lets through: empty tiles are not visited, full ones need no mask, and of partial ones the elements
are stored, a bit each (`block_lists.py` has the format). Made once, used in every layer and pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base import arguments, errors, known
from ..base.lru import Lru
from ..base.operands import BLOCK_LISTS
from ..tiles import block_lists
from ..tiles.block_lists import EMPTY, FULL, PARTIAL
from . import building, evaluation, predicates, sources
from .mask import Mask
from .programs import Program


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
        predicate, shape = predicates.as_predicate(predicate), arguments.four_lengths("shape", shape)
        predicate.check_shape(shape)
        program = evaluation.trace(predicate)
        return cls(*building.build(_of(program, shape), shape, block_m, block_n, max_tiles, max_parts))

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
            mask = Mask.from_dense(mask)
        if not isinstance(mask, Mask):
            raise TypeError(
                f"mask must be a Mask or an array [B, H, Sq, Sk], got {type(mask).__name__}; functions go to "
                f"BlockMask.from_predicate"
            )
        sizes: dict[str, Any] = {"block_m": block_m, "block_n": block_n, "max_tiles": max_tiles, "max_parts": max_parts}
        if mask.kind in ("full", "empty"):
            of_all = predicates.all_of() if mask.kind == "full" else predicates.any_of()
            return cls.from_predicate(of_all, mask.shape, **sizes)
        source: Any
        if not known.is_known(mask):
            source = sources.OfTraced(mask.to_dense())
        elif mask.kind == "sparse":
            listed = mask.to_indices()  # which checks it
            source = sources.OfIndices(mask.shape, *jax.device_get((listed.indices, listed.ptr, listed.data)))
        else:
            source = sources.OfArray(jax.device_get(mask.to_dense()))
        return cls(*building.build(source, mask.shape, **sizes))

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
        """What `base.operands.BLOCK_LISTS` calls them."""
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


def _held(seqlen: int, block: int) -> Array:
    """How many of a sequence each block holds."""
    return jnp.minimum(seqlen - jnp.arange(0, seqlen, block), block)


def _of(program: Program, shape: tuple[int, int, int, int]) -> sources.OfPredicate:
    return sources.OfPredicate(program.on_device() if known.is_known(program) else program, shape[3])


block_mask_cache = Lru(maxsize=256, max_bytes=2**28)
"""The block masks that `flash_attention(mask=predicate)` made last: `info()` says how many there are and what they
hold, `clear()` forgets them, and `maxsize` and `max_bytes` bound them."""


def cached(predicate: predicates.ElementPredicate, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> BlockMask:
    """`BlockMask.from_predicate`, made once for a predicate and shape, also under jit; see `block_mask_cache`.

    Batches and heads that the predicate does not look at are not asked about. Predicates of `predicates.py` and what
    they combine to are told apart by `==`. Others are by what they do, which is traced at each call (about a
    millisecond): so functions written anew for each call share a mask, and one that depends on an attribute or an array
    that has changed meanwhile has another. Arrays of JAX are told apart by which they are.

    Raises:
      ValueError: the predicate depends on traced values, or holds arrays of other lengths.
    """
    predicate, shape = predicates.as_predicate(predicate), (batch, heads, seqlen_q, seqlen_k)
    predicate.check_shape(shape)
    fixed = predicate.is_fixed and known.is_known(predicate)
    program = None if fixed else evaluation.trace(predicate)
    if not known.is_known(program):
        raise errors.traced_mask_error()

    def make() -> BlockMask:
        traced = program or evaluation.trace(predicate)
        uses_b, uses_h, *_ = traced.steps.reads()
        own = batch if uses_b else 1, heads if uses_h else 1, seqlen_q, seqlen_k
        return BlockMask(*building.build(_of(traced, own), own, None, None, None, None))

    def nbytes(mask: BlockMask) -> int:
        held = jax.tree.leaves(predicate) if program is None else program.held()
        return sum(x.nbytes for x in (*held, *jax.tree.leaves(mask)))

    own = predicate if program is None else program.key()
    key = own, shape, jax.config.jax_enable_x64, jax.config.jax_threefry_partitionable
    return block_mask_cache.get(key, make, nbytes)


clear_cache = block_mask_cache.clear
