"""Arguments in, dense arrays and a `Call` out. Every check is here, and every message.

A message names the argument, says what was wanted, what came, and what to do about it.
"""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import dropout, target
from .masks.block import BlockMask, cached
from .masks.mask import Mask
from .spec import PASSES, Config, Precision, Rules, Tuned
from .target import Target

Implementation = Literal["triton", "xla"]
Alignment = Literal["top_left", "bottom_right"]
WindowSize = int | tuple[int | None, int | None]

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MAX_HEAD_DIM = 256
_MAX_BLOCK = 512
_FAR = 2**30  # a bound that no index reaches, and that can be added to one


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static about one call: what is computed, how, by what and for which GPU."""

    rules: Rules
    configs: tuple[Config, ...]
    """What the caller asked for, for each of `spec.PASSES`."""
    implementation: Implementation | None
    target: Target | None
    """The GPU that an enclosing `gpu_target` names; None: the one that is there."""

    def config(self, name: str) -> Config:
        """What the caller asked of the pass `name`."""
        return self.configs[PASSES.index(name)]

    def wants_triton(self, dtype: Any) -> bool:
        """Whether a GPU runs the kernels; they have no fp64, which is left to XLA unless Triton is insisted on."""
        return self.implementation == "triton" or (self.implementation is None and dtype != jnp.float64)


def defaults() -> dict[str, Any]:
    """What the options of `flash_attention` are where a caller says nothing."""
    from .api import flash_attention

    parameters = inspect.signature(flash_attention).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def prepare(
    q, k, v, bias, *, causal, causal_alignment, window_size, mask, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths,
    logits_soft_cap, sinks, alibi_slopes, dropout_rate, dropout_seed, softmax_scale, implementation, block_ptr, config,
    higher_order, return_lse, return_max_logits,
) -> tuple[Call, tuple[Array, Array, Array, dict[str, Array]], tuple[int, ...]]:  # fmt: skip
    """Checks the arguments of `flash_attention` and brings them into the form that the primitives take.

    Returns:
      The call; q, k, v as `[B, S, H, D]` and the operands of `spec.OPERANDS` that it has; and the batch axes of the
      results.
    """
    q, k, v = _array("q", q), _array("k", k), _array("v", v)
    _check_shapes(q, k, v)
    batch, (seqlen_q, heads), seqlen_k = q.shape[:-3], q.shape[-3:-1], k.shape[-3]
    left, right = _window(window_size, _boolean("causal", causal))
    rules = Rules(
        left, right, _soft_cap(logits_soft_cap), _rate(dropout_rate), _boolean("return_max_logits", return_max_logits)
    )
    _boolean("return_lse", return_lse)
    implementation = check_implementation(implementation)
    if _boolean("higher_order", higher_order) and implementation == "triton":
        raise ValueError(
            'higher_order=True runs on XLA, got implementation="triton" too; leave one of them out (the Triton kernels '
            "have a first derivative only)"
        )
    call = Call(rules, _configs(config, block_ptr, implementation), implementation, target.named())
    _check_implementation_fits(call, q, v)

    operands: dict[str, Array] = {}
    operands["scale"], q = _scale(softmax_scale, q)
    if bias is not None:
        operands["bias"] = _bias(bias, batch, (heads, seqlen_q, seqlen_k))
    if mask is not None:
        axes = heads, seqlen_q, seqlen_k
        call, q = _add_mask(mask, batch, axes, call, q, operands)
    operands |= _segments(q_segment_ids, kv_segment_ids, batch, seqlen_q, seqlen_k)
    for name, lengths in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if lengths is not None:
            operands[name] = _integers(name, lengths, batch, (), "[*batch]").reshape(-1, 1, 1, 1)
    if sinks is not None:
        operands["sinks"] = _per_head("sinks", sinks, (), heads, q.dtype)
    if alibi_slopes is not None:
        operands["slopes"] = _per_head("alibi_slopes", alibi_slopes, batch, heads, q.dtype)
    if rules.dropout_rate:
        operands |= _dropout_keys(dropout_seed, batch, heads)
    positions_matter = left is not None or right is not None or "slopes" in operands or rules.dropout_rate > 0
    if _alignment(causal_alignment) == "bottom_right" and positions_matter and seqlen_q != seqlen_k:
        operands["offset"] = jnp.full((1, 1, 1, 1), seqlen_k - seqlen_q, jnp.int32)
    q, k, v = (x.reshape(-1 if x.size else math.prod(batch), *x.shape[-3:]) for x in (q, k, v))
    return call, (q, k, v, operands), batch


# One argument each.


def _array(name: str, x: Any) -> Array:
    if not isinstance(x, Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if x.dtype.name not in _DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(_DTYPES)}, got {x.dtype.name}; cast it first")
    return jnp.asarray(x)


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have shape [..., sequence, heads, head_dim], so at least 3 axes, got shape {x.shape}"
            )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must share one dtype, got q {q.dtype.name} and {name} {x.dtype.name}; cast one"
            )
        if x.shape[:-3] != q.shape[:-3]:
            raise ValueError(
                f"{name} must have q's batch axes {q.shape[:-3]}, got {x.shape[:-3]} "
                f"(shapes: q {q.shape}, {name} {x.shape}); use jnp.broadcast_to or jax.vmap"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k must have q's head_dim {q.shape[-1]}, got {k.shape[-1]} (shapes: q {q.shape}, k {k.shape})"
        )
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(
            f"v must have k's length and heads {k.shape[-3:-1]}, got {v.shape[-3:-1]} "
            f"(shapes: k {k.shape}, v {v.shape})"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of k and v, got {heads} and {kv_heads} "
            f"(shapes [..., sequence, heads, head_dim]: q {q.shape}, k {k.shape})"
        )
    for name, x in (("q and k", q), ("v", v)):
        if not 1 <= x.shape[-1] <= _MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name} must be from 1 to {_MAX_HEAD_DIM}, got {x.shape[-1]}")


def _flat(name: str, x: Any, batch: tuple[int, ...], axes: tuple[int, ...], wanted: str) -> Array:
    """x, which broadcasts to `[*batch, *axes]`, with its batch axes made one: `[1 or B, *(1 or axis)]`."""
    full = (*batch, *axes)
    own = (1,) * (len(full) - x.ndim) + x.shape
    if len(own) != len(full) or any(n not in (1, m) for n, m in zip(own, full, strict=True)):
        raise ValueError(f"{name} must broadcast to {wanted} = {full} (each axis 1 or full), got shape {x.shape}")
    rest = own[len(batch) :]
    if math.prod(own[: len(batch)]) > 1:  # batch axes that it has only in part cannot be flattened as they are
        x = jnp.broadcast_to(x, (*batch, *rest))
        return x.reshape(-1 if x.size else math.prod(batch), *rest)
    return jnp.asarray(x).reshape(1, *rest)


_LOGITS = "[*batch, heads, seqlen_q, seqlen_k]"


def _bias(bias: Any, batch: tuple[int, ...], axes: tuple[int, int, int]) -> Array:
    if not isinstance(bias, Array | np.ndarray):
        raise TypeError(f"bias must be an array, got {type(bias).__name__}")
    if bias.dtype.name not in _DTYPES:
        raise TypeError(
            f"bias must have one of the dtypes {', '.join(_DTYPES)}, got {bias.dtype.name}"
            f"{'; pass booleans as mask' if bias.dtype == jnp.bool_ else '; cast it first'}"
        )
    return _flat("bias", bias, batch, axes, _LOGITS)


def _mask(mask: Any, batch: tuple[int, ...], axes: tuple[int, int, int]) -> Array:
    if not isinstance(mask, Array | np.ndarray):
        raise TypeError(
            f"mask must be an array of booleans, a Mask, a BlockMask or a function of (b, h, i, j), got "
            f"{type(mask).__name__}"
        )
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must have dtype bool (True: attend), got {mask.dtype.name}; what is added to logits is a bias, and "
            f"numbers that mean yes or no are mask != 0"
        )
    return _flat("mask", mask, batch, axes, _LOGITS)


def _add_mask(
    mask: Any, batch: tuple[int, ...], axes: tuple[int, int, int], call: Call, q: Array, operands: dict[str, Array]
) -> tuple[Call, Array]:
    """Whatever kind of mask, as operands."""
    if isinstance(mask, Mask | BlockMask) and mask.overflow is not None:
        q = jnp.where(mask.overflow, jnp.nan, q).astype(q.dtype)  # what was found under jit, NaN everywhere tells
    if isinstance(mask, Mask):
        mask = _of_weights(mask, batch, axes, operands)
    elif callable(mask) and 0 not in (*batch, *axes):
        mask = cached(mask, math.prod(batch), *axes)
    elif callable(mask):
        return call, q  # there is nobody to hide
    if not isinstance(mask, BlockMask):
        if mask is not None:
            operands["mask"] = _mask(mask, batch, axes)
        return call, q
    whole = (math.prod(batch), *axes)
    if mask.shape[2:] != axes[1:] or any(n not in (1, full) for n, full in zip(mask.shape, whole, strict=True)):
        raise ValueError(f"mask must be a BlockMask of shape {whole} (B and H may be 1), got {mask.shape}")
    for name, config in zip(PASSES, call.configs, strict=True):
        for field, own in (("block_m", mask.block_m), ("block_n", mask.block_n)):
            if (getattr(config, field) or 0) > own:
                raise ValueError(
                    f"config.{field} must be at most {own}, as the tiles of the block mask are, got "
                    f"{getattr(config, field)} for {name!r}; leave it None, or make the BlockMask with {field}="
                )
    operands |= mask.operands()
    tiles = mask.block_m, mask.block_n
    return dataclasses.replace(call, rules=dataclasses.replace(call.rules, tiles=tiles)), q


_DENSE = 2**24
"""Up to how many elements an index list is made dense; longer ones are read as such."""


def _of_weights(mask: Mask, batch: tuple[int, ...], axes: tuple[int, int, int], operands: dict[str, Array]) -> Any:
    """What of a `Mask` is seen: booleans, a `BlockMask`, or None for all; the weights go to the bias.

    A key that a sampler kept with probability w stands for 1 / w of its kind: its logit gets -log(w).
    """
    whole = (math.prod(batch), *axes)
    if mask.shape[2:] != axes[1:] or any(n not in (1, full) for n, full in zip(mask.shape, whole, strict=True)):
        raise ValueError(f"mask must be a Mask of shape {whole} (B and H may be 1), got {mask.shape}")
    if mask.kind == "full":
        return None
    if mask.kind == "empty":
        return jnp.zeros((1, 1, 1), bool)
    known = not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask))
    if mask.kind == "sparse" and known and math.prod(mask.shape) > _DENSE:
        return BlockMask.from_mask(mask)
    weights = mask.to_dense() if mask.overflow is None else mask.to_dense(jnp.float32)  # which has a NaN to tell it by
    weights = weights.reshape(*(batch if mask.shape[0] > 1 else (1,) * len(batch)), *mask.shape[1:])
    seen = weights if weights.dtype == jnp.bool_ else weights != 0
    if mask.dtype == jnp.bool_:
        return seen
    dtype = jnp.float64 if weights.dtype == jnp.float64 else jnp.float32
    correction = _bias(-jnp.log(jnp.where(seen, weights, 1).astype(dtype)), batch, axes)
    with jax.numpy_dtype_promotion("standard"):
        operands["bias"] = operands.get("bias", 0) + correction
    return seen


def _integers(name: str, x: Any, batch: tuple[int, ...], axes: tuple[int, ...], wanted: str) -> Array:
    if _integer(x):
        x = np.asarray(x)
    if not isinstance(x, Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers {wanted}, got {_describe(x)}")
    return _flat(name, x, batch, axes, wanted).astype(jnp.int32)


def _segments(q_ids: Any, kv_ids: Any, batch: tuple[int, ...], seqlen_q: int, seqlen_k: int) -> dict[str, Array]:
    if q_ids is None and kv_ids is None:
        return {}
    if q_ids is None or (kv_ids is None and seqlen_q != seqlen_k):
        missing = "q_segment_ids" if q_ids is None else "kv_segment_ids"
        raise ValueError(
            f"q_segment_ids and kv_segment_ids go together, got no {missing} (only kv_segment_ids may be left out, and "
            f"only where Sq == Sk; here Sq = {seqlen_q}, Sk = {seqlen_k})"
        )
    q_ids = _integers("q_segment_ids", q_ids, batch, (seqlen_q,), "[*batch, seqlen_q]")
    if kv_ids is None:
        kv_ids = q_ids
    else:
        kv_ids = _integers("kv_segment_ids", kv_ids, batch, (seqlen_k,), "[*batch, seqlen_k]")
    return {"q_segments": q_ids[:, None, :, None], "kv_segments": kv_ids[:, None, None, :]}


def _per_head(name: str, x: Any, batch: tuple[int, ...], heads: int, dtype: Any) -> Array:
    wanted = "[*batch, heads]" if name == "alibi_slopes" else "[heads]"
    if not isinstance(x, Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array {wanted}, got {_describe(x)}")
    x = _flat(name, x, batch, (heads,), wanted)[:, :, None, None]
    return x.astype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """How far to the left and right of its position a row sees."""
    if window is None or _integer(window):
        window = (window, window)
    if not isinstance(window, tuple | list) or len(window) != 2 or not all(n is None or _integer(n) for n in window):
        raise TypeError(
            f"window_size must be an integer, a pair (left, right) of integers or None (no bound), got {window!r}"
        )
    if any(n is not None and n < 0 for n in window):
        raise ValueError(f"window_size must not be negative, got {tuple(window)}; None means that there is no bound")
    left, right = (None if n is None else min(int(n), _FAR) for n in window)
    return left, 0 if causal else right


def _alignment(alignment: Any) -> Alignment:
    if alignment not in get_args(Alignment):
        raise ValueError(f"causal_alignment must be one of {get_args(Alignment)}, got {alignment!r}")
    return alignment


def _soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    if not isinstance(cap, numbers.Real) or isinstance(cap, bool):
        raise TypeError(f"logits_soft_cap must be a number (it is static under jit) or None, got {_describe(cap)}")
    cap = float(cap)
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"logits_soft_cap must be positive and finite, got {cap}; None means that there is none")
    return cap


def _rate(rate: Any) -> float:
    if not isinstance(rate, numbers.Real) or isinstance(rate, bool):
        raise TypeError(f"dropout_rate must be a number (it is static under jit), got {_describe(rate)}")
    rate = float(rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be at least 0 and below 1, got {rate}")
    return rate


def _dropout_keys(seed: Any, batch: tuple[int, ...], heads: int) -> dict[str, Array]:
    """Philox keys `[1|B, 1|H, 1, 1]`."""
    size = math.prod(batch)
    if seed is None:
        raise ValueError("dropout_rate > 0 needs a dropout_seed: an integer, a PRNG key, or integers [*batch, heads]")
    if _integer(seed):
        words = np.uint32(int(seed) & 0xFFFFFFFF), np.uint32(int(seed) >> 32 & 0xFFFFFFFF)
    elif isinstance(seed, Array | np.ndarray) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape != ():
            raise ValueError(f"dropout_seed must be a single PRNG key, got keys of shape {seed.shape}")
        data = jax.random.key_data(seed)
        words = data[0], data[-1]
    elif not isinstance(seed, Array | np.ndarray) or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(
            f"dropout_seed must be an integer, a PRNG key, or an array of integers [*batch, heads], "
            f"got {_describe(seed)}"
        )
    elif seed.ndim == 0:
        wide = jnp.asarray(seed) if seed.dtype.itemsize >= 4 else jnp.asarray(seed, jnp.int32)
        words = wide.astype(jnp.uint32), (wide >> 16 >> 16).astype(jnp.uint32)
    elif seed.ndim == 1 and seed.shape == (2,) and seed.dtype == jnp.uint32:  # an old-style jax.random.PRNGKey
        words = seed[0], seed[1]
    elif seed.ndim == 1:
        raise ValueError(
            f"dropout_seed as an array needs at least 2 axes [*batch, heads] (each 1 or full), got shape {seed.shape}"
        )
    else:
        own = seed[0] if not batch and seed.ndim == 2 and seed.shape[0] == 1 else seed
        key = _flat("dropout_seed", own, batch, (heads,), "[*batch, heads]").astype(jnp.uint32)[:, :, None, None]
        return {"dropout_key0": key, "dropout_key1": jnp.zeros_like(key)}
    key0, key1 = dropout.keys(words, size, heads)
    return {"dropout_key0": key0, "dropout_key1": key1}


def _scale(scale: Any, q: Array) -> tuple[Array, Array]:
    """The softmax scale as a non-negative operand, and q with the scale's sign: kernels count on max(s) * scale."""
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        if not math.isfinite(scale):
            raise ValueError(f"softmax_scale must be finite, got {scale}")
        return jnp.full((1, 1, 1, 1), abs(float(scale)), dtype), -q if float(scale) < 0 else q
    if not isinstance(scale, Array | np.ndarray) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"softmax_scale must be a number or a 0-d floating array, got {_describe(scale)}")
    if scale.shape != ():
        raise ValueError(f"softmax_scale must be a single number, got an array of shape {scale.shape}")
    scale = jnp.asarray(scale).astype(dtype).reshape(1, 1, 1, 1)
    negative = scale < 0
    return jnp.where(negative, -scale, scale), jnp.where(negative.reshape(()), -q, q)


