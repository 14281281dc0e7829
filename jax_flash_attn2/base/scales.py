"""`softmax_scale` and `logits_soft_cap`: checked, and brought into the form that all else takes."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .arguments import accumulator, as_float, describe, is_array, is_number
from .known import full

_LOG2E = math.log2(math.e)  # by which the kernels multiply a scale and a cap


def soft_cap(cap: Any, dtype: Any) -> float | None:
    """`logits_soft_cap` as a float, or None. dtype: of q."""
    if cap is None:
        return None
    if not is_number(cap):
        raise TypeError(f"logits_soft_cap must be a number (it is static under jit) or None, got {describe(cap)}")
    cap = as_float(cap)
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"logits_soft_cap must be positive and finite, got {cap}; None means that there is none")
    tiny = float(jnp.finfo(accumulator(dtype)).tiny)
    largest = 1 / (tiny * _LOG2E)  # whose inverse is no 0
    if not tiny <= cap <= largest:
        raise ValueError(
            f"logits_soft_cap must be from {tiny:.2g} to {largest:.2g}, as logits are {accumulator(dtype).name}, got "
            f"{cap}; None means that there is none"
        )
    return cap


def scale_of(scale: Any, q: Array) -> tuple[Array, Array]:
    """The softmax scale as a non-negative operand, and q with the scale's sign: kernels count on max(s) * scale."""
    dtype = accumulator(q.dtype)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    check_scale("softmax_scale", scale, q.dtype)
    if is_number(scale):
        return full(abs(float(scale)), dtype, (1, 1, 1, 1)), -q if scale < 0 else q
    return _unsigned(jnp.asarray(scale).astype(dtype).reshape(1, 1, 1, 1), q)


def check_scale(name: str, scale: Any, dtype: Any) -> None:
    """Raises unless it is a softmax scale. name: of the argument that it is; dtype: of q."""
    if is_number(scale):
        _finite(name, scale)
        largest = float(jnp.finfo(accumulator(dtype)).max) / _LOG2E
        if abs(scale) > largest:
            raise ValueError(
                f"{name} must be at most {largest:.2g}, as logits are {accumulator(dtype).name}, got {float(scale)}"
            )
    elif not is_array(scale) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"{name} must be a number or a 0-d floating array, got {describe(scale)}")
    elif scale.shape != ():
        raise ValueError(f"{name} must be a single number, got an array of shape {scale.shape}")


@functools.partial(jax.jit, inline=True)
def _unsigned(scale: Array, q: Array) -> tuple[Array, Array]:
    negative = scale < 0
    return jnp.where(negative, -scale, scale), jnp.where(negative.reshape(()), -q, q)


def static_scale(scale: Any) -> float | None:
    """`softmax_scale` where it is part of a cache's key, so a plain number."""
    if scale is None or is_number(scale):
        return None if scale is None else _finite("softmax_scale", scale)
    raise TypeError(f"softmax_scale must be a number here, got {describe(scale)}; flash_attention takes a traced one")


def _finite(name: str, scale: numbers.Real) -> float:
    if not math.isfinite(as_float(scale)):
        raise ValueError(f"{name} must be finite, got {as_float(scale)}")
    return float(scale)
