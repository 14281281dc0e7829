"""Dense causal masks of a batch of sequences, built in three ways that agree bit for bit.

`make_causal_mask` vmaps an element predicate (`predicates.py`), which is the way that composes; the others are the two
lines everybody writes. Under jit all three compile to the same fused comparison; without jit vmap costs about a
millisecond more. Where a mask is only wanted for attention, `flash_attention(causal=True, window_size=...,
q_segment_ids=...)` needs none.

Padding hides keys: `padding_mask` True or nonzero is a real token, and what is padding is seen by no row. Rows that are
padding themselves keep their causal view of the real keys: what they give is not used, and hiding them too would cost
a NaN in softmaxes that know no empty rows. A row that sees nothing all the same, as before the first real token of a
sequence padded on the left, gives 0 in this package's attention.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments
from . import evaluation, predicates


def make_causal_mask(
    x_or_shape: Any,
    *,
    padding_mask: Array | np.ndarray | None = None,
    segment_ids: Array | np.ndarray | None = None,
    sliding_window: int | tuple[int | None, int | None] | None = None,
) -> Array:
    """Row i sees key j if j <= i, and if all that is asked for besides lets it.

    Args:
      x_or_shape: an array `[B, T, ...]`, of which only the shape is read, or (B, T).
      padding_mask: bool or integers `[B, T]` (or `[1, T]`): keys that are False or 0 are not seen.
      segment_ids: integers `[B, T]` (or `[1, T]`): rows see their own segment; negative is padding, which sees nothing.
      sliding_window: as `flash_attention`'s window_size: row i sees keys j >= i - n, so n + 1 of them, for an integer n
        or a pair whose first is n; None: no bound. (What the pair says of later keys does not matter here.)

    Returns:
      bool `[B, 1, T, T]`, True: seen.

    Raises:
      TypeError, ValueError: an argument does not fit.

    Examples:
      >>> make_causal_mask((1, 4), sliding_window=1)[0, 0].astype(int)
      Array([[1, 0, 0, 0],
             [1, 1, 0, 0],
             [0, 1, 1, 0],
             [0, 0, 1, 1]], dtype=int32)
    """
    batch, length = _shape(x_or_shape)
    seen = predicates.causal()
    if padding_mask is not None:
        seen = seen & predicates.padding(_per_token("padding_mask", padding_mask, batch, length))
    if segment_ids is not None:
        seen = seen & predicates.documents(_per_token("segment_ids", segment_ids, batch, length))
    if sliding_window is not None:
        left, right = arguments.window_pair("sliding_window", sliding_window)
        seen = seen & predicates.sliding_window(left, right)
    return evaluation.everywhere(seen, (batch, 1, length, length))


def causal_mask_tril(x_or_shape: Any, *, padding_mask: Array | np.ndarray | None = None) -> Array:
    """`make_causal_mask` as a lower triangle of ones: bool `[B, 1, T, T]`."""
    return _built(_tril, x_or_shape, padding_mask)


def causal_mask_comparison(x_or_shape: Any, *, padding_mask: Array | np.ndarray | None = None) -> Array:
    """`make_causal_mask` as a comparison of indices: bool `[B, 1, T, T]`."""
    return _built(_comparison, x_or_shape, padding_mask)


def _tril(length: int) -> Array:
    return jnp.tril(jnp.ones((length, length), jnp.bool_))


def _comparison(length: int) -> Array:
    rows = jnp.arange(length, dtype=jnp.int32)
    return rows[:, None] >= rows[None, :]


def _built(build: Callable[[int], Array], x_or_shape: Any, padding_mask: Any) -> Array:
    batch, length = _shape(x_or_shape)
    if padding_mask is not None:
        padding_mask = _per_token("padding_mask", padding_mask, batch, length)
    return _padded(build, batch, length, padding_mask)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _padded(build: Callable[[int], Array], batch: int, length: int, real: Array | None) -> Array:
    """A mask `[T, T]` for all batches, without the keys that are padding: `[B, 1, T, T]`."""
    seen = build(length)[None, None]
    if real is not None:
        seen = seen & real.astype(bool)[:, None, None, :]
    return jnp.broadcast_to(seen, (batch, 1, length, length))


def _shape(x_or_shape: Any) -> tuple[int, int]:
    """B and T."""
    if isinstance(x_or_shape, tuple | list):
        shape = tuple(x_or_shape)
        if len(shape) != 2 or not all(map(arguments.is_integer, shape)):
            raise TypeError(f"x_or_shape as a shape must be two integers (B, T), got {x_or_shape!r}")
        if min(shape) < 0:
            raise ValueError(f"x_or_shape must not be negative, got {x_or_shape!r}")
        return int(shape[0]), int(shape[1])
    if not isinstance(x_or_shape, Array | np.ndarray | jax.ShapeDtypeStruct):
        raise TypeError(f"x_or_shape must be an array [B, T, ...] or a tuple (B, T), got {type(x_or_shape).__name__}")
    if len(x_or_shape.shape) < 2:
        raise ValueError(f"x_or_shape must have at least the axes [B, T], got shape {x_or_shape.shape}; try x[None]")
    return x_or_shape.shape[0], x_or_shape.shape[1]


def _per_token(name: str, x: Any, batch: int, length: int) -> Any:
    """x, an array of integers (or bool, for padding) with a number for each token."""
    check = arguments.flags if name == "padding_mask" else arguments.integer_array
    check(name, x, "[B, T]")
    if x.shape not in ((batch, length), (1, length)):
        raise ValueError(f"{name} must have shape [B, T] = {(batch, length)}, or [1, T], got {x.shape}")
    return x
