"""What maskers show, as masks of `[1, 1, Sq, Sk]` or keys: bool, so that a merge makes of it what there was before."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base.arguments import accumulator
from .checks import check_size
from .mask import Mask


@dataclasses.dataclass(frozen=True)
class Range:
    """The keys from `start` up to `end` of each row: the last `window` up to its position, or the first `size`."""

    rows: int
    keys: int
    window: int | None = None
    size: int | None = None
    causal: bool = True

    def ends(self, xp: Any) -> tuple[Any, Any]:
        """`start` and `end`, int32 `[Sq]`, clipped to the keys there are; in NumPy or in JAX's."""
        after = xp.arange(self.rows, dtype="int32") + (self.keys - self.rows + 1)  # the position, and one
        end = after if self.size is None else xp.full_like(after, self.size)
        end = xp.clip(xp.minimum(end, after) if self.causal else end, 0, self.keys)
        start = xp.zeros_like(end) if self.window is None else xp.clip(after - self.window, 0, self.keys)
        return start, xp.maximum(start, end)

    @property
    def count(self) -> int:
        """How many keys are shown, over all rows."""
        start, end = self.ends(np)
        return int((end - start).sum(dtype=np.int64))

    def dense(self) -> Mask:
        """By comparing keys, as an array."""
        return Mask.from_dense(_compared(self))

    def triangles(self) -> Mask:
        """As an array, of a window: a triangle less a smaller one."""
        return Mask.from_dense(_band_by_triangles(self))

    def sparse(self) -> Mask:
        """As a list of entries."""
        total = self.count
        check_size("the number of entries", total, "use a dense implementation")
        indices, ptr, ones = _listed(self, total)
        # Not through `from_indices`, which could not know under jit that ptr fits.
        return Mask((1, 1, self.rows, self.keys), "sparse", np.dtype(bool), indices=indices, ptr=ptr, data=ones)


@functools.partial(jax.jit, static_argnums=0)
def _compared(shown: Range) -> Array:
    """The bool array `[1, 1, Sq, Sk]` that is True from start up to end."""
    at = jnp.arange(shown.keys, dtype=jnp.int32)[None]
    start, end = shown.ends(jnp)
    return ((at >= start[:, None]) & (at < end[:, None]))[None, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _listed(shown: Range, total: int) -> tuple[Array, Array, Array]:
    """`indices`, `ptr` and `data` of what is shown. On the device: it may be a lot."""
    start, end = shown.ends(jnp)
    counts = end - start
    ptr = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    row = jnp.repeat(jnp.arange(counts.size, dtype=jnp.int32), counts, total_repeat_length=total)
    return jnp.arange(total, dtype=jnp.int32) + (start - ptr[:-1])[row], ptr, jnp.ones(total, bool)


@functools.partial(jax.jit, static_argnums=0)
def _band_by_triangles(shown: Range) -> Array:
    """The same of a window, scattered."""
    rows, keys, window = shown.rows, shown.keys, shown.window or 0
    band = jnp.zeros((rows, keys), bool)
    for first, value in ((keys - rows - window + 1, True), (keys - rows + 1, False)):
        band = band.at[jnp.triu_indices(rows, first, keys)].set(value)
    return band[None, None]


@functools.partial(jax.jit, static_argnames=("count", "causal"))
def top_keys(q: Array, k: Array, scale: Any, allowed: Array | None, count: int, causal: bool) -> Array:
    """The keys with the `count` largest logits of each row, int32 `[B, H, Sq, count]`; -1 where there are fewer.

    A NaN is largest, so that attention under the mask is NaN too.
    """
    dtype = accumulator(q.dtype)
    batch, rows, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    q = q.astype(dtype).reshape(batch, rows, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", q, k.astype(dtype), precision=lax.Precision.HIGHEST)
    logits = logits.reshape(batch, heads, rows, keys) * jnp.asarray(scale, dtype)
    if causal:
        later = jnp.arange(keys)[None] > jnp.arange(rows)[:, None] + (keys - rows)
        logits = jnp.where(later[None, None], -jnp.inf, logits)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    logits = jnp.where(jnp.isnan(logits), jnp.nan, logits)  # with a sign it would be smaller than all others
    largest, at = lax.top_k(logits, count)
    return jnp.where(largest == -jnp.inf, -1, at)


@functools.partial(jax.jit, static_argnames="keys")
def scatter_keys(top: Array, keys: int) -> Array:
    """The bool array `[B, H, Sq, Sk]` that is True at the keys named, `[B, H, Sq, n]`."""
    flat = jnp.where(top < 0, keys, top).reshape(math.prod(top.shape[:3]), -1)
    shown = jnp.zeros((flat.shape[0], keys), bool)
    shown = shown.at[jnp.arange(flat.shape[0])[:, None], flat].set(True, mode="drop")
    return shown.reshape(*top.shape[:3], keys)
