"""What several programs made of the keys of the same rows, as one result (Flash-Decoding, Dao et al. 2023)."""

import triton
import triton.language as tl

from .fwd import finish
from .place import ending, place
from .tile import program

AT_ONCE = tl.constexpr(4096)
"""How many numbers of o a program has in registers at a time."""


@triton.jit
def attn_combine_kernel(
    parts, m_parts, l_parts, x, sizes, o, lse_out, m_out, l_out, max_out, lost_out, SPEC: tl.constexpr,
    CFG: tl.constexpr,
):  # fmt: skip
    """One row of one head, of what `attn_fwd_kernel` stored of each split: o = sum of 2^(m - max m) o."""
    S: tl.constexpr = CFG.block_n  # the next power of two of CFG.num_splits
    row, _, b, h = program(sizes[1], SPEC.heads, False)
    here = place(x, b, h, sizes, SPEC)
    if SPEC.cu_q_lens is not None:
        here = ending(here, tl.load(x[SPEC.cu_q_lens.at] + sizes[4]))
    split = tl.arange(0, S)
    own, rows = tl.cast(b, tl.int64) * sizes[1] + row, tl.cast(sizes[0], tl.int64) * sizes[1]
    first = (tl.cast(b, tl.int64) * SPEC.heads + h) * sizes[1] + row
    at = first + split * (rows * SPEC.heads)
    m = tl.load(m_parts + at, mask=split < CFG.num_splits, other=float("-inf"))
    l = tl.load(l_parts + at, mask=split < CFG.num_splits, other=0.0)
    top = tl.max(m, 0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    COLS: tl.constexpr = SPEC.block_dv
    STEP: tl.constexpr = min(max(AT_ONCE // COLS, 1), S)
    acc = tl.zeros([COLS], tl.float32)
    j = tl.arange(0, COLS)[None, :]
    for begin in tl.static_range(0, S, STEP):
        split = begin + tl.arange(0, STEP)
        inside = split < CFG.num_splits
        at = first + split * (rows * SPEC.heads)
        weight = tl.exp2(tl.load(m_parts + at, mask=inside, other=float("-inf")) - pivot)
        at = ((own + split * rows) * SPEC.heads + h) * SPEC.v_dim
        part = tl.load(parts + at[:, None] + j, mask=inside[:, None] & (j < SPEC.v_dim), other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    one = tl.zeros([1], tl.float32)
    l = tl.sum(l * tl.exp2(m - pivot), 0)
    m = one + top
    finish(m, one + l, acc[None, :], m, x, here, row, o, lse_out, m_out, l_out, max_out, lost_out, 1, SPEC)
