"""Tiles of dense arrays, in and out of memory: the only code that tells a pointer from a descriptor.

Arrays are dense and row-major, as JAX hands them over, so strides follow from the shape and none is an argument.
Offsets are computed from a 64-bit base, so no array is too long for them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def program(blocks, HEADS: tl.constexpr, REVERSED: tl.constexpr):
    """This program's block, batch and head. The blocks of one head run side by side, so they share its K and V."""
    pid = tl.program_id(0)
    block = pid % blocks
    if REVERSED:
        block = blocks - 1 - block
    return block, pid // blocks // HEADS, pid // blocks % HEADS


@triton.jit
def open_rows(
    x, b, seqlen, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CFG: tl.constexpr
):
    """x of shape [B, seqlen, H, D] as `load_rows` wants it: block-ptr makes a descriptor unless the host has."""
    if CFG.block_ptr and not isinstance(x, tl.tensor_descriptor):
        width: tl.constexpr = H * D
        # Batches before b and b itself: the bound matters, batches after b are not looked at.
        return tl.make_tensor_descriptor(
            x, [b + 1, seqlen, H, D], [tl.cast(seqlen, tl.int64) * width, width, D, 1], [1, ROWS, 1, COLS]
        )
    else:
        return x


@triton.jit
def row_offsets(b, h, start, seqlen, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the tile [b, start:start+ROWS, h, :] starts, its [ROWS, COLS] offsets from there, and the indices."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    base = (tl.cast(b, tl.int64) * seqlen + start) * (H * D) + h * D
    return base, rows * (H * D) + cols, rows, cols


@triton.jit
def load_rows(
    x, b, h, start, seqlen,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """x[b, start:start+ROWS, h, :COLS] of an array [B, seqlen, H, D]; past seqlen (if RAGGED) and past D reads 0."""
    if isinstance(x, tl.tensor_descriptor):  # strides and bounds live in the descriptor
        return x.load([b, start, h, 0]).reshape(ROWS, COLS)
    else:
        base, offsets, rows, cols = row_offsets(b, h, start, seqlen, H, D, ROWS, COLS)
        if RAGGED and COLS > D:
            return tl.load(x + base + offsets, mask=(start + rows < seqlen) & (cols < D), other=0.0)
        elif RAGGED:
            return tl.load(x + base + offsets, mask=start + rows < seqlen, other=0.0)
        elif COLS > D:
            return tl.load(x + base + offsets, mask=cols < D, other=0.0)
        else:
            return tl.load(x + base + offsets)


@triton.jit
def store_rows(x, tile, b, h, start, seqlen, H: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_rows`; rows past seqlen and columns past D are dropped."""
    base, offsets, rows, cols = row_offsets(b, h, start, seqlen, H, D, tile.shape[0], tile.shape[1])
    tl.store(x + base + offsets, tile.to(x.dtype.element_ty), mask=(start + rows < seqlen) & (cols < D))


@triton.jit
def load_vector(x, b, h, start, seqlen, H: tl.constexpr, ROWS: tl.constexpr, PAST: tl.constexpr = 0.0):
    """x[b, h, start:start+ROWS] of an array [B, H, seqlen]; reads PAST past seqlen."""
    rows = tl.arange(0, ROWS)
    return tl.load(x + (tl.cast(b, tl.int64) * H + h) * seqlen + start + rows, mask=start + rows < seqlen, other=PAST)


@triton.jit
def store_vector(x, vector, b, h, start, seqlen, H: tl.constexpr):
    """The inverse of `load_vector`."""
    rows = tl.arange(0, vector.shape[0])
    tl.store(x + (tl.cast(b, tl.int64) * H + h) * seqlen + start + rows, vector, mask=start + rows < seqlen)


@triton.jit
def bias_offsets(b, h, rows, cols, seqlen_q, seqlen_k, SPEC: tl.constexpr):
    """Where a bias plane of (b, h) starts, the offsets of rows and cols in it, and which of them exist.

    rows and cols are indices that broadcast against each other, in either order: [M, 1] and [1, N] or
    [1, M] and [N, 1]. An axis along which the bias is broadcast has length 1 and takes no part.
    """
    height, width = 1, 1
    if SPEC.bias_rows:
        height = seqlen_q
    if SPEC.bias_cols:
        # A power of two known to divide the row stride lets a tile be read in wide words.
        width = seqlen_k // SPEC.multiple_k * SPEC.multiple_k
    plane = tl.zeros((), tl.int64)
    if SPEC.bias_batch:
        plane += tl.cast(b, tl.int64) * (SPEC.heads if SPEC.bias_heads else 1)
    if SPEC.bias_heads:
        plane += h
    offsets = tl.zeros_like(rows).to(tl.int64)
    inside = rows >= 0
    if SPEC.bias_rows:
        offsets += rows.to(tl.int64) * width
        inside &= rows < seqlen_q
    if SPEC.bias_cols:
        offsets = offsets + cols
        inside = inside & (cols < seqlen_k)
    return plane * height * width, offsets, inside


@triton.jit
def load_bias(bias, b, h, rows, cols, seqlen_q, seqlen_k, SPEC: tl.constexpr):
    """bias[b, h, rows, cols] as base-2 logits, broadcast to the tile; reads 0 outside the array."""
    base, offsets, inside = bias_offsets(b, h, rows, cols, seqlen_q, seqlen_k, SPEC)
    return tl.load(bias + base + offsets, mask=inside, other=0.0).to(tl.float32) * LOG2E
