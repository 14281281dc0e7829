"""Which keys dropout keeps: a function of key, position and column alone, so that tiles of any size agree."""

import triton
import triton.language as tl

from .tile import load_scalar


@triton.jit
def keep(
    x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):  # fmt: skip
    """A tile [M, N], or [N, M], of whether a row keeps a key: Philox4x32-10 (Salmon et al., SC 2011), 4 keys a call."""
    low = load_scalar(x, here.b, here.h, SPEC.dropout_key0, SPEC).to(tl.uint64)
    high = load_scalar(x, here.b, here.h, SPEC.dropout_key1, SPEC).to(tl.uint64)
    positions = (start_m + here.offset + tl.arange(0, M)).to(tl.uint32, bitcast=True)
    quads = (start_n // 4 + tl.arange(0, N // 4)).to(tl.uint32, bitcast=True)
    if TRANSPOSED:
        c0, c1 = tl.broadcast(positions[None, :], quads[:, None])
    else:
        c0, c1 = tl.broadcast(positions[:, None], quads[None, :])
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(low | (high << 32), c0, c1, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., a, b] is word 2 a + b
    if TRANSPOSED:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (N, M))
    else:
        words = tl.reshape(words, (M, N))
    return words.to(tl.int64) >= SPEC.drop_threshold


@triton.jit
def drop(tile, keeps, SPEC: tl.constexpr):
    """What dropout leaves of a tile, scaled so that its mean stays."""
    return tl.where(keeps, tile * SPEC.keep_scale, 0.0)
