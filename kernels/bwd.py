"""The backward pass: FlashAttention-2, algorithm 2, as three kernels that each own what they write.

dq comes first and computes delta = rowsum(o * do) in its prologue; dk and dv follow, looping over the query heads
of their group; last comes the gradient of a bias, if asked for, unless nothing is summed for it: then dq writes it. No
kernel adds into memory, so runs repeat bit for bit.
"""

import triton
import triton.language as tl

from .dropout import drop, keep
from .fwd import logits
from .mask import distance, key_span, phase, place_of, query_span, tile_at
from .place import place
from .rounding import joined
from .tile import (
    LOG2E,
    WHOLE,
    edge,
    keys,
    load_constants,
    load_scalar,
    load_vector,
    opened,
    operand_offsets,
    program,
    queries,
    rows_of,
    store_constants,
    store_operand,
    store_tile,
    store_vector,
    tile,
    tile_indices,
)
from .units import counted, exponential, load_scale

# What dq tells the other kernels of each row (`row_constants`).
SHIFT, DELTA, NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def row_constants(own, here, start_m, M: tl.constexpr, SPEC: tl.constexpr):
    """What turns rows' logits into probabilities: p = exp2(s - shift) * norm.

    Where logits are only scaled products the shift alone does, which is lse. A bias may make m so large (-1e9 is a
    common way to hide a key) that log2(l) would be lost in it. Rows that see nothing, and rows past the end, get p = 0.
    """
    if SPEC.alters_logits:
        m, l = load_vector(own[3], 0.0, here, start_m, M, SPEC), load_vector(own[4], 0.0, here, start_m, M, SPEC)
        return tl.where(l == 0.0, float("inf"), m), 1.0 / tl.where(l == 0.0, 1.0, l)
    else:
        lse = load_vector(own[3], float("-inf"), here, start_m, M, SPEC)
        return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), 1.0


@triton.jit
def through_score(
    ds,
    p,
    scores,
    x,
    here,
    start_m,
    start_n,
    M: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FUNCTION: tl.constexpr,
    SPEC: tl.constexpr,
):
    """What a derivative of the score function makes of the gradient of a tile; 0 where p is, whatever it is there."""
    b, h, i, j = place_of(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC)
    return tl.where(p == 0.0, 0.0, ds * FUNCTION(scores, b, h, i, j, x[SPEC.score.at :]))


@triton.jit
def zero_unmet(dbias, here, start_m, span, SPEC: tl.constexpr, CFG: tl.constexpr):
    """The bias gradient of a block of rows is 0 at the keys outside its span."""
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    i, j = tile_indices(M, N, False)
    zeros = tl.zeros([M, N], dbias.dtype.element_ty)
    for n in range(0, span.begin, N):
        store_operand(dbias, zeros, here, start_m + i, n + j, SPEC.dbias, SPEC)
    for n in range(tl.cdiv(tl.maximum(span.begin, span.end), N) * N, here.seqlen_k, N):
        store_operand(dbias, zeros, here, start_m + i, n + j, SPEC.dbias, SPEC)


