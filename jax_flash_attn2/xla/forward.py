"""The forward pass: an online softmax over the key blocks that each block of query rows meets."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from ..base.config import Config
from ..base.rounding import split
from ..base.spec import Spec
from . import by_head, cached, layout, online, paged
from .logits import HIDDEN, Logits
from .tiling import Tiling, loop


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def forward(
    spec: Spec, config: Config, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> tuple[Array | None, ...]:
    """Attention and its softmax statistics.

    Args:
      spec: what to compute.
      config: block sizes, chosen here where they are None, and precision.
      q: `[B, Sq, H, D]`.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      operands: those of `base.operands.OPERANDS` that the call has. A bias below `HIDDEN` hides its key.

    Returns:
      A tuple of six: o, lse, m or None, l or None, largest logit or None, what o lost by rounding or None. o is
      `[B, Sq, H, Dv]` in q's dtype, and so is what it lost, in its own; the others are `[B, H, Sq]`. m and l are there
      where lse is not enough for the backward pass (`spec.alters_logits`): a row's maximum, its sink included, and its
      sum of `exp(s - m)`. The row's largest logit, without the sink, and what o lost are there if the rules want them.
      A row that sees nothing has o = 0, lse = -inf, a largest logit of -inf, l = 0 and some m that is finite.
    """
    if spec.page_size:
        return paged.forward(spec, config, q, k, v, operands)
    if by_head.pays(spec, q, operands):
        return by_head.forward(forward, spec, config, q, k, v, operands)
    t, dtype = Tiling(spec, config, q, k, operands, whole_rows=True), q.dtype
    logits = Logits(t, operands)
    q = t.rows(logits.clear("q", q).astype(t.dtype) * logits.per_batch("scale").astype(t.dtype))
    if not t.in_place:
        k, v = (t.rows(logits.clear("kv", x)) for x in (k, v))

    def products(q_tile, j):
        start_n = t.start_n(j)
        if t.in_place:
            return cached.products(q_tile, layout.take(k, start_n, t.block_n, 1), t.dot)
        return t.dot(q_tile, t.key_tile(k, start_n), 3, 3)

    def weighted(p, j, masked):
        start_n = t.start_n(j)
        if not t.in_place:
            return t.dot(p, t.key_tile(v, start_n), 3, 2)
        tile = layout.take(v, start_n, t.block_n, 1)
        return cached.weighted(p, logits.clear("kv", tile, start_n) if masked else tile, t.dot)

    def query_block(i, out):
        start_m = t.start_m(i)
        q_tile = t.query_tile(q, start_m)

        def key_block(masked, j, carry):
            s, _ = logits.of(products(q_tile, j), start_m, j, masked)

            def weigh(p):
                p = jnp.where(logits.kept(start_m, t.start_n(j)), p, 0) if spec.drops else p
                return weighted(p, j, masked)

            return online.step(spec, s, carry, weigh)

        if t.blocks_k == 1:
            m, l, acc = key_block(t.masked, 0, None)
        else:
            acc, m, l = (t.new_rows(x, fill, i) for x, fill in zip(out, (0, HIDDEN, 0), strict=False))
            m, l, acc = t.over_keys(i, key_block, (m, l, acc))
        row_max = [jnp.where(m <= HIDDEN, -jnp.inf, m)] if spec.rules.max_logits else []
        m, l, acc = online.finish(spec, (m, l, acc), logits.sinks(start_m) if spec.sinks else None)
        done = (t.put_rows(x, y, i) for x, y in zip(out, (acc, m, l, *row_max), strict=True))
        return tuple(done)

    m = jnp.full(q.shape[:3], HIDDEN if t.blocks_k > 1 else 0, t.dtype)
    out = (jnp.zeros((*m.shape, spec.v_dim), t.dtype), m, jnp.zeros_like(m), *([m] if spec.rules.max_logits else []))
    o, *stats = loop(0, t.blocks_q, query_block, out)
    m, l, *row_max = (layout.stats_out(x, t.seqlen_q) for x in stats)
    o, lost = layout.rows_out(o, t.seqlen_q), None
    if spec.rules.gives_lost:
        o, lost = split(o, dtype)
    o, stats = o.astype(spec.rules.result(dtype)), (m, l) if spec.alters_logits else (None, None)
    return o, online.lse(m, l), *stats, row_max[0] if row_max else None, lost
