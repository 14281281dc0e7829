"""Tiles of dense arrays, in and out of memory: the only code that tells a pointer from a descriptor.

Arrays are dense and row-major, as JAX hands them over, so strides follow from the shape and none is an argument.
Offsets are computed from a 64-bit base, so no array is too long for them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# How a tile of rows may end (`tile`).
WHOLE, RAGGED, CUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.constexpr_function
def edge(lengths, multiple, rows, met=0):
    """How tiles of `rows` rows may end, where a sequence is a multiple of `multiple` long and may have lengths. met:
    the rows of a block mask's tiles, where these are met part by part: one may lie behind the end."""
    return 2 if lengths is not None else int(multiple < max(rows, met))


@triton.jit
def program(blocks, HEADS: tl.constexpr, REVERSED: tl.constexpr, SPLITS: tl.constexpr = 1):
    """This program's block, split, batch and head. The blocks of one head run side by side: they share its K and V."""
    pid = tl.program_id(0)
    block = pid % blocks
    if REVERSED:
        block = blocks - 1 - block
    return block, pid // blocks % SPLITS, pid // blocks // SPLITS // HEADS, pid // blocks // SPLITS % HEADS


@triton.jit
def tile_indices(M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr = 1):
    """The rows and the keys of a tile, counted from its corner: [M, 1] and [1, N], or [1, M] and [N, 1]. PACKED: how
    many rows of the tile are one row, of as many heads."""
    if TRANSPOSED:
        return tl.arange(0, M)[None, :], tl.arange(0, N)[:, None]
    elif PACKED > 1:
        return tl.arange(0, M)[:, None] // PACKED, tl.arange(0, N)[None, :]
    else:
        return tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]


@triton.jit
def heads_in_tile(M: tl.constexpr, PACKED: tl.constexpr, HEADS: tl.constexpr):
    """Which of the program's heads each row of a tile is of, [M]. Where they are no power of two, some rows are of
    the last once more: they compute what another row does."""
    return tl.minimum(tl.arange(0, M) % PACKED, HEADS - 1)


class Rows(NamedTuple):
    """The rows of one sequence and head of an array [B, seqlen, H, D], whose H and D a `base.layout.Layout` has."""

    x: tl.tensor
    first: tl.tensor
    """Which row of all is the first, counted through the batches; for pointers."""
    b: tl.tensor
    """For descriptors."""
    h: tl.tensor
    """The head, or the first of those whose rows a tile has."""
    seqlen: tl.tensor
    limit: tl.tensor
    """Rows from here on are to read 0; seqlen but for lengths."""
    begin: tl.tensor
    """In pages, rows before this are to read 0 too; None: there are none."""
    table: tl.tensor
    """Which pages have the rows, if pages do."""
    pages: tl.tensor
    """How many pages there are."""


@triton.jit
def rows_of(x, b, h, seqlen, limit):
    """The rows of batch b and head h."""
    return Rows(x, tl.cast(b, tl.int64) * seqlen, b, h, seqlen, limit, None, None, 0)


@triton.jit
def queries(x, here):
    """The rows of x, which are as many as q's, that belong to a `place.Place`."""
    rows = rows_of(x, here.b, here.first_h, here.seqlen_q, here.end_q)
    if here.first_q is not None:
        rows = Rows(x, here.first_q, here.b, here.first_h, here.seqlen_q, here.end_q, None, None, 0)
    return rows


