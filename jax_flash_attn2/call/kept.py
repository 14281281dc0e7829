"""The output of a forward pass, as the backward pass is to have it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .. import primitives
from ..primitives.call import Call

CHECKPOINT_NAMES = ("flash_attention_o", "flash_attention_lse")
"""What `jax.checkpoint` must save so that a backward pass does not run attention forward again:
`policy=jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)`."""


def named(o: Array, lse: Array, stats: tuple[Array, ...]) -> tuple[Array, Array, tuple[Array, ...]]:
    """Results by `CHECKPOINT_NAMES`, and what the backward pass reads of rows: stats, or lse if there are none."""
    o_name, lse_name = CHECKPOINT_NAMES
    o, lse = checkpoint_name(o, o_name), checkpoint_name(lse, lse_name)
    return o, lse, tuple(checkpoint_name(x, lse_name) for x in stats) or (lse,)


def unrounded(call: Call) -> Call:
    """What runs forward where there is a backward pass: its o is for `split`, where the rules want it precise."""
    return primitives.wide(call) if call.rules.precise else call


def split(o: Array, dtype: Any) -> tuple[Array, Array | None]:
    """o in this dtype, and what it lost, if so: of a row's do * o all gradients of its logits have the same error,
    which does not average out (arXiv:2510.04212)."""
    if o.dtype == dtype:
        return o, None
    o, rest = _split(o, dtype)
    return o, checkpoint_name(rest, CHECKPOINT_NAMES[0])


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _split(o: Array, dtype: Any) -> tuple[Array, Array]:
    rounded = o.astype(dtype)
    return rounded, (o - rounded.astype(o.dtype)).astype(jnp.bfloat16)


def joined(o: Array, rest: Array | None) -> Array:
    """What was `split`."""
    return o if rest is None else _joined(o, rest)


@functools.partial(jax.jit, inline=True)
def _joined(o: Array, rest: Array) -> Array:
    return o.astype(jnp.float32) + rest.astype(jnp.float32)
