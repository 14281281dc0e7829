"""Arguments in, dense arrays and a `Call` out. Every check is here, and every message.

A message names the argument, says what was wanted, what came, and what to do about it.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from . import target
from .passes import PASSES
from .spec import Config, Precision, Spec, Tuned
from .target import Target

Implementation = Literal["triton", "xla"]

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MAX_HEAD_DIM = 256
_MAX_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static about one call: what is computed, how, by what and for which GPU."""

    spec: Spec
    configs: tuple[Config, ...]
    """What the caller asked for, for each of `passes.PASSES`."""
    implementation: Implementation | None
    target: Target | None
    """The GPU that an enclosing `gpu_target` names; None: the one that is there."""

    def config(self, name: str) -> Config:
        """What the caller asked of the pass `name`."""
        return self.configs[PASSES.index(name)]

    def wants_triton(self, dtype: Any) -> bool:
        """Whether a GPU runs the kernels; they have no fp64, which is left to XLA unless Triton is insisted on."""
        return self.implementation == "triton" or (self.implementation is None and dtype != jnp.float64)


def prepare(
    q, k, v, bias, *, causal, softmax_scale, implementation, block_ptr, config
) -> tuple[Call, tuple[Array, Array, Array, Array, Array | None], tuple[int, ...]]:
    """Checks the arguments of `flash_attention` and brings them into the form that the primitives take.

    Returns:
      The call; q, k, v as `[B, S, H, D]`, the scale as a non-negative 0-d array, the bias as four axes each
      of length 1 or full; and the batch axes of the results.
    """
    q, k, v = _array("q", q), _array("k", k), _array("v", v)
    _check_shapes(q, k, v)
    batch = q.shape[:-3]
    spec = Spec(
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        v_dim=v.shape[-1],
        causal=_boolean("causal", causal),
        multiple_q=_multiple(q.shape[-3]),
        multiple_k=_multiple(k.shape[-3]),
    )
    if bias is not None:
        bias = _bias(bias, (*batch, spec.heads, q.shape[-3], k.shape[-3]))
        spec = dataclasses.replace(spec, bias_axes=tuple(n > 1 for n in bias.shape))
    implementation = check_implementation(implementation)
    call = Call(spec, _configs(config, block_ptr, implementation), implementation, target.named())
    _check_implementation_fits(call, q.dtype)
    scale, q = _scale(softmax_scale, q)
    q, k, v = (x.reshape(-1 if x.size else math.prod(batch), *x.shape[-3:]) for x in (q, k, v))
    return call, (q, k, v, scale, bias), batch


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


def _multiple(n: int) -> int:
    """The largest power of two up to 128 that divides n."""
    return math.gcd(n, 128) if n else 128


def _bias(bias: Any, shape: tuple[int, ...]) -> Array:
    """A bias that broadcasts to `shape` ([*batch, H, Sq, Sk]), with its batch axes made one."""
    if not isinstance(bias, Array | np.ndarray):
        raise TypeError(f"bias must be an array, got {type(bias).__name__}")
    if bias.dtype.name not in _DTYPES:
        hint = "; a bias is added to the logits, a mask of booleans is jnp.where(mask, 0.0, -jnp.inf)"
        raise TypeError(
            f"bias must have one of the dtypes {', '.join(_DTYPES)}, got {bias.dtype.name}"
            f"{hint if bias.dtype == jnp.bool_ else '; cast it first'}"
        )
    own = (1,) * (len(shape) - bias.ndim) + bias.shape
    if len(own) != len(shape) or any(n not in (1, full) for n, full in zip(own, shape, strict=True)):
        raise ValueError(
            f"bias must broadcast to [*batch, heads, seqlen_q, seqlen_k] = {shape} (each axis 1 or full; the head axis "
            f"counts query heads), got shape {bias.shape}"
        )
    batch = shape[:-3]
    if math.prod(own[:-3]) > 1:  # batch axes that it has only in part cannot be flattened as they are
        bias = jnp.broadcast_to(bias, (*batch, *own[-3:]))
        return bias.reshape(-1 if bias.size else math.prod(batch), *own[-3:])
    return jnp.asarray(bias).reshape(1, *own[-3:])


def _scale(scale: Any, q: Array) -> tuple[Array, Array]:
    """The softmax scale as a non-negative array, and q with the scale's sign: kernels count on max(s) * scale."""
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        if not math.isfinite(scale):
            raise ValueError(f"softmax_scale must be finite, got {scale}")
        return jnp.asarray(abs(scale), dtype), -q if scale < 0 else q
    if not isinstance(scale, Array | np.ndarray) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"softmax_scale must be a number or a 0-d floating array, got {_describe(scale)}")
    if scale.shape != ():
        raise ValueError(f"softmax_scale must be a single number, got an array of shape {scale.shape}")
    scale = jnp.asarray(scale).astype(dtype)
    negative = scale < 0
    return jnp.where(negative, -scale, scale), jnp.where(negative, -q, q)


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


def _check_implementation_fits(call: Call, dtype: Any) -> None:
    if call.implementation == "triton" and dtype == jnp.float64:
        raise TypeError('implementation="triton" has no float64, got float64 q, k and v; use "xla", or cast them')
    for config in call.configs:
        if not config.block_ptr:
            continue
        for name, width in (("q and k", call.spec.head_dim), ("v", call.spec.v_dim)):
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
