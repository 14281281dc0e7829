"""One argument each: checked, and brought into the form that all else takes. The messages are here.

A message names the argument, says what was wanted, what came, and what to do about it.
"""

import functools
import math
import numbers
import pathlib
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import dropout
from .known import sent

Implementation = Literal["triton", "xla"]
Alignment = Literal["top_left", "bottom_right"]
WindowSize = int | tuple[int | None, int | None]
AnyArray = Array | np.ndarray
"""An array of JAX's, traced ones too, or of NumPy's."""

INT32 = np.iinfo(np.int32)
DTYPES = ("float16", "bfloat16", "float32", "float64")
KERNEL_HEAD_DIM = 256  # wider rows would leave no registers to the backward pass
MAX_HEAD_DIM = 1024
FAR = 2**30  # a bound that no index reaches, and that can be added to one


def accumulator(dtype: Any) -> np.dtype:
    """What sums of numbers of this dtype are kept in: fp64 for fp64, else fp32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def array(name: str, x: Any) -> Array:
    """q, k or v: a floating array."""
    if not isinstance(x, Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if x.dtype.name not in DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(DTYPES)}, got {x.dtype.name}; cast it first")
    check_static(name, x)
    return jnp.asarray(x)


def check_static(name: str, x: Any) -> None:
    """Raises if some length of an array is no number but a symbol, as `jax.export.symbolic_shape` makes them."""
    if not all(isinstance(n, int) for n in x.shape):
        shape = ", ".join(map(str, x.shape))
        raise ValueError(
            f"{name} must have a static shape, as tiles are counted when a call is traced, got symbolic lengths "
            f"[{shape}]; export once for each shape"
        )


def check_shapes(q: Array, k: Array, v: Array) -> None:
    """Raises unless q, k and v fit each other."""
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
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name} must be from 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}")
    if heads == kv_heads > _MANY_HEADS and max(q.shape[-3], k.shape[-3]) < heads:
        _say_swapped(q.shape)


_MANY_HEADS = 128
"""No model has more for its keys and values. With more of them than rows and keys, the axes are likely others than the
caller thinks; few rows over a long cache, and latent keys, are not meant."""


_NOT_THE_CALLER = (str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(jax.__file__).parent))


@functools.cache
def _say_swapped(shape: tuple[int, ...]) -> None:
    """Once for each shape."""
    warnings.warn(
        f"q of shape {shape} was read as [..., sequence, heads, head_dim], as in jax.nn: {shape[-3]} rows of "
        f"{shape[-2]} heads. If it is [..., heads, sequence, head_dim], pass jnp.swapaxes(x, -3, -2) of q, k and v",
        skip_file_prefixes=_NOT_THE_CALLER,
    )


def flat(name: str, x: Any, batch: tuple[int, ...], axes: tuple[int, ...], wanted: str, hint: str = "") -> Array:
    """x, which broadcasts to `[*batch, *axes]`, with its batch axes made one: `[1 or B, *(1 or axis)]`."""
    full = (*batch, *axes)
    own = (1,) * (len(full) - x.ndim) + x.shape
    if len(own) != len(full) or any(n not in (1, m) for n, m in zip(own, full, strict=True)):
        raise ValueError(f"{name} must broadcast to {wanted} = {full} (each axis 1 or full), got shape {x.shape}{hint}")
    rest = own[len(batch) :]
    if math.prod(own[: len(batch)]) != 1:  # batch axes that it has only in part cannot be flattened as they are
        x = jnp.broadcast_to(x, (*batch, *rest))
        return x.reshape(-1 if x.size else math.prod(batch), *rest)
    return jnp.asarray(x).reshape(1, *rest)


LOGITS = "[*batch, heads, seqlen_q, seqlen_k]"


def bias_of(bias: Any, batch: tuple[int, ...], axes: tuple[int, int, int]) -> Array:
    """The bias as `[1|B, 1|H, 1|Sq, 1|Sk]`."""
    if not isinstance(bias, Array | np.ndarray):
        raise TypeError(
            f"bias must be an array, got {type(bias).__name__}"
            f"{'; what says who sees whom is mask=, by name' if callable(bias) or hasattr(bias, 'tiles') else ''}"
        )
    if bias.dtype.name not in DTYPES:
        raise TypeError(
            f"bias must have one of the dtypes {', '.join(DTYPES)}, got {bias.dtype.name}"
            f"{'; pass booleans as mask' if bias.dtype == jnp.bool_ else '; cast it first'}"
        )
    return flat("bias", bias, batch, axes, LOGITS, _of_all_heads("bias", bias, batch, axes))


def mask_of(mask: Any, batch: tuple[int, ...], axes: tuple[int, int, int]) -> Array:
    """A mask of booleans as `[1|B, 1|H, 1|Sq, 1|Sk]`."""
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
    padding = len(batch) == 1 and mask.shape == (*batch, axes[2])
    hint = "; of padding, [batch, seqlen_k], pass mask[:, None, None, :], or kv_lengths" if padding else ""
    return flat("mask", mask, batch, axes, LOGITS, hint or _of_all_heads("mask", mask, batch, axes))


def _of_all_heads(name: str, x: Any, batch: tuple[int, ...], axes: tuple[int, int, int]) -> str:
    """What to write for one that lacks the axis of heads, and would be taken to lack that of batches."""
    whole = len(batch) == 1 and x.shape == (*batch, *axes[1:])
    return f"; of [batch, seqlen_q, seqlen_k], the same for all heads, pass {name}[:, None]" if whole else ""


def integer_array(name: str, x: Any, wanted: str = "") -> Any:
    """x itself, if it is an array of integers."""
    if not are_integers(x):
        raise TypeError(f"{name} must be an array of integers{wanted and ' '}{wanted}, got {describe(x)}")
    return x


def int32_array(name: str, x: Any, wanted: str = "") -> Any:
    """x itself, if it is an array of integers that, as far as is known, int32 holds."""
    x = integer_array(name, x, wanted)
    if is_wide(x.dtype) and x.size and _is_here(x):
        values = np.asarray(x)
        least, largest = int(values.min()), int(values.max())
        if least < INT32.min or largest > INT32.max:
            raise ValueError(f"{name} must fit int32, got values from {least} to {largest}; number them anew, from 0")
    return x


def flags(name: str, x: Any, wanted: str) -> Any:
    """x itself, if it is an array of booleans, or of integers, of which those that are not 0 mean True."""
    if not is_array(x) or not (x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} must be an array of booleans or integers {wanted}, got {describe(x)}")
    return x


def is_array(x: Any) -> bool:
    """Whether x is an array of JAX's or of NumPy's."""
    return isinstance(x, Array | np.ndarray)


def _is_here(x: Any) -> bool:
    """Whether an array's values can be looked at: it is not traced, nor in part another process's."""
    return isinstance(x, np.ndarray) or (not isinstance(x, jax.core.Tracer) and x.is_fully_addressable)


def are_integers(x: Any) -> bool:
    """Whether x is an array of integers."""
    return isinstance(x, Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.integer)


def is_wide(dtype: Any) -> bool:
    """Whether it has numbers that int32 does not."""
    return jnp.iinfo(dtype).max > INT32.max


def per_head(name: str, x: Any, batch: tuple[int, ...], heads: int, dtype: Any) -> Array:
    """Sinks or ALiBi slopes as `[1|B, 1|H, 1, 1]` in fp32 (fp64)."""
    wanted = "[*batch, heads]" if name == "alibi_slopes" else "[heads]"
    if not isinstance(x, Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array {wanted}, got {describe(x)}")
    x = flat(name, x, batch, (heads,), wanted)[:, :, None, None]
    return x.astype(accumulator(dtype))


def window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """How far to the left and right of its position a row sees."""
    left, right = window_pair("window_size", window)
    return left, 0 if causal else right


def window_pair(name: str, window: Any) -> tuple[int | None, int | None]:
    """A window named `name` as (left, right), which do not count a row's own position; an integer is both."""
    pair = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(n is None or is_integer(n) for n in pair):
        raise TypeError(
            f"{name} must be an integer, a pair (left, right) of integers or None (no bound), and is static under jit, "
            f"got {window!r}"
        )
    if any(n is not None and n < 0 for n in pair):
        raise ValueError(f"{name} must not be negative, got {window!r}; None means that there is no bound")
    left, right = (None if n is None else min(int(n), FAR) for n in pair)
    return left, right


