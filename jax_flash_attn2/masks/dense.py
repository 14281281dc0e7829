"""Attention with all of its logits in memory: for looking at weights, for small shapes, and as a baseline."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments, known, scales
from . import evaluation, predicates, weighing
from .cache import MaskCache, build_window, causal_mask_cache


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    *,
    causal: bool = False,
    causal_alignment: "arguments.Alignment" = "top_left",
    window_size: "arguments.WindowSize | None" = None,
    mask: Any = None,
    softmax_scale: float | Array | None = None,
    cache: MaskCache | None = causal_mask_cache,
    return_weights: bool = False,
) -> Array | tuple[Array, Array]:
    """`flash_attention`, done plainly: O(Sq * Sk) memory, with a dense causal or window mask that a cache keeps.

    Differentiable by JAX itself, in both modes and to any order. Logits, softmax and sums are in float32 (float64 for
    float64), products of float32 in full precision; weights are rounded to v's dtype where they multiply v.

    Args:
      q: `[*batch, Sq, H, D]`; float16, bfloat16, float32 or float64.
      k: `[*batch, Sk, Hkv, D]` in q's dtype; query head h reads head `h // (H // Hkv)`.
      v: `[*batch, Sk, Hkv, Dv]` in q's dtype.
      bias: added to the logits; broadcasts to `[*batch, H, Sq, Sk]`. -inf hides a key.
      causal, causal_alignment, window_size: as of `flash_attention`.
      mask: booleans that broadcast to `[*batch, H, Sq, Sk]`, True: seen. Or a `Mask` of weights w, whose four axes
        are 1 or full ([B, H, Sq, Sk], B all of batch): logits become logit - log(w), and w = 0 hides a key. Or a
        `BlockMask` of such axes, or a predicate (`predicates.py`).
      softmax_scale: a number or a 0-d array; D**-0.5 by default.
      cache: where the dense mask of causal and window_size is looked up outside jit; None: built anew at each call.
        Under jit indices are compared instead.
      return_weights: also return the softmax.

    Returns:
      o `[*batch, Sq, H, Dv]` in q's dtype, or (o, weights), weights `[*batch, H, Sq, Sk]` in float32 (float64). A row
      that sees no key has o = 0, weights of 0 and gradients of 0.

    Raises:
      TypeError, ValueError: an argument does not fit; the messages are `flash_attention`'s.

    Examples:
      >>> x = jnp.zeros((1, 2, 1, 8))
      >>> o, weights = dense_attention(x, x, x, causal=True, return_weights=True)
      >>> weights[0, 0]
      Array([[1. , 0. ],
             [0.5, 0.5]], dtype=float32)
    """
    if cache is not None and not isinstance(cache, MaskCache):
        raise TypeError(f"cache must be a MaskCache, or None (build the mask each time), got {cache!r}")
    if not isinstance(return_weights, bool):
        raise TypeError(f"return_weights must be True or False, got {return_weights!r}")
    q, k, v = arguments.array("q", q), arguments.array("k", k), arguments.array("v", v)
    arguments.check_shapes(q, k, v)
    batch, (seqlen_q, heads), seqlen_k = q.shape[:-3], q.shape[-3:-1], k.shape[-3]
    size, axes = math.prod(batch), (heads, seqlen_q, seqlen_k)
    window = arguments.window(window_size, arguments.boolean("causal", causal))
    arguments.alignment(causal_alignment)
    scale, q = scales.scale_of(softmax_scale, q)
    bias = None if bias is None else arguments.bias_of(bias, batch, axes)
    if isinstance(mask, Array | np.ndarray):
        mask = arguments.mask_of(mask, batch, axes)
    q, k, v = (x.reshape(size, *x.shape[-3:]) for x in (q, k, v))
    seen, reach = None, None
    if window != (None, None) and known.under_jit():  # where indices are compared: a dense constant is slow to compile
        reach = (*window, seqlen_k - seqlen_q if causal_alignment == "bottom_right" else 0)
    elif window != (None, None):
        build = build_window if cache is None else cache.window
        seen = build(seqlen_q, seqlen_k, window=window, causal_alignment=causal_alignment)
    if mask is not None and not isinstance(mask, Array):
        mask = _of_any(mask, (size, *axes))
    o, p = _attend(q, k, v, bias, scale, mask, seen, reach)
    o = o.reshape(*batch, seqlen_q, heads, v.shape[-1])
    return (o, p.reshape(*batch, *p.shape[1:])) if return_weights else o


@functools.partial(jax.jit, static_argnums=7, inline=True)
@jax.numpy_dtype_promotion("standard")  # whatever the caller's code is held to
def _attend(q, k, v, bias, scale, mask, seen, reach: tuple[int | None, int | None, int] | None) -> tuple[Array, Array]:
    """o and the softmax of `[B, S, H, D]`, under a mask of booleans or weights and a window, seen or as its reach."""
    (size, seqlen_q, heads, _), (_, seqlen_k, kv_heads, _) = q.shape, k.shape
    real = arguments.accumulator(q.dtype)
    grouped = q.reshape(size, seqlen_q, kv_heads, heads // kv_heads, q.shape[-1])
    s = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, precision="highest", preferred_element_type=real)
    s = s.reshape(size, heads, seqlen_q, seqlen_k) * scale
    if bias is not None:
        s = s + bias.astype(real)
    if reach is not None:
        window = predicates.sliding_window(*reach)
        seen = evaluation.everywhere(window, (1, 1, seqlen_q, seqlen_k))
    if seen is not None:
        s = jnp.where(seen, s, -jnp.inf)
    if mask is not None:
        shown = mask.astype(jnp.bool_)
        if mask.dtype != jnp.bool_:
            s = s + weighing.correction_of(mask, s.dtype)
        s = jnp.where(shown, s, -jnp.inf)
    p = _softmax(s)
    o = jnp.einsum(
        "bhgqk,bkhd->bqhgd",
        p.reshape(size, kv_heads, heads // kv_heads, seqlen_q, seqlen_k).astype(v.dtype),
        v,
        precision="highest",
        preferred_element_type=real,
    )
    return o.astype(q.dtype).reshape(size, seqlen_q, heads, v.shape[-1]), p


def _softmax(s: Array) -> Array:
    """Along the last axis; rows of nothing but -inf give 0."""
    m = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(s - jnp.where(m == -jnp.inf, 0, m))
    l = jnp.sum(e, -1, keepdims=True)
    return e / jnp.where(l == 0, 1, l)


def _of_any(mask: Any, shape: tuple[int, int, int, int]) -> Array:
    """Booleans or weights of a mask that is no array: a `Mask`, a `BlockMask`, or a predicate."""
    if hasattr(mask, "to_dense"):
        all_there = getattr(mask, "overflow", None) is None  # else a NaN has to tell, which no bool is
        weights = mask.to_dense() if all_there else mask.to_dense(jnp.float32)
        if weights.ndim != 4 or any(n not in (1, m) for n, m in zip(weights.shape, shape, strict=True)):
            raise ValueError(
                f"mask must have the axes [B, H, Sq, Sk] = {shape} (each 1 or full), got shape {weights.shape}"
            )
        return weights
    if callable(mask):
        predicate = predicates.as_predicate(mask, "mask")
        predicate.check_shape(shape)
        return evaluation.everywhere(predicate, shape)
    raise TypeError(
        f"mask must be an array of booleans, a Mask, a BlockMask or a predicate, got {type(mask).__name__}; numbers "
        f"that mean yes or no are mask != 0"
    )
