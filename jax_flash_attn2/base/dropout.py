"""Which keys dropout drops: Philox4x32-10 (Salmon et al. 2011) of the seed, batch, head, row and key, and nothing else.

So every block size, backend and pass drops the same keys, and none of it is kept from one pass to the next. A key j is
dropped from the row at position i' where word `j % 4` of `philox(i', j // 4, 0, 0)` is below a threshold.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what the two words of the key grow by from round to round


def keys(seed: tuple[Any, Any], batch_size: int, heads: int) -> tuple[Array, Array]:
    """The two words of each batch's and head's own key, uint32 `[B, H, 1, 1]`, from the two words of a seed."""
    b = jnp.arange(batch_size, dtype=jnp.uint32)[:, None, None, None]
    h = jnp.arange(heads, dtype=jnp.uint32)[None, :, None, None]
    return philox(b, h, 0, 0, *seed)[:2]


def keep(key0: Array, key1: Array, rows: Array, cols: Array, threshold: int) -> Array:
    """Whether rows at positions `rows` keep keys `cols`: int32, broadcasting against each other and the key's words."""
    words = philox(rows, cols // 4, 0, 0, key0, key1)
    which = cols % 4
    word = jnp.where(which < 2, jnp.where(which == 0, *words[:2]), jnp.where(which == 2, *words[2:]))
    return word >= np.uint32(threshold)


def keep_range(
    key0: Array, key1: Array, rows: Array, start: Any, size: int, threshold: int, *, aligned: bool = False
) -> Array:
    """`keep` for keys `[start, start + size)` along the last axis, where `rows` and the key's words have length 1.

    A call of philox serves four keys here, and one in `keep`. `aligned`: the start is known to be a multiple of 4.
    """
    aligned = aligned or (isinstance(start, int) and start % 4 == 0)
    if not isinstance(start, int):
        # What depends on the row and the key's words alone XLA would compute before a loop over starts, in a kernel for
        # each of the rounds' keys: 20 to compile. Tied to the start it stays in the one that computes the words.
        start, key0, key1, rows = lax.optimization_barrier((start, key0, key1, rows))
    quads = jnp.arange(-(-size // 4) + (not aligned), dtype=jnp.int32)
    quads += lax.div(jnp.asarray(start, jnp.int32), jnp.int32(4))
    kept = [(word >= np.uint32(threshold)).astype(jnp.uint32) for word in philox(rows, quads, 0, 0, key0, key1)]
    packed = kept[0] | kept[1] << 8 | kept[2] << 16 | kept[3] << 24  # a byte each
    # Without the barrier XLA would fuse philox into what unpacks the bytes, and run it for each of them.
    unpacked = lax.bitcast_convert_type(lax.optimization_barrier(packed), jnp.uint8)
    unpacked = unpacked.reshape(*packed.shape[:-1], -1)
    if aligned:
        return unpacked[..., :size] != 0
    return lax.dynamic_slice_in_dim(unpacked, start % 4, size, unpacked.ndim - 1) != 0


def philox(c0, c1, c2, c3, k0, k1) -> tuple[Array, Array, Array, Array]:
    """Four random words for a counter of four words and a key of two: uint32, broadcasting against each other."""
    c0, c1, c2, c3, k0, k1 = (_uint32(x) for x in (c0, c1, c2, c3, k0, k1))
    for i in range(_ROUNDS):
        (high0, low0), (high1, low1) = _multiply(_MULTIPLIERS[0], c0), _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        if i + 1 < _ROUNDS:
            k0, k1 = k0 + np.uint32(_WEYL[0]), k1 + np.uint32(_WEYL[1])
    return c0, c1, c2, c3


def _multiply(a: int, b: Array) -> tuple[Array, Array]:
    """High and low word of a * b. XLA has 64-bit integers whether JAX's x64 is on or not."""
    factor, half = lax.full_like(b, a), lax.full_like(b, 32)
    with jax.enable_x64(True):
        # Constants are widened, not written, as these: they pass through places where x64 is off.
        factor, half, b = (lax.convert_element_type(x, jnp.uint64) for x in (factor, half, b))
        product = factor * b
        return lax.convert_element_type(product >> half, jnp.uint32), lax.convert_element_type(product, jnp.uint32)


def _uint32(x: Any) -> Array:
    """x mod 2**32."""
    return jnp.asarray(np.uint32(x & 0xFFFFFFFF)) if isinstance(x, int) else jnp.asarray(x).astype(jnp.uint32)
