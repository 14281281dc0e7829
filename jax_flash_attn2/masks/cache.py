"""Dense causal masks that are built once and then looked up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments, known
from ..base.lru import CacheInfo, Lru

__all__ = ["CacheInfo", "MaskCache", "build_window", "causal_mask", "causal_mask_cache"]

_Key = tuple[int, int, int | None, int | None, int, str]  # Sq, Sk, left, right, offset, dtype


class MaskCache(Lru):
    """The causal (and window) masks last used, one for each (seqlen_q, seqlen_k, window, alignment, dtype).

    A mask holds Sq * Sk elements of its dtype on the default device: 64 MiB in bool at 8192 x 8192, four times that in
    float32. The least recently used go when there are more than `maxsize` of them, or more than `max_bytes` in all; a
    mask that is larger than `max_bytes` by itself is built each time.

    Any number of threads may use one cache; a mask that several ask for at once is built once. Under jit too a call
    gives a concrete array, which is never a tracer and becomes a constant of the program that is being traced: each
    program compiled with it keeps its own copy. There a comparison of indices, which XLA fuses into what uses it, costs
    less memory; what the cache saves is building masks call by call outside of jit, and at every trace.
    """

    def __init__(self, maxsize: int = 32, max_bytes: int = 2**28):
        super().__init__(maxsize, max_bytes)

    def causal(
        self,
        seqlen_q: int,
        seqlen_k: int | None = None,
        *,
        window: "arguments.WindowSize | None" = None,
        causal_alignment: "arguments.Alignment" = "top_left",
        dtype: Any = bool,
    ) -> Array:
        """Row i, at i' = i or i + Sk - Sq ("bottom_right"), sees keys j <= i' that are in its window.

        Args:
          seqlen_q: Sq, at least 0.
          seqlen_k: Sk; Sq if left out.
          window: as `flash_attention`'s window_size: keys j >= i' - left, so left + 1 of them.
          causal_alignment: "top_left" or "bottom_right".
          dtype: bool: True is seen. A floating one: what is added to logits, 0 where seen and -inf elsewhere, so that
            it serves as a bias. (For weights of 1 and 0 cast the bool.)

        Returns:
          `[1, 1, Sq, Sk]` of that dtype.

        Raises:
          TypeError, ValueError: an argument does not fit.
        """
        left, _ = arguments.window_pair("window", window)
        return self.window(seqlen_q, seqlen_k, window=(left, 0), causal_alignment=causal_alignment, dtype=dtype)

    def window(
        self,
        seqlen_q: int,
        seqlen_k: int | None = None,
        *,
        window: "arguments.WindowSize | None",
        causal_alignment: "arguments.Alignment" = "top_left",
        dtype: Any = bool,
    ) -> Array:
        """The same without being causal: keys i' - left <= j <= i' + right. Arguments as of `causal`."""
        key = _key(seqlen_q, seqlen_k, window, causal_alignment, dtype)
        usable = lambda mask: not mask.is_deleted()  # as donating it to a jitted function does
        return self.get(key, lambda: _build(*key), lambda mask: mask.nbytes, usable)


causal_mask_cache = MaskCache()
"""The cache that `causal_mask` and `dense_attention` use."""


def causal_mask(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    window: "arguments.WindowSize | None" = None,
    causal_alignment: "arguments.Alignment" = "top_left",
    dtype: Any = bool,
) -> Array:
    """`MaskCache.causal` of `causal_mask_cache`: `[1, 1, Sq, Sk]`.

    Examples:
      >>> causal_mask(2, 3, causal_alignment="bottom_right")[0, 0]
      Array([[ True,  True, False],
             [ True,  True,  True]], dtype=bool)
    """
    return causal_mask_cache.causal(seqlen_q, seqlen_k, window=window, causal_alignment=causal_alignment, dtype=dtype)


def build_window(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    window: "arguments.WindowSize | None",
    causal_alignment: "arguments.Alignment" = "top_left",
) -> Array:
    """`MaskCache.window` of booleans, without a cache."""
    return _build(*_key(seqlen_q, seqlen_k, window, causal_alignment, bool))


def _build(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, offset: int, dtype: str) -> Array:
    """The mask, now: a concrete array whatever is being traced.

    NumPy builds it, row by row, as each is an interval: for lengths that it meets for the first time XLA would compile
    for longer than that takes.
    """
    hidden, shown = (False, True) if dtype == "bool" else (-np.inf, 0)
    mask = np.full((1, 1, seqlen_q, seqlen_k), hidden, dtype)
    for row, at in enumerate(range(offset, offset + seqlen_q)):
        first = 0 if left is None else max(at - left, 0)
        end = seqlen_k if right is None else max(at + right + 1, 0)
        mask[0, 0, row, first:end] = shown
    with known.now():
        return jax.block_until_ready(jax.device_put(mask))  # what cannot be built fails here, and is not kept


def _key(seqlen_q: Any, seqlen_k: Any, window: Any, alignment: Any, dtype: Any) -> _Key:
    """The arguments, checked; two calls for equal masks by equal means have one key."""
    seqlen_q = _length("seqlen_q", seqlen_q)
    seqlen_k = seqlen_q if seqlen_k is None else _length("seqlen_k", seqlen_k)
    offset = seqlen_k - seqlen_q if arguments.alignment(alignment) == "bottom_right" else 0
    return seqlen_q, seqlen_k, *arguments.window_pair("window", window), offset, _dtype(dtype)


def _length(name: str, n: Any) -> int:
    if not arguments.is_integer(n):
        raise TypeError(f"{name} must be an integer (static under jit: x.shape[1], say), got {n!r}")
    if n < 0:
        raise ValueError(f"{name} must not be negative, got {n}")
    return int(n)


def _dtype(dtype: Any) -> str:
    dtype = jnp.dtype(dtype)
    if dtype != jnp.bool_ and dtype.name not in arguments.DTYPES:
        raise TypeError(
            f"dtype must be bool (True: seen) or, added to logits as 0 or -inf, one of {', '.join(arguments.DTYPES)}, "
            f"got {dtype.name}; for numbers 1 and 0 cast the bool"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(f"dtype {dtype.name} needs jax_enable_x64; switch it on, or ask for float32")
    return dtype.name
