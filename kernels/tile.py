"""Tiles of dense arrays, in and out of memory: the only code that tells a pointer from a descriptor.

Arrays are dense and row-major, as JAX hands them over, so strides follow from the shape and none is an argument.
Offsets are computed from a 64-bit base, so no array is too long for them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# How a tile of rows may end (`load_rows`).
WHOLE, RAGGED, CUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.constexpr_function
def edge(lengths, multiple, rows):
    """How tiles of `rows` rows may end, where a sequence is a multiple of `multiple` long and may have lengths."""
    return 2 if lengths is not None else int(multiple < rows)


@triton.jit
def program(blocks, HEADS: tl.constexpr, REVERSED: tl.constexpr):
    """This program's block, batch and head. The blocks of one head run side by side, so they share its K and V."""
    pid = tl.program_id(0)
    block = pid % blocks
    if REVERSED:
        block = blocks - 1 - block
    return block, pid // blocks // HEADS, pid // blocks % HEADS


@triton.jit
def tile_indices(M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The rows and the keys of a tile, counted from its corner: [M, 1] and [1, N], or [1, M] and [N, 1]."""
    if TRANSPOSED:
        return tl.arange(0, M)[None, :], tl.arange(0, N)[:, None]
    else:
        return tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]


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
    x, b, h, start, seqlen, limit,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """x[b, start:start+ROWS, h, :COLS] of an array [B, seqlen, H, D]; past D reads 0.

    EDGE: no row of the tile is past the end (`WHOLE`); rows past seqlen read 0 (`RAGGED`: limit is seqlen); rows past
    limit, which is any less, read 0 whatever is there (`CUT`).
    """
    if isinstance(x, tl.tensor_descriptor):  # strides and the array's own bounds live in the descriptor
        tile = x.load([b, start, h, 0]).reshape(ROWS, COLS)
        if EDGE == CUT:
            tile = tl.where(start + tl.arange(0, ROWS)[:, None] < limit, tile, 0.0)
        return tile
    else:
        base, offsets, rows, cols = row_offsets(b, h, start, seqlen, H, D, ROWS, COLS)
        if EDGE != WHOLE and COLS > D:
            return tl.load(x + base + offsets, mask=(start + rows < limit) & (cols < D), other=0.0)
        elif EDGE != WHOLE:
            return tl.load(x + base + offsets, mask=start + rows < limit, other=0.0)
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
def plane_number(b, h, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """Which [rows, cols] plane of an operand `[n, 1|H, rows, cols]` (spec.py) belongs to batch b and head h."""
    plane = tl.zeros((), tl.int64)
    if OPERAND.batch == 0:
        plane += b
    elif OPERAND.batch > 1:
        plane += b % OPERAND.batch
    if OPERAND.heads:
        plane = plane * SPEC.heads + h
    return plane


@triton.jit
def operand_offsets(b, h, rows, cols, seqlen_q, seqlen_k, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """Where an operand's plane starts, the offsets of rows and cols in it, and which of them exist.

    rows and cols are indices that broadcast against each other, in either order: [M, 1] and [1, N] or
    [1, M] and [N, 1]. An axis along which the operand does not vary has length 1 and takes no part.
    """
    height, width = 1, 1
    if OPERAND.rows:
        height = seqlen_q
    if OPERAND.cols:
        # A power of two known to divide the row stride lets a tile be read in wide words.
        width = seqlen_k // SPEC.multiple_k * SPEC.multiple_k
    if OPERAND.rows and OPERAND.cols:
        offsets = rows.to(tl.int64) * width + cols
        inside = (rows < seqlen_q) & (cols < seqlen_k)
    elif OPERAND.rows:
        offsets = rows.to(tl.int64)
        inside = rows < seqlen_q
    elif OPERAND.cols:
        offsets = cols.to(tl.int64)
        inside = cols < seqlen_k
    else:
        offsets = tl.zeros_like(rows).to(tl.int64)
        inside = rows >= 0
    return plane_number(b, h, OPERAND, SPEC) * height * width, offsets, inside


@triton.jit
def load_operand(x, here, rows, cols, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """An operand at [here.b, here.h, rows, cols]: a tile that broadcasts to them; reads 0 outside the array."""
    base, offsets, inside = operand_offsets(
        here.b, here.h, rows, cols, here.seqlen_q, here.seqlen_k, OPERAND, SPEC
    )  # fmt: skip
    return tl.load(x[OPERAND.at] + base + offsets, mask=inside, other=0)


@triton.jit
def load_scalar(x, b, h, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """An operand that varies along neither sequence, at [b, h]."""
    return tl.load(x[OPERAND.at] + plane_number(b, h, OPERAND, SPEC))
