"""The forward pass: an online softmax over the key blocks that each block of query rows meets."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base.config import Config
from ..base.spec import Spec
from . import layout, paged
from .logits import HIDDEN, Logits
from .tiling import Tiling, loop


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def forward(
    spec: Spec, config: Config | None, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> tuple[Array | None, ...]:
    """Attention and its softmax statistics.

    Args:
      spec: what to compute.
      config: block sizes and precision; None for the tuned ones.
      q: `[B, Sq, H, D]`.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      operands: those of `base.operands.OPERANDS` that the call has. A bias below `HIDDEN` hides its key.

    Returns:
      o `[B, Sq, H, Dv]` in q's dtype; then, `[B, H, Sq]` each, lse; where that is not enough for the backward pass
      (`spec.reshapes`), a row's maximum m, its sink included, and l, its sum of `exp(s - m)`; and, if the rules want
      it, the row's largest logit, without the sink. A row that sees nothing has o = 0, lse = -inf and a largest logit
      of -inf.
    """
    if spec.page_size:
        return paged.forward(forward, spec, config, q, k, v, operands)
    t, dtype = Tiling(spec, config, q, k, operands, whole_rows=True), q.dtype
    logits = Logits(t, operands)
    q, k, v = logits.clear("q", q), logits.clear("kv", k), logits.clear("kv", v)
    q, k, v = t.rows(q.astype(t.dtype) * logits.per_batch("scale").astype(t.dtype)), t.rows(k), t.rows(v)

    def query_block(i, out):
        start_m = t.start_m(i)
        q_tile = t.query_tile(q, start_m)

        def key_block(masked, j, carry):
            start_n = t.start_n(j)
            s, *_ = logits.of(q_tile, t.key_tile(k, start_n), start_m, j, masked)
            # From HIDDEN on, and not the larger of both, which XLA would not fuse with the exponential.
            m_new = lax.reduce(s, jnp.asarray(HIDDEN, s.dtype), lax.max, (3,)) if spec.hides else s.max(-1)
            if carry is not None:
                m_new = jnp.maximum(m_new, carry[0])
            p = jnp.exp(s - m_new[..., None])
            l_tile = p.sum(-1)
            if spec.drops:
                p = jnp.where(logits.kept(start_m, start_n), p, 0)
            acc_tile = t.dot(p, t.key_tile(v, start_n), 3, 2)
            if carry is None:
                return m_new, l_tile, acc_tile
            m, l, acc = carry
            alpha = jnp.exp(m - m_new)
            return m_new, l * alpha + l_tile, acc * alpha[..., None] + acc_tile

        if t.blocks_k == 1:
            m, l, acc = key_block(t.masked, 0, None)
        else:
            acc, m, l = (t.new_rows(x, fill, i) for x, fill in zip(out, (0, HIDDEN, 0), strict=False))
            m, l, acc = t.over_keys(i, key_block, (m, l, acc))
        row_max = [jnp.where(m > HIDDEN, m, -jnp.inf)] if spec.rules.max_logits else []
        if spec.sinks:
            sink = logits.sinks(start_m)
            m, m_seen = jnp.maximum(m, sink), m
            alpha = jnp.exp(m_seen - m)
            l, acc = l * alpha + jnp.exp(sink - m), acc * alpha[..., None]
        acc /= jnp.where(l > 0, l / spec.keep_scale, 1)[..., None]
        done = (t.put_rows(x, y, i) for x, y in zip(out, (acc, m, l, *row_max), strict=True))
        return tuple(done)

    m = jnp.full(q.shape[:3], HIDDEN if t.blocks_k > 1 else 0, t.dtype)
    out = (jnp.zeros((*m.shape, spec.v_dim), t.dtype), m, jnp.zeros_like(m), *([m] if spec.rules.max_logits else []))
    o, *stats = loop(0, t.blocks_q, query_block, out)
    m, l, *row_max = (layout.stats_out(x, t.seqlen_q) for x in stats)
    lse = jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1)), -jnp.inf)
    stats = (m, l) if spec.reshapes else (None, None)
    return layout.rows_out(o, t.seqlen_q).astype(spec.rules.result(dtype)), lse, *stats, row_max[0] if row_max else None
