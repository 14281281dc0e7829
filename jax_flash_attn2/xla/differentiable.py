"""The path that JAX differentiates by itself: forward mode, and derivatives of any order."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base.config import Config
from ..base.operands import BLOCK_LISTS, is_read
from ..base.spec import Spec
from . import layout, online
from .logits import HIDDEN, Logits
from .tiling import Tiling

_SCORES = 2**21
"""How many logits there are at a time."""
_HALF = ("float16", "bfloat16")
"""Of operands: their gradients, to which each block of rows adds, are summed in fp32."""


def whole_rows(spec: Spec, config: Config, q: Any, k: Any, operands: Mapping[str, Any]) -> Tiling:
    """How `differentiable` cuts a call: some rows at a time, with all keys."""
    rows_at_once = max(_SCORES // (q.shape[0] * spec.heads * k.shape[1]), 16)
    config = dataclasses.replace(config, block_m=config.block_m or rows_at_once, block_n=k.shape[1])
    return Tiling(spec, config, q, k, operands, whole_rows=True, whole_keys=True)


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def differentiable(
    spec: Spec, config: Config, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> list[Array]:
    """`forward` for JAX to differentiate, as often as wanted: the same results, those that there are.

    Whole rows of logits, some rows at a time, which a backward pass computes again: the memory of the function and of
    its first derivative is linear in the sequence lengths.
    """
    dtype = q.dtype
    operands = {name: x.astype(jnp.float32) if x.dtype.name in _HALF else x for name, x in operands.items()}
    t = whole_rows(spec, config, q, k, operands)
    every = Logits(t, operands)
    q, k, v = every.clear("q", q), every.clear("kv", k), every.clear("kv", v)
    q, k, v = t.rows(q.astype(t.dtype) * every.per_batch("scale").astype(t.dtype)), t.rows(k), t.rows(v)

    @jax.checkpoint
    def query_block(block):
        start_m, q_tile, rows = block
        logits = Logits(t, {**operands, **rows}, natively=True)
        s, _ = logits.of(t.dot(q_tile, k, 3, 3), start_m, 0, t.masked)
        m = jnp.maximum(lax.stop_gradient(s).max(-1), HIDDEN)
        row_max = [jnp.where(m <= HIDDEN, -jnp.inf, m)] if spec.rules.max_logits else []
        sink = logits.sinks(start_m) if spec.sinks else None
        if sink is not None:
            m = jnp.maximum(m, lax.stop_gradient(sink))
        p = jnp.exp(s - m[..., None])
        l = p.sum(-1)
        if spec.drops:
            p = jnp.where(logits.kept(start_m, 0), p, 0)
        acc = t.dot(p, v, 3, 2)
        if sink is not None:
            l += jnp.exp(sink - m)
        o = acc / (jnp.where(l == 0, 1, l) / spec.keep_scale)[..., None]
        return o, online.lse(m, l), *([m, l] if spec.alters_logits else []), *row_max

    own = [name for name in operands if name not in BLOCK_LISTS and not is_read(name)]
    by_rows = [name for name in own if operands[name].shape[2] > 1]
    rows = {name: layout.cut_rows(operands[name], t.block_m) for name in by_rows}
    out = lax.map(query_block, (t.starts(), layout.cut_rows(q, t.block_m * spec.group), rows))
    o, *stats = (layout.join_rows(x, t.seqlen_q * spec.group) for x in out)
    stats = (layout.stats_out(x, t.seqlen_q) for x in stats)
    return [layout.rows_out(o, t.seqlen_q).astype(spec.rules.result(dtype)), *stats]
