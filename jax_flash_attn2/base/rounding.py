"""What numbers lose when they are rounded, beside them; `kernels/rounding.py` has it of numbers that are rounded there.

Of bf16, which is the upper half of fp32, it is the next 8 bits. fp16 has other exponents, and in its subnormal numbers
may lose all: there it is the difference.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def loses(dtype: Any) -> bool:
    """Whether it is kept what numbers of this dtype lose: those of half precision."""
    return np.dtype(dtype).itemsize == 2


def lost_dtype(dtype: Any) -> np.dtype:
    """The dtype of what numbers of this dtype, bf16 or fp16, have lost."""
    return np.dtype(jnp.int8 if np.dtype(dtype) == jnp.bfloat16 else jnp.bfloat16)


def split(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x, in fp32, in this dtype, and what it lost.

    XLA may leave out a conversion and the one that undoes it, on GPUs does, and would take x for what it was rounded
    to. Hence what is converted has been rounded in fp32: nothing changes where that is left out.
    """
    rounded, lost = _rounded(x, dtype), lost_dtype(dtype)
    if lost == jnp.int8:
        difference = jnp.minimum((_bits(x) - _bits(rounded) + 128) >> 8, 127)  # from -128 to 128
    else:
        difference = x - rounded
    return rounded.astype(dtype), difference.astype(lost)


def _rounded(x: Array, dtype: Any) -> Array:
    """The nearest numbers of the dtype, in fp32. (`lax.reduce_precision` makes 0 of subnormal ones.)"""
    if lost_dtype(dtype) == jnp.int8:
        bits = _bits(x)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return lax.bitcast_convert_type(jnp.where(jnp.isnan(x), bits, even), jnp.float32)
    info = jnp.finfo(dtype)
    step = float(info.smallest_subnormal)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    return jnp.where(abs(x) < float(info.tiny), jnp.round(x / step) * step, rounded)


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
