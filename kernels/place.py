"""Where a program's rows are: of which sequence and head, and where their results go."""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import heads_in_tile, load_scalar


class Place(NamedTuple):
    """Which plane of logits a program is in, and how its rows and keys lie to each other."""

    b: tl.tensor
    h: tl.tensor
    """The query head: the program's, or [M, 1], each row's, where a tile has rows of several."""
    first_h: tl.tensor
    """The query head, or the first of them."""
    kv: tl.tensor
    """The key head."""
    seqlen_q: tl.tensor
    seqlen_k: tl.tensor
    end_q: tl.tensor
    """Rows from here on see nothing; seqlen_q but for q_lengths."""
    end_k: tl.tensor
    """Keys from here on are seen by nobody; seqlen_k but for kv_lengths."""
    begin_k: tl.tensor
    """First key that the block's window shows (in pages only: those left of it may be gone); None: no such bound."""
    offset: tl.tensor
    """Row i has position i + offset among the keys."""
    first_q: tl.tensor
    """Which row of q's array row 0 is, counted through the batches; None, here and below: as b and seqlen_q say."""
    first_stat: tl.tensor
    """Where an array of one number for each row has that of row 0 of head 0."""
    rows_q: tl.tensor
    """How many rows of a head such an array has."""
    pages: tl.tensor
    """How many pages keys lie in; 0: they do not."""


@triton.jit
def place(x, b, h, sizes, SPEC: tl.constexpr):
    """The plane of batch b and query head h."""
    seqlen_q, seqlen_k, pages = sizes[1], sizes[2], 0
    end_q, end_k, offset = seqlen_q, seqlen_k, 0
    if SPEC.page_size:
        pages = sizes[3]
    if SPEC.q_lengths is not None:
        end_q = tl.minimum(seqlen_q, load_scalar(x, b, h, SPEC.q_lengths, SPEC))
    if SPEC.kv_lengths is not None:
        end_k = tl.minimum(seqlen_k, load_scalar(x, b, h, SPEC.kv_lengths, SPEC))
    if SPEC.offset is not None:
        offset = load_scalar(x, b, h, SPEC.offset, SPEC)
    return Place(b, h, h, h // SPEC.group, seqlen_q, seqlen_k, end_q, end_k, None, offset, None, None, None, pages)


@triton.jit
def ragged_place(x, block, h, sizes, SPEC: tl.constexpr):
    """The plane of the sequence that a block of rows belongs to, and the first of its rows.

    The table [blocks, 4] behind the operands has of each block its sequence, its first row in this, where the sequence
    begins in q and how many rows it has. Rows behind the last sequence are those of sequence -1, who see nothing.
    """
    at = x[SPEC.blocks_at] + block * 4
    b, start, first, seqlen_q = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    there = b >= 0
    b = tl.maximum(b, 0)
    end_q = tl.where(there, seqlen_q, 0)
    end_k = tl.where(there, tl.minimum(sizes[2], load_scalar(x, b, 0, SPEC.kv_lengths, SPEC)), 0)
    offset = load_scalar(x, b, 0, SPEC.offset, SPEC)
    first = first.to(tl.int64)
    here = Place(
        b, h, h, h // SPEC.group, seqlen_q, sizes[2], end_q, end_k, None, offset, first, first, sizes[1], sizes[3]
    )  # fmt: skip
    return here, start


@triton.jit
def packed(here, M: tl.constexpr, SPEC: tl.constexpr):
    """The same of several heads that share a key head, whose rows lie beside one another in a tile. here.h counts such
    heads as one."""
    first = here.h * SPEC.heads_packed
    h = first + heads_in_tile(M, SPEC.packed, SPEC.heads_packed)[:, None]
    return Place(
        here.b, h, first, first // SPEC.group, here.seqlen_q, here.seqlen_k, here.end_q, here.end_k, here.begin_k,
        here.offset, here.first_q, here.first_stat, here.rows_q, here.pages,
    )  # fmt: skip


@triton.jit
def part_of(here, split, sizes, SPEC: tl.constexpr):
    """Where the results of a split are: behind those of the splits before it."""
    rows = split.to(tl.int64) * (sizes[0] * sizes[1])
    first, first_stat, rows_q = here.first_q, here.first_stat, here.rows_q
    if SPEC.cu_q_lens is None:
        first, rows_q = tl.cast(here.b, tl.int64) * here.seqlen_q, here.seqlen_q
        first_stat = first * SPEC.heads
    return Place(
        here.b, here.h, here.first_h, here.kv, here.seqlen_q, here.seqlen_k, here.end_q, here.end_k, here.begin_k,
        here.offset, first + rows, first_stat + rows * SPEC.heads, rows_q, here.pages,
    )  # fmt: skip


@triton.jit
def ending(here, end_q):
    """The same, whose rows from end_q on see nothing."""
    return Place(
        here.b, here.h, here.first_h, here.kv, here.seqlen_q, here.seqlen_k, end_q, here.end_k, here.begin_k,
        here.offset, here.first_q, here.first_stat, here.rows_q, here.pages,
    )  # fmt: skip


@triton.jit
def windowed(here, start, SPEC: tl.constexpr):
    """The same of rows from `start` on, which see nothing left of a window."""
    if SPEC.page_size and SPEC.rules.left is not None:
        begin = tl.maximum(start + here.offset - SPEC.rules.left, 0)
        return Place(
            here.b, here.h, here.first_h, here.kv, here.seqlen_q, here.seqlen_k, here.end_q, here.end_k, begin,
            here.offset, here.first_q, here.first_stat, here.rows_q, here.pages,
        )  # fmt: skip
    else:
        return here
