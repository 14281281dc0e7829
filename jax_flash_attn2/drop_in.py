"""`jax.nn.dot_product_attention`, argument for argument, computed by `flash_attention`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from .base import arguments, names, scales
from .base.arguments import FAR, INT32, Alignment, AnyArray, Implementation, are_integers, is_integer
from .base.config import Config
from .base.tokens import clipped
from .call.api import flash_attention
from .call.combined import floating, is_structured
from .call.options import AnyMask
from .functions.trace import ScoreFunction

_AnyMask = ArrayLike | AnyMask


class _Options(TypedDict, total=False):
    """Those of `dot_product_attention` that do not decide what it returns, for type checkers."""

    scale: float | AnyArray | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int | None, int | None] | None
    implementation: Implementation | None
    causal_alignment: Alignment
    q_segment_ids: AnyArray | None
    kv_segment_ids: AnyArray | None
    q_positions: AnyArray | None
    kv_positions: AnyArray | None
    score_mod: ScoreFunction | None
    logits_soft_cap: float | None
    sinks: AnyArray | None
    alibi_slopes: AnyArray | None
    dropout_rate: float
    dropout_seed: int | AnyArray | None
    block_ptr: bool | None
    config: Config | Mapping[str, Config] | None
    higher_order: bool


@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: _AnyMask | None = None, *,
    return_residual: Literal[False] = False, return_max_logits: Literal[False] = False, **options: Unpack[_Options],
) -> Array: ...  # fmt: skip
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: _AnyMask | None = None, *,
    return_residual: Literal[True], return_max_logits: Literal[False] = False, **options: Unpack[_Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: _AnyMask | None = None, *,
    return_residual: Literal[False] = False, return_max_logits: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: _AnyMask | None = None, *,
    return_residual: Literal[True], return_max_logits: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None = None, mask: _AnyMask | None = None, *,
    return_residual: bool = False, return_max_logits: bool = False, **options: Unpack[_Options],
) -> Array | tuple[Array, ...]: ...  # fmt: skip
@names.by_our_names
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: _AnyMask | None = None,
    *,
    scale: float | AnyArray | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    causal_alignment: Alignment = "top_left",
    q_segment_ids: AnyArray | None = None,
    kv_segment_ids: AnyArray | None = None,
    q_positions: AnyArray | None = None,
    kv_positions: AnyArray | None = None,
    score_mod: ScoreFunction | None = None,
    logits_soft_cap: float | None = None,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: int | AnyArray | None = None,
    block_ptr: bool | None = None,
    config: Config | Mapping[str, Config] | None = None,
    higher_order: bool = False,
    return_max_logits: bool = False,
) -> Array | tuple[Array, ...]:
    """`jax.nn.dot_product_attention` as flash attention: the same arguments, shapes, errors and numbers.

    From `causal_alignment` on, the arguments are `flash_attention`'s. B batches, T queries, S keys, N query heads, K
    key/value heads, heads H wide.

    It departs from jax.nn in four ways. A row that sees no key gives 0 and a residual of -inf, where jax.nn gives the
    mean of all values and -2.4e38. `implementation` names this package's: there is no "cudnn". Heads are at most 1024
    wide, and dtypes are floating. And jvp, hessian and every derivative beyond the first need `higher_order=True`.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`; float16, bfloat16, float32, or float64 (XLA path).
      key: `[B, S, K, H]` or `[S, K, H]` in query's dtype; K divides N. Each of query, key and value that has less than
        four axes gets leading ones.
      value: key's shape and dtype.
      bias: added to the logits; real numbers that broadcast to `[B, N, T, S]`. A floating one has a gradient, of its
        own shape.
      mask: booleans that broadcast to `[B, N, T, S]`; True: attend. Or whatever else `flash_attention` takes: a
        predicate, a `BlockMask`, a `Mask`.
      scale: a number or a 0-d array, also a traced one; H**-0.5 by default. Differentiable.
      is_causal: row i sees keys j <= i, counted from the first row and key also when T != S.
      query_seq_lengths: int32 `[B]`. Rows from there on are 0.
      key_value_seq_lengths: int32 `[B]`. Keys from there on are not seen.
      local_window_size: w or (left, right): row i sees keys i - left <= j <= i + right; None: no bound. Negative
        numbers count as well; they, and traced ones, are turned into a `[T, S]` mask.
      implementation: None, "triton" or "xla", as in `flash_attention`.
      return_residual: also return the logarithm of the softmax denominators.
      causal_alignment: as in `flash_attention`; is_causal and local_window_size follow it.
      q_segment_ids: `[B, T]`, as in `flash_attention`.
      kv_segment_ids: `[B, S]`, as in `flash_attention`.
      q_positions: `[B, T]`, as in `flash_attention`; not with a window that is a mask, which counts by index.
      kv_positions: `[B, S]`, as in `flash_attention`.
      score_mod: as in `flash_attention`.
      logits_soft_cap: as in `flash_attention`.
      sinks: `[N]`, as in `flash_attention`; they count in the residual.
      alibi_slopes: `[N]` or `[B, N]`, as in `flash_attention`.
      dropout_rate: as in `flash_attention`.
      dropout_seed: as in `flash_attention`.
      block_ptr: as in `flash_attention`.
      config: as in `flash_attention`.
      higher_order: as in `flash_attention`.
      return_max_logits: also return, last, the largest logit of each batch and head, float32 `[B, N]` or `[N]`.

    Returns:
      An array of query's shape and dtype; with return_residual, (it, residual), the residual `[B, T, N]` or `[T, N]`
      in the same dtype, natural logarithm, without a gradient.

    Raises:
      ValueError: shapes, dtypes or the implementation do not fit, in jax.nn's words where it has any.
      TypeError: likewise, for what only `flash_attention` knows.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 32))
      >>> ours = dot_product_attention(x, x, x, is_causal=True)
      >>> bool(jnp.allclose(ours, jax.nn.dot_product_attention(x, x, x, is_causal=True), atol=1e-5))
      True
    """
    if implementation not in (None, "triton", "xla"):
        hint = "; jax.nn.dot_product_attention has it" if implementation == "cudnn" else ""
        raise ValueError(
            f'Unsupported implementation option: {implementation}; it must be "triton", "xla" or None (choose){hint}'
        )
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    shape = query.shape
    q, k, v = (_four_axes(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    added: Any = None if bias is None else _four_axes("bias", jnp.asarray(bias))
    seen: Any = mask if mask is None or is_structured(mask) else _four_axes("mask", jnp.asarray(mask))
    q_lengths, kv_lengths = (None if x is None else jnp.asarray(x) for x in (query_seq_lengths, key_value_seq_lengths))
    for name, x in (("query", q), ("key", k), ("value", v)):
        arguments.array(name, x)
    scale = floating(scale)
    if scale is not None:
        scales.check_scale("scale", scale, q.dtype)
    arguments.booleans(return_residual=return_residual, return_max_logits=return_max_logits)
    _check(q, k, v, None if is_structured(seen) else seen, q_lengths, kv_lengths)

    window = _pair(local_window_size)
    if window is not None and not all(n is None or (isinstance(n, int) and n >= 0) for n in window):
        if q_positions is not None:
            raise ValueError(
                "local_window_size of negative or traced numbers is a mask by index, and cannot go with q_positions; "
                "pass integers of at least 0"
            )
        if is_structured(seen):
            raise ValueError(
                f"local_window_size of negative or traced numbers is a mask by index, and cannot go with a "
                f"{type(mask).__name__}; pass integers of at least 0, or combine predicates"
            )
        within = _window_mask(window, q.shape[1], k.shape[1], causal_alignment)
        window, seen = None, within if seen is None else seen & within
    results = flash_attention(
        q, k, v, floating(added), mask=seen, causal=bool(is_causal), causal_alignment=causal_alignment,
        window_size=window, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, q_positions=q_positions,
        kv_positions=kv_positions, q_lengths=q_lengths, kv_lengths=kv_lengths, score_mod=score_mod,
        logits_soft_cap=logits_soft_cap, sinks=sinks, alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate, dropout_seed=dropout_seed, softmax_scale=scale,
        implementation=implementation, block_ptr=block_ptr, config=config, higher_order=higher_order,
        return_lse=return_residual, return_max_logits=return_max_logits,
    )  # fmt: skip
    if isinstance(results, Array):
        return results.reshape(shape)
    o, *others = results
    if return_residual:
        lse = jax.lax.stop_gradient(others[0]).swapaxes(1, 2)
        others[0] = lse.reshape(shape[:-1]).astype(o.dtype)
    if return_max_logits:
        others[-1] = others[-1].reshape(*shape[:-3], q.shape[2])
    return o.reshape(shape), *others


def _four_axes(name: str, x: Array) -> Array:
    if x.ndim > 4:
        raise ValueError(f"{name} ndim should be 4, but got {x.ndim}")
    return jnp.expand_dims(x, tuple(range(4 - x.ndim)))


def _check(q: Array, k: Array, v: Array, mask: Array | None, q_lengths: Array | None, kv_lengths: Array | None) -> None:
    """Raises what jax.nn raises."""
    batch, _, kv_heads, head_dim = k.shape
    _check_array("value", v, k.shape, k.dtype)
    _check_array("query", q, (batch, -1, -1, head_dim), k.dtype)
    _check_array("mask", mask, (-1,) * 4, jnp.bool_)
    _check_array("query_seq_lengths", q_lengths, (batch,), jnp.int32)
    _check_array("key_value_seq_lengths", kv_lengths, (batch,), jnp.int32)
    if q.shape[2] % kv_heads:
        raise ValueError(
            f"The number of query heads must be a multiple of key/value heads, but got {q.shape[2]} vs {kv_heads}"
        )


def _check_array(name: str, x: Array | None, shape: Sequence[int], dtype: Any) -> None:
    """`shape` has -1 where any length will do."""
    if x is None:
        return
    if x.ndim != len(shape):
        raise ValueError(f"{name} ndim should be {len(shape)}, but got {x.ndim}")
    if x.dtype != dtype:
        raise ValueError(f"{name} dtype should be {jnp.dtype(dtype)}, but got {x.dtype}")
    if any(want not in (-1, n) for want, n in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} shape should be {list(shape)}: but got {x.shape}")


def _pair(window: Any) -> tuple[Any, Any] | None:
    """local_window_size as (left, right), each an int unless it is an array, and none of them beyond `FAR`."""
    if window is None:
        return None
    pair = tuple(window) if isinstance(window, Sequence) or np.ndim(window) else (window, window)
    is_one = lambda n: n is None or is_integer(n) or (are_integers(n) and n.ndim == 0)
    if len(pair) != 2 or not all(map(is_one, pair)):
        raise TypeError(
            f"local_window_size must be an integer, a pair (left, right) of integers or None (no bound), got {window!r}"
        )
    left, right = map(_bounded, pair)
    return left, right


def _bounded(n: Any) -> Any:
    if isinstance(n, int | np.integer):
        return min(max(int(n), -FAR), FAR)
    return n if n is None else jnp.clip(clipped(jnp.asarray(n), INT32.min), -FAR, FAR)


def _window_mask(window: tuple[Any, Any], seqlen_q: int, seqlen_k: int, alignment: Alignment) -> Array:
    """The window as `[1, 1, T, S]` booleans."""
    left, right = window
    shape = (1, 1, seqlen_q, seqlen_k)
    rows, cols = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
    if alignment == "bottom_right":
        rows += seqlen_k - seqlen_q
    seen = jnp.ones(shape, bool)
    seen = seen if left is None else seen & (rows <= cols + left)
    return seen if right is None else seen & (cols <= rows + right)
