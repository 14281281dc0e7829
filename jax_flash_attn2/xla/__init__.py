"""The same attention in plain `jax.numpy`, tile by tile: what CPU, TPU and every declined call runs.

Memory is linear in the sequence lengths: scores exist one `[block_m, block_n]` tile at a time, for all
batches and heads at once, so that batch and head axes shard freely. A ragged sequence is never padded: its
last tile is moved back to end with the sequence, and what it shares with the tile before counts once.

Some choices are XLA:CPU's. Its fast matrix product (YNNPACK) wants the left operand contracted along its
last axis, so dk and dv are summed transposed. It fuses a mask that is added, not one that is selected. And a
tile costs a dozen kernel calls of some microseconds each, so tiles are larger than on a GPU.

Inside, the G heads that share a key head are rows beside one another: q is `[B, Hkv, Sq * G, D]`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base import dropout
from ..base.spec import BLOCK_LISTS, Config, Spec
from ..tiles import block_lists, spans

HIDDEN = float(np.finfo(np.float32).min) * math.log(2)
"""A bias below this (-2.36e38) hides its key, as -inf does: the GPU kernels' base-2 logits overflow there.
It is also where a running maximum starts: finite, so that `exp(s - m)` is 0, not NaN, for `s` = -inf."""

_DIFFERENTIABLE_SCORES = 2**21
"""How many logits `differentiable` holds at a time."""


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def forward(
    spec: Spec, config: Config | None, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Attention and its softmax statistics.

    Args:
      spec: what to compute.
      config: block sizes and precision; None for the tuned ones.
      q: `[B, Sq, H, D]`.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      operands: those of `spec.OPERANDS` that the call has. A bias below `HIDDEN` hides its key.

    Returns:
      o `[B, Sq, H, Dv]` in q's dtype; then, `[B, H, Sq]` each, lse, a row's maximum m (its sink included), and l, its
      sum of `exp(s - m)`; and, if the rules want it, the row's largest logit, without the sink. A row that sees
      nothing has o = 0, lse = -inf and a largest logit of -inf.
    """
    t, dtype = _Tiling(spec, config, q, k, operands, whole_rows=True), q.dtype
    q, k, v = t.clear("q", q), t.clear("kv", k), t.clear("kv", v)
    q, k, v = t.rows(q.astype(t.dtype) * t.per_batch(operands["scale"]).astype(t.dtype)), t.rows(k), t.rows(v)

    def query_block(i, out):
        start_m = t.start_m(i)
        q_tile = t.query_tile(q, start_m)

        def key_block(masked, j, carry):
            start_n = t.start_n(j)
            s, _ = t.logits(q_tile, t.key_tile(k, start_n), operands, start_m, j, masked)
            m_new = s.max(-1)
            if carry is not None or spec.hides:
                m_new = jnp.maximum(m_new, HIDDEN if carry is None else carry[0])
            p = jnp.exp(s - m_new[..., None])
            l_tile = p.sum(-1)
            if spec.drops:
                p = jnp.where(t.kept(operands, start_m, start_n), p, 0)
            acc_tile = t.dot(p, t.key_tile(v, start_n), 3, 2)
            if carry is None:
                return m_new, l_tile, acc_tile
            m, l, acc = carry
            alpha = jnp.exp(m - m_new)
            return m_new, l * alpha + l_tile, acc * alpha[..., None] + acc_tile

        if t.blocks_k == 1:
            m, l, acc = key_block(t.masked, 0, None)
        else:
            m = jnp.full(q_tile.shape[:3], HIDDEN, t.dtype)
            carry = (m, jnp.zeros_like(m), jnp.zeros((*m.shape, spec.v_dim), t.dtype))
            m, l, acc = t.over_keys(i, key_block, carry)
        row_max = [jnp.where(m > HIDDEN, m, -jnp.inf)] if spec.rules.max_logits else []
        if spec.sinks:
            sink = t.sinks(operands, start_m)
            m, m_seen = jnp.maximum(m, sink), m
            alpha = jnp.exp(m_seen - m)
            l, acc = l * alpha + jnp.exp(sink - m), acc * alpha[..., None]
        acc /= jnp.where(l > 0, l / spec.keep_scale, 1)[..., None]
        done = (t.put_rows(x, y, i) for x, y in zip(out, (acc, m, l, *row_max), strict=True))
        return tuple(done)

    m = jnp.zeros(q.shape[:3], t.dtype)
    out = (jnp.zeros((*m.shape, spec.v_dim), t.dtype), m, m, *([m] if spec.rules.max_logits else []))
    o, *stats = _loop(0, t.blocks_q, query_block, out)
    m, l, *row_max = map(t.stats_out, stats)
    lse = jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1)), -jnp.inf)
    return t.rows_out(o, t.seqlen_q).astype(dtype), lse, m, l, row_max[0] if row_max else None


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def backward(
    spec: Spec,
    config: Config | None,
    q: Array,
    k: Array,
    v: Array,
    operands: Mapping[str, Array],
    o: Array,
    m: Array,
    l: Array,
    do: Array,
    dlse: Array | None,
    *,
    wanted: tuple[str, ...],
    apart: tuple[int, ...],
) -> tuple[Array, ...]:
    """Gradients, from the output and the statistics that `forward` returned.

    Args:
      spec: as in `forward`, and so are config, q, k, v and operands.
      o: `[B, Sq, H, Dv]`, with m and l `[B, H, Sq]`, from `forward`.
      do: `[B, Sq, H, Dv]`, the gradient of o.
      dlse: None or `[B, H, Sq]`, the gradient of lse.
      wanted: the operands to return the gradients of, in the order of `spec.DIFFERENTIABLE`.
      apart: for each of them, how many parts of the batch have a gradient of their own.

    Returns:
      dq, dk and dv, each of the shape and dtype of what it is the gradient of; then the gradients of the wanted
      operands, `[apart * n, ...]` for an operand `[n, ...]`.
    """
    t = _Tiling(spec, config, q, k, operands, whole_rows=False)
    apart_of = dict(zip(wanted, apart, strict=True))
    q, k, v, do = t.clear("q", q), t.clear("kv", k), t.clear("kv", v), t.clear("q", do)
    args, scale = (q, k, v), t.per_batch(operands["scale"]).astype(t.dtype)
    # p is exp(s - m) / l. The division moves from the tiles of p to the rows of do and delta.
    l_inv = jnp.where(l > 0, 1 / jnp.where(l > 0, l, 1), 0)
    do = t.rows(do.astype(t.dtype) * l_inv.swapaxes(1, 2)[..., None])
    delta = jnp.sum(t.rows(o) * do, -1)
    if dlse is not None:
        delta -= t.stats(jnp.where(l > 0, dlse.astype(t.dtype) * l_inv, 0))
    do *= spec.keep_scale
    m_rows = t.stats(m)
    q, k, v = t.rows(q.astype(t.dtype) * scale), t.rows(k), t.rows(v)

    def query_block(i, carry):
        dq, *sums = carry
        start_m = t.start_m(i)
        q_tile, do_tile, m_tile, delta_tile = (t.query_tile(x, start_m) for x in (q, do, m_rows, delta))
        m_tile = t.hide_repeated_rows(m_tile, i)
        qt_tile, dot_tile = q_tile.swapaxes(2, 3), do_tile.swapaxes(2, 3)

        def key_block(masked, j, carry):
            dq_tile, dkt, dvt, grads = carry
            start_n = t.start_n(j)
            k_tile = t.key_tile(k, start_n)
            s, capped = t.logits(q_tile, k_tile, operands, start_m, j, masked)
            p = jnp.exp(s - m_tile[..., None])
            p_kept, dp = p, t.dot(do_tile, t.key_tile(v, start_n), 3, 3)
            if spec.drops:
                kept = t.kept(operands, start_m, start_n)
                p_kept, dp = (jnp.where(kept, x, 0) for x in (p, dp))
            ds = p * (dp - delta_tile[..., None])
            grads = t.add_grads(grads, ds, operands, start_m, start_n)
            if capped is not None:
                ds *= 1 - capped * capped
            dq_tile += t.dot(ds, k_tile, 3, 2)
            dkt = _add(dkt, t.dot(qt_tile, ds, 3, 2), start_n, 3)
            dvt = _add(dvt, t.dot(dot_tile, p_kept, 3, 2), start_n, 3)
            return dq_tile, dkt, dvt, grads

        dq_tile, *sums = t.over_keys(i, key_block, (jnp.zeros_like(q_tile), *sums))
        return _add(dq, dq_tile, start_m * spec.group, 2), *sums

    grads = {name: t.grad_zeros(operands[name], n) for name, n in apart_of.items() if name in ("bias", "slopes")}
    carry = (jnp.zeros_like(q), *(jnp.zeros_like(x).swapaxes(2, 3) for x in (k, v)), grads)
    dq, dkt, dvt, grads = _loop(0, t.blocks_q, query_block, carry)
    dq = t.rows_out(dq, t.seqlen_q)
    if "scale" in apart_of:
        # The sum of ds * (q k), as a product of vectors: that sums more exactly than a reduction does.
        dscale = jnp.einsum("bn,bn->b", *(x.astype(t.dtype).reshape(x.shape[0], -1) for x in (dq, args[0])))
        grads["scale"] = _sum_to(dscale[:, None, None, None], operands["scale"].shape, apart_of["scale"])
    if "sinks" in apart_of:
        dsinks = -t.stats_out(delta) * jnp.exp(t.per_batch(operands["sinks"])[..., 0] - jnp.where(l > 0, m, jnp.inf))
        grads["sinks"] = _sum_to(dsinks[..., None], operands["sinks"].shape, apart_of["sinks"])
    dqkv = (dq * scale, *(t.rows_out(x.swapaxes(2, 3), t.seqlen_k) for x in (dkt, dvt)))
    dqkv = (g.astype(x.dtype) for g, x in zip(dqkv, args, strict=True))
    return *dqkv, *(grads[name].astype(operands[name].dtype) for name in wanted)


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def differentiable(
    spec: Spec, config: Config | None, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> tuple[Array, Array, Array | None]:
    """`forward` for JAX to differentiate, as often as wanted: o, lse, and the largest logits if the rules want them.

    Whole rows of logits, some rows at a time, which a backward pass computes again: the memory of the function and of
    its first derivative is linear in the sequence lengths.
    """
    config, dtype = config or Config(), q.dtype
    rows_at_once = max(_DIFFERENTIABLE_SCORES // (q.shape[0] * spec.heads * k.shape[1]), 16)
    config = dataclasses.replace(config, block_m=config.block_m or rows_at_once, block_n=k.shape[1])
    t = _Tiling(spec, config, q, k, operands, whole_rows=True, whole_keys=True)
    q, k, v = t.clear("q", q), t.clear("kv", k), t.clear("kv", v)
    q, k, v = t.rows(q.astype(t.dtype) * t.per_batch(operands["scale"]).astype(t.dtype)), t.rows(k), t.rows(v)

    @jax.checkpoint
    def query_block(block):
        start_m, q_tile, rows = block
        s, _ = t.logits(q_tile, k, {**operands, **rows}, start_m, 0, t.masked)
        m = jnp.maximum(lax.stop_gradient(s).max(-1), HIDDEN)
        row_max = [jnp.where(m > HIDDEN, m, -jnp.inf)] if spec.rules.max_logits else []
        sink = t.sinks(operands, start_m) if spec.sinks else None
        if sink is not None:
            m = jnp.maximum(m, lax.stop_gradient(sink))
        p = jnp.exp(s - m[..., None])
        l = p.sum(-1)
        if spec.drops:
            p = jnp.where(t.kept(operands, start_m, 0), p, 0)
        acc = t.dot(p, v, 3, 2)
        if sink is not None:
            l += jnp.exp(sink - m)
        l_or_1 = jnp.where(l > 0, l, 1)
        lse = jnp.where(l > 0, m + jnp.log(l_or_1), -jnp.inf)
        return acc / (l_or_1 / spec.keep_scale)[..., None], lse, *row_max

    starts = jnp.minimum(jnp.arange(t.blocks_q) * t.block_m, t.seqlen_q - t.block_m)
    by_rows = [name for name, x in operands.items() if x.shape[2] > 1 and name not in BLOCK_LISTS]
    rows = {name: t.cut_rows(operands[name], t.block_m) for name in by_rows}
    out = lax.map(query_block, (starts, t.cut_rows(q, t.block_m * spec.group), rows))
    o, *stats = (t.join_rows(x) for x in out)
    lse, *row_max = map(t.stats_out, stats)
    return t.rows_out(o, t.seqlen_q).astype(dtype), lse, row_max[0] if row_max else None


def tiles(
    spec: Spec, config: Config | None, q: Any, k: Any, operands: Mapping[str, Any], *, forward: bool
) -> tuple[np.ndarray, int, int]:
    """How a pass cuts its logits: the first row of each block of query rows, and the sizes of a tile."""
    t = _Tiling(spec, config, q, k, operands, whole_rows=forward)
    return np.minimum(np.arange(t.blocks_q) * t.block_m, t.seqlen_q - t.block_m), t.block_m, t.block_n


class _Tiling:
    """How one call is cut into tiles. Starts and spans are Python ints where the block number is one."""

    def __init__(self, spec, config, q, k, operands, whole_rows, whole_keys=False):
        self.spec, self.config, self.batch = spec, config, q.shape[0]
        self.dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        self.seqlen_q, self.seqlen_k = q.shape[1], k.shape[1]
        self.masked = spec.masks
        if spec.listed:
            block_m, block_n = spec.tile_rows, self.seqlen_k if whole_keys else spec.tile_keys
        else:
            block_m, block_n = _choose_blocks(
                self.seqlen_q,
                self.seqlen_k,
                q.shape[0] * spec.heads,
                whole_rows and not self.masked,
                256 if spec.q_segments is not None else 512,  # documents are met tile by tile: small ones waste less
            )
            block_m, block_n = (config and config.block_m) or block_m, (config and config.block_n) or block_n
        self.block_m, self.block_n = min(block_m, self.seqlen_q), min(block_n, self.seqlen_k)
        self.blocks_q, self.blocks_k = -(-self.seqlen_q // self.block_m), -(-self.seqlen_k // self.block_n)
        self.lengths = {side: operands.get(f"{side}_lengths") for side in ("q", "kv")}
        self.spans = self.look_up_spans(operands) if spec.spans and self.blocks_k > 1 else None
        if spec.listed:
            self.parts = block_lists.parts(operands)
        self.list = self.look_up_list(operands) if spec.listed and self.blocks_k > 1 else None

    def start_m(self, i):
        """First row of query block i."""
        return _min(i * self.block_m, self.seqlen_q - self.block_m)

    def start_n(self, j):
        """First row of key block j."""
        return _min(j * self.block_n, self.seqlen_k - self.block_n)

    def look_up_spans(self, operands):
        """[blocks_q, 4]: begin, full, stop and end of the key blocks that a query block meets in any batch or head."""
        starts = jnp.minimum(jnp.arange(self.blocks_q, dtype=jnp.int32) * self.block_m, self.seqlen_q - self.block_m)
        lengths = self.seqlen_q, self.seqlen_k
        table = spans.query_spans(self.spec, operands, self.batch, *lengths, starts, self.block_m, self.block_n)
        return spans.union(table).astype(int)  # the type that the loops over query blocks count in

    def look_up_list(self, operands):
        """[blocks_q, 3] and [tiles]: the key blocks that a query block meets in any batch or head, in a list that has
        first those that need the mask, then those seen whole."""
        bounded = self.spec.causal or self.spec.bounded
        sizes = self.batch, self.seqlen_q, self.seqlen_k
        status = block_lists.status(self.spec, operands, *sizes, self.parts, bounded=bounded)
        status = block_lists.union(status)
        ends, tiles = block_lists.lists(status, jnp.zeros(status.shape, jnp.int32), status.size)
        return ends.astype(int), tiles[:, 0].astype(int)

    def over_keys(self, i, key_block, carry):
        """Run key_block(masked, j, carry) for every key block j that query block i meets."""
        if self.list is not None:
            ends, tiles = self.list
            begin, full, end = ends[i]
            carry = lax.fori_loop(full, end, lambda n, carry: key_block(False, tiles[n], carry), carry)
            return lax.fori_loop(begin, full, lambda n, carry: key_block(True, tiles[n], carry), carry)
        if self.spans is None:
            stop, end = self.key_span(self.start_m(i))
            carry = _loop(0, stop, functools.partial(key_block, False), carry)
            return _loop(stop, end, functools.partial(key_block, True), carry)
        begin, full, stop, end = self.spans[i]

        def on_either_side(j, carry):  # one loop for what lies before and behind: half the code to compile
            return key_block(True, jnp.where(j < full, j, j + stop - full), carry)

        carry = lax.fori_loop(full, stop, functools.partial(key_block, False), carry)
        return lax.fori_loop(begin, end - (stop - full), on_either_side, carry)

    def key_span(self, start_m):
        """Key blocks [0, full) are seen whole by the query block, [full, end) through the mask."""
        full, end = self.seqlen_k // self.block_n, self.blocks_k
        if self.spec.spans or self.spec.listed:  # but one key block: nothing to look up
            return 0, 1
        if not self.spec.causal:
            return full, end
        last = start_m + self.block_m - 1
        return _min((start_m + 1) // self.block_n, full), _min(last // self.block_n + 1, end)

    def row_index(self, start_m):
        """[M * G, 1]: the rows of a tile."""
        rows = _int32(jnp.arange(self.block_m * self.spec.group))[:, None]
        return _int32(start_m) + rows // self.spec.group

    def col_index(self, start_n):
        """[1, N]: the keys of a tile."""
        return _int32(start_n) + _int32(jnp.arange(self.block_n))[None, :]

    def positions(self, operands, start_m):
        """[1|B, 1, M * G, 1], or without the first two axes: where the rows of a tile are among the keys."""
        rows = self.row_index(start_m)
        return rows + self.per_batch(operands["offset"]) if "offset" in operands else rows

    def visible(self, operands, start_m, j):
        """[1|B, 1|Hkv, M * G, N]: what the tile's rows see of its keys, less those that key block j - 1 held."""
        start_n, rules = self.start_n(j), self.spec.rules
        cols = self.col_index(start_n)
        visible = cols >= _int32(j * self.block_n)
        if rules.left is not None:
            visible &= self.positions(operands, start_m) - rules.left <= cols
        if rules.right is not None:
            visible &= self.positions(operands, start_m) + rules.right >= cols
        if "q_segments" in operands:
            q_ids, kv_ids = (self.tile(operands[f"{side}_segments"], start_m, start_n) for side in ("q", "kv"))
            visible &= (q_ids == kv_ids) & (q_ids >= 0)
        if "q_lengths" in operands:
            visible &= self.row_index(start_m) < self.per_batch(operands["q_lengths"])
        if "kv_lengths" in operands:
            visible &= cols < self.per_batch(operands["kv_lengths"])
        if "mask" in operands:
            visible &= self.tile(operands["mask"], start_m, start_n)
        if self.spec.listed:
            visible &= self.of_tile(block_lists.element_masks, operands, start_m, j)
        return visible

    def of_tile(self, read, operands, start_m, j):
        """[1|B, 1|Hkv, M * G, N]: what the block mask says of a tile; anything of rows and keys that another has."""
        i = (start_m + self.block_m - 1) // self.block_m
        part = lax.dynamic_slice_in_dim(self.parts, i, 1, 2)
        if self.blocks_k == 1:  # of the tiling, that is: the block mask may have more
            j = 0
        else:
            part = lax.dynamic_slice_in_dim(part, j, 1, 3)
        x = read(operands, part, self.spec.tile_rows, self.spec.tile_keys)
        if self.seqlen_q % self.block_m:  # the last tile was moved back
            x = jnp.roll(x, i * self.block_m - start_m, 2)
        if self.seqlen_k % self.block_n:
            x = jnp.roll(x, j * self.block_n - self.start_n(j), 3)
        return self.tile(x[:, :, : self.block_m, : self.block_n], start_m, 0)

    def logits(self, q_tile, k_tile, operands, start_m, j, masked):
        """Logits of one tile [B, Hkv, M * G, N], -inf where hidden; and the tanh of the soft cap, or None."""
        s, capped, start_n = self.dot(q_tile, k_tile, 3, 3), None, self.start_n(j)
        if (cap := self.spec.rules.soft_cap) is not None:
            capped = jnp.tanh(s / cap)
            s = cap * capped
        if "bias" in operands:
            bias = self.tile(operands["bias"], start_m, start_n).astype(self.dtype)
            s += jnp.where(bias < HIDDEN, -jnp.inf, bias)
        if "slopes" in operands:
            s -= self.tile(operands["slopes"], start_m, start_n) * self.distances(operands, start_m, start_n)
        if masked and "tile_weights" in operands:
            s -= self.of_tile(block_lists.log_weights, operands, start_m, j).astype(self.dtype)
        if masked:
            s += jnp.where(self.visible(operands, start_m, j), 0, -jnp.inf).astype(self.dtype)
        return s, capped

    def distances(self, operands, start_m, start_n):
        """[1|B, 1, M * G, N]: how far each key is from the row's position."""
        cols = self.col_index(start_n)
        return jnp.abs(self.positions(operands, start_m) - cols).astype(self.dtype)

    def kept(self, operands, start_m, start_n):
        """[B, Hkv, M * G, N]: what dropout leaves of a tile."""
        key0, key1 = (self.tile(operands[f"dropout_key{word}"], start_m, start_n) for word in (0, 1))
        rows = self.positions(operands, start_m)
        return dropout.keep_range(key0, key1, rows, start_n, self.block_n, self.spec.drop_threshold)

    def sinks(self, operands, start_m):
        """[1|B, 1|Hkv, 1|M * G]: the sinks of a tile's rows; -inf for rows past the length."""
        sinks = self.tile(operands["sinks"], start_m, 0)[..., 0].astype(self.dtype)
        if "q_lengths" in operands:
            ends = self.per_batch(operands["q_lengths"])[..., 0]
            sinks = jnp.where(self.row_index(start_m)[:, 0] < ends, sinks, -jnp.inf)
        return sinks

    def hide_repeated_rows(self, m_tile, i):
        """Give rows that query block i - 1 held an infinite maximum: their p is 0."""
        if self.seqlen_q % self.block_m == 0:
            return m_tile
        rows = self.start_m(i) + jnp.arange(m_tile.shape[-1]) // self.spec.group
        return jnp.where(rows < i * self.block_m, jnp.inf, m_tile)

    def put_rows(self, x, tile, i):
        """x [B, Hkv, Sq * G, ...] with query block i."""
        start = self.start_m(i) * self.spec.group
        if self.spec.listed and self.seqlen_q % self.block_m:  # its list is not that of rows that block i - 1 has done
            rows = self.start_m(i) + jnp.arange(tile.shape[2]) // self.spec.group
            own = (rows >= i * self.block_m).reshape(-1, *(1,) * (tile.ndim - 3))
            tile = jnp.where(own, tile, lax.dynamic_slice_in_dim(x, start, tile.shape[2], 2))
        return _put(x, tile, start, 2)

    def query_tile(self, x, start_m):
        """[B, Hkv, Sq * G, ...] -> [B, Hkv, M * G, ...]."""
        group = self.spec.group
        return lax.dynamic_slice_in_dim(x, start_m * group, self.block_m * group, 2)

    def key_tile(self, x, start_n):
        """[B, Hkv, Sk, ...] -> [B, Hkv, N, ...]."""
        return lax.dynamic_slice_in_dim(x, start_n, self.block_n, 2)

    def tile(self, x, start_m, start_n):
        """Of an operand [n, 1|H, 1|Sq, 1|Sk], what one tile reads: [1|B, 1|Hkv, 1|M * G, 1|N].

        Only what is small is repeated. An axis may also have the length of a tile already.
        """
        if x.shape[2] > self.block_m:
            x = lax.dynamic_slice_in_dim(x, start_m, self.block_m, 2)
        if x.shape[3] > self.block_n:
            x = lax.dynamic_slice_in_dim(x, start_n, self.block_n, 3)
        x = self.per_batch(x)
        b, h, m, n = x.shape
        group = self.spec.group
        if group == 1 or (h == 1 and m == 1):
            return x
        x = x.reshape(b, -1, group if h > 1 else 1, m, n).swapaxes(2, 3)
        x = jnp.broadcast_to(x, (*x.shape[:2], self.block_m, group, n))
        return x.reshape(b, -1, self.block_m * group, n)

    def per_batch(self, x):
        """[n, ...] -> [1|B, ...]: batch b reads b % n."""
        return x if x.shape[0] in (1, self.batch) else jnp.tile(x, (self.batch // x.shape[0], 1, 1, 1))

    def clear(self, side, x):
        """[B, S, ...] with zeros past the length of its side: not even a NaN there is seen."""
        lengths = self.lengths[side]
        if lengths is None:
            return x
        return jnp.where(_int32(jnp.arange(x.shape[1]))[:, None, None] < self.per_batch(lengths), x, 0)

    def grad_zeros(self, operand, apart):
        """Where the gradient of an operand is summed."""
        dtype = operand.dtype  # with rows and columns each element is added to once, and needs no wider one
        if 1 in operand.shape[2:]:
            dtype = self.dtype
        return jnp.zeros((apart * operand.shape[0], *operand.shape[1:]), dtype)

    def add_grads(self, grads, ds, operands, start_m, start_n):
        """Add what the tile ds [B, Hkv, M * G, N] gives to the gradients of bias and slopes."""
        added = dict(grads)
        if "bias" in grads:
            added["bias"] = self.add_grad(grads["bias"], ds, operands["bias"], start_m, start_n)
        if "slopes" in grads:
            dslopes = -(ds * self.distances(operands, start_m, start_n)).sum(-1, keepdims=True)
            added["slopes"] = self.add_grad(grads["slopes"], dslopes, operands["slopes"], start_m, start_n)
        return added

    def add_grad(self, grad, x, operand, start_m, start_n):
        """Add x [B, Hkv, M * G, 1|N] to grad, summed over the axes that the operand lacks."""
        b, n, _, keys = x.shape
        x = x.reshape(b, n, self.block_m, -1, keys).swapaxes(2, 3).reshape(b, -1, self.block_m, keys)
        x = _sum_to(x, operand.shape, grad.shape[0] // operand.shape[0]).astype(grad.dtype)
        start = (0, 0, start_m if grad.shape[2] > 1 else 0, start_n if grad.shape[3] > 1 else 0)
        return lax.dynamic_update_slice(grad, lax.dynamic_slice(grad, start, x.shape) + x, start)

    def rows(self, x):
        """[B, S, Hkv * G, D] -> [B, Hkv, S * G, D]."""
        b, s, h, d = x.shape  # G as an axis, even of 1, saves XLA:CPU a copy, as in `rows_out`
        n = self.spec.kv_heads
        return x.astype(self.dtype).reshape(b, s, n, h // n, d).swapaxes(1, 2).reshape(b, n, -1, d)

    def rows_out(self, x, seqlen):
        """[B, Hkv, S * G, D] -> [B, S, Hkv * G, D]: `rows` undone."""
        b, n, _, d = x.shape
        return x.reshape(b, n, seqlen, -1, d).swapaxes(1, 2).reshape(b, seqlen, -1, d)

    def stats(self, x):
        """[B, H, Sq] -> [B, Hkv, Sq * G]."""
        b, _, s = x.shape
        return x.reshape(b, self.spec.kv_heads, -1, s).swapaxes(2, 3).reshape(b, self.spec.kv_heads, -1)

    def stats_out(self, x):
        """[B, Hkv, Sq * G] -> [B, H, Sq]: `stats` undone."""
        b, n, _ = x.shape
        return x.reshape(b, n, self.seqlen_q, -1).swapaxes(2, 3).reshape(b, -1, self.seqlen_q)

    def cut_rows(self, x, size):
        """[B, H, S, D] -> [blocks_q, B, H, size, D]: a row axis as blocks, the last moved back if need be."""
        whole = x.shape[2] // size * size
        blocks = jnp.moveaxis(x[:, :, :whole].reshape(*x.shape[:2], -1, size, x.shape[3]), 2, 0)
        return blocks if whole == x.shape[2] else jnp.concatenate([blocks, x[None, :, :, -size:]])

    def join_rows(self, x):
        """[blocks_q, B, Hkv, M * G, ...] -> [B, Hkv, Sq * G, ...]: `cut_rows` undone."""
        x = jnp.moveaxis(x, 0, 2)
        before = (x.shape[2] - 1) * x.shape[3]
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        last = before - self.seqlen_q * self.spec.group  # negative: that many rows of the last block are its own
        return jnp.concatenate([x[:, :, :before], x[:, :, last:]], 2)

    def dot(self, x, y, x_axis, y_axis):
        """Batches and heads of x times those of y, contracted along one axis of each."""
        tf32 = self.config is not None and self.config.precision == "tf32"
        precision = lax.Precision.DEFAULT if tf32 else lax.Precision.HIGHEST
        return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0, 1), (0, 1))), precision=precision)


def _choose_blocks(seqlen_q, seqlen_k, batch_heads, whole_rows, largest):
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


def _power_of_two(x):
    """The largest power of two up to x, at least 1."""
    return 2 ** int(math.log2(max(x, 1)))


def _even(seqlen, block):
    """As many blocks as `block` makes of a sequence, but of about equal size."""
    size = -(-seqlen // -(-seqlen // block))
    return min(-(-size // 16) * 16, block)


def _sum_to(x, shape, apart):
    """[B, H, M, N] -> [apart * n, 1|H, 1|M, 1|N], summed over the axes that an operand of this shape lacks."""
    x = x.reshape(apart, -1, shape[0], *x.shape[1:])
    x = x.sum([1, *(axis + 2 for axis in (1, 2, 3) if shape[axis] == 1)], keepdims=True)
    return x.reshape(-1, *x.shape[3:])


def _int32(x):
    """Row and key numbers are int32 under x64 too, as lengths and offsets are."""
    return jnp.asarray(x, jnp.int32)


def _min(x, y):
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def _put(x, tile, start, axis):
    return lax.dynamic_update_slice_in_dim(x, tile, start, axis)


def _add(x, tile, start, axis):
    return _put(x, lax.dynamic_slice_in_dim(x, start, tile.shape[axis], axis) + tile, start, axis)


def _loop(start, stop, body, carry):
    """`lax.fori_loop`, or no loop at all where the bounds are known and at most one step apart."""
    if isinstance(start, int) and isinstance(stop, int) and stop - start <= 1:
        return body(start, carry) if start < stop else carry
    return lax.fori_loop(start, stop, body, carry)
