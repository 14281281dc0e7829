"""Who sees whom: the only code that knows about causality and about the ends of a sequence."""

import triton
import triton.language as tl


@triton.jit
def key_span(start_m, seqlen_k, SPEC: tl.constexpr, CFG: tl.constexpr):
    """Of the keys, rows [start_m, start_m + M) see [0, full) whole, [full, end) through the mask, no others."""
    end = seqlen_k
    full = seqlen_k
    if SPEC.causal:
        end = tl.minimum(end, start_m + CFG.block_m)
        full = tl.minimum(full, start_m + 1)
    return full // CFG.block_n * CFG.block_n, end


@triton.jit
def query_span(start_n, seqlen_q, SPEC: tl.constexpr, CFG: tl.constexpr):
    """Keys [start_n, start_n + N) are seen by rows [begin, full) through the mask, by [full, seqlen_q) whole."""
    if SPEC.causal:
        begin = start_n // CFG.block_m * CFG.block_m
        full = tl.cdiv(start_n + CFG.block_n - 1, CFG.block_m) * CFG.block_m
        return tl.minimum(begin, seqlen_q), full
    else:
        return 0, 0


@triton.jit
def visible(rows, cols, seqlen_k, SPEC: tl.constexpr):
    """Whether each of rows sees each of cols; indices that broadcast against each other."""
    seen = cols < seqlen_k
    if SPEC.causal:
        seen = seen & (cols <= rows)
    return seen
