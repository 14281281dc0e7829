"""Which keys dropout keeps: a function of key, position and column alone, so that tiles of any size agree."""

import triton
import triton.language as tl

from .tile import load_operand, load_scalar, tile_indices


@triton.jit
def keep(
    x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):  # fmt: skip
    """A tile [M, N], or [N, M], of whether a row keeps a key: Philox4x32-10 (Salmon et al., SC 2011), 4 keys a call."""
    low = load_scalar(x, here.b, here.h, SPEC.dropout_key0, SPEC).to(tl.uint64)
    high = load_scalar(x, here.b, here.h, SPEC.dropout_key1, SPEC).to(tl.uint64)
    if SPEC.q_index is not None or SPEC.kv_index is not None:
        return keep_by_index(x, here, low | (high << 32), start_m, start_n, M, N, TRANSPOSED, SPEC)
    i, quad = tile_indices(M, N // 4, TRANSPOSED, SPEC.packed)
    positions = (start_m + here.offset + i).to(tl.uint32, bitcast=True)
    c0, c1 = tl.broadcast(positions, (start_n // 4 + quad).to(tl.uint32, bitcast=True))
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(low | (high << 32), c0, c1, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., a, b] is word 2 a + b
    if TRANSPOSED:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (N, M))
    else:
        words = tl.reshape(words, (M, N))
    return words.to(tl.int64) >= SPEC.drop_threshold


@triton.jit
def keep_by_index(
    x, here, key, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):
    """`keep`, where it is data which row and key an element belongs to: a call for each of them."""
    i, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    row, col = start_m + i, start_n + j
    if SPEC.q_index is not None:
        row = load_operand(x, here, start_m + i, start_n + j, SPEC.q_index, SPEC)
    if SPEC.kv_index is not None:
        col = load_operand(x, here, start_m + i, start_n + j, SPEC.kv_index, SPEC)
    c0, c1 = tl.broadcast((row + here.offset).to(tl.uint32, bitcast=True), (col // 4).to(tl.uint32, bitcast=True))
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, zero, zero)
    which = col % 4
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return word.to(tl.int64) >= SPEC.drop_threshold


@triton.jit
def drop(tile, keeps, SPEC: tl.constexpr):
    """What dropout leaves of a tile, scaled so that its mean stays."""
    return tl.where(keeps, tile * SPEC.keep_scale, 0.0)
