"""Flash attention where Flax takes an `attention_fn`: `nnx.MultiHeadAttention`, `linen.MultiHeadDotProductAttention`.

    nnx.MultiHeadAttention(8, 512, attention_fn=attention_fn, decode=False, rngs=rngs)
    linen.MultiHeadDotProductAttention(8, attention_fn=make_attention_fn(window_size=(128, 0)))

Flax itself is not imported here.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .base import arguments, names, versions
from .base.config import Config, Precision
from .call import inputs
from .call.api import flash_attention
from .call.combined import booleans, both, floating, is_structured
from .functions.trace import trace
from .masks import evaluation
from .masks.programs import Steps

versions.check("jax_flash_attn2.flax", "flax")

_NOT_OPTIONS = {
    **dict.fromkeys(("q", "k", "v"), "Flax gives it"),
    "bias": "Flax gives it; one that is always the same is a score_mod that reads an array",
    "deterministic": "Flax's modules give theirs",
    "dropout_rate": "Flax's modules have their own",
    "dropout_seed": "Flax's modules give theirs",
    "return_lse": "the output is all that Flax takes",
    "return_max_logits": "the output is all that Flax takes",
}
"""What `make_attention_fn` does not take, of what `flash_attention` or Flax does, and why."""

_OPTIONS = ("rope", *(name for name in inspect.signature(flash_attention).parameters if name not in _NOT_OPTIONS))


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    input_positions: Array | None = None,
    force_fp32_for_softmax: bool = True,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
    rope: Callable | None = None,
    _fixed_mask: Any = None,  # make_attention_fn's
    **options: Any,
) -> Array:
    """`flash_attention` with the arguments of `nnx.dot_product_attention` and `linen.dot_product_attention`.

    It gives their numbers, with two differences: a row that sees no key gives 0 instead of the mean of all values,
    and dropout drops other keys, at the same rate. `make_attention_fn` sets options once and for all.

    Args:
      query: `[*batch, T, N, H]`, any number of batch axes, none included.
      key: `[*batch, S, K, H]`; K divides N. In a decode step T is 1 and key and value are the whole cache.
      value: `[*batch, S, K, Hv]`.
      bias: added to the logits; broadcasts to `[*batch, N, T, S]`.
      mask: broadcasts to `[*batch, N, T, S]`, and may have more axes of length 1 in front. Booleans or numbers, as
        Flax's `make_causal_mask` and its like return them: attend where it is not 0. Or what else `flash_attention`
        takes: a predicate (`masks.causal() & masks.documents(ids)`), a `BlockMask`, a `Mask`; Flax hands it over as it
        is, but for decode steps, in which it combines arrays.
      broadcast_dropout: True: all batches and heads drop the same keys. False: each drops its own.
      dropout_rng: a PRNG key, typed or not.
      dropout_rate: the probability that a key is dropped, from 0 to below 1.
      deterministic: True: no dropout.
      dtype: what query, key and value are cast to; None: what they promote to.
      precision: as `jax.lax.dot_general` takes it. For float32 it sets `Config.precision`: "highest" is "ieee", "high"
        "tf32x3"; None and "default" leave it. float16 and bfloat16 are multiplied exactly whatever is asked.
      module: must be None (`sow_weights=False`): no weights exist that could be sown.
      is_causal: row i sees keys j <= i.
      input_positions: numbers `[T]` or `[*batch, T]`, for rope.
      force_fp32_for_softmax: accepted; the softmax is always computed in float32 (float64 for float64).
      einsum_dot_general: must be None.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.
      rope: rotates queries and keys before attention: a function of `[*batch, T, H]`, and of positions `[T]` where
        input_positions are given, such as `nnx.RoPE()`.
      **options: arguments of `flash_attention`: causal, causal_alignment, window_size, q_segment_ids, kv_segment_ids,
        q_positions, kv_positions, q_lengths, kv_lengths, score_mod, logits_soft_cap, sinks, alibi_slopes,
        softmax_scale, implementation, block_ptr, config, higher_order.

    Returns:
      `[*batch, T, N, Hv]`, in dtype or in what query, key and value promote to.

    Raises:
      ValueError: what is asked for cannot be done: weights to sow, an einsum of one's own, a precision that the kernels
        do not have, dropout without a key; in a decode step, what counts rows, unless q_positions and kv_positions say
        where the query stands: is_causal, window_size, alibi_slopes; and an option mask or score_mod that reads i.
      TypeError, ValueError: shapes and dtypes do not fit, as in `flash_attention`.

    Examples:
      >>> from flax import nnx
      >>> layer = nnx.MultiHeadAttention(2, 32, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 16, 32)), is_causal=True).shape
      (1, 16, 32)
    """
    _refuse_what_needs_weights(
        module=module, einsum_dot_general=einsum_dot_general, qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )  # fmt: skip
    _check_options(options)
    if dtype is None:
        dtype = jnp.result_type(query, key, value)
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    is_causal = options.pop("causal", False) or bool(is_causal)
    if rope is not None:
        query, key = _rotate(rope, query, key, input_positions)
    elif input_positions is not None:
        raise ValueError("input_positions are for rope, which is None; give one: make_attention_fn(rope=nnx.RoPE())")
    if mask is not None and query.shape[-3] == 1 < key.shape[-3]:
        _refuse_what_counts_rows(key.shape[-3], is_causal, _fixed_mask, options)
    options["config"] = _with_precision(options.get("config"), precision, query.dtype)
    fixed, given = (booleans(_without_ones(x, query.ndim)) for x in (_fixed_mask, mask))
    mask, bias = both(fixed, given, floating(bias))
    return flash_attention(
        query,
        key,
        value,
        bias,
        mask=mask,
        causal=is_causal,
        **_dropout(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
        **options,
    )


def make_attention_fn(**options: Any) -> Callable[..., Array]:
    """`attention_fn` with options that Flax does not know.

    The same options give the same object (unless there are arrays or a dict among them, or functions that close over
    something), so that modules which differ in nothing compare equal and are traced once.

    Args:
      **options: rope, mask (of any kind that `flash_attention` takes), and what is listed in `attention_fn`. Where a
        call has a mask too, what both let through is seen: of a predicate and an array, tiles are skipped by the
        predicate.

    Returns:
      A function with `attention_fn`'s signature. Linen reads it to learn which arguments it may pass.

    Raises:
      TypeError: there is no such option.

    Examples:
      >>> make_attention_fn(window_size=(64, 0)) is make_attention_fn(window_size=(64, 0))
      True
    """
    _check_options(options)
    options = {"_fixed_mask" if name == "mask" else name: x for name, x in sorted(options.items())}
    if not all(map(_holds_nothing, options.values())):
        return functools.partial(attention_fn, **options)
    try:
        hash(tuple(options.values()))
    except TypeError:
        return functools.partial(attention_fn, **options)
    return _made(**options)


def _holds_nothing(option: Any) -> bool:
    """Whether no array lives as long as this does; a function may have some in what it closes over."""
    for leaf in jax.tree.leaves(option):
        if isinstance(leaf, Array | np.ndarray):
            return False
        if callable(leaf) and (not inspect.isfunction(leaf) or leaf.__closure__ or leaf.__defaults__):
            return False
    return True


@functools.lru_cache(maxsize=256, typed=True)
def _made(**options: Any) -> Callable[..., Array]:
    return functools.partial(attention_fn, **options)


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _NOT_OPTIONS:
            raise TypeError(f"attention_fn has no option {name!r}: {_NOT_OPTIONS[name]}")
    names.check("attention_fn", options, _OPTIONS)


def _refuse_what_needs_weights(**arguments: Any) -> None:
    for name, x in arguments.items():
        if x is not None:
            what = "sow_weights must be False" if name == "module" else f"{name} must be None"
            raise ValueError(
                f"{what}: flash attention never holds the attention weights; Flax's own dot_product_attention does"
            )


def _refuse_what_counts_rows(seqlen_k: int, is_causal: bool, fixed_mask: Any, options: Mapping[str, Any]) -> None:
    """In a decode step the one query is row 0, wherever it stands: what follows from the number of a row is refused."""
    placed = options.get("q_positions") is not None and options.get("kv_positions") is not None
    last = options.get("causal_alignment", "top_left") == "bottom_right"
    place = "give q_positions and kv_positions, which say where it stands"
    in_the_mask = "leave it out and say it in the mask of each step, such as jnp.arange(S) >= index - left"
    left, right = arguments.window(options.get("window_size"), False)
    if not placed and (left is not None or (right is not None and not last)):
        why = ", and the last key of a cache is not the newest until it is full" if last else ""
        raise ValueError(f"window_size {_counts(seqlen_k)}{why}; {in_the_mask}; or {place}")
    if is_causal and not placed and not last:
        raise ValueError(
            f"is_causal=True counts from the first key, so this one query would see key 0 of {seqlen_k} alone; in a "
            f"decode step pass is_causal=False (the mask does the work), as Flax does from 0.12.12 on, or set "
            f'causal_alignment="bottom_right"'
        )
    sinks = options.get("sinks") is not None
    if options.get("alibi_slopes") is not None and not placed and (sinks or not last):  # else all logits shift alike
        or_last = "" if sinks else ', or set causal_alignment="bottom_right", which shifts all logits of a row alike'
        raise ValueError(f"alibi_slopes {_counts(seqlen_k)}; {place}{or_last}")
    if callable(fixed_mask) and evaluation.trace(fixed_mask).steps.reads()[2]:
        raise ValueError(f"mask, an option that reads the row i, {_counts(seqlen_k)}; {in_the_mask}")
    score_mod = options.get("score_mod")
    if score_mod is not None and Steps(trace(score_mod, "score_mod", jnp.float32)[0].jaxpr).reads()[3]:
        raise ValueError(
            f"score_mod, which reads the row i, {_counts(seqlen_k)}; let it read where the query stands from an array, "
            f"in place of i"
        )


def _counts(seqlen_k: int) -> str:
    return f"counts from the row's number, which in a decode step (one query over {seqlen_k} keys, a mask) is always 0"


def _without_ones(mask: Any, ndim: int) -> Any:
    """An array without the axes of length 1 that Flax may have in front; any other mask as it is."""
    if mask is None or is_structured(mask):
        return mask
    mask = jnp.asarray(mask)
    while mask.ndim > ndim and mask.shape[0] == 1:
        mask = mask[0]
    return mask


def _rotate(rope: Callable, query: Array, key: Array, positions: Array | None) -> tuple[Array, Array]:
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"rope needs as many queries as keys, got {query.shape[-3]} and {key.shape[-3]}; for a cache, rotate keys "
            f"before they enter it"
        )
    rotate = jax.vmap(rope, -2, -2)  # over heads
    if positions is not None:
        with_positions = jax.vmap(rope, (-2, None), -2)
        batch = query.shape[:-3] if positions.ndim > 1 else ()
        positions = jnp.broadcast_to(positions, (*batch, positions.shape[-1]))
        for _ in batch:  # rope takes positions [T]
            with_positions = jax.vmap(with_positions)
        rotate = lambda x: with_positions(x, positions)
    return rotate(query), rotate(key)


def _dropout(broadcast: bool, rng: Array | None, rate: float, deterministic: bool) -> dict[str, Any]:
    if deterministic or rate == 0:
        return {}
    if rng is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_rng, unless deterministic=True")
    return {"dropout_rate": rate, "dropout_seed": jax.random.bits(rng, (1, 1), jnp.uint32) if broadcast else rng}


# Precision: jax.lax's words, and Config's.

_EXACTNESS = {"tf32": 0, "tf32x3": 1, "ieee": 2}
assert _EXACTNESS.keys() == set(get_args(Precision))

_PRESET = lax.DotAlgorithmPreset
_MEANING: dict[Any, Precision | None] = {
    None: None,
    lax.Precision.DEFAULT: None,
    lax.Precision.HIGH: "tf32x3",
    lax.Precision.HIGHEST: "ieee",
    _PRESET.DEFAULT: None,
    _PRESET.TF32_TF32_F32: "tf32",
    _PRESET.TF32_TF32_F32_X3: "tf32x3",
    _PRESET.F32_F32_F32: "ieee",
}
_OWN = {"float16": _PRESET.F16_F16_F32, "bfloat16": _PRESET.BF16_BF16_F32, "float64": _PRESET.F64_F64_F64}
"""The algorithm by which each other dtype is multiplied anyway."""


def _with_precision(config: Any, precision: Any, dtype: Any) -> Any:
    """A config that is as exact as `precision` asks."""
    pair = precision if isinstance(precision, tuple) else (precision,)
    asked = [_meaning(x, dtype) for x in pair]
    wanted = max((x for x in asked if x is not None), key=_EXACTNESS.__getitem__, default=None)
    if wanted is None or dtype != jnp.float32:  # other dtypes have one way only, and it loses nothing
        return config
    if config is None:
        return Config(precision=wanted)
    for one in inputs.configs(config, None, None):
        if _EXACTNESS[one.precision] < _EXACTNESS[wanted]:
            raise ValueError(f"precision={precision} asks for {wanted!r}, got config.precision={one.precision!r}")
    return config


def _meaning(precision: Any, dtype: Any) -> Precision | None:
    name, asked = jnp.dtype(dtype).name, _by_name(precision) if isinstance(precision, str) else precision
    if asked == _OWN.get(name):
        return None
    if asked not in _MEANING:
        presets = sorted(x.name for x in (*_MEANING, _OWN.get(name)) if isinstance(x, _PRESET))
        raise ValueError(
            f'precision must be None, "default", "high", "highest" or one of {", ".join(presets)} for {name}, got '
            f"{precision!r}"
        )
    return _MEANING[asked]


def _by_name(precision: str) -> Any:
    """What `jax.lax` calls so; the name itself if there is nothing."""
    if precision in _PRESET.__members__:
        return _PRESET.__members__[precision]
    try:
        return lax.Precision(precision)
    except ValueError:
        return precision
