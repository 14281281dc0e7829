"""What numbers lose when they are rounded, beside them."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

LOST = jnp.bfloat16
"""The dtype of what is lost: it has the range of fp32."""


def split(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x, in fp32, in this dtype, and what it lost: 0 where it became infinite.

    XLA may leave out a conversion and the one that undoes it, and would find that nothing was lost. Hence
    `reduce_precision`, which rounds likewise, but for making 0 of subnormal numbers.
    """
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.minexp > jnp.finfo(x.dtype).minexp:
        step = float(info.smallest_subnormal)
        rounded = jnp.where(abs(x) < float(info.tiny), jnp.round(x / step) * step, rounded)
    lost = x - rounded
    return x.astype(dtype), jnp.where(jnp.isfinite(lost), lost, 0).astype(LOST)


def joined(x: Array, lost: Array | None) -> Array:
    """What was `split`, in fp32; or x, if nothing was lost."""
    return x if lost is None else x.astype(jnp.float32) + lost.astype(jnp.float32)
