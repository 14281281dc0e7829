"""Attention within each of many sequences whose tokens lie in one row."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array

from ..base import arguments, axes, names
from ..base.arguments import AnyArray, Implementation, WindowSize
from ..base.config import Config
from ..base.known import is_known
from ..call.api import attend, defaults, returned
from ..call.inputs import prepare
from ..call.options import RowOptions
from ..functions.trace import ScoreFunction
from ..primitives import sharding
from ..tiles.ragged import sequence_of_rows
from . import inputs


@overload
def varlen_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, cu_q_lens: AnyArray, cu_k_lens: AnyArray | None = None, *,
    return_lse: Literal[False] = False, return_max_logits: Literal[False] = False, **options: Unpack[RowOptions],
) -> Array: ...  # fmt: skip
@overload
def varlen_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, cu_q_lens: AnyArray, cu_k_lens: AnyArray | None = None, *,
    return_lse: Literal[True], return_max_logits: Literal[False] = False, **options: Unpack[RowOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def varlen_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, cu_q_lens: AnyArray, cu_k_lens: AnyArray | None = None, *,
    return_lse: Literal[False] = False, return_max_logits: Literal[True], **options: Unpack[RowOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def varlen_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, cu_q_lens: AnyArray, cu_k_lens: AnyArray | None = None, *,
    return_lse: Literal[True], return_max_logits: Literal[True], **options: Unpack[RowOptions],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def varlen_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, cu_q_lens: AnyArray, cu_k_lens: AnyArray | None = None, *,
    return_lse: bool = False, return_max_logits: bool = False, **options: Unpack[RowOptions],
) -> Array | tuple[Array, ...]: ...  # fmt: skip
@names.by_our_names
def varlen_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    cu_q_lens: AnyArray,
    cu_k_lens: AnyArray | None = None,
    *,
    causal: bool = False,
    window_size: WindowSize | None = None,
    logits_soft_cap: float | None = None,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    softmax_scale: float | AnyArray | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: AnyArray | int | None = None,
    score_mod: ScoreFunction | None = None,
    implementation: Implementation | None = None,
    block_ptr: bool | None = None,
    config: Config | Mapping[str, Config] | None = None,
    higher_order: bool = False,
    return_lse: bool = False,
    return_max_logits: bool = False,
) -> Array | tuple[Array, ...]:
    """Attention of sequences of many lengths, all tokens in one row: no padding is computed.

    `flash_attn_varlen_func` of FlashAttention (2.1 and later), with the names of this package: rows `cu_q_lens[b]` to
    `cu_q_lens[b + 1]` of q are sequence b's, and so are keys `cu_k_lens[b]` to `cu_k_lens[b + 1]`. A row sees keys of
    its own sequence only. Where that has other numbers of rows and of keys, the last row is at the last key's position
    (bottom-right), as in `paged_attention`: row i of r, of s keys, has position `s - r + i`. causal, window_size and
    alibi_slopes compare positions within the sequence. Prompts and decoding rows go together in one call.

    It is `flash_attention` of one row with segment ids and positions, so it is differentiable (in q, k, v, sinks,
    alibi_slopes, softmax_scale and what score_mod reads, through o and lse), and works under jit, grad, vmap (over rows
    with their own cu_q_lens), remat, scan and sharding. Results and gradients repeat bit for bit. A tile of logits in
    which no row sees a key is not visited; but the kernels also visit tiles between two that they must, where the keys
    between them have no rows of their own, or lie outside of their rows' windows. What is in padding reaches nothing,
    not even a NaN; of another sequence in the same tile, a NaN or inf does, as `flash_attention` says of segments.

    A mask or bias over all `[T, Tk]` is not taken: score_mod says what pairs of tokens do to each other.

    Args:
      q: `[T, H, D]`; float16, bfloat16, float32, or float64 (XLA path). D as there.
      k: `[Tk, Hkv, D]` in q's dtype; Hkv divides H.
      v: `[Tk, Hkv, Dv]` in q's dtype.
      cu_q_lens: integers `[B + 1]`: where the rows of each sequence begin, from 0, and where the last end, at most T
        (`masks.cu_lens(lengths)`). Sequences may be empty. Rows behind the last are padding: o = 0, lse = -inf, no
        gradient.
      cu_k_lens: integers `[B + 1]`: the same of keys; cu_q_lens if left out, and then Tk = T. Keys behind the last are
        padding, which nobody sees.
      causal: a row sees keys up to its position.
      window_size: (left, right) or an integer for both: a row sees keys that far from its position, and not its own
        counted; None: no bound.
      logits_soft_cap: c > 0: scaled products become c * tanh(x / c).
      sinks: floating `[H]`: a logit in the softmax denominator of each row (and in lse) that adds nothing to o.
      alibi_slopes: floating `[H]`: logits get -slope * distance.
      softmax_scale: a number or a 0-d array; D**-0.5 by default.
      dropout_rate: at least 0, below 1 (static under jit).
      dropout_seed: as in `flash_attention`; masks are drawn by row and key of the one row.
      score_mod: as in `flash_attention`. b is 0, i and j are the numbers of row and key in the one row: arrays of
        `masks.segment_ids` and `masks.positions` that it closes over say which sequence and place that is.
      implementation: as in `flash_attention`, and so are block_ptr, config and higher_order.
      block_ptr: how the kernels reach memory.
      config: a `Config`, or one for each pass.
      higher_order: run a path that differentiates in forward mode and to any order.
      return_lse: also return the logarithm of the softmax denominators.
      return_max_logits: also return the largest logit of each head, over all sequences.

    Returns:
      o `[T, H, Dv]` in q's dtype, or (o, lse), (o, max_logits), (o, lse, max_logits), as asked for. lse `[H, T]` and
      max_logits `[H]` in float32 (float64 for float64). A row that sees no key has o = 0 and lse = -inf (the sink, if
      any). Under jit nobody can look at numbers: where cu_q_lens or cu_k_lens fall, do not begin at 0, or end past the
      row, all results are NaN.

    Raises:
      TypeError, ValueError: an argument does not fit, cu_q_lens and cu_k_lens that are known included.

    Examples:
      >>> q = k = v = jnp.ones((16, 2, 8))  # sequences of 5 and 9 tokens, and 2 of padding
      >>> varlen_attention(q, k, v, jnp.array([0, 5, 14]), causal=True)[:, 0, 0]
      Array([1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 0., 0.], dtype=float32)
    """
    arguments.booleans(return_lse=return_lse, return_max_logits=return_max_logits)
    arrays = {
        **{"q": q, "k": k, "v": v, "cu_q_lens": cu_q_lens, "cu_k_lens": cu_k_lens, "sinks": sinks},
        **{"alibi_slopes": alibi_slopes, "softmax_scale": softmax_scale, "dropout_seed": dropout_seed},
    }
    options = {
        **{"causal": causal, "window_size": window_size, "logits_soft_cap": logits_soft_cap, "score_mod": score_mod},
        **{"dropout_rate": dropout_rate, "higher_order": higher_order, "implementation": implementation},
        **{"block_ptr": block_ptr, "config": config},
        **{"return_lse": return_lse, "return_max_logits": return_max_logits},
    }
    results = sharding.typed_as_q(_varlen_attention, arrays, options)
    return results[0] if len(results) == 1 else results


def _varlen_attention(arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Array, ...]:
    """Say where the sequences are, and run."""
    arrays = dict(arrays)
    starts_q, starts_k = arrays.pop("cu_q_lens"), arrays.pop("cu_k_lens")
    q, k, v = (arguments.array(name, arrays[name]) for name in "qkv")
    inputs.check_packed(q, k, v, together=starts_k is None)
    starts_q = inputs.starts_of(starts_q)
    starts_k = None if starts_k is None else inputs.starts_of(starts_k, starts_q.shape[0] - 1, "cu_k_lens")
    rows, keys = q.shape[0], k.shape[0]
    inputs.check_starts(starts_q, rows)
    inputs.check_starts(starts_k, keys, "cu_k_lens", "k")
    left, right = arguments.window(options["window_size"], arguments.boolean("causal", options["causal"]))
    where, bad = places(starts_q, starts_k, rows, keys, left, right)

    given: dict[str, Any] = defaults() | {"bias": None} | arrays | where | options
    call, (q, k, v, operands), batch = prepare(**given)
    o, lse, row_max = attend(call, axes.vary_alike((q, k, v, operands)), options["higher_order"])
    if not is_known((starts_q, starts_k)):  # by products, so that gradients are NaN too; exp and max may lose a NaN
        o, lse = (x * jnp.where(bad, jnp.nan, 1).astype(x.dtype) for x in (o, lse))
        row_max = None if row_max is None else jnp.where(bad, jnp.nan, row_max)
    return returned((o, lse, row_max), batch, options["return_lse"])


def places(
    starts_q: Any, starts_k: Any, rows: int, keys: int, left: int | None, right: int | None
) -> tuple[dict[str, Array], Array]:
    """Where sequences are, as options of `flash_attention`; and whether starts do not fit: then each row sees each key.

    Ids are sorted and positions rise along the whole row, of rows and of keys alike, so the least and the largest of a
    tile say of each tile truly whether it shows anything. Positions need only be right within a sequence: each has as
    many as its rows or its keys, whichever are more, and ends at the last of them. What sees nothing, or is not seen,
    is in no segment: it would widen a tile's ids and positions.
    """
    if starts_k is None:
        return _same(starts_q, rows)
    return _apart(starts_q, starts_k, rows, keys, left, right)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _same(starts: Array, rows: int) -> tuple[dict[str, Array], Array]:
    """Rows and keys go together, and an index is a position."""
    bad, whose = inputs.bad_starts(starts, rows), sequence_of_rows(starts, rows)
    ids = jnp.where(whose < starts.shape[0] - 1, whose, -1)
    ends = {name: jnp.where(bad, rows, starts[-1]) for name in ("q_lengths", "kv_lengths")}
    return {"q_segment_ids": jnp.where(bad, 0, ids), **ends}, bad


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _apart(
    starts_q: Array, starts_k: Array, rows: int, keys: int, left: int | None, right: int | None
) -> tuple[dict[str, Array], Array]:
    bad = inputs.bad_starts(starts_q, rows) | inputs.bad_starts(starts_k, keys)
    own_rows, own_keys = jnp.diff(starts_q), jnp.diff(starts_k)
    ends = jnp.cumsum(jnp.maximum(own_rows, own_keys), dtype=jnp.int32)
    made = {}
    for name, starts, count, others, reach in (
        ("q", starts_q, rows, own_keys, right),
        ("kv", starts_k, keys, own_rows, left),
    ):
        whose = sequence_of_rows(starts, count)
        to_end = jnp.append(starts[1:], count)[whose] - jnp.arange(count, dtype=jnp.int32)  # 1 for the last
        partners = jnp.append(others, 0)[whose]
        met = partners > 0 if reach is None else (partners > 0) & (to_end - partners <= reach)
        at = jnp.append(ends, ends[-1:] + count if ends.size else 0)[whose] - to_end
        made[f"{name}_segment_ids"] = jnp.where(bad, 0, jnp.where(met, whose, -1))
        made[f"{name}_positions"] = jnp.where(bad, 0, at)
        made[f"{name}_lengths"] = jnp.where(bad, count, starts[-1])
    return made, bad
