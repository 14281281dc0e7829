"""Keys and values that lie in pages."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..base.operands import SERVED
from ..base.spec import Spec


def forward(
    dense: Callable[..., tuple[Array | None, ...]], spec: Spec, config: Any, q: Array, k: Array, v: Array,
    operands: Mapping[str, Array],
) -> tuple[Array | None, ...]:  # fmt: skip
    """`forward` of a paged cache."""
    own = {name: x for name, x in operands.items() if name not in SERVED}
    table = operands["page_table"][:, 0, 0]
    if "cu_q_lens" in operands:
        starts, row = operands["cu_q_lens"].ravel(), jnp.arange(q.shape[1], dtype=jnp.int32)
        whose = jnp.searchsorted(starts[1:], row, side="right", method="compare_all").astype(jnp.int32)
        there, whose = whose < table.shape[0], jnp.minimum(whose, table.shape[0] - 1)
        table, q = table[whose], q[0][:, None]
        own |= {name: own[name][whose] for name in ("kv_lengths", "offset")}
        own["offset"] += (row - starts[whose])[:, None, None, None]
        own["kv_lengths"] = jnp.where(there[:, None, None, None], own["kv_lengths"], 0)
        own["q_lengths"] = there.astype(jnp.int32)[:, None, None, None]
    k, v = (_gathered(x, table, operands.get(f"{name}_scale"), q.dtype) for name, x in (("k", k), ("v", v)))
    v = v[..., : spec.v_dim]
    spec = Spec.of(dataclasses.replace(spec.rules, latent=None), q, k, v, own)
    o, lse, *rest = dense(spec, config, q, k, v, own)
    if "cu_q_lens" in operands:
        assert o is not None
        assert lse is not None
        o, lse = o[:, 0][None], lse[:, :, 0].T[None]
    return o, lse, *rest


def _gathered(pages: Array, table: Array, scale: Array | None, dtype: Any) -> Array:
    table = jnp.clip(table, 0, pages.shape[0] - 1)
    x = pages[table].astype(dtype)
    if scale is not None:
        scale = jnp.broadcast_to(scale[..., 0], (pages.shape[0], pages.shape[2], 1))[table]
        x = (x.astype(scale.dtype) * scale[:, :, None]).astype(dtype)
    return x.reshape(table.shape[0], -1, *x.shape[3:])
