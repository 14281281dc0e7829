"""The backward pass: FlashAttention-2, algorithm 2, as three kernels that each own what they write.

dq comes first and computes delta = rowsum(o * do) in its prologue; dk and dv follow, looping over the query heads
of their group; the bias gradient, if asked for, last. No kernel adds into memory, so runs repeat bit for bit.
"""

import triton
import triton.language as tl

from .fwd import load_scale, logits
from .mask import key_span, query_span
from .tile import (
    bias_offsets,
    load_rows,
    load_vector,
    open_rows,
    program,
    store_rows,
    store_vector,
)


@triton.jit
def row_constants(m, l, SPEC: tl.constexpr):
    """What turns a row's logits into probabilities: p = exp2(s - shift) * norm.

    Without a bias the shift alone does, m + log2(l). With one, m may be so large (-1e9 is a common way to hide a
    key) that log2(l) would be lost in it. Rows that see nothing, and rows past the end, get p = 0.
    """
    if SPEC.has_bias:
        return tl.where(l == 0.0, float("inf"), m), 1.0 / tl.where(l == 0.0, 1.0, l)
    else:
        return tl.where(l == 0.0, float("inf"), m + tl.log2(l)), l


@triton.jit
def attn_bwd_dq_kernel(
    q, k, v, scale, bias, o, m, l, do, dlse, seqlen_q, seqlen_k, dq, delta_out, shift_out, norm_out, dscale,
    SPEC: tl.constexpr, CFG: tl.constexpr,
):  # fmt: skip
    """One block of query rows: dq = scale * ds k, its share of the scale's gradient, and what the others need of it."""
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    D: tl.constexpr = SPEC.block_d
    DV: tl.constexpr = SPEC.block_dv
    H: tl.constexpr = SPEC.heads
    H_KV: tl.constexpr = SPEC.kv_heads
    RAGGED_Q: tl.constexpr = SPEC.multiple_q < M
    RAGGED_K: tl.constexpr = SPEC.multiple_k < N
    FIRST: tl.constexpr = 0 if SPEC.causal or RAGGED_K else 1
    block, b, h = program(tl.cdiv(seqlen_q, M), H, SPEC.causal)
    start_m, h_kv = block * M, h // SPEC.group
    k = open_rows(k, b, seqlen_k, H_KV, SPEC.head_dim, N, D, CFG)
    v = open_rows(v, b, seqlen_k, H_KV, SPEC.v_dim, N, DV, CFG)
    q_tile = load_rows(q, b, h, start_m, seqlen_q, H, SPEC.head_dim, M, D, RAGGED_Q)  # [M, D]
    do_tile = load_rows(do, b, h, start_m, seqlen_q, H, SPEC.v_dim, M, DV, RAGGED_Q)  # [M, DV]
    o_tile = load_rows(o, b, h, start_m, seqlen_q, H, SPEC.v_dim, M, DV, RAGGED_Q)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # [M]
    if dlse is not None:  # lse is a result too: d lse / d s = p
        delta -= load_vector(dlse, b, h, start_m, seqlen_q, H, M)
    shift, norm = row_constants(
        load_vector(m, b, h, start_m, seqlen_q, H, M), load_vector(l, b, h, start_m, seqlen_q, H, M), SPEC
    )
    store_vector(delta_out, delta, b, h, start_m, seqlen_q, H)
    store_vector(shift_out, shift, b, h, start_m, seqlen_q, H)
    if norm_out is not None:
        store_vector(norm_out, norm, b, h, start_m, seqlen_q, H)
    scale_log2 = load_scale(scale)
    rows = start_m + tl.arange(0, M)
    acc = tl.zeros([M, D], tl.float32)
    full, end = key_span(start_m, seqlen_k, SPEC, CFG)
    for BARE in tl.static_range(FIRST, 2):  # masked, then bare, as in the forward pass
        for n in range(0 if BARE else full, full if BARE else end, N):
            k_tile = load_rows(k, b, h_kv, n, seqlen_k, H_KV, SPEC.head_dim, N, D, RAGGED_K and not BARE)
            v_tile = load_rows(v, b, h_kv, n, seqlen_k, H_KV, SPEC.v_dim, N, DV, RAGGED_K and not BARE)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=CFG.precision)  # [M, N]
            cols = n + tl.arange(0, N)
            s, unit = logits(
                qk, bias, b, h, rows[:, None], cols[None, :], scale_log2, seqlen_q, seqlen_k, not BARE, SPEC
            )
            p = tl.exp2(s * unit - shift[:, None])
            if SPEC.has_bias:
                p *= norm[:, None]
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=CFG.precision)  # [M, N]
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=CFG.precision)
    store_rows(dq, acc * tl.load(scale).to(tl.float32), b, h, start_m, seqlen_q, H, SPEC.head_dim)
    if dscale is not None:  # s = scale * q k, so sum(ds * q k) = sum((ds k) * q)
        store_vector(dscale, tl.sum(acc * q_tile.to(tl.float32), 1), b, h, start_m, seqlen_q, H)


