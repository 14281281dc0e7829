"""Products of a few query rows with keys and values as a cache has them, `[B, N, Hkv, D]`.

Before a matrix product XLA:CPU copies such a tile, transposed, which takes longer than to read it. A reduction of
several operands reads it in place: the slice of the cache that it is, and its conversion to fp32, are fused into it, as
they are not into one of a single operand. LLVM makes vectors of what it does if the inner loops are short: so each sum
is taken in parts, `LANES` elements beside each other, and the parts are summed by another kernel (hence the barriers).
What a tile is multiplied by has lanes too, p repeated: of one number LLVM would make no vector.
"""

import functools
import operator
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from . import layout

LANES = 8
"""Numbers side by side in a vector."""
_ROWS = 8
"""As many rows go through a tile at once."""


def products(q: Array, k: Array, dot: Callable[..., Array]) -> Array:
    """q `[B, Hkv, R, D]`, k `[B, N, Hkv, D]` -> `[B, Hkv, R, N]`, by matrix products `dot` if rows are many."""
    (*_, rows, width), (b, n, heads, _) = q.shape, k.shape
    if rows > _ROWS or width % LANES:
        return dot(q, layout.rows(k, heads, q.dtype), 3, 3)
    k = k.astype(q.dtype).reshape(b, n, heads, -1, LANES)
    q = q.reshape(b, 1, heads, rows, -1, LANES)
    if _alone(rows, width):
        halves = (jnp.split(x, 2, -2) for x in (q[:, :, :, 0], k))
        parts = [operator.add(*_sums([x * y for x, y in zip(*halves, strict=True)], 3))]
    else:
        parts = _sums([q[:, :, :, r] * k for r in range(rows)], 3)
    sums = [functools.reduce(operator.add, (x[..., lane] for lane in range(LANES))) for x in parts]
    return jnp.stack(sums, 3).transpose(0, 2, 3, 1)


def weighted(p: Array, v: Array, dot: Callable[..., Array]) -> Array:
    """p `[B, Hkv, R, N]`, v `[B, N, Hkv, Dv]` -> `[B, Hkv, R, Dv]`, likewise."""
    (*_, rows, _), (b, n, heads, width) = p.shape, v.shape
    if rows > _ROWS or width % LANES or n % LANES:
        return dot(p, layout.rows(v, heads, p.dtype), 3, 2)
    v = v.astype(p.dtype).reshape(b, -1, LANES, heads, width // LANES, LANES)
    p = jnp.broadcast_to(p.transpose(0, 3, 1, 2)[..., None], (b, n, heads, rows, LANES))
    p = lax.optimization_barrier(p).reshape(b, -1, LANES, heads, rows, 1, LANES)
    if _alone(rows, width):
        halves = _sums([p[..., 0, :, :] * x for x in jnp.split(v, 2, -2)], 2)
        parts = [jnp.concatenate(halves, -2)]
    else:
        parts = _sums([p[..., r, :, :] * v for r in range(rows)], 2)
    return jnp.stack([x.sum(1).reshape(b, heads, width) for x in parts], 2)


def _alone(rows: int, width: int) -> bool:
    """Whether there would be one operand, which is made two, of half the columns each."""
    return rows == 1 and width % (2 * LANES) == 0


def _sums(operands: list[Array], axis: int) -> tuple[Array, ...]:
    """The sum of each along an axis, in one reduction."""
    zeros = (jnp.zeros((), operands[0].dtype),) * len(operands)
    return lax.optimization_barrier(lax.reduce(tuple(operands), zeros, _add, (axis,)))


def _add(x, y):
    """Named, as a function made anew would be compiled anew outside jit."""
    return tuple(map(operator.add, x, y))
