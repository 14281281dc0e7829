"""The public functions. Reads as the story of a call: check, run, differentiate."""

import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from .. import primitives, xla
from ..base import arguments, axes, errors, names, scales
from ..base.arguments import Alignment, AnyArray, Implementation, WindowSize
from ..base.config import Config
from ..base.operands import DIFFERENTIABLE, is_score_array
from ..base.spec import Spec
from ..functions.trace import ScoreFunction
from ..primitives import sharding
from ..primitives.call import Call
from . import inputs, kept
from .options import AnyMask, Options

ARRAYS = (
    *("q", "k", "v", "bias", "mask", "sinks", "alibi_slopes", "q_segment_ids", "kv_segment_ids"),
    *("q_positions", "kv_positions", "q_lengths", "kv_lengths", "softmax_scale", "dropout_seed"),
)
"""The arguments of `flash_attention` that may be arrays."""

BY_TOKENS = ("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions")
"""Those of them with one number for each row, or each key."""


@overload
def flash_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *,
    return_lse: Literal[False] = False, return_max_logits: Literal[False] = False, **options: Unpack[Options],
) -> Array: ...  # fmt: skip
@overload
def flash_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *,
    return_lse: Literal[True], return_max_logits: Literal[False] = False, **options: Unpack[Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def flash_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *,
    return_lse: Literal[False] = False, return_max_logits: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def flash_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *,
    return_lse: Literal[True], return_max_logits: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def flash_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *,
    return_lse: bool = False, return_max_logits: bool = False, **options: Unpack[Options],
) -> Array | tuple[Array, ...]: ...  # fmt: skip
@names.by_our_names
def flash_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    bias: AnyArray | None = None,
    *,
    score_mod: ScoreFunction | None = None,
    causal: bool = False,
    causal_alignment: Alignment = "top_left",
    window_size: WindowSize | None = None,
    mask: AnyMask | None = None,
    q_segment_ids: AnyArray | None = None,
    kv_segment_ids: AnyArray | None = None,
    q_positions: AnyArray | None = None,
    kv_positions: AnyArray | None = None,
    q_lengths: AnyArray | int | None = None,
    kv_lengths: AnyArray | int | None = None,
    logits_soft_cap: float | None = None,
    sinks: AnyArray | None = None,
    alibi_slopes: AnyArray | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: AnyArray | int | None = None,
    softmax_scale: float | AnyArray | None = None,
    implementation: Implementation | None = None,
    block_ptr: bool | None = None,
    config: Config | Mapping[str, Config] | None = None,
    higher_order: bool = False,
    return_lse: bool = False,
    return_max_logits: bool = False,
) -> Array | tuple[Array, ...]:
    """softmax(softmax_scale * q kᵀ + bias) v, without holding the `[Sq, Sk]` logits.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691): Triton kernels on GPUs (AMD's are untried), a blockwise XLA path
    everywhere else. Differentiable in q, k, v, bias, sinks, alibi_slopes and softmax_scale, through o and lse. Works
    under jit, grad, vmap, remat, scan, export and sharding. Results and gradients repeat bit for bit.

    Everything below combines with everything else, forward and backward. A row i has position i' = i, or
    i + Sk - Sq with causal_alignment="bottom_right", or what q_positions says. Tiles of keys that no row of a block
    sees are not visited.

    What is hidden has p = 0, which no finite number behind it changes. Of NaN and inf there, on every backend, forward
    and backward:

        hidden by                            in q, k, v        in bias
        q_lengths, kv_lengths                held off          held off
        mask, segments, window, causality    0 * NaN is NaN    held off
        a bias of -inf, a Mask's weight of 0 0 * NaN is NaN    held off

    Args:
      q: `[*batch, Sq, H, D]`; float16, bfloat16, float32, or float64 (XLA path). D from 1 to 1024, beyond
        256 on the XLA path alone. Any number of batch axes, none included.
      k: `[*batch, Sk, Hkv, D]` in q's dtype. Hkv divides H; query head h reads key/value head `h // (H // Hkv)`.
      v: `[*batch, Sk, Hkv, Dv]` in q's dtype. Dv may differ from D.
      bias: added to the logits; a floating array that broadcasts to `[*batch, H, Sq, Sk]`. Its gradient has its own
        shape. -inf hides a key; so does what is beyond fp32 as a base-2 logit, or, in kernels, when it is divided by
        softmax_scale (below -2.3e38, or -3.4e38 * softmax_scale).
      score_mod: a function (score, b, h, i, j) -> score of scalars, in `jax.numpy`: of the scaled product (fp32; fp64
        for fp64), and of the int32 numbers of batch (all batch axes as one), query head, row and key. Logits are made
        in this order: softmax_scale * q kᵀ, score_mod, logits_soft_cap, bias, alibi_slopes, masks. It may close over
        arrays, also traced ones, and index them with b, h, i, j and what it computes of these; floating ones have
        gradients. -inf hides a key. What a mask hides it changes nothing for: not even a NaN arrives (but,
        with higher_order=True, in gradients of functions that read arrays but by elements). The kernels take what
        `explain` can show as Triton source; "xla" takes all that JAX does. Each element of an array that it reads
        adds, where the array's gradient is wanted, one more pass over the tiles; an index that both i and j decide,
        other than by i - j, also a sorted sum on GPUs.
      causal: row i sees keys j <= i'.
      causal_alignment: "top_left" or "bottom_right" (the last row sees the last key): what i' is, for causal,
        window_size, alibi_slopes and dropout.
      window_size: (left, right) or one integer for both: row i sees keys i' - left <= j <= i' + right, left + 1 + right
        of them; None: no bound.
      mask: booleans that broadcast to `[*batch, H, Sq, Sk]`, True: attend. Or, over `[B, H, Sq, Sk]` (B is the product
        of the batch axes; B and H may be 1): a `masks.BlockMask`, whose empty tiles are not visited; a function of
        (b, h, i, j), which is made into one with tiles of 128 and kept (`masks.block_mask_cache`), and evaluated in
        partial tiles where that is cheaper than reading bits; if it holds traced arrays, in every tile instead; a
        `masks.Mask` of weights w in [0, 1], whose logits get -log(w): a key that was kept with probability w stands
        for 1 / w of its kind. On the XLA path a block mask that differs from head to head is met key head by key head;
        query heads that share one, and all batches, meet what any of them sees.
      q_segment_ids: integers of any width, `[*batch, Sq]` (each axis 1 or full): row i sees keys of its own segment
        only. Negative is padding, which sees nothing and is not seen. Sorted ids (packed documents) let whole tiles be
        skipped.
      kv_segment_ids: integers `[*batch, Sk]`; q_segment_ids if left out and Sq == Sk.
      q_positions: integers `[*batch, Sq]` (each axis 1 or full) that fit int32: i', what causal, window_size and
        alibi_slopes compare, in place of the index; with kv_positions. In any order (zigzag, left padding, the ring
        buffer of a window's cache, documents counted each from 0 under segment ids); tiles are skipped by the least and
        the largest of a block. Dropout counts by the index.
      kv_positions: integers `[*batch, Sk]`: j there; with q_positions. One that no row comes to hides its key where
        attention is causal.
      q_lengths: integers `[*batch]`: rows from there on have o = 0 and lse = -inf, whatever they and their bias hold.
      kv_lengths: integers `[*batch]`: keys from there on are not seen, whatever they and their bias hold. Positions do
        not shift.
      logits_soft_cap: c > 0: scaled products become c * tanh(x / c), before the bias (static under jit).
      sinks: floating `[H]`: a logit in the softmax denominator of each row (and in lse) that adds nothing to o.
      alibi_slopes: floating `[H]` or `[*batch, H]`: logits get -slope * |i' - j| (Press et al., arXiv:2108.12409).
      dropout_rate: at least 0, below 1 (static under jit): the probability that a key is dropped from o, the others
        counting 1 / (1 - rate). lse and the largest logits do not see it.
      dropout_seed: an integer, a 0-d integer array or a PRNG key; each batch and head draws its own
        mask from it (Philox4x32-10 by batch, head, i' and j: the same on every backend and for all block sizes). Or
        integers of at least two axes that broadcast to `[*batch, H]`: equal ones draw the same mask.
      softmax_scale: a number or a 0-d array, also a traced one; D**-0.5 by default.
      implementation: None chooses by platform: "triton" on GPUs (but for float64 and heads wider than 256), "xla"
        elsewhere. A name is taken at its word: what cannot run that way raises.
      block_ptr: how the kernels reach memory: True through tensor descriptors ("block-ptr"; TMA on sm_90 and later),
        False through pointers ("ptr-block"), None the tuned choice. No meaning off the GPU.
      config: a `Config` for every kernel, or a mapping from "fwd", "dq", "dkdv", "dbias" to one; what is None, or
        missing, is tuned.
      higher_order: run a path (on XLA, slower) that differentiates natively, in forward mode and to any order.
        Without it there is one derivative, in reverse mode; others raise.
      return_lse: also return the logarithm of the softmax denominators.
      return_max_logits: also return the largest logit of each head, over what is visible, sinks excepted.

    Returns:
      o `[*batch, Sq, H, Dv]` in q's dtype, or (o, lse), (o, max_logits), (o, lse, max_logits), as asked for. lse
      `[*batch, H, Sq]` in float32 (float64 for float64), natural logarithm. max_logits `[*batch, H]`, likewise, has no
      gradient. A row that sees no key has o = 0, lse = -inf (the sink, if any) and gradients of 0.

    Raises:
      TypeError, ValueError: an argument does not fit; the message says which, what was wanted and what came. A config
        too large for the GPU's shared memory, and "triton" where there is no GPU, raise when the call is compiled.
      ImportError: on a GPU without jax-triton and triton installed.

    Examples:
      >>> q, k, v = jnp.ones((2, 128, 8, 64)), jnp.ones((2, 128, 2, 64)), jnp.ones((2, 128, 2, 64))
      >>> flash_attention(q, k, v, causal=True, window_size=(31, 0)).shape
      (2, 128, 8, 64)
      >>> o, lse = flash_attention(q, k, v, kv_lengths=jnp.array([100, 128]), return_lse=True)
      >>> lse.shape, lse.dtype
      ((2, 8, 128), dtype('float32'))
    """
    options = dict(locals())  # first of all: the arguments, and nothing else
    arguments.booleans(return_lse=return_lse, return_max_logits=return_max_logits)
    arrays = {name: options.pop(name) for name in ARRAYS}
    unpacked = sharding.typed_as_q(_flash_attention, arrays, options)
    return unpacked[0] if len(unpacked) == 1 else unpacked


