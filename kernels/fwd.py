"""The forward pass: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with logits in base 2."""

import triton
import triton.language as tl

from .mask import key_span, visible
from .tile import LOG2E, load_bias, load_rows, open_rows, program, store_rows, store_vector


@triton.jit
def load_scale(scale):
    """The softmax scale times log2(e). Callers make it non-negative; a zero must not turn -inf into NaN."""
    return tl.maximum(tl.load(scale).to(tl.float32) * LOG2E, 1e-37)


@triton.jit
def logits(qk, bias, b, h, rows, cols, scale_log2, seqlen_q, seqlen_k, MASKED: tl.constexpr, SPEC: tl.constexpr):
    """A tile of logits and the unit that makes them base-2 logits: exp2(s * unit - m) is one FMA and one EX2.

    rows and cols broadcast against each other, in either order. A bias needs the unit to be 1.
    """
    s, unit = qk, scale_log2
    if SPEC.has_bias:
        s = qk * scale_log2 + load_bias(bias, b, h, rows, cols, seqlen_q, seqlen_k, SPEC)
        unit = 1.0
    if MASKED:
        s = tl.where(visible(rows, cols, seqlen_k, SPEC), s, float("-inf"))
    return s, unit


@triton.jit
def attn_fwd_kernel(q, k, v, scale, bias, seqlen_q, seqlen_k, o, m_out, l_out, SPEC: tl.constexpr, CFG: tl.constexpr):
    """One block of query rows against every key it sees: o, and each row's maximum m (base 2) and sum l."""
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    D: tl.constexpr = SPEC.block_d
    DV: tl.constexpr = SPEC.block_dv
    H_KV: tl.constexpr = SPEC.kv_heads
    RAGGED_K: tl.constexpr = SPEC.multiple_k < N  # the last tile of keys may be cut short
    FIRST: tl.constexpr = 0 if SPEC.causal or RAGGED_K else 1  # otherwise no tile needs the mask
    block, b, h = program(tl.cdiv(seqlen_q, M), SPEC.heads, SPEC.causal)  # the last rows see most: they go first
    start_m, h_kv = block * M, h // SPEC.group
    k = open_rows(k, b, seqlen_k, H_KV, SPEC.head_dim, N, D, CFG)
    v = open_rows(v, b, seqlen_k, H_KV, SPEC.v_dim, N, DV, CFG)
    q_tile = load_rows(q, b, h, start_m, seqlen_q, SPEC.heads, SPEC.head_dim, M, D, SPEC.multiple_q < M)  # [M, D]
    scale_log2 = load_scale(scale)
    rows = start_m + tl.arange(0, M)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    full, end = key_span(start_m, seqlen_k, SPEC, CFG)
    # One loop body, compiled masked and then bare: the other way round, ptxas serialises wgmma where tiles come
    # through pointers. The first tile shows every row a key, so m is finite from then on.
    for BARE in tl.static_range(FIRST, 2):
        for n in range(0 if BARE else full, full if BARE else end, N):
            k_tile = load_rows(k, b, h_kv, n, seqlen_k, H_KV, SPEC.head_dim, N, D, RAGGED_K and not BARE)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=CFG.precision)  # [M, N]
            cols = n + tl.arange(0, N)
            s, unit = logits(
                s, bias, b, h, rows[:, None], cols[None, :], scale_log2, seqlen_q, seqlen_k, not BARE, SPEC
            )
            m_new = tl.maximum(m, tl.max(s, 1) * unit)
            pivot = m_new
            if SPEC.has_bias:  # -inf hides a key, so a row may have seen nothing so far
                pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * unit - pivot[:, None])  # [M, N]
            alpha = tl.exp2(m - pivot)
            v_tile = load_rows(v, b, h_kv, n, seqlen_k, H_KV, SPEC.v_dim, N, DV, RAGGED_K and not BARE)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=CFG.precision)
            l = l * alpha + tl.sum(p, 1)
            m = m_new
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]  # a row that sees nothing: o = 0
    store_rows(o, acc, b, h, start_m, seqlen_q, SPEC.heads, SPEC.v_dim)
    store_vector(m_out, m, b, h, start_m, seqlen_q, SPEC.heads)
    store_vector(l_out, l, b, h, start_m, seqlen_q, SPEC.heads)