def alignment(alignment: Any) -> Alignment:
    """`causal_alignment` itself, if it is one."""
    if alignment not in get_args(Alignment):
        raise ValueError(f"causal_alignment must be one of {get_args(Alignment)}, got {alignment!r}")
    return alignment


def rate(rate: Any) -> float:
    """`dropout_rate` as a float."""
    if not is_number(rate):
        raise TypeError(f"dropout_rate must be a number (it is static under jit), got {describe(rate)}")
    rate = as_float(rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be at least 0 and below 1, got {rate}")
    return rate


def dropout_keys(seed: Any, batch: tuple[int, ...], heads: int) -> dict[str, Array]:
    """Philox keys `[1|B, 1|H, 1, 1]`."""
    size = math.prod(batch)
    if seed is None:
        raise ValueError("dropout_rate > 0 needs a dropout_seed: an integer, a PRNG key, or integers [*batch, heads]")
    if is_integer(seed):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"dropout_seed must be an integer of 64 bits, got {seed}; take it modulo 2**64")
        words = tuple(sent(np.uint32(int(seed) >> shift & 0xFFFFFFFF)) for shift in (0, 32))
    elif isinstance(seed, Array | np.ndarray) and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape != ():
            raise ValueError(f"dropout_seed must be a single PRNG key, got keys of shape {seed.shape}")
        words = _words_of_key(seed)
    elif not isinstance(seed, Array | np.ndarray) or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(
            f"dropout_seed must be an integer, a PRNG key, or an array of integers [*batch, heads], "
            f"got {describe(seed)}"
        )
    elif seed.ndim == 0:
        words = _words(seed, of_sign=True)
    elif seed.ndim == 1 and seed.shape == (2,) and seed.dtype == jnp.uint32:  # an old-style jax.random.PRNGKey
        words = _pair(seed)
    elif seed.ndim == 1:
        raise ValueError(
            f"dropout_seed as an array needs at least 2 axes [*batch, heads] (each 1 or full), got shape {seed.shape}"
        )
    else:
        own = seed.reshape(seed.shape[1:]) if not batch and seed.ndim == 2 and seed.shape[0] == 1 else seed
        words = _words(own, of_sign=False)
        key0, key1 = (flat("dropout_seed", x, batch, (heads,), "[*batch, heads]")[:, :, None, None] for x in words)
        return {"dropout_key0": key0, "dropout_key1": key1}
    key0, key1 = _keys(words, size, heads)
    return {"dropout_key0": key0, "dropout_key1": key1}


