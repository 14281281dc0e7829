"""Block masks: which tiles of the logits are empty, full or partial, as the kernels want to know it.

A mask costs what it lets through: empty tiles are not visited, full ones need no mask, and of partial ones the elements
are stored, a bit each (`block_lists.py` has the format). Made once, used in every layer and pass.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from ..base import arguments, errors, known
from ..base.lru import Lru
from ..base.operands import BLOCK_LISTS
from . import building, checks, chosen, entries, evaluation, predicates, reading, rows, sources
from .mask import Mask
from .programs import Program

_WIDTH = 40
"""Of the picture that `str` is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask over `[B, H, Sq, Sk]`, by tiles `[block_m, block_n)`. B and H may be 1, and hold for all then.

    Made by `from_predicate` and `from_mask`, or of tiles that are chosen, by `from_tiles` and `from_kv_blocks`. A
    pytree, so it may be an argument of a jitted function. `str` draws it. Its first six fields are the arrays of
    `base.operands.BLOCK_LISTS`; `tiles/block_lists.py` says what each holds.

    Examples:
      >>> block = BlockMask.from_predicate(causal() & sliding_window(127), (1, 1, 512, 512))
      >>> block.tiles()[0, 0]
      Array([[2, 0, 0, 0],
             [2, 2, 0, 0],
             [0, 2, 2, 0],
             [0, 0, 2, 2]], dtype=int8)
      >>> block.sparsity(), block.rows(500).shape
      (56.25, (1, 1, 1, 512))
    """

    row_ends: Array
    row_tiles: Array
    col_ends: Array
    col_tiles: Array
    tile_bits: Array
    tile_weights: Array | None
    overflow: Array | None
    """Whether what was made under jit is not all there: it had more tiles than `max_tiles` or `max_parts` allow, or
    `rows` or `from_kv_blocks` were asked for some that do not exist. Attention is NaN then."""
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
        return cls(**building.build(_of(program, shape), shape, block_m, block_n, max_tiles, max_parts))

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
        return cls(**building.build(source, mask.shape, **sizes))

    @classmethod
    def from_tiles(
        cls,
        tiles: Array | np.ndarray,
        shape: tuple[int, int, int, int],
        *,
        block_m: int = building.DEFAULT_BLOCK,
        block_n: int = building.DEFAULT_BLOCK,
        within: "predicates.ElementPredicate | BlockMask | None" = None,
        max_tiles: int | None = None,
        max_parts: int | None = None,
    ) -> "BlockMask":
        """The mask that visits the tiles chosen, as methods of sparse attention choose them; no element is looked at.

        Under jit `tiles` may be traced, and no size need be given: `max_tiles` saves memory where few are chosen.

        Args:
          tiles: bool `[1|B, 1|H, ceil(Sq / block_m), ceil(Sk / block_n)]`, True: visited. Leading axes may be left out.
            The last tiles may stick out of the lengths.
          shape: (B, H, Sq, Sk). Where `tiles` have one batch or head, so has the mask, for all.
          block_m: rows of a tile, a power of two from 16 to 512.
          block_n: keys of a tile, a power of two from 32 to 512.
          within: what is seen of the tiles chosen, e.g. `predicates.causal()`; None: all. A predicate is evaluated in
            these tiles only or, where they are traced, everywhere, once for all calls (`block_mask_cache`). Where tiles
            are chosen again and again, pass a BlockMask of the same lengths and tiles: nothing is evaluated then.
          max_tiles: how many tiles of a batch and head may be visited. None: as many as are, or under jit as there are.
          max_parts: room for element masks, of which tiles that look alike share one. None: as many as there are.

        Raises:
          TypeError: tiles are no booleans.
          ValueError: sizes that do not fit; more tiles than allowed, as in `from_predicate`.
        """
        sizes = _sizes(shape, block_m, block_n)
        tiles = chosen.table(tiles, chosen.blocks(*sizes))
        whole, divided = (tiles, None) if within is None else (None, tiles)
        return cls._chosen(whole, divided, "within", within, sizes, max_tiles, max_parts)

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Array | np.ndarray,
        kv_indices: Array | np.ndarray,
        full_kv_num_blocks: Array | np.ndarray | None = None,
        full_kv_indices: Array | np.ndarray | None = None,
        mask_mod: "predicates.ElementPredicate | BlockMask | None" = None,
        *,
        shape: tuple[int, int, int, int],
        block_size: int | tuple[int, int] = building.DEFAULT_BLOCK,
        max_tiles: int | None = None,
        max_parts: int | None = None,
    ) -> "BlockMask":
        """The mask of lists of key blocks, as PyTorch's FlexAttention holds its own.

        Args:
          kv_num_blocks: integers `[1|B, 1|H, row blocks]`: how many key blocks that `mask_mod` divides each block of
            rows visits.
          kv_indices: integers `[1|B, 1|H, row blocks, n]`: which; what follows the first `kv_num_blocks` is not read.
          full_kv_num_blocks, full_kv_indices: likewise those that are seen whole.
          mask_mod: a predicate `(b, h, i, j)`, evaluated as `from_tiles` does, or a BlockMask; None: these blocks are
            seen whole, too.
          shape: (B, H, Sq, Sk), which FlexAttention has in its `seq_lengths`.
          block_size: rows and keys of a block, or one number for both; powers of two as in `from_tiles`.
          max_tiles, max_parts: as in `from_tiles`.

        Raises:
          TypeError: no integers.
          ValueError: shapes that do not fit; one of the full_ arguments without the other; numbers that do not fit
            (under jit `overflow` says so, and attention is NaN); if that can be known, a block in both lists of a row.
        """
        pair = tuple(block_size) if isinstance(block_size, tuple | list) else (block_size, block_size)
        if len(pair) != 2:
            raise ValueError(f"block_size must be a number or a pair, of rows and of keys, got {block_size!r}")
        sizes = _sizes(shape, *pair, name="block_size")
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            came = "full_kv_indices" if full_kv_num_blocks is None else "full_kv_num_blocks"
            raise ValueError(f"full_kv_num_blocks and full_kv_indices must be given together, got only {came}")
        blocks = chosen.blocks(*sizes)
        divided, bad = chosen.table_of_lists("", kv_num_blocks, kv_indices, blocks)
        whole = None
        if full_kv_indices is not None:
            whole, more = chosen.table_of_lists("full_", full_kv_num_blocks, full_kv_indices, blocks)
            bad = entries.either(bad, more)
            if known.is_known((whole, divided)) and (whole & divided).any():
                raise ValueError(
                    "kv_indices and full_kv_indices must have no block of a row in common, got one in both"
                )
        if mask_mod is None:
            whole, divided = divided if whole is None else whole | divided, None
        made = cls._chosen(whole, divided, "mask_mod", mask_mod, sizes, max_tiles, max_parts)
        return dataclasses.replace(made, overflow=entries.either(made.overflow, bad))

    @classmethod
    def _chosen(cls, whole, divided, name: str, by, sizes, max_tiles, max_parts) -> "BlockMask":
        """What `chosen.build` makes of tiles, and of what divides them as a caller says it, by an argument `name`."""
        building.check_sizes(max_tiles, max_parts)
        (shape, block_m, block_n), overflow = sizes, None
        if by is not None and not isinstance(by, BlockMask):
            by = predicates.as_predicate(by, name)
            by.check_shape(shape)
            program = evaluation.trace(by)
            if not known.is_known(program):
                raise ValueError(
                    f"{name} must not depend on traced values here, got {by!r}; pass {name}=BlockMask.from_predicate("
                    f"predicate, shape, block_m={block_m}, block_n={block_n}, max_tiles=..., max_parts=...)"
                )
            by = program if known.is_known((whole, divided)) else cached(by, *shape, tiles=(block_m, block_n))
        if isinstance(by, BlockMask):
            if (by.block_m, by.block_n) != (block_m, block_n) or not checks.fits(by.shape, shape):
                raise ValueError(
                    f"{name} must be a BlockMask of shape {shape} (B and H may be 1) with block_m={block_m} and "
                    f"block_n={block_n}, got {by!r}"
                )
            by, overflow = by.operands(), by.overflow
        made = cls(**chosen.build(whole, divided, by, *sizes, max_tiles, max_parts))
        return dataclasses.replace(made, overflow=entries.either(made.overflow, overflow))

    def rows(self, start: int | Array | np.ndarray, count: int = 1) -> "BlockMask":
        """The mask of `count` rows from `start` on, over all keys: a step of decoding, of a mask of the whole cache.

        `flash_attention(q, k, v, mask=mask.rows(t, q.shape[1]))` attends as the rows from t on would in the whole, and
        visits the tiles that they see. What else counts rows (`causal`, `window_size`, functions) counts from the first
        of them, as in any call of so few rows.

        Args:
          start: the first row, for all batches; or `[B]`, one for each, where they are at different places. May be
            traced, so that one compiled step serves every t.
          count: how many rows; static.

        Returns:
          A mask of shape `[B, H, count, Sk]`, with room for an element mask in every tile.

        Raises:
          TypeError: start is no integer, or array of them.
          ValueError: rows that do not exist (if start is traced, `overflow` says so, and attention is NaN).
        """
        return BlockMask(**rows.build(self, start, count))

    def tiles(self) -> Array:
        """int8 `[B, H, row blocks, key blocks]`: 0 where a tile is empty, 1 full, 2 partial.

        Raises:
          TypeError: under jit it is not known whether the mask is all there, which integers cannot say.
        """
        mask = self._usable()
        if mask.overflow is not None:
            raise TypeError(
                "tiles must say under jit whether the mask is all there (overflow), which integers cannot, got a mask "
                "that was made there; look at tiles outside of jit"
            )
        return reading.tiles(mask)

    def to_dense(self, dtype: Any = None) -> Array:
        """`[B, H, Sq, Sk]`: booleans, or fp32 weights if it has any; `dtype` as of `Mask.to_dense`.

        Raises:
          TypeError: the result would be bool and the mask may not be all there under jit: a bool cannot be NaN.
        """
        return reading.as_mask(self._usable()).to_dense(dtype)

    def density(self) -> float | Array:
        """The share of elements that are seen: a float, or under jit fp32 `[]`."""
        share = reading.density(self._usable())
        return share if isinstance(share, jax.core.Tracer) else float(share)

    def sparsity(self) -> float | Array:
        """How many of 100 tiles are not visited, likewise."""
        percent = reading.sparsity(self._usable())
        return percent if isinstance(percent, jax.core.Tracer) else float(percent)

    def _usable(self) -> "BlockMask":
        """This mask, if it is known to be all there, or not known."""
        if self.overflow is None or not known.is_known(self.overflow):
            return self
        if bool(self.overflow):
            raise ValueError(
                "the block mask must be all there, got overflow=True: under jit it had more tiles than max_tiles or "
                "max_parts allow, or rows or blocks were asked for that do not exist; give it more room"
            )
        return dataclasses.replace(self, overflow=None)

    def operands(self) -> dict[str, Array]:
        """What `base.operands.BLOCK_LISTS` calls them."""
        held = {name: getattr(self, name) for name in BLOCK_LISTS}
        return {name: x for name, x in held.items() if x is not None}

    def show(self, **options: Any) -> str:
        """A text picture; see `masks.show`."""
        from .text import show

        return show(self, **options)

    def __str__(self) -> str:
        drawn = known.is_known(self) and all(isinstance(x, Array) for x in jax.tree.leaves(self))
        drawn = drawn and self.row_ends.ndim == 4 and not (self.overflow is not None and self.overflow)
        return self.show(width=_WIDTH) if drawn else repr(self)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block_m={self.block_m}, block_n={self.block_n})"


def _sizes(
    shape: Any, block_m: Any, block_n: Any, name: str | None = None
) -> tuple[tuple[int, int, int, int], int, int]:
    """Lengths and sizes of tiles, checked. name: of the argument that both sizes are."""
    shape = arguments.four_lengths("shape", shape)
    building.check_shape(shape)
    block_m = building.block_size(name or "block_m", block_m, shape[2], 16)
    return shape, block_m, building.block_size(name or "block_n", block_n, shape[3], 32)


def _of(program: Program, shape: tuple[int, int, int, int]) -> sources.OfPredicate:
    return sources.OfPredicate(program.on_device() if known.is_known(program) else program, shape[3])


block_mask_cache = Lru(maxsize=256, max_bytes=2**28)
"""The block masks that `flash_attention(mask=predicate)` made last: `info()` says how many there are and what they
hold, `clear()` forgets them, and `maxsize` and `max_bytes` bound them."""


def cached(
    predicate: predicates.ElementPredicate, batch: int, heads: int, seqlen_q: int, seqlen_k: int,
    *, tiles: tuple[int | None, int | None] = (None, None),
) -> BlockMask:  # fmt: skip
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
        return BlockMask(**building.build(_of(traced, own), own, *tiles, None, None))

    def nbytes(mask: BlockMask) -> int:
        held = jax.tree.leaves(predicate) if program is None else program.held()
        return sum(x.nbytes for x in (*held, *jax.tree.leaves(mask)))

    own = predicate if program is None else program.key()
    key = own, shape, tiles, jax.config.jax_enable_x64, jax.config.jax_threefry_partitionable
    return block_mask_cache.get(key, make, nbytes)
