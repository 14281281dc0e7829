"""Arguments in, dense arrays and a `Call` out: `prepare` puts the checks of `base.arguments` in order and adds those of
masks, of configurations and of what goes with what.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from ..base import arguments, scales, tokens
from ..base.arguments import Implementation
from ..base.axes import as_called
from ..base.config import ONLY_FOR, PASSES, Config, Precision
from ..base.known import full, is_known, now
from ..base.operands import mask_arrays
from ..base.operands import score_arrays as names_of_score_arrays
from ..base.spec import Rules
from ..functions.trace import trace, trace_mask
from ..gpu import target
from ..gpu.functions import cheaper_than_bits
from ..masks import checks, entries, evaluation, predicates, weighing
from ..masks.block import BlockMask, cached
from ..masks.mask import Mask
from ..primitives.call import Call
from .share import Share

_MAX_BLOCK = 512


def prepare(
    q, k, v, bias, *, causal, causal_alignment, window_size, mask, q_segment_ids, kv_segment_ids, q_positions,
    kv_positions, q_lengths, kv_lengths,
    score_mod,
    logits_soft_cap, sinks, alibi_slopes, dropout_rate, dropout_seed, softmax_scale, implementation, block_ptr, config,
    higher_order, return_lse, return_max_logits, share: Share | None = None,
) -> tuple[Call, tuple[Array, Array, Array, dict[str, Array]], tuple[int, ...]]:  # fmt: skip
    """Checks the arguments of `flash_attention` and brings them into the form that the primitives take.

    share: what q, k and v are of sequences that lie on several devices; None: all.

    Returns:
      The call; q, k, v as `[B, S, H, D]` and the operands (`base.operands`) that it has; and the batch axes of the
      results.
    """
    q, k, v = arguments.array("q", q), arguments.array("k", k), arguments.array("v", v)
    arguments.check_shapes(q, k, v)
    batch, (seqlen_q, heads), seqlen_k = q.shape[:-3], q.shape[-3:-1], k.shape[-3]
    left, right = arguments.window(window_size, arguments.boolean("causal", causal))
    soft_cap, rate = scales.soft_cap(logits_soft_cap, q.dtype), arguments.rate(dropout_rate)
    score_arrays: list[Array] = []
    if score_mod is not None:
        dtype = arguments.accumulator(q.dtype)
        own, score_arrays = as_called(lambda: trace(score_mod, "score_mod", dtype, beside=q))
        score_mod = dataclasses.replace(own, batch=math.prod(batch))
    largest = arguments.boolean("return_max_logits", return_max_logits)
    rules = Rules(left, right, soft_cap, rate, score=score_mod, max_logits=largest)
    arguments.boolean("return_lse", return_lse)
    implementation = check_implementation(implementation)
    if arguments.boolean("higher_order", higher_order) and implementation == "triton":
        raise ValueError(
            'higher_order=True runs on XLA, got implementation="triton" too; leave one of them out (the Triton kernels '
            "have a first derivative only)"
        )
    made = configs(config, block_ptr, implementation)
    if is_wide(q, v) and implementation is None:
        implementation = "xla"
    on_xla = implementation == "xla" or (implementation is None and target.named() is None and not target.is_default())
    if on_xla or q.dtype.itemsize >= 4:
        rules = dataclasses.replace(rules, precise=True)
    call = Call(rules, made, implementation, target.named())
    _check_implementation_fits(call, q, v)

    whole_q, whole_k = (seqlen_q, seqlen_k) if share is None else (share.rows, share.keys)
    lengths = heads, seqlen_q, seqlen_k
    axes = lambda name, x: lengths if share is None else share.axes(name, x, *lengths)
    operands: dict[str, Array] = {}
    operands["scale"], q = scales.scale_of(softmax_scale, q)
    if bias is not None:
        operands["bias"] = arguments.bias_of(bias, batch, axes("bias", bias))
    if callable(mask) and share is None and q_segment_ids is None and kv_segment_ids is None:
        mask, q_segment_ids, kv_segment_ids = _documents_of(mask, batch, lengths)
    if mask is not None:
        call, q = _add_mask(mask, batch, axes("mask", mask), call, q, operands, share)
    operands |= tokens.segments(q_segment_ids, kv_segment_ids, batch, seqlen_q, seqlen_k)
    for name, ends in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if ends is not None:
            operands[name] = tokens.lengths(name, ends, batch)
    if sinks is not None:
        operands["sinks"] = arguments.per_head("sinks", sinks, (), heads, q.dtype)
    if alibi_slopes is not None:
        operands["slopes"] = arguments.per_head("alibi_slopes", alibi_slopes, batch, heads, q.dtype)
    names = names_of_score_arrays(len(score_arrays))
    operands |= {name: x[None] for name, x in zip(names, score_arrays, strict=True)}
    if rules.dropout_rate:
        operands |= arguments.dropout_keys(dropout_seed, batch, heads)
    positions = tokens.positions(q_positions, kv_positions, batch, seqlen_q, seqlen_k)
    bottom_right = arguments.alignment(causal_alignment) == "bottom_right"
    if bottom_right and positions:
        raise ValueError(
            'causal_alignment="bottom_right" says what the position of an index is, and so do q_positions and '
            "kv_positions; leave one of them out"
        )
    compared = left is not None or right is not None or "slopes" in operands
    if compared:
        operands |= positions
    if bottom_right and (compared or rules.dropout_rate > 0) and whole_q != whole_k:
        operands["offset"] = full(whole_k - whole_q, jnp.dtype(jnp.int32), (1, 1, 1, 1))
    q, k, v = (x.reshape(-1 if x.size else math.prod(batch), *x.shape[-3:]) for x in (q, k, v))
    return call, (q, k, v, operands), batch


def _add_mask(
    mask: Any, batch: tuple[int, ...], axes: tuple[int, int, int], call: Call, q: Array, operands: dict[str, Array],
    share: Share | None,
) -> tuple[Call, Array]:  # fmt: skip
    """Whatever kind of mask, as operands. axes: of an array."""
    every = axes if share is None else (axes[0], share.rows, share.keys)
    if isinstance(mask, Mask | BlockMask) and mask.overflow is not None:
        q = _spoiled(q, mask.overflow)  # for the gradients; of results see `poisoned`
    if isinstance(mask, Mask):
        mask = _of_weights(mask, batch, every, operands, share)
    elif callable(mask) and 0 not in (*batch, *every):
        mask, rules = _of_function(mask, math.prod(batch), every, call.rules, q, operands, share)
        call = dataclasses.replace(call, rules=rules)
        if mask is None:
            return call, q
    elif callable(mask):
        return call, q  # there is nobody to hide
    if not isinstance(mask, BlockMask):
        if mask is not None:
            operands["mask"] = arguments.mask_of(mask, batch, axes)
        return call, q
    whole = (math.prod(batch), *every)
    if not checks.fits(mask.shape, whole):
        raise ValueError(f"mask must be a BlockMask of shape {whole} (B and H may be 1), got {mask.shape}")
    within = tuple(_within(mask, config, name) for name, config in zip(PASSES, call.configs, strict=True))
    call = dataclasses.replace(call, configs=within)
    operands |= {name: x for name, x in mask.operands().items() if call.rules.mask is None or name != "tile_bits"}
    tiles = mask.block_m, mask.block_n
    return dataclasses.replace(call, rules=dataclasses.replace(call.rules, tiles=tiles)), q


def poisoned(results: tuple[Array, Array, Array | None], mask: Any) -> tuple[Array, Array, Array | None]:
    """o, lse and the largest logits, NaN where the mask is not all there: rows whose tiles are missing meet no NaN of
    q's."""
    if not isinstance(mask, Mask | BlockMask) or mask.overflow is None:
        return results
    o, lse, largest = results
    o, lse = (_spoiled(x, mask.overflow) for x in (o, lse))
    return o, lse, None if largest is None else entries.poisoned(largest, mask.overflow)


