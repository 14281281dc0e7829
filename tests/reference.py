"""Attention as it is defined. Everything else is measured against this."""

import jax
import jax.numpy as jnp


def attention(q, k, v, bias=None, scale=None, *, causal=False, compute=jnp.float64, round_p=None):
    """o `[*batch, Sq, H, Dv]` and lse `[*batch, H, Sq]`, with the whole `[Sq, Sk]` matrix of logits in `compute`.

    `round_p`: the dtype in which p is multiplied by v; by default `compute` too.
    """
    group = q.shape[-2] // k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.astype(compute) for x in (q, k, v))
    k, v = (jnp.repeat(x, group, -2) for x in (k, v))
    s = jnp.einsum("...qhd,...khd->...hqk", q, k, precision="highest") * jnp.asarray(scale, compute)
    s = s if bias is None else s + bias.astype(compute)
    if causal:
        s = jnp.where(jnp.arange(s.shape[-2])[:, None] >= jnp.arange(s.shape[-1]), s, -jnp.inf)
    m = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=-jnp.inf))
    m = jnp.where(m == -jnp.inf, 0, m)
    e = jnp.exp(s - m)
    l = e.sum(-1, keepdims=True)
    empty = l == 0  # a row that sees nothing: o = 0, lse = -inf, gradients 0
    l = jnp.where(empty, 1, l)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(l))[..., 0]
    p = e / l
    p, v = (p, v) if round_p is None else (x.astype(round_p).astype(compute) for x in (p, v))
    return jnp.einsum("...hqk,...khd->...qhd", p, v, precision="highest"), lse