@triton.jit
def keys(x, here, operands, SPEC: tl.constexpr):
    """The rows of x, which are as many as k's, that a `place.Place` looks at. operands: say which pages have them."""
    if SPEC.page_size:
        table = operands[SPEC.page_table.at] + here.b.to(tl.int64) * (here.seqlen_k // SPEC.page_size)
        return Rows(x, 0, here.b, here.kv, here.seqlen_k, here.end_k, here.begin_k, table, here.pages)
    else:
        return rows_of(x, here.b, here.kv, here.seqlen_k, here.end_k)


@triton.jit
def opened(x, b, seqlen, ROWS: tl.constexpr, LAYOUT: tl.constexpr, CFG: tl.constexpr):
    """x of shape [B, seqlen, H, D], to be read in tiles of ROWS: block-ptr makes a descriptor unless the host has. b:
    the last batch that is looked at."""
    if CFG.block_ptr and not isinstance(x, tl.tensor_descriptor):
        width: tl.constexpr = LAYOUT.stride
        # Batches before b and b itself: the bound matters, batches after b are not looked at.
        return tl.make_tensor_descriptor(
            x,
            [b + 1, seqlen, LAYOUT.heads, LAYOUT.width],
            [tl.cast(seqlen, tl.int64) * width, width, LAYOUT.width, 1],
            [1, ROWS, 1, LAYOUT.cols],
        )
    else:
        return x


@triton.jit
def row_offsets(rows, start, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the tile from row `start` on begins, its [ROWS, cols] offsets from there, and the indices."""
    i, j = tile_indices(ROWS, LAYOUT.cols, False, LAYOUT.packed)
    if LAYOUT.page:
        base, offsets = page_offsets(rows, start, i, ROWS, LAYOUT)
    else:
        base, offsets = (rows.first + start) * LAYOUT.stride, i * LAYOUT.stride
    if LAYOUT.packed > 1:
        offsets += heads_in_tile(ROWS, LAYOUT.packed, LAYOUT.heads_packed)[:, None] * LAYOUT.width
    return base + (rows.h * LAYOUT.width + LAYOUT.first), offsets + j, i, j


@triton.jit
def present(rows, at, LAYOUT: tl.constexpr):
    """Which of these rows are to be read."""
    if LAYOUT.page and rows.begin is not None:
        return (at >= rows.begin) & (at < rows.limit)
    else:
        return at < rows.limit


@triton.jit
def page_numbers(rows, start, i, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """Which page has a tile of ROWS rows from `start` on, or which have its rows i; some page, if none is called so."""
    if LAYOUT.page >= ROWS:
        number = tl.load(rows.table + start // LAYOUT.page)
    else:
        at = start + i
        number = tl.load(rows.table + at // LAYOUT.page, mask=present(rows, at, LAYOUT), other=0)
    return tl.minimum(tl.maximum(number, 0), rows.pages - 1)


@triton.jit
def page_offsets(rows, start, i, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the tile's page begins and its rows from there; or, where it has several pages, where all do."""
    number = page_numbers(rows, start, i, ROWS, LAYOUT).to(tl.int64)
    if LAYOUT.page >= ROWS:
        return (number * LAYOUT.page + start % LAYOUT.page) * LAYOUT.stride, i * LAYOUT.stride
    else:
        return tl.zeros((), tl.int64), (number * LAYOUT.page + (start + i) % LAYOUT.page) * LAYOUT.stride


@triton.jit
def tile(rows, start, ROWS: tl.constexpr, LAYOUT: tl.constexpr, EDGE: tl.constexpr):
    """The tile [ROWS, cols] from row `start` on; past the width reads 0.

    EDGE: no row of the tile is past the end (`WHOLE`); rows past seqlen read 0 (`RAGGED`: limit is seqlen); rows past
    limit, which is any less, read 0 whatever is there (`CUT`).
    """
    if isinstance(rows.x, tl.tensor_descriptor):  # strides and the array's own bounds live in the descriptor
        if LAYOUT.page:
            at = [page_numbers(rows, start, 0, ROWS, LAYOUT), start % LAYOUT.page, rows.h, LAYOUT.first]
        else:
            at = [rows.b, start, rows.h, LAYOUT.first]
        loaded = rows.x.load(at).reshape(ROWS, LAYOUT.cols)
        if EDGE == CUT:
            loaded = tl.where(start + tl.arange(0, ROWS)[:, None] < rows.limit, loaded, 0.0)
        return loaded
    else:
        base, offsets, i, j = row_offsets(rows, start, ROWS, LAYOUT)
        if EDGE != WHOLE and LAYOUT.cols > LAYOUT.taken:
            return tl.load(
                rows.x + base + offsets, mask=present(rows, start + i, LAYOUT) & (j < LAYOUT.taken), other=0.0
            )
        elif EDGE != WHOLE:
            return tl.load(rows.x + base + offsets, mask=present(rows, start + i, LAYOUT), other=0.0)
        elif LAYOUT.cols > LAYOUT.taken:
            return tl.load(rows.x + base + offsets, mask=j < LAYOUT.taken, other=0.0)
        else:
            return tl.load(rows.x + base + offsets)


@triton.jit
def store_tile(rows, values, start, LAYOUT: tl.constexpr):
    """The inverse of `tile`; rows past seqlen and columns past the width are dropped."""
    base, offsets, i, j = row_offsets(rows, start, values.shape[0], LAYOUT)
    values = values.to(rows.x.dtype.element_ty)
    tl.store(rows.x + base + offsets, values, mask=(start + i < rows.seqlen) & (j < LAYOUT.taken))


@triton.jit
def row_heads(here, ROWS: tl.constexpr, SPEC: tl.constexpr):
    """The query head of each row of a tile, [ROWS]; or of all."""
    if SPEC.packed > 1:
        return here.first_h + heads_in_tile(ROWS, SPEC.packed, SPEC.heads_packed)
    else:
        return here.h


@triton.jit
def vector_at(here, start, ROWS: tl.constexpr, SPEC: tl.constexpr):
    """Where an array [B, H, seqlen_q] has what it has of the heads of a tile's rows, and which rows these are."""
    i = tl.arange(0, ROWS)
    if SPEC.packed > 1:
        i = i // SPEC.packed
    h = row_heads(here, ROWS, SPEC)
    if here.first_stat is None:
        at = (tl.cast(here.b, tl.int64) * SPEC.heads + h) * here.seqlen_q
    else:
        at = here.first_stat + h * tl.cast(here.rows_q, tl.int64)
    return at, start + i


@triton.jit
def load_vector(x, past, here, start, ROWS: tl.constexpr, SPEC: tl.constexpr):
    """x[b, h, start:start+ROWS] of an array [B, H, seqlen_q]; reads `past` past the end."""
    at, i = vector_at(here, start, ROWS, SPEC)
    return tl.load(x + at + i, mask=i < here.seqlen_q, other=past)


@triton.jit
def store_vector(x, vector, here, start, SPEC: tl.constexpr):
    """The inverse of `load_vector`."""
    at, i = vector_at(here, start, vector.shape[0], SPEC)
    tl.store(x + at + i, vector, mask=i < here.seqlen_q)


@triton.jit
def constants_at(x, here, WHICH: tl.constexpr, SPEC: tl.constexpr):
    """Where the constants of b and h's rows begin in an array [B, H, constants, rows]: `SPEC.padded` rows at a time, so
    that every tile is whole, and aligned."""
    plane = (tl.cast(here.b, tl.int64) * SPEC.heads + here.h) * SPEC.constants + WHICH
    return x + plane * (tl.cdiv(here.seqlen_q, SPEC.padded) * SPEC.padded)


@triton.jit
def load_constants(x, here, start, ROWS: tl.constexpr, WHICH: tl.constexpr, SPEC: tl.constexpr):
    """One of the constants of rows start to start+ROWS."""
    return tl.load(constants_at(x, here, WHICH, SPEC) + start + tl.arange(0, ROWS))


@triton.jit
def store_constants(x, values, past, here, start, WHICH: tl.constexpr, SPEC: tl.constexpr):
    """The inverse of `load_constants`, by the program that has these rows. The last one of a head goes on with `past`
    up to where the array ends."""
    ROWS: tl.constexpr = values.shape[0]
    at = constants_at(x, here, WHICH, SPEC)
    tl.store(at + start + tl.arange(0, ROWS), values)
    if SPEC.padded > ROWS:
        end = tl.cdiv(here.seqlen_q, SPEC.padded) * SPEC.padded
        for i in range(start + ROWS, tl.where(start + ROWS >= here.seqlen_q, end, 0), ROWS):
            tl.store(at + i + tl.arange(0, ROWS), tl.full([ROWS], past, tl.float32))


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
def load_page_scale(x, rows, start, ROWS: tl.constexpr, OPERAND: tl.constexpr, LAYOUT: tl.constexpr):
    """The dequantization scale of each row of a tile of pages: [1, ROWS], or a number where it has one page."""
    i = tl.arange(0, ROWS)[None, :]
    number = 0
    if OPERAND.batch != 1:
        number = page_numbers(rows, start, i, ROWS, LAYOUT)
    if OPERAND.heads:
        number = number * LAYOUT.heads + rows.h
    if OPERAND.batch == 1 or LAYOUT.page >= ROWS:
        return tl.load(x[OPERAND.at] + number)
    else:
        return tl.load(x[OPERAND.at] + number, mask=present(rows, start + i, LAYOUT), other=0.0)


@triton.jit
def load_operand(x, here, rows, cols, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """An operand at [here.b, here.h, rows, cols]: a tile that broadcasts to them; reads 0 outside the array."""
    base, offsets, inside = operand_offsets(
        here.b, here.h, rows, cols, here.seqlen_q, here.seqlen_k, OPERAND, SPEC
    )  # fmt: skip
    return tl.load(x[OPERAND.at] + base + offsets, mask=inside, other=0)


@triton.jit
def store_operand(x, values, here, rows, cols, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """Values for [here.b, here.h, rows, cols] of an array with the axes of an operand; those outside are dropped."""
    base, offsets, inside = operand_offsets(
        here.b, here.h, rows, cols, here.seqlen_q, here.seqlen_k, OPERAND, SPEC
    )  # fmt: skip
    tl.store(x + base + offsets, values, mask=inside)


@triton.jit
def load_scalar(x, b, h, OPERAND: tl.constexpr, SPEC: tl.constexpr):
    """An operand that varies along neither sequence, at [b, h]."""
    return tl.load(x[OPERAND.at] + plane_number(b, h, OPERAND, SPEC))