@functools.cache
def defaults() -> dict[str, Any]:
    """What the options of `flash_attention` are where a caller says nothing."""
    parameters = inspect.signature(flash_attention).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _flash_attention(arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Array, ...]:
    """Check, run, and hand over what was asked for."""
    call, operands, batch = inputs.prepare(**arrays, **options)
    results = attend(call, axes.vary_alike(operands), options["higher_order"])
    return returned(inputs.poisoned(results, arrays["mask"]), batch, options["return_lse"])


def attend(call: Call, operands: tuple[Any, ...], higher_order: bool) -> tuple[Array, Array, Array | None]:
    """o, lse and, if the rules want them, the largest logits of each row, of what `inputs.prepare` returned."""
    return results(call, natively(call, *operands))[:3] if higher_order else _with_kernels(call, *operands)


def returned(
    unpacked: tuple[Array, Array, Array | None], batch: tuple[int, ...], return_lse: bool
) -> tuple[Array, ...]:
    """What was asked for, with the caller's batch axes."""
    o, lse, row_max = unpacked
    asked = [o.reshape(*batch, *o.shape[1:])]
    if return_lse:
        asked.append(lse.reshape(*batch, *lse.shape[1:]))
    if row_max is not None:
        asked.append(_largest(row_max).reshape(*batch, row_max.shape[1]))
    return tuple(asked)


