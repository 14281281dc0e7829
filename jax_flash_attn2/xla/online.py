"""The online softmax: tiles of keys one after the other, and what sinks and the end make of it."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from ..base.spec import Spec
from .logits import HIDDEN

State = tuple[Array, Array, Array]
"""m and l `[B, Hkv, R]`, and acc `[B, Hkv, R, Dv]`: of each row the largest logit, the sum of p, and that of p v."""


def step(spec: Spec, s: Array, state: State | None, weigh: Callable[[Array], Array]) -> State:
    """The state after a tile of logits s `[B, Hkv, R, N]`; weigh: of p, what the tile adds to acc."""
    m_new = _largest(s) if spec.hides else s.max(-1)
    if state is not None:
        m_new = jnp.maximum(m_new, state[0])
    p = jnp.exp(s - m_new[..., None])
    l_tile, acc_tile = p.sum(-1), weigh(p)
    if state is None:
        return m_new, l_tile, acc_tile
    m, l, acc = state
    alpha = jnp.exp(m - m_new)
    return m_new, l * alpha + l_tile, acc * alpha[..., None] + acc_tile


def _largest(s: Array) -> Array:
    """The largest logit of each row, or HIDDEN: as where the reduction starts, which XLA fuses with the exponential; it
    forgets where, if there is but one key."""
    least = jnp.asarray(HIDDEN, s.dtype)
    return lax.reduce(s, least, lax.max, (3,)) if s.shape[3] > 1 else jnp.maximum(s[..., 0], least)


def finish(spec: Spec, state: State, sink: Array | None) -> State:
    """The state after the sinks, if any, with o in place of acc."""
    m, l, acc = state
    if sink is not None:
        m, m_seen = jnp.maximum(m, sink), m
        alpha = jnp.exp(m_seen - m)
        l, acc = l * alpha + jnp.exp(sink - m), acc * alpha[..., None]
    return m, l, acc / jnp.where(l == 0, 1, l / spec.keep_scale)[..., None]


def lse(m: Array, l: Array) -> Array:
    """The logarithm of the softmax denominators; -inf where nothing is seen, NaN of NaN."""
    return jnp.where(l == 0, -jnp.inf, m + jnp.log(jnp.where(l == 0, 1, l)))
