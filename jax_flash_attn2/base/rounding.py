"""What numbers lose when they are rounded, beside them (`kernels/rounding.py` has the same).

Of bf16, which is the upper half of fp32, it is the next 8 bits. fp16 has other exponents, and in its subnormal numbers
may lose all: there it is the difference.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def lost_dtype(dtype: Any) -> np.dtype:
    """The dtype of what numbers of this dtype, bf16 or fp16, have lost."""
    return np.dtype(jnp.int8 if np.dtype(dtype) == jnp.bfloat16 else jnp.bfloat16)


def split(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x, in fp32, in this dtype, and what it lost.

    XLA may leave out a conversion and the one that undoes it, and would find that nothing was lost. Hence
    `reduce_precision`, which rounds likewise, but for making 0 of subnormal numbers.
    """
    info, lost = jnp.finfo(dtype), lost_dtype(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if lost == jnp.int8:
        bits = (_bits(x) - _bits(rounded) + 128) >> 8  # from -128 to 128
        return x.astype(dtype), jnp.minimum(bits, 127).astype(lost)
    step = float(info.smallest_subnormal)
    rounded = jnp.where(abs(x) < float(info.tiny), jnp.round(x / step) * step, rounded)
    return x.astype(dtype), (x - rounded).astype(lost)


def joined(x: Array, lost: Array | None) -> Array:
    """What was `split`, in fp32; what became infinite stays so. Or x, if nothing was lost."""
    if lost is None:
        return x
    x = x.astype(jnp.float32)
    if lost.dtype == jnp.int8:
        nearer = lax.bitcast_convert_type(_bits(x) + (lost.astype(jnp.int32) << 8), jnp.float32)
    else:
        nearer = x + lost.astype(jnp.float32)
    return jnp.where(jnp.isinf(x), x, nearer)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)
