"""How a call is cut into tiles, and which of them a block of query rows meets."""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base.arguments import accumulator
from ..base.config import Config
from ..base.spec import Spec
from ..tiles import block_lists, spans
from ..tiles.kinds import FULL, PARTIAL
from . import layout


def tiles(
    spec: Spec, config: Config, q: Any, k: Any, operands: Mapping[str, Any], *, forward: bool
) -> tuple[np.ndarray, int, int]:
    """How a pass cuts its logits: the first row of each block of query rows, and the sizes of a tile."""
    t = Tiling(spec, config, q, k, operands, whole_rows=forward)
    return t.starts(np), t.block_m, t.block_n


_FEW_ROWS = 16
"""For so few it does not pay to transpose all keys and values."""
_CACHE = 2**17
"""With fewer numbers than these, they are in a core's own cache: a tile or two with no loop around them are faster."""


_SUMMED = 256
"""So many rows of products are summed by one dot: with twice as many sums are less exact than the plain
implementation's (`python -m benchmarks numerics`)."""


class Tiling:
    """How one call is cut into tiles. Starts and spans are Python ints where the block number is one."""

    def __init__(self, spec: Spec, config: Config, q, k, operands, whole_rows, whole_keys=False):
        self.spec, self.config, self.batch = spec, config, q.shape[0]
        self.dtype = accumulator(q.dtype)
        self.exact = self.dtype == q.dtype  # results are not rounded: what sums lose shows
        self.seqlen_q, self.seqlen_k = q.shape[1], k.shape[1]
        self.masked = spec.masks
        self.in_place = whole_rows and not whole_keys and in_place(q, k)
        if spec.listed:
            block_m, block_n = spec.tile_rows, self.seqlen_k if whole_keys else spec.tile_keys
        elif self.in_place:
            block_m, block_n = self.seqlen_q, keys_in_place(k.size // self.seqlen_k)
            block_n = config.block_n or block_n
        else:
            block_m, block_n = choose_blocks(
                self.seqlen_q,
                self.seqlen_k,
                q.shape[0] * spec.heads,
                whole_rows and not self.masked,
                256 if spec.q_segments is not None else 512,  # documents are met tile by tile: small ones waste less
            )
            block_m, block_n = config.block_m or block_m, config.block_n or block_n
        self.block_m, self.block_n = min(block_m, self.seqlen_q), min(block_n, self.seqlen_k)
        self.blocks_q, self.blocks_k = -(-self.seqlen_q // self.block_m), -(-self.seqlen_k // self.block_n)
        self.status = self.look_up_status(operands) if spec.spans and self.blocks_k > 1 else None
        self.parts: Any = block_lists.parts(operands) if spec.listed else None
        self.list: Any = self.look_up_list(operands) if spec.listed and self.blocks_k > 1 else None

    def start_m(self, i):
        """First row of query block i."""
        return _start(i, self.block_m, self.seqlen_q)

    def starts(self, xp: Any = jnp) -> Any:
        """int32 [blocks_q]: the first row of each query block; in JAX, or in NumPy."""
        return xp.minimum(xp.arange(self.blocks_q, dtype=xp.int32) * self.block_m, self.seqlen_q - self.block_m)

    def start_n(self, j):
        """First row of key block j."""
        return _start(j, self.block_n, self.seqlen_k)

    # Which tiles are met.

    def look_up_status(self, operands):
        """[blocks_q, blocks_k]: what the key blocks are to the query blocks, in any batch or head."""
        lengths = self.seqlen_q, self.seqlen_k
        return spans.query_tiles(self.spec, operands, self.batch, *lengths, self.starts(), self.block_m, self.block_n)

    def look_up_list(self, operands):
        """[blocks_q, 3] and [tiles]: the key blocks that a query block meets in any batch or head, in a list that has
        first those that need the mask, then those seen whole."""
        bounded = self.spec.causal or self.spec.bounded
        sizes = self.batch, self.seqlen_q, self.seqlen_k
        status = block_lists.status(self.spec, operands, *sizes, self.parts, bounded=bounded)
        status = block_lists.union(status)
        ends, tiles = block_lists.lists(status, jnp.zeros(status.shape, jnp.int32), status.size)
        return ends.astype(int), tiles[:, 0].astype(int)

    def over_keys(self, i, key_block: Callable, carry):
        """Run key_block(masked, j, carry) for every key block j that query block i meets."""
        over = self._over_list if self.list else self._over_span if self.status is None else self._over_status
        return over(i, key_block, carry)

    def _over_list(self, i, key_block: Callable, carry):
        ends, tiles = self.list
        begin, full, end = ends[i]
        carry = lax.fori_loop(full, end, lambda n, carry: key_block(False, tiles[n], carry), carry)
        return lax.fori_loop(begin, full, lambda n, carry: key_block(True, tiles[n], carry), carry)

    def _over_span(self, i, key_block: Callable, carry):
        stop, end = self.key_span(self.start_m(i))
        carry = loop(0, stop, functools.partial(key_block, False), carry)
        return loop(stop, end, functools.partial(key_block, True), carry)

    def _over_status(self, i, key_block: Callable, carry):
        row = lax.dynamic_index_in_dim(self.status, i, 0, keepdims=False, allow_negative_indices=False)

        def tile(j, carry):
            # Loops of at most one step, which XLA:CPU runs in place; what a conditional returns it would copy.
            status = lax.dynamic_index_in_dim(row, j, 0, keepdims=False, allow_negative_indices=False)
            for masked, kind in ((False, FULL), (True, PARTIAL)):
                met = lax.convert_element_type(status == kind, lax.dtype(j))
                carry = lax.fori_loop(j, j + met, functools.partial(key_block, masked), carry)
            return carry

        return lax.fori_loop(0, self.blocks_k, tile, carry)

    def key_span(self, start_m):
        """Key blocks [0, full) are seen whole by the query block, [full, end) through the mask."""
        full, end = self.seqlen_k // self.block_n, self.blocks_k
        if self.spec.spans or self.spec.listed:  # but one key block: nothing to look up
            return 0, 1
        if not self.spec.causal:
            return full, end
        last = start_m + self.block_m - 1
        return _min(_div(start_m + 1, self.block_n), full), _min(_div(last, self.block_n) + 1, end)

    # What a tile holds of an array, and what is done with it.

    def query_tile(self, x: Array, start_m) -> Array:
        """[B, Hkv, Sq * G, ...] -> [B, Hkv, M * G, ...]."""
        group = self.spec.group
        return layout.take(x, start_m * group, self.block_m * group, 2)

    def key_tile(self, x: Array, start_n) -> Array:
        """[B, Hkv, Sk, ...] -> [B, Hkv, N, ...]."""
        return layout.take(x, start_n, self.block_n, 2)

    def rows(self, x: Array) -> Array:
        """[B, S, Hkv * G, D] -> [B, Hkv, S * G, D]."""
        return layout.rows(x, self.spec.kv_heads, self.dtype)

    def new_rows(self, x: Array, fill: float, i) -> Array:
        """A tile of `fill`, shaped as block i of x [B, Hkv, Sq * G, ...]. x starts out filled with it, so where no
        block overlaps another the tile is sliced from x, by a kernel that exists anyway; else it is made new."""
        if self.seqlen_q % self.block_m:
            return jnp.full((*x.shape[:2], self.block_m * self.spec.group, *x.shape[3:]), fill, x.dtype)
        return self.query_tile(x, self.start_m(i))

    def put_rows(self, x: Array, tile: Array, i) -> Array:
        """x [B, Hkv, Sq * G, ...] with query block i."""
        start = self.start_m(i) * self.spec.group
        if self.spec.listed and self.seqlen_q % self.block_m:
            # The last block was moved back over rows that block i - 1 has finished by another list of tiles: those keep
            # their values.
            rows = self.start_m(i) + jnp.arange(tile.shape[2]) // self.spec.group
            own = (rows >= i * self.block_m).reshape(-1, *(1,) * (tile.ndim - 3))
            tile = jnp.where(own, tile, layout.take(x, start, tile.shape[2], 2))
        return layout.put(x, tile, start, 2)

    def hide_repeated_rows(self, shift: Array, i) -> Array:
        """Give rows that query block i - 1 held an infinite shift: their p is 0."""
        if self.seqlen_q % self.block_m == 0:
            return shift
        rows = self.start_m(i) + jnp.arange(shift.shape[-1]) // self.spec.group
        return jnp.where(rows < i * self.block_m, jnp.inf, shift)

    def dot_of_rows(self, x: Array, y: Array) -> Array:
        """xᵀ y, summed over the rows of tiles [B, Hkv, M * G, D|N]: if `exact` by parts of them, of which one long sum
        would be a less exact one."""
        rows, xt = x.shape[2], x.swapaxes(2, 3)
        size = _SUMMED if self.exact else rows
        parts = [slice(start, start + size) for start in range(0, rows, size)]
        return functools.reduce(operator.add, [self.dot(xt[..., part], y[:, :, part], 3, 2) for part in parts])

    def dot(self, x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
        """Batches and heads of x times those of y, contracted along one axis of each."""
        precision = lax.Precision.DEFAULT if self.config.precision == "tf32" else lax.Precision.HIGHEST
        return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0, 1), (0, 1))), precision=precision)