_pair = jax.jit(lambda words: (words[0], words[1]), inline=True)
_words_of_key = jax.jit(lambda key: tuple(jax.random.key_data(key)[at] for at in (0, -1)), inline=True)
_keys = jax.jit(dropout.keys, static_argnums=(1, 2), inline=True)


def _words(seed: Any, *, of_sign: bool) -> tuple[Any, Any]:
    """The low and the high 32 bits. The high ones of shorter integers are 0, or those of their sign."""
    if not isinstance(seed, np.ndarray):
        return _words_of(seed, of_sign)
    wide = seed if seed.dtype.itemsize == 8 else seed.astype(np.int64)
    high = wide >> 32 if of_sign or wide is seed else wide * 0
    return (wide & 0xFFFFFFFF).astype(np.uint32), (high & 0xFFFFFFFF).astype(np.uint32)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _words_of(seed: Array, of_sign: bool) -> tuple[Array, Array]:
    seed = seed if seed.dtype.itemsize >= 4 else seed.astype(jnp.int32)
    high = (seed >> 16 >> 16).astype(jnp.uint32)
    return seed.astype(jnp.uint32), high if of_sign or seed.dtype.itemsize == 8 else jnp.zeros_like(high)


def is_number(x: Any) -> bool:
    """Whether x is a number of Python's or of NumPy's, and no bool."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def as_float(x: Any) -> float:
    """x as a float; an integer that no float is close to is infinite."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def four_lengths(name: str, shape: Any) -> tuple[int, int, int, int]:
    """A mask's shape."""
    if not isinstance(shape, Sequence) or len(shape) != 4 or not all(is_integer(n) and n >= 0 for n in shape):
        raise ValueError(f"{name} must be four lengths (B, H, Sq, Sk), got {shape!r}")
    batch, heads, seqlen_q, seqlen_k = map(int, shape)
    return batch, heads, seqlen_q, seqlen_k


def boolean(name: str, x: Any) -> bool:
    """x as a bool, if it is one."""
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False (it is static under jit), got {describe(x)}")
    return bool(x)


def booleans(**given: Any) -> None:
    """Raises unless all of these arguments are `boolean`: of those that are asked before all else is checked."""
    for name, x in given.items():
        boolean(name, x)


def describe(x: Any) -> str:
    """What came, for a message."""
    if hasattr(x, "dtype"):
        return f"{type(x).__name__} of dtype {getattr(x.dtype, 'name', x.dtype)}"
    return reprlib.repr(x)


def is_integer(n: Any) -> bool:
    """Whether n is an integer, and no bool."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool)
