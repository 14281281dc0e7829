"""Who sees whom: the only code that knows about causality, windows, segments, lengths and the ends of a sequence."""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import load_operand, plane_number, tile_indices

LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)
"""The numbers that positions may have."""


class Span(NamedTuple):
    """Tiles [begin, full) and [stop, end) are met through the mask, [full, stop) are seen whole, no others are met.

    Of a block mask these are places in its list of tiles.
    """

    begin: tl.tensor
    full: tl.tensor
    stop: tl.tensor
    end: tl.tensor


@triton.jit
def share(span, split, STEP: tl.constexpr, SPLITS: tl.constexpr):
    """A split's part of a span: as many tiles as the others have, or fewer. STEP: from tile to tile."""
    each = tl.cdiv(tl.cdiv(span.end - span.begin, STEP), SPLITS) * STEP
    low = tl.minimum(span.begin + split * each, span.end)
    high = tl.minimum(low + each, span.end)
    full = tl.minimum(tl.maximum(span.full, low), high)
    return Span(low, full, tl.minimum(tl.maximum(span.stop, low), high), high)


@triton.jit
def reckoned(start, rows, here, N: tl.constexpr, SPEC: tl.constexpr):
    """The keys that rows from `start` on meet, where the bounds alone say it."""
    last = tl.minimum(start + rows, here.end_q) - 1
    seen, full = 0, 0
    stop, end = here.end_k, here.end_k
    if SPEC.rules.right is not None:
        end = tl.minimum(end, last + here.offset + SPEC.rules.right + 1)
        stop = tl.minimum(stop, start + here.offset + SPEC.rules.right + 1)
    if SPEC.rules.left is not None:
        seen = tl.maximum(start + here.offset - SPEC.rules.left, 0)
        full = tl.cdiv(tl.maximum(last + here.offset - SPEC.rules.left, 0), N) * N
    begin = seen // N * N
    end = tl.where((start <= last) & (seen < end), end, begin)
    full = tl.minimum(full, end)
    stop = tl.maximum(tl.maximum(stop, 0) // N * N, full)
    return Span(begin, full, tl.minimum(stop, end), end)


@triton.jit
def look_up(x, here, block, blocks, SIZE: tl.constexpr, SPEC: tl.constexpr):
    """The span of a block, from the table [B, 1|H, blocks, 4] in numbers of tiles of `spans.py`, the last of x."""
    plane = here.b
    if SPEC.span_heads:
        plane = here.b * SPEC.heads + here.h
    at = x[SPEC.spans_at] + (plane.to(tl.int64) * blocks + block) * 4
    return Span(tl.load(at) * SIZE, tl.load(at + 1) * SIZE, tl.load(at + 2) * SIZE, tl.load(at + 3) * SIZE)


@triton.jit
def look_up_list(x, here, block, blocks, ENDS: tl.constexpr, PIECES: tl.constexpr, SPEC: tl.constexpr):
    """The places of a block's tiles in the list of a block mask: partial tiles, then full ones. A kernel's own tiles,
    which are what is counted, are PIECES of these."""
    at = x[ENDS.at] + (plane_number(here.b, here.h, ENDS, SPEC) * blocks + block) * 3
    end = tl.load(at + 2) * PIECES
    return Span(tl.load(at) * PIECES, tl.load(at + 1) * PIECES, end, end)


@triton.jit
def key_span(block, start_m, here, x, SPEC: tl.constexpr, CFG: tl.constexpr):
    """The keys that a block of query rows meets, whose first is start_m."""
    ROWS: tl.constexpr = CFG.block_m // SPEC.packed
    if SPEC.reckons:
        return reckoned(start_m, ROWS, here, CFG.block_n, SPEC)
    elif SPEC.listed:
        blocks = tl.cdiv(here.seqlen_q, SPEC.tile_rows)
        return look_up_list(
            x, here, start_m // SPEC.tile_rows, blocks, SPEC.row_ends, SPEC.tile_keys // CFG.block_n, SPEC
        )
    elif SPEC.spans:
        return look_up(x, here, block, tl.cdiv(here.seqlen_q, ROWS), CFG.block_n, SPEC)
    else:
        stop, end = here.seqlen_k, here.seqlen_k
        if SPEC.causal:
            end = tl.minimum(end, start_m + ROWS)
            stop = tl.minimum(stop, start_m + 1)
        return Span(0, 0, stop // CFG.block_n * CFG.block_n, end)


@triton.jit
def query_span(block, here, x, SPEC: tl.constexpr, CFG: tl.constexpr):
    """The query rows that a block of keys meets."""
    start_n = block * CFG.block_n
    if SPEC.listed:
        blocks = tl.cdiv(here.seqlen_k, SPEC.tile_keys)
        return look_up_list(
            x, here, start_n // SPEC.tile_keys, blocks, SPEC.col_ends, SPEC.tile_rows // CFG.block_m, SPEC
        )
    elif SPEC.spans:
        return look_up(x, here, block, tl.cdiv(here.seqlen_k, CFG.block_n), CFG.block_m, SPEC)
    elif SPEC.causal:
        begin = start_n // CFG.block_m * CFG.block_m
        full = tl.cdiv(start_n + CFG.block_n - 1, CFG.block_m) * CFG.block_m
        return Span(tl.minimum(begin, here.seqlen_q), full, here.seqlen_q, here.seqlen_q)
    else:
        return Span(0, 0, here.seqlen_q, here.seqlen_q)


@triton.jit
def phase(span, BARE: tl.constexpr, BEFORE: tl.constexpr, SPEC: tl.constexpr):
    """The bounds of a loop over the tiles seen whole (BARE), or over those met through the mask.

    The latter may lie on both sides of the former, if spans or lists are looked up, and `tile_at` makes the loop jump.
    Else they lie BEFORE it (the rows that meet a key, causally) or after it (the keys that meet a row).
    """
    if BARE:
        return span.full, span.stop
    elif SPEC.spans or SPEC.listed:
        return span.begin, span.end - (span.stop - span.full)
    elif BEFORE:
        return span.begin, tl.minimum(span.full, span.stop)
    else:
        return span.stop, span.end


@triton.jit
def tile_at(
    i, span, x, TILES: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, BARE: tl.constexpr, SPEC: tl.constexpr
):
    """Where the tile starts that a loop within `phase` has come to, and which element mask is its own (-1: none).

    TILES, SIZE: the list of a block mask, and how many rows or keys its tiles have, of which a kernel's has STEP.
    """
    if SPEC.listed:
        at = x[TILES.at] + i // (SIZE // STEP) * 2
        start = tl.load(at) * SIZE + i % (SIZE // STEP) * STEP
        if BARE:
            return start, -1
        else:
            return start, tl.load(at + 1)
    elif BARE or not SPEC.spans:
        return i, -1
    else:
        return i + tl.where(i >= span.full, span.stop - span.full, 0), -1


@triton.jit
def shown_by_bits(
    x, start_m, start_n, part, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):
    """Whether element mask `part` of the block mask shows each element: one bit each, 32 keys to a word."""
    i, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    WORDS: tl.constexpr = SPEC.tile_keys // 32
    first = start_n % SPEC.tile_keys
    words = x[SPEC.tile_bits.at] + (part.to(tl.int64) * SPEC.tile_rows + start_m % SPEC.tile_rows) * WORDS + first // 32
    stored = part >= i * 0  # else all is shown
    word = tl.load(words + i * WORDS, mask=stored, other=-1)
    for n in tl.static_range(1, N // 32):  # a row's words once each, not once for every key
        word = tl.where(j < n * 32, word, tl.load(words + i * WORDS + n, mask=stored, other=-1))
    return ((word >> ((first + j) % 32)) & 1) != 0


@triton.jit
def log_weights(
    x, start_m, start_n, part, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):
    """The logarithms of the weights that the block mask gives the elements of a tile."""
    i, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    at = (start_m % SPEC.tile_rows + i) * SPEC.tile_keys + start_n % SPEC.tile_keys + j
    base = x[SPEC.tile_weights.at] + part.to(tl.int64) * (SPEC.tile_rows * SPEC.tile_keys)
    return tl.load(base + at, mask=part >= at * 0, other=0.0)


@triton.jit
def shown_by_mask(x, here, rows, cols, SPEC: tl.constexpr):
    """Whether the mask shows the elements at these rows and keys."""
    return load_operand(x, here, rows, cols, SPEC.mask, SPEC) != 0


@triton.jit
def positions(
    x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):
    """Where a tile's rows and keys are, as far as causality, windows and distances go: [M, 1] and [1, N], or [1, M] and
    [N, 1]. Counted from the tile's first key, unless they are data."""
    i, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    if SPEC.q_positions is not None:
        own = load_operand(x, here, start_m + i, start_n + j, SPEC.q_positions, SPEC)
        return own, load_operand(x, here, start_m + i, start_n + j, SPEC.kv_positions, SPEC)
    else:
        return i + (start_m + here.offset - start_n), j


@triton.jit
def within_bounds(here, start_m, start_n, i, j, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    """Whether causality, a window and the end of the keys let row i of a tile see key j of it, by index.

    The tile's first axis gets one bound that says all, so that each element takes one comparison with a constant.
    """
    position = start_m + here.offset - start_n  # of row 0, counted from key 0 of the tile
    end = here.end_k - start_n
    if TRANSPOSED and SPEC.kv_lengths is None:  # what keys past the end get is stored nowhere
        seen = i >= (-(1 << 30) if SPEC.rules.right is None else j - (position + SPEC.rules.right))
    elif SPEC.rules.right is None:
        seen = j < end
    elif TRANSPOSED:
        seen = i >= tl.where(j < end, j - (position + SPEC.rules.right), 1 << 30)
    else:
        seen = j <= tl.minimum(i + (position + SPEC.rules.right), end - 1)
    if SPEC.rules.left is None:
        pass
    elif TRANSPOSED:
        seen = seen & (i <= j - (position - SPEC.rules.left))
    else:
        seen = seen & (j >= i + (position - SPEC.rules.left))
    return seen


@triton.jit
def near_enough(
    x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):
    """`within_bounds`, by positions that are data."""
    _, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    own, other = positions(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC)
    seen = start_n + j < here.end_k
    if SPEC.rules.right is not None:
        seen = seen & (other <= tl.minimum(own, MOST - SPEC.rules.right) + SPEC.rules.right)  # which never wraps
    if SPEC.rules.left is not None:
        seen = seen & (other >= tl.maximum(own, LEAST + SPEC.rules.left) - SPEC.rules.left)
    return seen


@triton.jit
def distance(x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    """How far each key of a tile is from the position of each of its rows."""
    own, other = positions(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC)
    if SPEC.q_positions is not None:
        far = tl.maximum(own, other) - tl.minimum(own, other)
        return far.to(tl.uint32, bitcast=True).to(tl.float32)
    else:
        return tl.abs(own - other).to(tl.float32)


@triton.jit
def place_of(x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    """What a function of the caller's is told of a tile: batch, head, rows and keys, as the caller counts them."""
    i, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    b, h = here.b + tl.zeros((), tl.int32), here.h + tl.zeros((), tl.int32)  # tensors, which a loop's number may not be
    row, key = start_m + i, start_n + j
    if SPEC.q_index is not None:
        row = load_operand(x, here, start_m + i, start_n + j, SPEC.q_index, SPEC)
    if SPEC.kv_index is not None:
        key = load_operand(x, here, start_m + i, start_n + j, SPEC.kv_index, SPEC)
    if SPEC.origin is not None:  # where this device's share begins
        at = x[SPEC.origin.at]
        b, h = b + tl.load(at), h + tl.load(at + 1)
        if SPEC.q_index is None:
            row += tl.load(at + 2)
    return b, h, row, key


@triton.jit
def visible(
    x, here, start_m, start_n, part, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr
):
    """Whether each of a tile's rows sees each of its keys: [M, N], or [N, M]. part: its element mask (`tile_at`).

    Of all but the mask (`shown_by_mask`), which is loaded before the product where that may start from it.
    """
    i, j = tile_indices(M, N, TRANSPOSED, SPEC.packed)
    if SPEC.q_positions is not None:
        seen = near_enough(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC)
    else:
        seen = within_bounds(here, start_m, start_n, i, j, TRANSPOSED, SPEC)
    if SPEC.q_segments is not None:
        own = load_operand(x, here, start_m + i, start_n + j, SPEC.q_segments, SPEC)
        other = load_operand(x, here, start_m + i, start_n + j, SPEC.kv_segments, SPEC)
        seen = seen & (own == other) & (own >= 0)
    if SPEC.q_lengths is not None:  # such a row has nothing to say whatever is in it, or in its row of a bias
        seen = seen & (start_m + i < here.end_q)
    if SPEC.mask_function is not None:
        b, h, i, j = place_of(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC)
        seen = seen & SPEC.mask_function.value(0.0, b, h, i, j, x[SPEC.mask_function.at :])
    elif SPEC.listed:
        seen = seen & shown_by_bits(x, start_m, start_n, part, M, N, TRANSPOSED, SPEC)
    return seen
