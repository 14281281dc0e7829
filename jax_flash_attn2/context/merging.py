"""Attention over parts of the keys, brought together: the associative half of the online softmax (Milakov and
Gimelshein 2018, arXiv:1805.02867)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..base.arguments import accumulator, array
from . import parts


def merge(o1: Array, lse1: Array, o2: Array, lse2: Array) -> tuple[Array, Array]:
    """Attention of the same queries over two sets of keys as that over both: o and lse.

    Exact where one part, or both, saw nothing (o = 0, lse = -inf). Differentiable in all four. Several parts merge in
    any grouping; sinks and dropout's rate belong to the parts (a sink to one of them).

    Args:
      o1: `[*batch, Sq, H, Dv]`, as `flash_attention(..., return_lse=True)` gave it for one set of keys.
      lse1: `[*batch, H, Sq]`, likewise: float32 (float64 for float64), natural logarithm.
      o2: for the other set, of o1's shape and dtype.
      lse2: of lse1's shape and dtype.

    Returns:
      o in o1's dtype, computed in lse1's, and lse.

    Raises:
      TypeError: one of them is no floating array, or lse1 has another dtype.
      ValueError: their shapes or dtypes do not fit.

    Examples:
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
      >>> near = flash_attention(q, k[:, 32:], v[:, 32:], return_lse=True)
      >>> far = flash_attention(q, k[:, :32], v[:, :32], return_lse=True)
      >>> bool(jnp.allclose(merge(*near, *far)[0], flash_attention(q, k, v), atol=1e-5))
      True
    """
    o1, lse1, o2, lse2 = (array(n, x) for n, x in (("o1", o1), ("lse1", lse1), ("o2", o2), ("lse2", lse2)))
    _check(o1, lse1, o2, lse2)
    return _merged(o1, lse1, o2, lse2)


@jax.jit
def _merged(o1: Array, lse1: Array, o2: Array, lse2: Array) -> tuple[Array, Array]:
    unit = jnp.ones((), lse1.dtype)
    of = lambda o, lse: parts.Part(o.astype(lse.dtype), lse, parts.sum_beside(lse), None)
    merged = parts.both(of(o1, lse1), of(o2, lse2), unit)
    return merged.o.astype(o1.dtype), parts.lse_of(merged, unit)


def _check(o1: Any, lse1: Any, o2: Any, lse2: Any) -> None:
    for name, x, like, of in (("o2", o2, o1, "o1"), ("lse2", lse2, lse1, "lse1")):
        if x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(
                f"{name} must have {of}'s shape and dtype, {like.shape} {like.dtype}, got {x.shape} {x.dtype}"
            )
    dtype = accumulator(o1.dtype)
    if lse1.dtype != dtype:
        raise TypeError(f"lse1 must be {dtype} beside o1 in {o1.dtype}, got {lse1.dtype}; cast it")
    wanted = (*o1.shape[:-3], o1.shape[-2], o1.shape[-3]) if o1.ndim >= 3 else None
    if lse1.shape != wanted:
        raise ValueError(
            f"lse1 must be [*batch, H, Sq] for o1 [*batch, Sq, H, Dv] {o1.shape}, that is {wanted}, got {lse1.shape}"
        )
