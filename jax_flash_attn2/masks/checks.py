"""What a `Mask` is given, checked: dtypes, sizes, weights, shapes that go together."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments, known

Mode = Literal["sparse", "dense"]

_DTYPES = ("bool", "float16", "bfloat16", "float32", "float64")
MAX_SIZE = 2**31 - 1
"""Places among entries are int32."""


def dtype_of(dtype: Any) -> np.dtype:
    """A dtype that weights may have."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if dtype.name not in _DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype.name}")
    return dtype


def wider(a: Any, b: Any) -> np.dtype:
    """The dtype that holds both, also where JAX is set to refuse to choose one."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def size_of(size: Any) -> int:
    """A number of entries."""
    if not arguments.is_integer(size) or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size must be an int from 0 to {MAX_SIZE}, or None, got {size!r}")
    return int(size)


def check_mode(mode: Any) -> None:
    """Raises unless it is a mode."""
    if mode not in get_args(Mode):
        raise ValueError(f'mode must be "sparse" or "dense", got {mode!r}')


def check_size(name: str, n: int, instead: str) -> None:
    """Raises where the places among n entries do not fit an int32."""
    if n > MAX_SIZE:
        raise ValueError(f"{name} of a sparse mask must be at most {MAX_SIZE} (int32), got {n}; {instead}")


def check_fits(count: int, size: int | None) -> None:
    """Raises where there are more entries than room."""
    if size is not None and count > size:
        raise ValueError(f"size must be at least the number of entries, {count}, got {size}; give more, or None")


def weights_of(name: str, x: Any) -> Array:
    """x as a JAX array, if its dtype is one of weights and, as far as is known, all are in [0, 1]."""
    if not isinstance(x, Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    if x.dtype.name not in _DTYPES:
        raise TypeError(f"{name} must be bool or floating, got {x.dtype.name}; compare with 0, or cast it")
    if known.is_known(x) and x.dtype != bool:
        with known.now():
            good = bool(_are_weights(x) if isinstance(x, Array) else ((x >= 0) & (x <= 1)).all())
        if not good:
            values = np.asarray(x)
            at = tuple(map(int, np.argwhere(~((values >= 0) & (values <= 1)))[0]))
            raise ValueError(f"{name} must have weights in [0, 1], got {values[at]} at {at}; clip or divide them")
    return converted(x)


@jax.jit
def _are_weights(x: Array) -> Array:
    return ((x >= 0) & (x <= 1)).all()


def data_of(data: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """The weights of entries of the given shape."""
    if data is None:
        return known.full(1, jnp.dtype(jnp.float32) if dtype is None else dtype_of(dtype), shape)
    data = weights_of("data", data)
    if data.shape != shape:
        raise ValueError(f"data must have the shape of the indices, {shape}, got {data.shape}")
    return data if dtype is None else cast(data, dtype_of(dtype))


def integers(name: str, x: Any) -> Array:
    """x as int32, if it is an array of integers that fit."""
    return converted(arguments.int32_array(name, x), jnp.int32)


def converted(x: Array | np.ndarray, dtype: Any = None) -> Array:
    """x as a JAX array, of known values if they are known: also under jit, which would make a tracer of them."""
    if not known.is_known(x):
        return jnp.asarray(x, dtype)
    with known.now():
        return jnp.asarray(x, dtype)


def cast(x: Array, dtype: Any) -> Array:
    """`x.astype(dtype)`, known if x is."""
    if x.dtype == dtype:
        return x
    if not known.is_known(x):
        return x.astype(dtype)
    with known.now():
        return _cast(x, dtype)


_cast = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)


def fits(shape: tuple[int, ...], onto: tuple[int, ...]) -> bool:
    """Whether a mask of `shape` stands for one of the shape `onto`."""
    return shape[2:] == onto[2:] and all(m in (1, n) for m, n in zip(shape[:2], onto[:2], strict=True))


def common_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The shape that masks of both shapes stand for."""
    batch, heads = (n if m == 1 else m for m, n in zip(a[:2], b[:2], strict=True))
    shape = (batch, heads, a[2], a[3])
    if not (fits(a, shape) and fits(b, shape)):
        raise ValueError(f"other must have the shape {a} (B and H may be 1), got {b}")
    return shape


def times(shape: tuple[int, ...], onto: tuple[int, ...]) -> int:
    """How many times a mask is repeated when it is broadcast."""
    return math.prod(n for m, n in zip(shape[:2], onto[:2], strict=True) if m == 1)
