"""The same attention in plain `jax.numpy`, tile by tile: what CPU, TPU and every declined call runs.

Memory is linear in the sequence lengths: scores exist one `[block_m, block_n]` tile at a time, for all
batches and heads at once, so that batch and head axes shard freely. A ragged sequence is never padded: its
last tile is moved back to end with the sequence, and what it shares with the tile before counts once.

Some choices are XLA:CPU's. Its fast matrix product (YNNPACK) wants the left operand contracted along its
last axis, so dk and dv are summed transposed. It fuses a mask that is added, not one that is selected. And a
tile costs a dozen kernel calls of some microseconds each, so tiles are larger than on a GPU.

Inside, the G heads that share a key head are rows beside one another: q is `[B, Hkv, Sq * G, D]`.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .spec import Config, Spec

HIDDEN = float(np.finfo(np.float32).min) * math.log(2)
"""A bias below this (-2.36e38) hides its key, as -inf does: the GPU kernels' base-2 logits overflow there.
It is also where a running maximum starts: finite, so that `exp(s - m)` is 0, not NaN, for `s` = -inf."""


def forward(
    spec: Spec, config: Config | None, q: Array, k: Array, v: Array, scale: Array, bias: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Attention and its softmax statistics.

    Args:
      spec: what to compute.
      config: block sizes and precision; None for the tuned ones.
      q: `[B, Sq, H, D]`.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      scale: `[]`, at least 0.
      bias: None or `[1|B, 1|H, 1|Sq, 1|Sk]`; below `HIDDEN` it hides its key.

    Returns:
      o `[B, Sq, H, Dv]` in q's dtype; then, `[B, H, Sq]` each, lse, a row's maximum m, and l, its sum of
      `exp(s - m)`. A row that sees nothing has o = 0 and lse = -inf.
    """
    t, dtype = _Tiling(spec, config, q, k, whole_rows=True), q.dtype
    q, k, v = t.rows(q.astype(t.dtype) * scale.astype(t.dtype)), t.rows(k), t.rows(v)

    def query_block(i, out):
        start_m = t.start_m(i)
        q_tile = t.query_tile(q, start_m)

        def key_block(masked, j, carry):
            start_n = t.start_n(j)
            s = t.scores(q_tile, t.key_tile(k, start_n), bias, start_m, j, masked)
            m_new = s.max(-1)
            if carry is not None or bias is not None:
                m_new = jnp.maximum(m_new, HIDDEN if carry is None else carry[0])
            p = jnp.exp(s - m_new[..., None])
            l_tile, acc_tile = p.sum(-1), t.dot(p, t.key_tile(v, start_n), 3, 2)
            if carry is None:
                return m_new, l_tile, acc_tile
            m, l, acc = carry
            alpha = jnp.exp(m - m_new)
            return m_new, l * alpha + l_tile, acc * alpha[..., None] + acc_tile

        full, end = t.key_span(start_m)
        if t.blocks_k == 1:
            m, l, acc = key_block(spec.causal, 0, None)
        else:
            m = jnp.full(q_tile.shape[:3], HIDDEN, t.dtype)
            carry = (m, jnp.zeros_like(m), jnp.zeros((*m.shape, spec.v_dim), t.dtype))
            carry = _loop(0, full, functools.partial(key_block, False), carry)
            m, l, acc = _loop(full, end, functools.partial(key_block, True), carry)
        acc /= jnp.where(l > 0, l, 1)[..., None]
        return tuple(_put(x, y, start_m * spec.group, 2) for x, y in zip(out, (acc, m, l), strict=True))

    m = jnp.zeros(q.shape[:3], t.dtype)
    o, m, l = _loop(0, t.blocks_q, query_block, (jnp.zeros((*m.shape, spec.v_dim), t.dtype), m, m))
    m, l = t.stats_out(m), t.stats_out(l)
    lse = jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1)), -jnp.inf)
    return t.rows_out(o, t.seqlen_q).astype(dtype), lse, m, l