def static_scale(scale: Any) -> float | None:
    """`softmax_scale` where it is part of a cache's key, so a plain number."""
    if scale is None or (isinstance(scale, numbers.Real) and not isinstance(scale, bool)):
        return None if scale is None else float(scale)
    raise TypeError(f"softmax_scale must be a number here, got {_describe(scale)}; flash_attention takes a traced one")


def _boolean(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False (it is static under jit), got {_describe(x)}")
    return bool(x)


def _describe(x: Any) -> str:
    return f"{type(x).__name__} of dtype {x.dtype.name}" if hasattr(x, "dtype") else repr(x)


# How it runs.


def check_implementation(implementation: Any) -> Implementation | None:
    """`implementation` itself, if it is one."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f'implementation must be "triton", "xla" or None (choose), got {implementation!r}')
    return implementation


def check_block_size(name: str, n: Any) -> None:
    """Raises unless n is None or a block size."""
    if n is not None and not (_integer(n) and 16 <= n <= _MAX_BLOCK and n & (n - 1) == 0):
        raise ValueError(f"{name} must be a power of two from 16 to {_MAX_BLOCK}, or None (tuned), got {n!r}")


def _integer(n: Any) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def _configs(config: Any, block_ptr: Any, implementation: Implementation | None) -> tuple[Config, ...]:
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
    if config.num_stages is not None and not (_integer(config.num_stages) and 1 <= config.num_stages <= 8):
        raise ValueError(f"config.num_stages must be from 1 to 8, or None (tuned), got {config.num_stages!r}")
    if config.maxnreg is not None and not (_integer(config.maxnreg) and 24 <= config.maxnreg <= 255):
        raise ValueError(f"config.maxnreg must be from 24 to 255, or None (no bound), got {config.maxnreg!r}")
    if config.precision not in get_args(Precision):
        raise ValueError(f"config.precision must be one of {get_args(Precision)}, got {config.precision!r}")
    if block_ptr is not None:
        if config.block_ptr not in (None, block_ptr):
            raise ValueError(f"block_ptr={block_ptr} contradicts config.block_ptr={config.block_ptr}; give one of them")
        config = dataclasses.replace(config, block_ptr=block_ptr)
    if implementation == "xla":
        for field in ("num_warps", "num_stages", "maxnreg", "block_ptr"):
            if getattr(config, field) is not None:
                raise ValueError(
                    f'{field} speaks to the Triton kernels and means nothing to implementation="xla", '
                    f"got {field}={getattr(config, field)!r}; leave one of them out"
                )
    return config


def _check_implementation_fits(call: Call, q: Array, v: Array) -> None:
    dtype = q.dtype
    if call.implementation == "triton" and dtype == jnp.float64:
        raise TypeError('implementation="triton" has no float64, got float64 q, k and v; use "xla", or cast them')
    for config in call.configs:
        if not config.block_ptr:
            continue
        for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
            if width * dtype.itemsize % 16:
                raise ValueError(
                    f"block_ptr=True needs rows of a multiple of 16 bytes, got head_dim {width} of {name} in "
                    f"{dtype.name}; "
                    f"use block_ptr=None or False, or pad to a multiple of {16 // dtype.itemsize}"
                )


def block_ptr_from(value: str | None) -> bool | None:
    """The value of `FLASH_ATTN_BLOCK_PTR`."""
    if value not in (None, "", "0", "1"):
        raise ValueError(
            f'FLASH_ATTN_BLOCK_PTR must be "1" (tensor descriptors), "0" (pointers) or unset (tuned), got {value!r}'
        )
    return {"1": True, "0": False}.get(value or "")


# Errors that only show once something is lowered for a platform.


def missing_triton_error(cause: ImportError) -> ImportError:
    """The GPU extras are not installed."""
    return ImportError(
        f'the Triton kernels need jax-triton and triton ({cause}): pip install "jax_flash_attn2[cuda13]" '
        f"(or [cuda12]), "
        f'or pass implementation="xla"'
    )


def higher_order_error() -> TypeError:
    """A derivative was asked for that the kernels do not have."""
    return TypeError(
        "flash_attention has one derivative, in reverse mode; for forward mode (jvp, jacfwd), hessians and gradients "
        "of gradients pass higher_order=True"
    )


def no_gradient_of_weights_error() -> TypeError:
    """The weights of a block mask depend on what is differentiated."""
    return TypeError(
        "mask is a BlockMask whose weights have no gradient, got weights that one is asked for; pass a Mask (whose "
        "weights have one), or make it of jax.lax.stop_gradient(weights)"
    )


def not_on_this_platform_error() -> ValueError:
    """The kernels were insisted on where there is no GPU."""
    return ValueError(
        'implementation="triton" runs on GPUs, and this is being lowered for another platform. Leave it None for the '
        "XLA path, or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow)"
    )


def shared_memory_error(kernel: str, config: Tuned, used: int, target: Target) -> ValueError:
    """A tile is too large for the chip."""
    return ValueError(
        f"{kernel} with block_m={config.block_m}, block_n={config.block_n}, num_stages={config.num_stages} "
        f"needs {used} bytes of shared memory, but {target.name} has {target.shared_memory} per block; "
        f"use smaller block sizes or fewer stages, or leave them None (tuned)"
    )