@functools.partial(jax.jit, inline=True)
def _largest(row_max: Array) -> Array:
    return jax.lax.stop_gradient(jnp.max(row_max, -1, initial=-jnp.inf))


def _with_kernels(call: Call, q, k, v, operands) -> tuple[Array, Array, Array | None]:
    try:
        return _everywhere(call, q, k, v, operands)
    except TypeError as error:  # from within JAX, whose message cannot know what to do
        if "forward-mode" not in str(error):
            raise
        raise errors.higher_order_error() from error


def natively(call: Call, q, k, v, operands) -> list[Array]:
    """`primitives.forward` by the path that JAX differentiates by itself."""
    if primitives.nothing_to_see(q, k, v):
        return primitives.forward_of_nothing(call, q, k, v, operands)
    spec, config = Spec.of(call.rules, q, k, v, operands), call.config("fwd")
    if call.rules.score is not None and call.rules.score.has_rules:  # equal ones may differ in higher derivatives
        return xla.differentiable(spec, config, q, k, v, operands)
    return [*_differentiable(spec, config, q, k, v, operands)]


_differentiable = jax.jit(xla.differentiable, static_argnums=(0, 1), inline=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q, k, v, operands) -> tuple[Array, Array, Array | None]:
    return results(call, primitives.forward(call, q, k, v, operands))[:3]


def results(call: Call, made: list[Array]) -> tuple[Array, Array, Array | None, tuple[Array, ...]]:
    """Of a forward pass: o, lse, the largest logits if the rules want them, and what else the backward pass reads."""
    o, lse, *rest = made
    row_max = rest.pop() if call.rules.max_logits else None
    return o, lse, row_max, tuple(rest)


