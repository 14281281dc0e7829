"""Attention over a cache that lies in pages."""

import functools
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from .. import primitives
from ..base import arguments, axes, names, scales
from ..base.arguments import AnyArray, Implementation, WindowSize
from ..base.config import Config
from ..base.spec import Rules
from ..call.inputs import check_descriptors, check_dtype, check_implementation, configs
from ..gpu import target
from ..primitives.call import Call
from . import inputs


class _Options(TypedDict, total=False):
    """Those of `paged_attention`, for type checkers."""

    cu_q_lens: AnyArray | None
    causal: bool
    window_size: WindowSize | None
    logits_soft_cap: float | None
    sinks: AnyArray | None
    alibi_slopes: AnyArray | None
    k_scale: AnyArray | float | None
    v_scale: AnyArray | float | None
    softmax_scale: float | AnyArray | None
    head_dim_v: int | None
    splits: int | None
    implementation: Implementation | None
    block_ptr: bool | None
    config: Config | None


@overload
def paged_attention(
    q: AnyArray, k_pages: AnyArray, v_pages: AnyArray | None, page_table: AnyArray, lengths: AnyArray, *,
    return_lse: Literal[False] = False, **options: Unpack[_Options],
) -> Array: ...  # fmt: skip
@overload
def paged_attention(
    q: AnyArray, k_pages: AnyArray, v_pages: AnyArray | None, page_table: AnyArray, lengths: AnyArray, *,
    return_lse: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def paged_attention(
    q: AnyArray, k_pages: AnyArray, v_pages: AnyArray | None, page_table: AnyArray, lengths: AnyArray, *,
    return_lse: bool = False, **options: Unpack[_Options],
) -> Array | tuple[Array, Array]: ...  # fmt: skip
@names.by_our_names
def paged_attention(
    q: AnyArray,
    k_pages: AnyArray,
    v_pages: AnyArray | None,
    page_table: AnyArray,
    lengths: AnyArray,
    *,
    cu_q_lens: AnyArray | None = None,
    causal: bool = True,
    window_size: WindowSize | None = None,
    logits_soft_cap: float | None = None,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    k_scale: AnyArray | float | None = None,
    v_scale: AnyArray | float | None = None,
    softmax_scale: float | AnyArray | None = None,
    head_dim_v: int | None = None,
    splits: int | None = None,
    implementation: Implementation | None = None,
    block_ptr: bool | None = None,
    config: Config | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of the newest tokens of many sequences over a cache of keys and values that lies in pages.

    PagedAttention (Kwon et al. 2023, arXiv:2309.06180) with keys split over programs (Flash-Decoding, Dao et al. 2023).
    Pages, table and lengths are those of JAX's TPU kernel `ragged_paged_attention` and its GPU kernel
    `paged_attention`, and of vLLM's, with K and V apart: page `page_table[b, n]` has keys `n * page_size` to
    `(n + 1) * page_size` of sequence b. The keys of a sequence are its first `lengths[b]`, the new ones among them
    (`write_pages` puts them there first). Its rows are the last of them: row i of r has position `lengths[b] - r + i`,
    and sees keys up to there. No keys but those are read, nor what a window leaves out: such pages may be anybody's.

    Sequences do not influence each other, bit for bit. Results repeat bit for bit.

    Args:
      q: `[B, Sq, H, D]`: Sq rows of each sequence (1: decoding; a few: speculation; many: a chunk of a prompt).
        `[B, H, D]`: one row. `[T, H, D]` with cu_q_lens. float16, bfloat16, float32, or float64 (XLA path).
      k_pages: `[num_pages, page_size, Hkv, D]`, page_size a power of two from 16 to 256. Any of q's dtypes, int8,
        float8_e4m3fn (GPUs from sm_89 on) or float8_e5m2; it need not be q's. Products are taken in q's dtype.
      v_pages: `[num_pages, page_size, Hkv, Dv]` in the dtype of k_pages. None: the first head_dim_v columns of k_pages
        (multi-head latent attention in its absorbed form, arXiv:2405.04434: D 576, head_dim_v 512, Hkv 1).
      page_table: integers `[B, n]`. Entries behind the last key of a sequence, or left of its window, may be anything.
      lengths: integers `[B]`: keys of each sequence, new ones included; 0: none, then o = 0.
      cu_q_lens: integers `[B + 1]`: rows `cu_q_lens[b]` to `cu_q_lens[b + 1]` of q are sequence b's, of any number
        each: prompts and decoding in one call. Rows behind the last have o = 0.
      causal: a row sees keys up to its position; False: all of the sequence's.
      window_size: (left, right) or an integer for both, as in `flash_attention`.
      logits_soft_cap: c > 0: products become c * tanh(x / c).
      sinks: floating `[H]`: one more logit of each row, which adds nothing to o.
      alibi_slopes: floating `[H]`: logits get -slope * distance.
      k_scale: the dequantization scale: keys are k_pages * k_scale. A number, or floating `[num_pages, Hkv]`.
      v_scale: the same of v_pages (and, without them, of k_pages as values; k_scale by default).
      softmax_scale: a number or a 0-d array; D**-0.5 by default, which in latent attention is not what the model was
        trained with.
      head_dim_v: with v_pages=None.
      splits: programs that share the keys of one tile of rows, on GPUs; None: by a rule from shapes and chip.
      implementation: as in `flash_attention`.
      block_ptr: likewise.
      config: a `Config` of the kernel.
      return_lse: also return the logarithm of the softmax denominators.

    Returns:
      o in q's shape and dtype, but for Dv; and lse `[B, H, Sq]`, `[B, H]` or `[H, T]`, in float32 (float64).
      Under jit nobody can look at numbers: rows of a sequence whose length the table does not hold, or whose rows see a
      page that does not exist, are NaN, never another's data.

    Raises:
      TypeError, ValueError: an argument does not fit, page numbers and lengths that are known included; a derivative is
        asked for.

    Examples:
      >>> k_pages = v_pages = jnp.ones((8, 16, 1, 8))  # 8 pages of 16 tokens
      >>> table, lengths = jnp.array([[3, 0], [5, 7]]), jnp.array([9, 20])  # of two sequences
      >>> paged_attention(jnp.ones((2, 4, 8)), k_pages, v_pages, table, lengths).shape
      (2, 4, 8)
    """
    q = arguments.array("q", q)
    k = inputs.pages_of("k_pages", k_pages)
    v = k if v_pages is None else inputs.pages_of("v_pages", v_pages)
    inputs.check_pages(k, v)
    latent = inputs.latent_width(head_dim_v, k) if v_pages is None else None
    if v_pages is not None and head_dim_v not in (None, v.shape[3]):
        raise ValueError(f"head_dim_v must be that of v_pages, {v.shape[3]}, or None, got {head_dim_v!r}")
    inputs.check_rows(q, ragged=cu_q_lens is not None)
    inputs.check_queries(q, k, v)
    lengths = inputs.lengths_of(lengths, None if cu_q_lens is not None else q.shape[0])
    page_table = inputs.table_of(page_table, lengths.shape[0])
    if cu_q_lens is not None:
        cu_q_lens = inputs.starts_of(cu_q_lens, lengths.shape[0])

    left, right = arguments.window(window_size, arguments.boolean("causal", causal))
    rules = Rules(left, right, scales.soft_cap(logits_soft_cap, q.dtype), latent=latent)
    implementation = check_implementation(implementation)
    check_dtype(implementation, q)
    made = configs(inputs.of_forward(config, splits, implementation), block_ptr, implementation)
    check_descriptors(made, {"k_pages": k, "v_pages": v})
    call = Call(rules, made, implementation, target.named())
    arguments.boolean("return_lse", return_lse)
    k_scale = inputs.page_scale("k_scale", k_scale, k)
    v_scale = k_scale if latent and v_scale is None else inputs.page_scale("v_scale", v_scale, v)

    arrays: dict[str, Any] = {"q": q, "k": k, "v": v, "page_table": page_table, "lengths": lengths}
    arrays |= {"cu_q_lens": cu_q_lens, "k_scale": k_scale, "v_scale": v_scale}
    heads = q.shape[-2]
    if sinks is not None:
        arrays["sinks"] = arguments.per_head("sinks", sinks, (), heads, q.dtype)
    if alibi_slopes is not None:
        arrays["slopes"] = arguments.per_head("alibi_slopes", alibi_slopes, (), heads, q.dtype)
    arrays["scale"] = softmax_scale if isinstance(softmax_scale, Array | np.ndarray) else None
    fixed = None if arrays["scale"] is not None else softmax_scale
    arrays = {name: x for name, x in arrays.items() if x is not None}
    types = lambda _: _types(q, ragged=cu_q_lens is not None)
    results = axes.on_auto_axes(lambda x: _paged(call, fixed, x), arrays, types)
    return results if return_lse else results[0]


def _types(q: Array, ragged: bool) -> tuple[PartitionSpec, PartitionSpec]:
    """How o and lse are divided: as q is."""
    *rows, heads, _ = axes.spec_of(q)
    own = 0 if ragged else 1  # how many axes of lse come before the heads
    return PartitionSpec(*rows, heads, None), PartitionSpec(*rows[:own], heads, *rows[own:])


def _paged(call: Call, fixed_scale: Any, arrays: dict[str, Any]) -> tuple[Array, Array]:
    """o and lse of arguments that fit."""
    q, table, lengths, starts = arrays["q"], arrays["page_table"], arrays["lengths"], arrays.get("cu_q_lens")
    ragged, shape = starts is not None, q.shape
    q = q[None] if ragged else q[:, None] if q.ndim == 3 else q
    pages, rows, left = arrays["k"].shape[:2], q.shape[1], call.rules.left
    inputs.check_values(table, lengths, starts, rows, left, pages)
    bad = inputs.bad_sequences(table, lengths, starts, rows, left, pages)
    scale, q = scales.scale_of(arrays.get("scale", fixed_scale), q)
    lengths = jnp.clip(jnp.asarray(lengths), 0, table.shape[1] * pages[1])
    own_rows = jnp.diff(jnp.asarray(starts)) if ragged else rows
    by_sequence = {"kv_lengths": lengths, "offset": lengths - own_rows}
    operands = {name: x.reshape(-1, 1, 1, 1) for name, x in by_sequence.items()}
    operands |= {"scale": scale, "page_table": jnp.asarray(table)[:, None, None, :]}
    operands |= {"cu_q_lens": jnp.asarray(starts).reshape(1, 1, 1, -1)} if ragged else {}
    operands |= {name: arrays[name] for name in ("k_scale", "v_scale", "sinks", "slopes") if name in arrays}
    q, k, v, operands = axes.vary_alike((q, arrays["k"], arrays["v"], operands))
    o, lse = _attention(call, q, k, v, operands)
    o, lse = inputs.poisoned(o, lse, bad, starts)
    if ragged:
        return o[0], lse[0]
    return o.reshape(*shape[:-1], o.shape[-1]), lse[:, :, 0] if len(shape) == 3 else lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q, k, v, operands) -> tuple[Array, Array]:
    o, lse, *_ = primitives.forward(call, q, k, v, operands)
    return o, lse


def _no_gradient(*_: Any) -> Any:
    raise inputs.no_gradient_error()


_attention.defvjp(_no_gradient, _no_gradient)