@triton.jit
def attn_bwd_dkdv_kernel(
    q,
    k,
    v,
    scale,
    bias,
    do,
    delta,
    shift,
    norm,
    seqlen_q,
    seqlen_k,
    dk,
    dv,
    SPEC: tl.constexpr,
    CFG: tl.constexpr,
):
    """One block of keys and values: dv = p' do and dk = scale * ds' q, summed over the heads that share them.

    Everything is transposed (a tile is [N, M]), so that p' and ds' feed the next product as they are.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    D: tl.constexpr = SPEC.block_d
    DV: tl.constexpr = SPEC.block_dv
    H: tl.constexpr = SPEC.heads
    H_KV: tl.constexpr = SPEC.kv_heads
    RAGGED_Q: tl.constexpr = SPEC.multiple_q < M
    RAGGED_K: tl.constexpr = SPEC.multiple_k < N
    FIRST: tl.constexpr = 0 if SPEC.causal else 1  # without causality no tile needs the mask
    block, b, h_kv = program(tl.cdiv(seqlen_k, N), H_KV, False)  # the first keys are seen most
    start_n = block * N
    q = open_rows(q, b, seqlen_q, H, SPEC.head_dim, M, D, CFG)
    do = open_rows(do, b, seqlen_q, H, SPEC.v_dim, M, DV, CFG)
    k_tile = load_rows(k, b, h_kv, start_n, seqlen_k, H_KV, SPEC.head_dim, N, D, RAGGED_K)  # [N, D]
    v_tile = load_rows(v, b, h_kv, start_n, seqlen_k, H_KV, SPEC.v_dim, N, DV, RAGGED_K)  # [N, DV]
    scale_log2 = load_scale(scale)
    cols = start_n + tl.arange(0, N)
    dk_acc = tl.zeros([N, D], tl.float32)
    dv_acc = tl.zeros([N, DV], tl.float32)
    begin, full = query_span(start_n, seqlen_q, SPEC, CFG)
    for g in range(SPEC.group):
        h = h_kv * SPEC.group + g
        for BARE in tl.static_range(FIRST, 2):
            for i in range(full if BARE else begin, seqlen_q if BARE else tl.minimum(full, seqlen_q), M):
                q_tile = load_rows(q, b, h, i, seqlen_q, H, SPEC.head_dim, M, D, RAGGED_Q)  # [M, D]
                do_tile = load_rows(do, b, h, i, seqlen_q, H, SPEC.v_dim, M, DV, RAGGED_Q)  # [M, DV]
                qk = tl.dot(k_tile, tl.trans(q_tile), input_precision=CFG.precision)  # [N, M]
                rows = i + tl.arange(0, M)
                s, unit = logits(
                    qk,
                    bias,
                    b,
                    h,
                    rows[None, :],
                    cols[:, None],
                    scale_log2,
                    seqlen_q,
                    seqlen_k,
                    not BARE,
                    SPEC,
                )
                p = tl.exp2(s * unit - load_vector(shift, b, h, i, seqlen_q, H, M, float("inf"))[None, :])
                if SPEC.has_bias:
                    p *= load_vector(norm, b, h, i, seqlen_q, H, M)[None, :]
                dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=CFG.precision)
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=CFG.precision)  # [N, M]
                ds = p * (dp - load_vector(delta, b, h, i, seqlen_q, H, M)[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=CFG.precision)
    store_rows(dk, dk_acc * tl.load(scale).to(tl.float32), b, h_kv, start_n, seqlen_k, H_KV, SPEC.head_dim)
    store_rows(dv, dv_acc, b, h_kv, start_n, seqlen_k, H_KV, SPEC.v_dim)


@triton.jit
def attn_bwd_dbias_kernel(
    q,
    k,
    v,
    scale,
    bias,
    do,
    delta,
    shift,
    norm,
    batch,
    seqlen_q,
    seqlen_k,
    dbias,
    SPEC: tl.constexpr,
    CFG: tl.constexpr,
):
    """One tile of the bias gradient: ds summed over the axes along which the bias is broadcast.

    A bias with both sequence axes is summed over batches and heads here. One that lacks a sequence axis is small
    even per batch and head, so that is what comes out ([B, H, Sq or 1, Sk or 1]), and its programs are many.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    D: tl.constexpr = SPEC.block_d
    DV: tl.constexpr = SPEC.block_dv
    H: tl.constexpr = SPEC.heads
    H_KV: tl.constexpr = SPEC.kv_heads
    OUT: tl.constexpr = SPEC.dbias_partial  # the gradient as a bias of its own: which axes it has
    pid = tl.program_id(0)
    m_begin, m_end, n_begin, n_end = 0, seqlen_q, 0, seqlen_k
    if OUT.bias_cols:
        blocks = tl.cdiv(seqlen_k, N)
        n_begin = pid % blocks * N
        n_end = tl.minimum(n_begin + N, seqlen_k)
        pid = pid // blocks
    if OUT.bias_rows:
        blocks = tl.cdiv(seqlen_q, M)
        m_begin = pid % blocks * M
        m_end = tl.minimum(m_begin + M, seqlen_q)
        pid = pid // blocks
    h_begin, h_end, b_begin, b_end = 0, H, 0, batch
    if OUT.bias_heads:
        h_begin = pid % H
        h_end = h_begin + 1
        pid = pid // H
    if OUT.bias_batch:
        b_begin = pid
        b_end = pid + 1
    scale_log2 = load_scale(scale)
    acc = tl.zeros([M, N], tl.float32)
    for b in range(b_begin, b_end):
        for h in range(h_begin, h_end):
            h_kv = h // SPEC.group
            for i in range(m_begin, m_end, M):
                q_tile = load_rows(q, b, h, i, seqlen_q, H, SPEC.head_dim, M, D, SPEC.multiple_q < M)
                do_tile = load_rows(do, b, h, i, seqlen_q, H, SPEC.v_dim, M, DV, SPEC.multiple_q < M)
                delta_row = load_vector(delta, b, h, i, seqlen_q, H, M)
                shift_row = load_vector(shift, b, h, i, seqlen_q, H, M, float("inf"))
                norm_row = load_vector(norm, b, h, i, seqlen_q, H, M)
                rows = i + tl.arange(0, M)
                last = key_span(i, n_end, SPEC, CFG)[1]
                for n in range(n_begin, last, N):
                    k_tile = load_rows(k, b, h_kv, n, seqlen_k, H_KV, SPEC.head_dim, N, D, SPEC.multiple_k < N)
                    v_tile = load_rows(v, b, h_kv, n, seqlen_k, H_KV, SPEC.v_dim, N, DV, SPEC.multiple_k < N)
                    cols = n + tl.arange(0, N)
                    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=CFG.precision)  # [M, N]
                    s, unit = logits(
                        qk,
                        bias,
                        b,
                        h,
                        rows[:, None],
                        cols[None, :],
                        scale_log2,
                        seqlen_q,
                        seqlen_k,
                        True,
                        SPEC,
                    )
                    p = tl.exp2(s * unit - shift_row[:, None]) * norm_row[:, None]
                    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=CFG.precision)
                    acc += p * (dp - delta_row[:, None])
    rows, cols = m_begin + tl.arange(0, M)[:, None], n_begin + tl.arange(0, N)[None, :]
    if not OUT.bias_rows:
        acc = tl.sum(acc, 0)[None, :]
        rows = tl.zeros([1, 1], tl.int32)
    if not OUT.bias_cols:
        acc = tl.sum(acc, 1)[:, None]
        cols = tl.zeros([1, 1], tl.int32)
    base, offsets, inside = bias_offsets(b_begin, h_begin, rows, cols, seqlen_q, seqlen_k, OUT)
    tl.store(dbias + base + offsets, acc, mask=inside)
