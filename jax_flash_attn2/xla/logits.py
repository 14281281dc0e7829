"""What is in a tile: its logits, what of them is visible, what dropout leaves, what each operand has to do with it."""

import functools
import math
import operator
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base import dropout, positions
from ..base.operands import for_every_batch, mask_arrays, score_arrays
from ..tiles import block_lists
from . import layout
from .functions import FunctionTiles
from .tiling import Tiling

HIDDEN = float(np.finfo(np.float32).min) * math.log(2)
"""A bias below this (-2.36e38) hides its key, as -inf does: the GPU kernels' base-2 logits overflow there.

A running maximum starts here. That is finite, so that `exp(s - m)` is 0, not NaN, for `s` = -inf.
"""


class Logits:
    """The logits of a call, by tiles: one begins at row `start_m` and key `start_n`, or at that of key block j."""

    def __init__(self, tiling: Tiling, operands: Mapping[str, Array], natively: bool = False):
        """natively: JAX differentiates them, and so a score function."""
        self.tiling, self.operands, self.natively = tiling, operands, natively
        self.spec, self.dtype = tiling.spec, tiling.dtype
        rules = self.spec.rules
        self.score_function = None if rules.score is None else FunctionTiles(self, rules.score, score_arrays)
        self.mask_function = None if rules.mask is None else FunctionTiles(self, rules.mask, mask_arrays)

    def of(self, products: Array, start_m, j, masked: bool) -> tuple[Array, Array | None]:
        """Logits of one tile [B, Hkv, M * G, N], of the products of its rows and keys, -inf where hidden; and the tanh
        of the soft cap, or None."""
        t, operands, capped = self.tiling, self.operands, None
        start_n = t.start_n(j)
        visible = self.visible(start_m, j) if masked else None
        s = products
        if self.score_function is not None:
            s = self.score_function.of(s, start_m, start_n, visible if self.natively else None)
        if (cap := self.spec.rules.soft_cap) is not None:
            capped = jnp.tanh(s / cap)
            s = cap * capped
        if "bias" in operands:
            bias = self.tile("bias", start_m, start_n).astype(self.dtype)
            s += jnp.where(bias < HIDDEN, -jnp.inf, bias)
        if "slopes" in operands:
            s -= self.tile("slopes", start_m, start_n) * self.distances(start_m, start_n)
        if masked and "tile_weights" in operands:
            s -= self.of_block_mask(block_lists.log_weights, start_m, j).astype(self.dtype)
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)  # even where a bias made s NaN
            if t.blocks_k > 1:
                # So that what follows is the code of tiles without a mask, compiled once; fused with the mask, the
                # exponential is half as fast. One tile in all is left to XLA's fusions (`choose_blocks`).
                s = lax.optimization_barrier(s)
        return s, capped

    def visible(self, start_m, j) -> Array | None:
        """[1|B, 1|Hkv, M * G, N]: what the tile's rows see of its keys, less those that key block j - 1 held.

        None: all. Indices are relative to the tile's first key: terms that are the same for all tiles of a row would be
        hoisted out of the loop by XLA:CPU, each into a kernel of its own.
        """
        t, rules, visible = self.tiling, self.spec.rules, []
        start_n = t.start_n(j)
        cols, rows = self.col_index(), self.row_index(start_m - start_n)
        if t.seqlen_k % t.block_n:
            visible.append(cols >= layout.int32(j * t.block_n - start_n))
        if "q_positions" in self.operands:
            own, other = self.places(start_m, start_n)
            if rules.left is not None:
                visible.append(positions.before(own, rules.left) <= other)
            if rules.right is not None:
                visible.append(positions.after(own, rules.right) >= other)
        else:
            offset = self.per_batch("offset") if "offset" in self.operands else 0
            if rules.left is not None:
                visible.append(rows + (offset - rules.left) <= cols)
            if rules.right is not None:
                visible.append(rows + (offset + rules.right) >= cols)
        if "q_segments" in self.operands:
            q_ids, kv_ids = (self.tile(f"{side}_segments", start_m, start_n) for side in ("q", "kv"))
            # Not `q_ids >= 0`, which does not change from tile to tile and would be hoisted likewise.
            visible.append((q_ids == kv_ids) & (kv_ids >= 0))
        if "q_lengths" in self.operands:
            visible.append(rows < self.per_batch("q_lengths") - layout.int32(start_n))
        if "kv_lengths" in self.operands:
            visible.append(cols < self.per_batch("kv_lengths") - layout.int32(start_n))
        if "mask" in self.operands:
            visible.append(self.tile("mask", start_m, start_n))
        if self.mask_function is not None:
            visible.append(self.mask_function.visible(start_m, start_n))
        elif self.spec.listed:
            visible.append(self.of_block_mask(block_lists.element_masks, start_m, j))
        return functools.reduce(operator.and_, visible) if visible else None

    def row_index(self, start_m) -> Array:
        """[M * G, 1]: the rows of a tile."""
        rows = layout.int32(jnp.arange(self.tiling.block_m * self.spec.group))[:, None]
        return layout.int32(start_m) + (rows // self.spec.group if self.spec.group > 1 else rows)

    def col_index(self) -> Array:
        """[1, N]: the keys of a tile, counted from its first."""
        return layout.int32(jnp.arange(self.tiling.block_n))[None, :]

    def aligned(self, rows: Array) -> Array:
        """[1|B, 1, M * G, 1], or without the first two axes: rows of a tile, counted as the keys are."""
        return rows + self.per_batch("offset") if "offset" in self.operands else rows

    def places(self, start_m, start_n) -> tuple[Array, Array]:
        """[1|B, 1, M * G, 1] and [1|B, 1, 1, N], or without the first two axes: where a tile's rows and keys are.
        Counted from the first key, as in `visible`, unless they are data."""
        if "q_positions" not in self.operands:
            return self.aligned(self.row_index(start_m - start_n)), self.col_index()
        own, other = (self.tile(f"{side}_positions", start_m, start_n) for side in ("q", "kv"))
        return own, other

    @property
    def in_order(self) -> bool:
        """Whether rows and keys are numbered by their places."""
        return "q_index" not in self.operands and "kv_index" not in self.operands

    def numbers(self, name: str, start) -> Array:
        """[M] or [N]: q_index or kv_index of a tile, which may also be all that there is."""
        x, t = self.operands[name].ravel(), self.tiling
        size = t.block_m if name == "q_index" else t.block_n
        return x if x.shape[0] == size else layout.take(x, start, size, 0)

    def distances(self, start_m, start_n) -> Array:
        """[1|B, 1, M * G, N]: how far each key is from the row's position."""
        own, other = self.places(start_m, start_n)
        far = positions.apart(own, other) if "q_positions" in self.operands else jnp.abs(own - other)
        return far.astype(self.dtype)

    def kept(self, start_m, start_n) -> Array:
        """[B, Hkv, M * G, N]: what dropout leaves of a tile."""
        key0, key1 = (self.tile(f"dropout_key{word}", start_m, start_n) for word in (0, 1))
        rows = self.tile("q_index", start_m, 0) if "q_index" in self.operands else self.row_index(start_m)
        rows, t = self.aligned(rows), self.tiling
        if "kv_index" in self.operands:
            cols = self.tile("kv_index", start_m, start_n)
            return dropout.keep(key0, key1, rows, cols, self.spec.drop_threshold)
        aligned = t.block_n % 4 == 0 and (t.seqlen_k % t.block_n == 0 or t.seqlen_k % 4 == 0)
        return dropout.keep_range(key0, key1, rows, start_n, t.block_n, self.spec.drop_threshold, aligned=aligned)

    def sinks(self, start_m) -> Array:
        """[1|B, 1|Hkv, 1|M * G]: the sinks of a tile's rows; -inf for rows past the length."""
        sinks = self.tile("sinks", start_m, 0)[..., 0].astype(self.dtype)
        if "q_lengths" in self.operands:
            ends = self.per_batch("q_lengths")[..., 0]
            sinks = jnp.where(self.row_index(start_m)[:, 0] < ends, sinks, -jnp.inf)
        return sinks

    def tile(self, name: str, start_m, start_n) -> Array:
        """What one tile reads of an operand: [1|B, 1|Hkv, 1|M * G, 1|N]."""
        return self.cut(self.operands[name], start_m, start_n)

    def cut(self, x: Array, start_m, start_n) -> Array:
        """Of x [n, 1|H, 1|Sq, 1|Sk], what one tile reads: [1|B, 1|Hkv, 1|M * G, 1|N].

        Only what is small is repeated. An axis may also have the length of a tile already.
        """
        block_m, block_n, group = self.tiling.block_m, self.tiling.block_n, self.spec.group
        if x.shape[2] > block_m:
            x = layout.take(x, start_m, block_m, 2)
        if x.shape[3] > block_n:
            x = layout.take(x, start_n, block_n, 3)
        x = for_every_batch(x, self.tiling.batch)
        b, h, m, n = x.shape
        if group == 1 or (h == 1 and m == 1):
            return x
        x = x.reshape(b, -1, group if h > 1 else 1, m, n).swapaxes(2, 3)
        x = jnp.broadcast_to(x, (*x.shape[:2], block_m, group, n))
        return x.reshape(b, -1, block_m * group, n)

    def of_block_mask(self, read, start_m, j) -> Array:
        """[1|B, 1|Hkv, M * G, N]: what the block mask says of a tile; anything of rows and keys that another has."""
        t = self.tiling
        i = (start_m + t.block_m - 1) // t.block_m
        part = layout.take(t.parts, i, 1, 2)
        if t.blocks_k == 1:  # of the tiling, that is: the block mask may have more
            j = 0
        else:
            part = layout.take(part, j, 1, 3)
        x = read(self.operands, part, self.spec.tile_rows, self.spec.tile_keys)
        if t.seqlen_q % t.block_m:  # the last tile was moved back
            x = jnp.roll(x, i * t.block_m - start_m, 2)
        if t.seqlen_k % t.block_n:
            x = jnp.roll(x, j * t.block_n - t.start_n(j), 3)
        return self.cut(x[:, :, : t.block_m, : t.block_n], start_m, 0)

    def per_batch(self, name: str) -> Array:
        """An operand [n, ...] -> [1|B, ...]: batch b reads b % n."""
        return for_every_batch(self.operands[name], self.tiling.batch)

    def clear(self, side: str, x: Array, start=0) -> Array:
        """x [B, S, ...] of "q" or "kv", of the rows or keys from `start` on, with zeros past the length of its side:
        not even a NaN there is seen."""
        if f"{side}_lengths" not in self.operands:
            return x
        index = layout.int32(jnp.arange(x.shape[1])) + layout.int32(start)
        return jnp.where(index[:, None, None] < self.per_batch(f"{side}_lengths"), x, 0)