@triton.jit
def attn_bwd_dq_kernel(
    k, v, x, sizes, own, lost, dq, constants, dscale, dslopes, dbias, SPEC: tl.constexpr, CFG: tl.constexpr
):  # fmt: skip
    """One block of query rows: dq = scale * ds k, what the other kernels need of each row, and, if wanted, its share
    of the gradients of the scale and of the ALiBi slopes, and the gradient of a bias that is of this head alone, ds.

    own: what is read of these rows alone: q, do, o, lse (or m and l), and dlse if something depends on lse. lost: what
    o lost when it was rounded: else ds is off by the same share of p in all of a row, which does not average out
    (arXiv:2510.04212). None: o was not rounded, or that is all there is.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    EDGE_Q: tl.constexpr = edge(SPEC.q_lengths, SPEC.multiple_q, M)
    EDGE_K: tl.constexpr = edge(SPEC.kv_lengths, SPEC.multiple_k, N, SPEC.tile_keys)
    FIRST: tl.constexpr = 0 if SPEC.masks or EDGE_K != WHOLE else 1
    block, _, b, h = program(tl.cdiv(sizes[1], M), SPEC.heads, SPEC.causal)
    start_m = block * M
    here = place(x, b, h, sizes, SPEC)
    k = keys(opened(k, b, here.seqlen_k, N, SPEC.k_rows, CFG), here, x, SPEC)
    v = keys(opened(v, b, here.seqlen_k, N, SPEC.v_rows, CFG), here, x, SPEC)
    q_tile = tile(queries(own[0], here), start_m, M, SPEC.q_rows, EDGE_Q)  # [M, D]
    scale = load_scale(x, b, SPEC)
    q_counted = counted(q_tile, scale, SPEC, CFG)
    do_tile = tile(queries(own[1], here), start_m, M, SPEC.o_rows, EDGE_Q)  # [M, Dv]
    o_tile = tile(queries(own[2], here), start_m, M, SPEC.o_rows, EDGE_Q).to(tl.float32)
    if lost is not None:
        o_tile = joined(o_tile, tile(queries(lost, here), start_m, M, SPEC.o_rows, EDGE_Q))
    shift, norm = row_constants(own, here, start_m, M, SPEC)
    delta = tl.sum(o_tile * do_tile.to(tl.float32), 1)  # [M]
    if SPEC.dlse:  # lse is a result too: d lse / d s = p
        dlse = load_vector(own[5 if SPEC.alters_logits else 4], 0.0, here, start_m, M, SPEC)
        delta -= tl.where(shift == float("inf"), 0.0, dlse)
    store_constants(constants, shift, float("inf"), here, start_m, SHIFT, SPEC)
    store_constants(constants, delta, 0.0, here, start_m, DELTA, SPEC)
    if SPEC.alters_logits:
        store_constants(constants, norm, 1.0, here, start_m, NORM, SPEC)
    acc = tl.zeros([M, SPEC.block_d], tl.float32)
    slope_acc = tl.zeros([M], tl.float32)
    span = key_span(block, start_m, here, x, SPEC, CFG)
    for BARE in tl.static_range(FIRST, 2):  # masked, then bare, as in the forward pass
        first, last = phase(span, BARE, False, SPEC)
        for i in tl.range(first, last, 1 if SPEC.listed else N, warp_specialize=CFG.warp_specialize):
            n, part = tile_at(i, span, x, SPEC.row_tiles, SPEC.tile_keys, N, BARE, SPEC)
            k_tile = tile(k, n, N, SPEC.k_rows, WHOLE if BARE else EDGE_K)  # [N, D]
            v_tile = tile(v, n, N, SPEC.v_rows, WHOLE if BARE else EDGE_K)  # [N, Dv]
            s, unit, capped, scores = logits(
                q_counted, tl.trans(k_tile), x, here, start_m, n, part, scale, False, not BARE, SPEC, CFG
            )  # [M, N]
            p = exponential(s, unit, shift[:, None], SPEC)
            if SPEC.alters_logits:
                p *= norm[:, None]
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=CFG.precision)  # [M, N]
            if SPEC.drops:
                dp = drop(dp, keep(x, here, start_m, n, M, N, False, SPEC), SPEC)
            ds = p * (dp - delta[:, None])
            if dbias is not None:
                rows, cols = tile_indices(M, N, False)
                store_operand(dbias, ds, here, start_m + rows, n + cols, SPEC.dbias, SPEC)
            if dslopes is not None:
                slope_acc -= tl.sum(ds * distance(x, here, start_m, n, M, N, False, SPEC), 1)
            if SPEC.rules.soft_cap is not None:
                ds *= 1.0 - capped * capped
            if SPEC.score is not None and SPEC.score.slope is not None:
                ds = through_score(ds, p, scores, x, here, start_m, n, M, N, False, SPEC.score.slope, SPEC)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=CFG.precision)
    if dbias is not None:
        zero_unmet(dbias, here, start_m, span, SPEC, CFG)
    factor = load_scalar(x, b, h, SPEC.scale, SPEC).to(tl.float32)
    store_tile(queries(dq, here), acc * factor, start_m, SPEC.q_rows)
    if dscale is not None:  # s = scale * q k, so sum(ds * q k) = sum((ds k) * q)
        store_vector(dscale, tl.sum(acc * q_tile.to(tl.float32), 1), here, start_m, SPEC)
    if dslopes is not None:
        store_vector(dslopes, slope_acc, here, start_m, SPEC)


@triton.jit
def attn_bwd_dkdv_kernel(
    q, k, v, x, sizes, do, constants, dk, dv, SPEC: tl.constexpr, CFG: tl.constexpr
):  # fmt: skip
    """One block of keys and values: dv = p' do and dk = scale * ds' q, summed over `SPEC.summed` of the heads that
    share them: all of these, or one, where that makes too few programs.

    Everything is transposed (a tile is [N, M]), so that p' and ds' feed the next product as they are.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    EDGE_Q: tl.constexpr = edge(SPEC.q_lengths, SPEC.multiple_q, M, SPEC.tile_rows)
    EDGE_K: tl.constexpr = edge(SPEC.kv_lengths, SPEC.multiple_k, N)
    FIRST: tl.constexpr = 0 if SPEC.masks else 1  # keys past the end are stored nowhere
    block, _, b, group = program(tl.cdiv(sizes[2], N), SPEC.heads // SPEC.summed, False)  # the first keys are seen most
    start_n = block * N
    here = place(x, b, group * SPEC.summed, sizes, SPEC)
    q = opened(q, b, here.seqlen_q, M, SPEC.q_rows, CFG)
    do = opened(do, b, here.seqlen_q, M, SPEC.o_rows, CFG)
    scale = load_scale(x, b, SPEC)
    k_tile = counted(tile(keys(k, here, x, SPEC), start_n, N, SPEC.k_rows, EDGE_K), scale, SPEC, CFG)  # [N, D]
    v_tile = tile(keys(v, here, x, SPEC), start_n, N, SPEC.v_rows, EDGE_K)  # [N, Dv]
    dk_acc = tl.zeros([N, SPEC.block_d], tl.float32)
    dv_acc = tl.zeros([N, SPEC.block_dv], tl.float32)
    for g in range(SPEC.summed):
        here = place(x, b, group * SPEC.summed + g, sizes, SPEC)
        span = query_span(block, here, x, SPEC, CFG)
        for BARE in tl.static_range(FIRST, 2):
            first, last = phase(span, BARE, True, SPEC)
            for j in range(first, last, 1 if SPEC.listed else M):
                i, part = tile_at(j, span, x, SPEC.col_tiles, SPEC.tile_rows, M, BARE, SPEC)
                q_tile = tile(queries(q, here), i, M, SPEC.q_rows, EDGE_Q)  # [M, D]
                do_tile = tile(queries(do, here), i, M, SPEC.o_rows, EDGE_Q)  # [M, Dv]
                s, unit, capped, scores = logits(
                    k_tile, tl.trans(q_tile), x, here, i, start_n, part, scale, True, not BARE, SPEC, CFG
                )  # [N, M]
                p = exponential(s, unit, load_constants(constants, here, i, M, SHIFT, SPEC)[None, :], SPEC)
                if SPEC.alters_logits:
                    p *= load_constants(constants, here, i, M, NORM, SPEC)[None, :]
                if (
                    SPEC.score is not None and EDGE_Q != WHOLE
                ):  # a score function may make NaN of rows that there are not
                    p = tl.where(load_constants(constants, here, i, M, SHIFT, SPEC)[None, :] == float("inf"), 0.0, p)
                if CFG.overlaps and BARE:  # before dv, which waits for p: then wgmma runs while p is computed
                    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=CFG.precision)  # [N, M]
                kept = p  # what v was multiplied by
                if SPEC.drops:
                    keeps = keep(x, here, i, start_n, M, N, True, SPEC)
                    kept = drop(p, keeps, SPEC)
                dv_acc = tl.dot(kept.to(do_tile.dtype), do_tile, dv_acc, input_precision=CFG.precision)
                if not (CFG.overlaps and BARE):
                    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=CFG.precision)
                if SPEC.drops:
                    dp = drop(dp, keeps, SPEC)
                ds = p * (dp - load_constants(constants, here, i, M, DELTA, SPEC)[None, :])
                if SPEC.rules.soft_cap is not None:
                    ds *= 1.0 - capped * capped
                if SPEC.score is not None and SPEC.score.slope is not None:
                    ds = through_score(ds, p, scores, x, here, i, start_n, M, N, True, SPEC.score.slope, SPEC)
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=CFG.precision)
    factor = load_scalar(x, b, 0, SPEC.scale, SPEC).to(tl.float32)
    store_tile(rows_of(dk, b, group, here.seqlen_k, here.end_k), dk_acc * factor, start_n, SPEC.dk_rows)
    store_tile(rows_of(dv, b, group, here.seqlen_k, here.end_k), dv_acc, start_n, SPEC.dv_rows)


