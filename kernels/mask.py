"""Who sees whom: the only code that knows about causality, windows, segments, lengths and the ends of a sequence."""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import load_operand, load_scalar, tile_indices


class Place(NamedTuple):
    """Which plane of logits a program is in, and how its rows and keys lie to each other."""

    b: tl.tensor
    h: tl.tensor
    seqlen_q: tl.tensor
    seqlen_k: tl.tensor
    end_q: tl.tensor
    """Rows from here on see nothing; seqlen_q but for q_lengths."""
    end_k: tl.tensor
    """Keys from here on are seen by nobody; seqlen_k but for kv_lengths."""
    offset: tl.tensor
    """Row i has position i + offset among the keys."""


class Span(NamedTuple):
    """Tiles [begin, full) and [stop, end) are met through the mask, [full, stop) are seen whole, no others are met."""

    begin: tl.tensor
    full: tl.tensor
    stop: tl.tensor
    end: tl.tensor


@triton.jit
def place(x, b, h, seqlen_q, seqlen_k, SPEC: tl.constexpr):
    """The plane of batch b and query head h."""
    end_q, end_k, offset = seqlen_q, seqlen_k, 0
    if SPEC.q_lengths is not None:
        end_q = tl.minimum(seqlen_q, load_scalar(x, b, h, SPEC.q_lengths, SPEC))
    if SPEC.kv_lengths is not None:
        end_k = tl.minimum(seqlen_k, load_scalar(x, b, h, SPEC.kv_lengths, SPEC))
    if SPEC.offset is not None:
        offset = load_scalar(x, b, h, SPEC.offset, SPEC)
    return Place(b, h, seqlen_q, seqlen_k, end_q, end_k, offset)


@triton.jit
def look_up(spans, here, block, blocks, SIZE: tl.constexpr, SPEC: tl.constexpr):
    """The span of a block, from the table [B, 1|H, blocks, 4] that `spans.py` made in numbers of tiles."""
    plane = here.b
    if SPEC.span_heads:
        plane = here.b * SPEC.heads + here.h
    at = spans + (plane.to(tl.int64) * blocks + block) * 4
    return Span(tl.load(at) * SIZE, tl.load(at + 1) * SIZE, tl.load(at + 2) * SIZE, tl.load(at + 3) * SIZE)


@triton.jit
def key_span(block, here, spans, SPEC: tl.constexpr, CFG: tl.constexpr):
    """The keys that a block of query rows meets."""
    if SPEC.spans:
        return look_up(spans, here, block, tl.cdiv(here.seqlen_q, CFG.block_m), CFG.block_n, SPEC)
    else:
        start_m = block * CFG.block_m
        stop, end = here.seqlen_k, here.seqlen_k
        if SPEC.causal:
            end = tl.minimum(end, start_m + CFG.block_m)
            stop = tl.minimum(stop, start_m + 1)
        return Span(0, 0, stop // CFG.block_n * CFG.block_n, end)


@triton.jit
def query_span(block, here, spans, SPEC: tl.constexpr, CFG: tl.constexpr):
    """The query rows that a block of keys meets."""
    if SPEC.spans:
        return look_up(spans, here, block, tl.cdiv(here.seqlen_k, CFG.block_n), CFG.block_m, SPEC)
    elif SPEC.causal:
        start_n = block * CFG.block_n
        begin = start_n // CFG.block_m * CFG.block_m
        full = tl.cdiv(start_n + CFG.block_n - 1, CFG.block_m) * CFG.block_m
        return Span(tl.minimum(begin, here.seqlen_q), full, here.seqlen_q, here.seqlen_q)
    else:
        return Span(0, 0, here.seqlen_q, here.seqlen_q)


@triton.jit
def phase(span, BARE: tl.constexpr, SPLIT: tl.constexpr, BEFORE: tl.constexpr):
    """The bounds of a loop over the tiles seen whole (BARE), or over those met through the mask.

    SPLIT: the latter may lie on both sides of the former, and `tile_start` makes the loop jump. Else they lie BEFORE
    it (the rows that meet a key, causally) or after it (the keys that meet a row).
    """
    if BARE:
        return span.full, span.stop
    elif SPLIT:
        return span.begin, span.end - (span.stop - span.full)
    elif BEFORE:
        return span.begin, tl.minimum(span.full, span.stop)
    else:
        return span.stop, span.end


@triton.jit
def tile_start(i, span, BARE: tl.constexpr, SPLIT: tl.constexpr):
    """Where the tile starts that a loop within `phase` has come to."""
    if BARE or not SPLIT:
        return i
    else:
        return i + tl.where(i >= span.full, span.stop - span.full, 0)


@triton.jit
def visible(x, here, start_m, start_n, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, SPEC: tl.constexpr):
    """Whether each of a tile's rows sees each of its keys: [M, N], or [N, M]."""
    i, j = tile_indices(M, N, TRANSPOSED)
    position = start_m + here.offset - start_n  # of row 0, counted from key 0 of the tile
    # The tile's first axis gets one bound that says all, so that each element takes one comparison with a constant.
    end = here.end_k - start_n
    if SPEC.rules.right is None:
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
    if SPEC.q_segments is not None:
        own = load_operand(x, here, start_m + i, start_n + j, SPEC.q_segments, SPEC)
        other = load_operand(x, here, start_m + i, start_n + j, SPEC.kv_segments, SPEC)
        seen = seen & (own == other) & (own >= 0)
    if SPEC.mask is not None:
        seen = seen & (load_operand(x, here, start_m + i, start_n + j, SPEC.mask, SPEC) != 0)
    return seen