def choose_blocks(seqlen_q, seqlen_k, batch_heads, whole_rows, largest):
    """Block sizes that were fast on CPUs with 1 MiB of L2 per core and 32 MiB of L3.

    One tile where it is small: with no running statistics XLA fuses the softmax into the matrix product, and
    one jit of both passes computes p once. Then whole rows of keys, for the same fusion, in a forward that
    has no causal tiles to skip. Else squares with about 2**19 scores over all batches and heads.
    """
    if batch_heads * seqlen_q * seqlen_k <= 2**21:
        return seqlen_q, seqlen_k
    side = min(max(_power_of_two(1.5 * math.sqrt(2**19 / batch_heads)), 128), largest)
    block_m = side * max(side // seqlen_k, 1)  # a tile that is short one way is long the other
    block_n = side * max(side // seqlen_q, 1)
    rows = _power_of_two(2**22 / (batch_heads * seqlen_k))
    if whole_rows and rows >= min(64, seqlen_q):
        block_m, block_n = min(rows, max(block_m, 256)), seqlen_k
    return _even(seqlen_q, block_m), _even(seqlen_k, block_n)


def in_place(q: Any, k: Any) -> bool:
    """Whether a forward pass reads keys and values where they are (`cached`)."""
    return few_rows(q) and k.size >= _CACHE


def few_rows(q: Any) -> bool:
    """Whether there are too few to do something to all keys first."""
    return q.shape[1] <= _FEW_ROWS


def keys_in_place(width: int) -> int:
    """How many keys of `width` numbers, those of all batches and heads, are a tile of a cache that is read in place: so
    few that what is made of it stays near its core, and that most tiles of a short cache need no mask."""
    return _power_of_two(min(max(2**20 / width, 32), max(2**17 / width, 128)))


def _power_of_two(x):
    """The largest power of two up to x, at least 1."""
    return 2 ** int(math.log2(max(x, 1)))


def _even(seqlen, block):
    """As many blocks as `block` makes of a sequence, but of about equal size."""
    size = -(-seqlen // -(-seqlen // block))
    return min(-(-size // 16) * 16, block)


def _start(i, block: int, seqlen: int):
    """Where block i begins: the last is moved back, to be whole."""
    return i * block if seqlen % block == 0 else _min(i * block, seqlen - block)


def _div(x, y: int):
    """x // y for an x that is not negative."""
    return x // y if isinstance(x, int) else lax.div(x, jnp.asarray(y, x.dtype))


def _min(x, y):
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def loop(start, stop, body: Callable, carry):
    """`lax.fori_loop`, or no loop at all where the bounds are known and at most one step apart."""
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= 1:
        return body(start, carry) if start < stop else carry
    return lax.fori_loop(start, stop, body, carry)