@jax.tree_util.register_static
class _Wanted(tuple):
    """Of the operands that have a gradient, those whose gradient somebody asked for."""


def wanted_of(operands: Mapping[str, Any]) -> _Wanted:
    """The operands of a forward pass whose gradients are asked for, as JAX gives them to it."""
    if "tile_weights" in operands and operands["tile_weights"].perturbed:
        raise errors.no_gradient_of_weights_error()
    differentiable = (name for name in operands if name in DIFFERENTIABLE or is_score_array(name))
    return _Wanted(name for name in differentiable if operands[name].perturbed)


def values(given: Any) -> Any:
    """What JAX gives to a forward pass, without what it says of which gradients are asked for."""
    return jax.tree.map(lambda x: x.value, given, is_leaf=lambda x: hasattr(x, "perturbed"))


def _attention_fwd(call: Call, q, k, v, operands):
    wanted = wanted_of(operands)
    q, k, v, operands = values((q, k, v, operands))
    made, lost = primitives.forward_and_lost(call, q, k, v, operands)
    o, lse, row_max, stats = results(call, made)
    o, lost, lse, stats = kept.named(o, lost, lse, stats)
    return (o, lse, row_max), (q, k, v, operands, o, lost, stats, wanted)


def _attention_bwd(call: Call, residuals, cotangents):
    q, k, v, operands, o, lost, stats, wanted = residuals
    do, dlse, _ = cotangents
    do = _zeros_like(o) if isinstance(do, SymbolicZero) else do
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    args = q, k, v, operands, o, stats, do, dlse
    dq, dk, dv, grads = primitives.backward(call, *args, wanted=tuple(wanted), lost=lost)
    return dq, dk, dv, {name: grads.get(name) for name in operands}


_zeros_like = jax.jit(jnp.zeros_like, inline=True)

_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)
_everywhere = axes.outside_jit_too(_attention)


class CachedAttention(Protocol):
    """What `get_cached_flash_attention` returns."""

    def __call__(self, query: AnyArray, key: AnyArray, value: AnyArray, bias: AnyArray | None = None) -> Array:
        """Attention of query `[*batch, Sq, H, D]`, as `flash_attention` with the options that were fixed."""
        ...


def get_cached_flash_attention(
    blocksize_q: int | None = None,
    blocksize_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    implementation: Implementation | None = None,
) -> CachedAttention:
    """`flash_attention` with block sizes fixed, as a function `(query, key, value, bias=None)`.

    The same arguments, and the same `FLASH_ATTN_BLOCK_PTR` in the environment when it is called ("1": tensor
    descriptors, "0": pointers, unset: tuned), give the same object, so jit traces it once; the last 256 are kept.

    Args:
      blocksize_q: query rows per tile, a power of two from 16 to 512; None: tuned.
      blocksize_k: key rows per tile, likewise.
      softmax_scale: a number; None: head_dim**-0.5.
      implementation: as in `flash_attention`. With "xla" the environment is not looked at.

    Returns:
      A function of query `[*batch, Sq, H, D]`, key, value and an optional bias to `[*batch, Sq, H, Dv]`.

    Examples:
      >>> attend = get_cached_flash_attention(64, 64)
      >>> attend is get_cached_flash_attention(64, 64)
      True
      >>> attend(*jnp.ones((3, 1, 128, 2, 32))).shape
      (1, 128, 2, 32)
    """
    inputs.check_block_size("blocksize_q", blocksize_q)
    inputs.check_block_size("blocksize_k", blocksize_k)
    inputs.check_implementation(implementation)
    block_ptr = None if implementation == "xla" else inputs.block_ptr_from(os.environ.get("FLASH_ATTN_BLOCK_PTR"))
    return _cached(blocksize_q, blocksize_k, scales.static_scale(softmax_scale), implementation, block_ptr)


@functools.lru_cache(maxsize=256)
def _cached(blocksize_q, blocksize_k, softmax_scale, implementation, block_ptr) -> CachedAttention:
    config = Config(block_m=blocksize_q, block_n=blocksize_k)
    options = Options(softmax_scale=softmax_scale, implementation=implementation, block_ptr=block_ptr)

    def flash_attention_cached(query: AnyArray, key: AnyArray, value: AnyArray, bias: AnyArray | None = None) -> Array:
        return flash_attention(query, key, value, bias, config=config, **options)

    return flash_attention_cached