@functools.partial(jax.jit, inline=True)
def _spoiled(x: Array, overflow: Array) -> Array:
    """By a product, so that gradients are NaN too."""
    return x * jnp.where(overflow, jnp.nan, 1).astype(x.dtype)


def _within(mask: BlockMask, config: Config, of_pass: str) -> Config:
    """A config whose blocks are no larger than the mask's tiles; where one of these is all there is, a larger block is
    the same."""
    blocks = []
    for field, own, length in (("block_m", mask.block_m, mask.shape[2]), ("block_n", mask.block_n, mask.shape[3])):
        block = getattr(config, field)
        if block is not None and block > own:
            if own < length:
                raise ValueError(
                    f"config.{field} must be at most {own}, as the tiles of the block mask are, got {block} for "
                    f"{of_pass!r}; leave it None, or make the BlockMask with {field}="
                )
            block = own
        blocks.append(block)
    return dataclasses.replace(config, block_m=blocks[0], block_n=blocks[1])


def _documents_of(function: Any, batch: tuple[int, ...], lengths: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """A mask function, and the segment ids of documents in it that are traced: by ids tiles can be skipped even so."""
    predicate = predicates.as_predicate(function, "mask")
    rest, ids = predicates.split_documents(predicate)
    if ids is None or has_known_tiles(predicate):
        return function, None, None
    predicate.check_shape((math.prod(batch), *lengths))
    q_ids, kv_ids = (x.reshape(*(batch if x.shape[0] > 1 else ()), x.shape[1]) for x in ids)
    return rest, q_ids, kv_ids


def _of_function(
    function: Any, batch: int, lengths: tuple[int, int, int], rules: Rules, q: Array, operands: dict[str, Array],
    share: Share | None,
) -> tuple[BlockMask | None, Rules]:  # fmt: skip
    """A mask function: which tiles it leaves, if that can be known, and what evaluates it in those that it divides, if
    that is cheaper than their bits."""
    predicate = predicates.as_predicate(function, "mask")
    predicate.check_shape((batch, *lengths))
    trace_here = lambda: trace_mask(functools.partial(evaluation.seen, predicate), "mask", beside=q)
    lists = share is None or share.lists
    if not (lists and has_known_tiles(predicate)):
        block, (traced, arrays) = None, as_called(trace_here)
    else:
        block = as_called(lambda: cached(predicate, batch, *lengths))
        with now():
            traced, arrays = as_called(trace_here)
        if not cheaper_than_bits(traced, [x[None] for x in arrays]):
            return block, rules
    operands |= {name: x[None] for name, x in zip(mask_arrays(len(arrays)), arrays, strict=True)}
    return block, dataclasses.replace(rules, mask=dataclasses.replace(traced, batch=batch))


def has_known_tiles(function: Any) -> bool:
    """Whether it can be known which tiles a mask function leaves: it holds nothing traced."""
    predicate = predicates.as_predicate(function, "mask")
    return as_called(lambda: is_known(predicate) and is_known(evaluation.trace(predicate)))


_DENSE = 2**24
"""Up to how many elements an index list is made dense; longer ones are read as such."""


def _of_weights(
    mask: Mask, batch: tuple[int, ...], axes: tuple[int, int, int], operands: dict[str, Array], share: Share | None
) -> Any:
    """What of a `Mask` is seen: booleans, a `BlockMask`, or None for all; the weights go to the bias.

    A key that a sampler kept with probability w stands for 1 / w of its kind: its logit gets -log(w).
    """
    whole = (math.prod(batch), *axes)
    if not checks.fits(mask.shape, whole):
        raise ValueError(f"mask must be a Mask of shape {whole} (B and H may be 1), got {mask.shape}")
    if mask.kind == "full":
        return None
    if mask.kind == "empty":
        return full(False, jnp.dtype(bool), (1, 1, 1))
    if mask.kind == "sparse" and share is None and is_known(mask) and math.prod(mask.shape) > _DENSE:
        return BlockMask.from_mask(mask)
    weights = mask.to_dense() if mask.overflow is None else mask.to_dense(jnp.float32)  # which has a NaN to tell it by
    weights = weights.reshape(*(batch if mask.shape[0] > 1 else (1,) * len(batch)), *mask.shape[1:])
    if share is not None:
        weights, axes = share.own(weights), (axes[0], share.row_tokens.shape[0], axes[2])
    seen = weights if weights.dtype == jnp.bool_ else weighing.seen_of(weights)
    if mask.dtype == jnp.bool_:
        return seen
    dtype = arguments.accumulator(weights.dtype)
    correction = arguments.bias_of(weighing.correction_of(weights, dtype), batch, axes)
    operands["bias"] = _sum(operands["bias"], correction) if "bias" in operands else correction
    return seen


@functools.partial(jax.jit, inline=True)
@jax.numpy_dtype_promotion("standard")
def _sum(bias: Array, correction: Array) -> Array:
    return bias + correction


# How it runs.


def check_implementation(implementation: Any) -> Implementation | None:
    """`implementation` itself, if it is one."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f'implementation must be "triton", "xla" or None (choose), got {implementation!r}')
    return implementation


def check_block_size(name: str, n: Any) -> None:
    """Raises unless n is None or a block size."""
    if n is not None and not (arguments.is_integer(n) and 16 <= n <= _MAX_BLOCK and n & (n - 1) == 0):
        raise ValueError(f"{name} must be a power of two from 16 to {_MAX_BLOCK}, or None (tuned), got {n!r}")


def configs(config: Any, block_ptr: Any, implementation: Implementation | None) -> tuple[Config, ...]:
    """`config` and `block_ptr` as a `Config` for each of `PASSES`."""
    if not (block_ptr is None or isinstance(block_ptr, bool)):
        raise TypeError(
            f"block_ptr must be True (tensor descriptors), False (pointers) or None (choose), got {block_ptr!r}"
        )
    if config is None:
        config = Config()
    if isinstance(config, Config):
        config = dict.fromkeys(PASSES, config)
    if not isinstance(config, Mapping) or not all(isinstance(c, Config) for c in config.values()):
        raise TypeError(
            f"config must be a Config, or a mapping from {PASSES} to Config, or None (tuned), got {config!r}"
        )
    if unknown := set(config) - set(PASSES):
        raise ValueError(f"config has no pass {sorted(unknown, key=str)[0]!r}; the passes are {PASSES}")
    return tuple(_config(name, config.get(name, Config()), block_ptr, implementation) for name in PASSES)


def _config(name: str, config: Config, block_ptr: bool | None, implementation: Implementation | None) -> Config:
    check_block_size("config.block_m", config.block_m)
    check_block_size("config.block_n", config.block_n)
    if config.num_warps not in (None, 1, 2, 4, 8, 16):
        raise ValueError(f"config.num_warps must be 1, 2, 4, 8, 16 or None (tuned), got {config.num_warps!r}")
    if config.num_stages is not None and not (arguments.is_integer(config.num_stages) and 1 <= config.num_stages <= 8):
        raise ValueError(f"config.num_stages must be from 1 to 8, or None (tuned), got {config.num_stages!r}")
    if config.maxnreg is not None and not (arguments.is_integer(config.maxnreg) and 24 <= config.maxnreg <= 255):
        raise ValueError(f"config.maxnreg must be from 24 to 255, or None (no bound), got {config.maxnreg!r}")
    if config.num_splits is not None and not (
        arguments.is_integer(config.num_splits) and 1 <= config.num_splits <= 256
    ):
        raise ValueError(f"config.num_splits must be from 1 to 256, or None (chosen), got {config.num_splits!r}")
    for field in ("block_ptr", "overlaps", "warp_specialize"):
        if getattr(config, field) is not None and not isinstance(getattr(config, field), bool):
            raise TypeError(f"config.{field} must be True, False or None (tuned), got {getattr(config, field)!r}")
    for field, passes in ONLY_FOR.items():
        if getattr(config, field) and name not in passes:
            raise ValueError(
                f"config.{field} is for {' and '.join(map(repr, passes))}, got it for {name!r}; give it by pass: "
                f"config={{{passes[0]!r}: Config({field}={getattr(config, field)!r})}}"
            )
    if config.precision not in get_args(Precision):
        raise ValueError(f"config.precision must be one of {get_args(Precision)}, got {config.precision!r}")
    if block_ptr is not None:
        if config.block_ptr not in (None, block_ptr):
            raise ValueError(f"block_ptr={block_ptr} contradicts config.block_ptr={config.block_ptr}; give one of them")
        config = dataclasses.replace(config, block_ptr=block_ptr)
    if implementation == "xla":
        for field in ("num_warps", "num_stages", "maxnreg", "block_ptr", *ONLY_FOR):
            if getattr(config, field) is not None:
                raise ValueError(
                    f'{field} speaks to the Triton kernels and means nothing to implementation="xla", '
                    f"got {field}={getattr(config, field)!r}; leave one of them out"
                )
    return config


def is_wide(q: Any, v: Any) -> bool:
    """Whether rows are wider than the kernels take them."""
    return max(q.shape[-1], v.shape[-1]) > arguments.KERNEL_HEAD_DIM


def _check_implementation_fits(call: Call, q: Array, v: Array) -> None:
    check_dtype(call.implementation, q)
    if call.implementation == "triton" and is_wide(q, v):
        raise ValueError(
            f'implementation="triton" has heads of up to {arguments.KERNEL_HEAD_DIM}, got {q.shape[-1]} and '
            f'{v.shape[-1]}; use None or "xla", or, to decode with latent keys, paged_attention'
        )
    check_descriptors(call.configs, {"q and k": q, "v": v})


def check_dtype(implementation: Implementation | None, q: Any) -> None:
    """Raises if the kernels, which do not have q's dtype, are insisted on."""
    if implementation == "triton" and q.dtype == jnp.float64:
        raise TypeError('implementation="triton" has no float64, got float64 q; use "xla", or cast q, k and v')


def check_descriptors(made: tuple[Config, ...], rows: Mapping[str, Any]) -> None:
    """Raises if descriptors are asked for that cannot be made of these rows."""
    for name, x in rows.items():
        width, dtype = x.shape[-1], x.dtype
        if any(config.block_ptr for config in made) and width * dtype.itemsize % 16:
            raise ValueError(
                f"block_ptr=True needs rows of a multiple of 16 bytes, got head_dim {width} of {name} in {dtype.name}; "
                f"use block_ptr=None or False, or pad to a multiple of {16 // dtype.itemsize}"
            )


def block_ptr_from(value: str | None) -> bool | None:
    """The value of `FLASH_ATTN_BLOCK_PTR`."""
    if value not in (None, "", "0", "1"):
        raise ValueError(
            f'FLASH_ATTN_BLOCK_PTR must be "1" (tensor descriptors), "0" (pointers) or unset (tuned), got {value!r}'
        )
    return {"1": True, "0": False}.get(value or "")