@triton.jit
def attn_bwd_dbias_kernel(
    q, k, v, x, sizes, do, constants, slab, dbias, SPEC: tl.constexpr, CFG: tl.constexpr
):  # fmt: skip
    """One tile of the bias gradient: ds summed over the axes that `SPEC.dbias` lacks. Or of the gradient of what a
    score function read (`SPEC.score.read`), which is summed likewise.

    A bias with both sequence axes is summed over batches and heads here. One that lacks a sequence axis is small
    even per batch and head, so that is what comes out ([B, H, Sq or 1, Sk or 1]), and its programs are many.

    slab: the first of the rows that come out, and how many; None: all of them.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    EDGE_Q: tl.constexpr = edge(SPEC.q_lengths, SPEC.multiple_q, M)
    EDGE_K: tl.constexpr = edge(SPEC.kv_lengths, SPEC.multiple_k, N)
    OUT: tl.constexpr = SPEC.dbias
    READS: tl.constexpr = SPEC.score is not None and SPEC.score.read is not None
    batch, seqlen_q, seqlen_k = sizes
    row_from, height = 0, seqlen_q
    if slab is not None:
        row_from, height = tl.load(slab[0]), slab[1]
    pid = tl.program_id(0)
    m_begin, m_end, n_begin, n_end = 0, seqlen_q, 0, seqlen_k
    if OUT.cols:
        blocks = tl.cdiv(seqlen_k, N)
        n_begin = pid % blocks * N
        n_end = tl.minimum(n_begin + N, seqlen_k)
        pid = pid // blocks
    if OUT.rows:
        blocks = tl.cdiv(height, M)
        m_begin = row_from + pid % blocks * M
        m_end = tl.minimum(m_begin + M, seqlen_q)
        pid = pid // blocks
    h_begin, h_end, b_begin, b_end = 0, SPEC.heads, 0, batch
    if OUT.heads:
        h_begin = pid % SPEC.heads
        h_end = h_begin + 1
        pid = pid // SPEC.heads
    if OUT.batch == 0:
        b_begin = pid
        b_end = pid + 1
    acc = tl.zeros([M, N], tl.float32)
    for b in range(b_begin, b_end):
        scale = load_scale(x, b, SPEC)
        for h in range(h_begin, h_end):
            here = place(x, b, h, sizes, SPEC)
            for i in range(m_begin, m_end, M):
                q_tile = counted(tile(queries(q, here), i, M, SPEC.q_rows, EDGE_Q), scale, SPEC, CFG)  # [M, D]
                do_tile = tile(queries(do, here), i, M, SPEC.o_rows, EDGE_Q)  # [M, Dv]
                shift = load_constants(constants, here, i, M, SHIFT, SPEC)
                delta = load_constants(constants, here, i, M, DELTA, SPEC)
                norm = load_constants(constants, here, i, M, NORM, SPEC)
                span = key_span(i // M, i, here, x, SPEC, CFG)
                first, last = span.begin, span.end
                if not SPEC.listed:
                    first, last = tl.maximum(n_begin, first), tl.minimum(n_end, last)
                for j in range(first, last, 1 if SPEC.listed else N):
                    n, part = tile_at(j, span, x, SPEC.row_tiles, SPEC.tile_keys, N, not SPEC.listed, SPEC)
                    if not SPEC.listed or (n >= n_begin and n < n_end):  # a list has all of the row's tiles
                        k_tile = tile(keys(k, here, x, SPEC), n, N, SPEC.k_rows, EDGE_K)  # [N, D]
                        v_tile = tile(keys(v, here, x, SPEC), n, N, SPEC.v_rows, EDGE_K)  # [N, Dv]
                        s, unit, capped, scores = logits(
                            q_tile, tl.trans(k_tile), x, here, i, n, part, scale, False, True, SPEC, CFG
                        )  # [M, N]
                        p = exponential(s, unit, shift[:, None], SPEC) * norm[:, None]
                        if SPEC.score is not None and EDGE_Q != WHOLE:  # of rows that there are not
                            p = tl.where(shift[:, None] == float("inf"), 0.0, p)
                        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=CFG.precision)
                        if SPEC.drops:
                            dp = drop(dp, keep(x, here, i, n, M, N, False, SPEC), SPEC)
                        ds = p * (dp - delta[:, None])
                        if READS and SPEC.rules.soft_cap is not None:
                            ds *= 1.0 - capped * capped
                        if READS:
                            ds = through_score(ds, p, scores, x, here, i, n, M, N, False, SPEC.score.read, SPEC)
                        acc += ds
    rows, cols = m_begin - row_from + tl.arange(0, M)[:, None], n_begin + tl.arange(0, N)[None, :]
    if not OUT.rows:
        acc = tl.sum(acc, 0)[None, :]
        rows = tl.zeros([1, 1], tl.int32)
    if not OUT.cols:
        acc = tl.sum(acc, 1)[:, None]
        cols = tl.zeros([1, 1], tl.int32)
    base, offsets, inside = operand_offsets(b_begin, h_begin, rows, cols, height, seqlen_k, OUT, SPEC)
    tl.store(dbias + base + offsets, acc, mask=inside)