def backward(
    spec: Spec,
    config: Config | None,
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    bias: Array | None,
    o: Array,
    m: Array,
    l: Array,
    do: Array,
    dlse: Array | None,
    *,
    bias_grad: bool,
    scale_grad: bool,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients, from the output and the statistics that `forward` returned.

    Args:
      spec: as in `forward`, and so are config, q, k, v, scale and bias.
      o: `[B, Sq, H, Dv]`, with m and l `[B, H, Sq]`, from `forward`.
      do: `[B, Sq, H, Dv]`, the gradient of o.
      dlse: None or `[B, H, Sq]`, the gradient of lse.
      bias_grad: whether to return the bias's gradient.
      scale_grad: whether to return the scale's gradient.

    Returns:
      dq, dk, dv and dbias, each of the shape and dtype of what it is the gradient of, and dscale `[B]`, the
      share of each batch. dbias and dscale are None unless asked for.
    """
    t = _Tiling(spec, config, q, k, whole_rows=False)
    args, scale_of = (q, k, v), scale.astype(t.dtype)
    # p is exp(s - m) / l. The division moves from the tiles of p to the rows of do and delta.
    l_inv = jnp.where(l > 0, 1 / jnp.where(l > 0, l, 1), 0)
    do = t.rows(do.astype(t.dtype) * l_inv.swapaxes(1, 2)[..., None])
    delta = jnp.sum(t.rows(o) * do, -1)
    if dlse is not None:
        delta -= t.stats(jnp.where(l > 0, dlse.astype(t.dtype) * l_inv, 0))
    m = t.stats(m)
    q, k, v = t.rows(q.astype(t.dtype) * scale_of), t.rows(k), t.rows(v)

    def query_block(i, carry):
        dq, dkt, dvt, dbias = carry
        start_m = t.start_m(i)
        q_tile, do_tile, m_tile, delta_tile = (t.query_tile(x, start_m) for x in (q, do, m, delta))
        m_tile = t.hide_repeated_rows(m_tile, i)
        qt_tile, dot_tile = q_tile.swapaxes(2, 3), do_tile.swapaxes(2, 3)

        def key_block(masked, j, carry):
            dq_tile, dkt, dvt, dbias = carry
            start_n = t.start_n(j)
            k_tile = t.key_tile(k, start_n)
            s = t.scores(q_tile, k_tile, bias, start_m, j, masked)
            p = jnp.exp(s - m_tile[..., None])
            ds = p * (t.dot(do_tile, t.key_tile(v, start_n), 3, 3) - delta_tile[..., None])
            dq_tile += t.dot(ds, k_tile, 3, 2)
            dkt = _add(dkt, t.dot(qt_tile, ds, 3, 2), start_n, 3)
            dvt = _add(dvt, t.dot(dot_tile, p, 3, 2), start_n, 3)
            if dbias is not None:
                dbias = t.add_bias(dbias, ds, start_m, start_n)
            return dq_tile, dkt, dvt, dbias

        full, end = t.key_span(start_m)
        carry = (jnp.zeros_like(q_tile), dkt, dvt, dbias)
        carry = _loop(0, full, functools.partial(key_block, False), carry)
        dq_tile, dkt, dvt, dbias = _loop(full, end, functools.partial(key_block, True), carry)
        return _add(dq, dq_tile, start_m * spec.group, 2), dkt, dvt, dbias

    dbias = None
    if (
        bias_grad and bias is not None
    ):  # one with rows and columns gets each element once, and needs no wider accumulator
        dbias = jnp.zeros(bias.shape, t.dtype if 1 in bias.shape[2:] else bias.dtype)
    carry = (jnp.zeros_like(q), *(jnp.zeros_like(x).swapaxes(2, 3) for x in (k, v)), dbias)
    dq, dkt, dvt, dbias = _loop(0, t.blocks_q, query_block, carry)
    dq = t.rows_out(dq, t.seqlen_q)
    dscale = None
    if scale_grad:  # the sum of ds * (q k), as a product of vectors, whose sum is more exact than a reduction's
        dscale = jnp.einsum("bn,bn->b", *(x.astype(t.dtype).reshape(x.shape[0], -1) for x in (dq, args[0])))
        dscale = dscale.astype(scale.dtype)
    dbias = None if dbias is None or bias is None else dbias.astype(bias.dtype)
    grads = (dq * scale_of, *(t.rows_out(x.swapaxes(2, 3), t.seqlen_k) for x in (dkt, dvt)))
    return *(g.astype(x.dtype) for g, x in zip(grads, args, strict=True)), dbias, dscale


class _Tiling:
    """How one call is cut into tiles. Starts and spans are Python ints where the block number is one."""

    def __init__(self, spec, config, q, k, whole_rows):
        self.spec, self.config = spec, config
        self.dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        self.seqlen_q, self.seqlen_k = q.shape[1], k.shape[1]
        block_m, block_n = _choose_blocks(
            self.seqlen_q, self.seqlen_k, q.shape[0] * spec.heads, whole_rows and not spec.causal
        )
        self.block_m = min((config and config.block_m) or block_m, self.seqlen_q)
        self.block_n = min((config and config.block_n) or block_n, self.seqlen_k)
        self.blocks_q, self.blocks_k = -(-self.seqlen_q // self.block_m), -(-self.seqlen_k // self.block_n)

    def start_m(self, i):
        """First row of query block i."""
        return _min(i * self.block_m, self.seqlen_q - self.block_m)

    def start_n(self, j):
        """First row of key block j."""
        return _min(j * self.block_n, self.seqlen_k - self.block_n)

    def key_span(self, start_m):
        """Key blocks [0, full) are seen whole by the query block, [full, end) through the mask."""
        full, end = self.seqlen_k // self.block_n, self.blocks_k
        if not self.spec.causal:
            return full, end
        last = start_m + self.block_m - 1
        return _min((start_m + 1) // self.block_n, full), _min(last // self.block_n + 1, end)

    def visible(self, start_m, j):
        """[M * G, N]: what the tile's rows see of its keys, less those that key block j - 1 held."""
        cols = self.start_n(j) + jnp.arange(self.block_n)[None, :]
        visible = cols >= j * self.block_n
        if self.spec.causal:
            rows = jnp.arange(self.block_m * self.spec.group)[:, None] // self.spec.group
            visible &= start_m + rows >= cols
        return visible

    def scores(self, q_tile, k_tile, bias, start_m, j, masked):
        """Logits of one tile [B, Hkv, M * G, N]; -inf where the mask hides them."""
        s = self.dot(q_tile, k_tile, 3, 3)
        if bias is not None:
            s += self.bias_tile(bias, start_m, self.start_n(j))
        if masked:
            s += jnp.where(self.visible(start_m, j), 0, -jnp.inf).astype(self.dtype)
        return s

    def hide_repeated_rows(self, m_tile, i):
        """Give rows that query block i - 1 held an infinite maximum: their p is 0."""
        if self.seqlen_q % self.block_m == 0:
            return m_tile
        rows = self.start_m(i) + jnp.arange(m_tile.shape[-1]) // self.spec.group
        return jnp.where(rows < i * self.block_m, jnp.inf, m_tile)

    def query_tile(self, x, start_m):
        """[B, Hkv, Sq * G, ...] -> [B, Hkv, M * G, ...]."""
        group = self.spec.group
        return lax.dynamic_slice_in_dim(x, start_m * group, self.block_m * group, 2)

    def key_tile(self, x, start_n):
        """[B, Hkv, Sk, ...] -> [B, Hkv, N, ...]."""
        return lax.dynamic_slice_in_dim(x, start_n, self.block_n, 2)

    def bias_tile(self, bias, start_m, start_n):
        """[1|B, 1|H, 1|Sq, 1|Sk] -> [1|B, 1|Hkv, 1|M * G, 1|N]."""
        if bias.shape[2] > 1:
            bias = lax.dynamic_slice_in_dim(bias, start_m, self.block_m, 2)
        if bias.shape[3] > 1:
            bias = lax.dynamic_slice_in_dim(bias, start_n, self.block_n, 3)
        b, h, m, n = bias.shape
        bias = bias.astype(self.dtype)
        bias = jnp.where(bias < HIDDEN, -jnp.inf, bias)
        group = self.spec.group
        if group == 1 or (h == 1 and m == 1):
            return bias
        bias = bias.reshape(b, -1, group if h > 1 else 1, m, n).swapaxes(2, 3)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], self.block_m, group, n))
        return bias.reshape(b, -1, self.block_m * group, n)

    def add_bias(self, dbias, ds, start_m, start_n):
        """Add the tile ds [B, Hkv, M * G, N], summed over the axes that the bias lacks."""
        b, n, _, keys = ds.shape
        ds = ds.reshape(b, n, self.block_m, -1, keys).swapaxes(2, 3).reshape(b, -1, self.block_m, keys)
        ds = ds.sum([a for a in range(4) if dbias.shape[a] == 1], keepdims=True).astype(dbias.dtype)
        start = (0, 0, start_m if dbias.shape[2] > 1 else 0, start_n if dbias.shape[3] > 1 else 0)
        return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, start, ds.shape) + ds, start)

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

    def dot(self, x, y, x_axis, y_axis):
        """Batches and heads of x times those of y, contracted along one axis of each."""
        tf32 = self.config is not None and self.config.precision == "tf32"
        precision = lax.Precision.DEFAULT if tf32 else lax.Precision.HIGHEST
        return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((0, 1), (0, 1))), precision=precision)


def _choose_blocks(seqlen_q, seqlen_k, batch_heads, whole_rows):
    """Block sizes that were fast on CPUs with 1 MiB of L2 per core and 32 MiB of L3.

    One tile where it is small: with no running statistics XLA fuses the softmax into the matrix product, and
    one jit of both passes computes p once. Then whole rows of keys, for the same fusion, in a forward that
    has no causal tiles to skip. Else squares with about 2**19 scores over all batches and heads.
    """
    if batch_heads * seqlen_q * seqlen_k <= 2**21:
        return seqlen_q, seqlen_k
    side = min(max(_power_of_two(1.5 * math.sqrt(2**19 / batch_heads)), 128), 512)
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
