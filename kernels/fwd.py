"""The forward pass: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1, with logits in base 2."""

import triton
import triton.language as tl

from .dropout import drop, keep
from .mask import distance, key_span, log_weights, phase, place_of, share, shown_by_mask, tile_at, visible
from .place import packed, part_of, place, ragged_place, windowed
from .rounding import lost_of
from .tile import (
    LN2,
    LOG2E,
    WHOLE,
    edge,
    keys,
    load_operand,
    load_page_scale,
    load_scalar,
    opened,
    program,
    queries,
    row_heads,
    store_tile,
    store_vector,
    tile,
    tile_indices,
    vector_at,
)
from .units import counted, divides, exact_logit, exact_unit, exponential, in_true_unit, lift, load_scale, lowered


@triton.jit
def tanh(y):
    """tanh to fp32 accuracy: a polynomial near 0, where the exponentials cancel."""
    t = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    z = y * y
    near = tl.fma(z, tl.fma(z, tl.fma(z, -1382 / 155925, 62 / 2835), -17 / 315), 2 / 15)
    near = tl.fma(z, tl.fma(z, near, -1 / 3), 1.0)
    return tl.where(tl.abs(y) < 0.3, y * near, tl.where(y < 0.0, -far, far))


@triton.jit
def start(
    x, here, start_m, start_n, inverse, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, SPEC: tl.constexpr,
    CFG: tl.constexpr,
):  # fmt: skip
    """What a tile of logits starts from: the bias, and -inf where the mask hides. inverse: of their unit."""
    i, j = tile_indices(CFG.block_m, CFG.block_n, TRANSPOSED, SPEC.packed)
    s = 0.0
    if SPEC.bias is not None:
        s = load_operand(x, here, start_m + i, start_n + j, SPEC.bias, SPEC).to(tl.float32) * (inverse * LOG2E)
    if MASKED and SPEC.mask is not None:
        s = tl.where(shown_by_mask(x, here, start_m + i, start_n + j, SPEC), s, float("-inf"))
    return s


@triton.jit
def logits(
    first, second, x, here, start_m, start_n, part, scale, TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
    SPEC: tl.constexpr, CFG: tl.constexpr, others=None, key_rows=None,
):  # fmt: skip
    """A tile of logits, the unit that makes them base-2 logits, the tanh of the soft cap, and the scores that a score
    function was given.

    What is loaded, a bias or a mask, is where the product starts from, if the config says so: added to the product,
    Triton may compute all up to exp2 in both layouts. A tile is the product of first and second, [M, N], or [N, M] if
    TRANSPOSED, plus others, if there are any. part: its element mask (`tile_at`). key_rows: the `Rows` whose pages have
    a scale, if they do.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    LOADS: tl.constexpr = SPEC.bias is not None or (MASKED and SPEC.mask is not None)
    STARTS: tl.constexpr = LOADS and CFG.starts and (divides(SPEC) or not SPEC.alters_logits)
    unit, inverse, capped, scores = scale.unit, 1.0 / scale.unit, 0.0, 0.0
    if STARTS:
        s = start(x, here, start_m, start_n, inverse, TRANSPOSED, MASKED, SPEC, CFG)
        s = tl.broadcast_to(s, [N, M] if TRANSPOSED else [M, N])
        s = tl.dot(first, second, s, input_precision=CFG.precision)
    else:
        if SPEC.rest is not None:
            s = tl.dot(first, second, others, input_precision=CFG.precision)
        else:
            s = tl.dot(first, second, input_precision=CFG.precision)
        if SPEC.k_scale is not None:
            s *= load_page_scale(x, key_rows, start_n, N, SPEC.k_scale, SPEC.k_rows)
        if SPEC.score is not None:
            scores = s * (scale.unit * LN2)
            b, h, i, j = place_of(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC)
            s = tl.broadcast_to(SPEC.score.value(scores, b, h, i, j, x[SPEC.score.at :]), scores.shape)
            unit, inverse = LOG2E, LN2
        elif SPEC.alters_logits and not divides(SPEC):
            s *= scale.unit
            unit, inverse = 1.0, 1.0
        if SPEC.rules.soft_cap is not None:
            s, capped = soft_cap(s, SPEC.rules.soft_cap * (LOG2E if SPEC.score is None else 1.0))
        if divides(SPEC):
            s = tl.fma(s, scale.counts, start(x, here, start_m, start_n, inverse, TRANSPOSED, MASKED, SPEC, CFG))
        elif LOADS:
            s += start(x, here, start_m, start_n, inverse, TRANSPOSED, MASKED, SPEC, CFG)
    if SPEC.slopes is not None:
        slope = load_scalar(x, here.b, here.h, SPEC.slopes, SPEC) * LOG2E
        s = tl.fma(distance(x, here, start_m, start_n, M, N, TRANSPOSED, SPEC), -slope * inverse, s)
    if MASKED and SPEC.tile_weights is not None:
        s = tl.fma(log_weights(x, start_m, start_n, part, M, N, TRANSPOSED, SPEC), inverse * -LOG2E, s)
    if MASKED:
        s = tl.where(visible(x, here, start_m, start_n, part, M, N, TRANSPOSED, SPEC), s, float("-inf"))
    return s, unit, capped, scores


@triton.jit
def plus_product(
    acc, alpha, p, v, n, EDGE: tl.constexpr, DTYPE: tl.constexpr, SPEC: tl.constexpr, CFG: tl.constexpr
):  # fmt: skip
    """acc alpha + p v, with the values of the tile at n."""
    v_tile = tile(v, n, CFG.block_n, SPEC.v_rows, EDGE)  # [N, Dv]
    if SPEC.page_size:
        v_tile = v_tile.to(DTYPE)
    return tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=CFG.precision)


@triton.jit
def other_columns(rest, v, n, EDGE: tl.constexpr, SPEC: tl.constexpr, CFG: tl.constexpr):
    """In latent attention, the part of q kᵀ whose columns are no values."""
    if SPEC.rest is not None:
        others = tile(v, n, CFG.block_n, SPEC.v_rows, EDGE)
        return tl.dot(rest, tl.trans(others.to(rest.dtype)), input_precision=CFG.precision)
    else:
        return None


@triton.jit
def tile_before(i, first, here, span, x, N: tl.constexpr, BARE: tl.constexpr, SPEC: tl.constexpr):
    """Where the tile starts that a loop over unlisted tiles came to before i; past the end, if there was none: there a
    descriptor reads 0."""
    before, _ = tile_at(i - N, span, x, SPEC.row_tiles, SPEC.tile_keys, N, BARE, SPEC)
    return tl.where(i > first, before, here.seqlen_k)


@triton.jit
def with_sink(m, l, acc, x, b, h, SPEC: tl.constexpr):
    """One more logit, with nothing to add to o. h: the head, or that of each row."""
    sink = load_scalar(x, b, h, SPEC.sinks, SPEC) * LOG2E
    m_new = tl.maximum(m, sink)
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - pivot)
    return m_new, l * alpha + tl.exp2(sink - pivot), acc * alpha[:, None]


@triton.jit
def soft_cap(s, CAP: tl.constexpr):
    """c tanh(s / c), and the tanh."""
    capped = tanh(s * (1.0 / CAP))
    return capped * CAP, capped


@triton.jit
def finish(
    m, l, acc, top, x, here, start_m, o, lse_out, m_out, l_out, max_out, lost_out, M: tl.constexpr, SPEC: tl.constexpr
):  # fmt: skip
    """What comes of all keys: o, and each row's lse (natural); if that is not enough for the backward pass, m (base 2)
    and the sum l of 2^(s - m); and, if wanted, its largest logit, which is top, without the sink, and what o loses when
    it is rounded."""
    _, rows = vector_at(here, start_m, M, SPEC)
    m, top = in_true_unit(m, x, here.b, SPEC), in_true_unit(top, x, here.b, SPEC)
    if max_out is not None:
        largest = tl.where(l == l, top * LN2, float("nan"))  # a maximum passes over a NaN, a sum does not
        store_vector(max_out, tl.where(rows < here.end_q, largest, float("-inf")), here, start_m, SPEC)
    if SPEC.sinks is not None:
        m, l, acc = with_sink(m, l, acc, x, here.b, row_heads(here, M, SPEC), SPEC)
    if SPEC.q_lengths is not None or SPEC.cu_q_lens is not None:
        m = tl.where(rows < here.end_q, m, float("-inf"))
        l = tl.where(rows < here.end_q, l, 0.0)
        acc = tl.where((rows < here.end_q)[:, None], acc, 0.0)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]  # a row that sees nothing: o = 0
    rounded = acc.to(o.dtype.element_ty)
    store_tile(queries(o, here), rounded, start_m, SPEC.o_rows)
    if lost_out is not None:
        store_tile(queries(lost_out, here), lost_of(acc, rounded, lost_out.dtype.element_ty), start_m, SPEC.o_rows)
    store_vector(lse_out, (m + tl.log2(l)) * LN2, here, start_m, SPEC)
    if m_out is not None:
        store_vector(m_out, m, here, start_m, SPEC)
        store_vector(l_out, l, here, start_m, SPEC)


@triton.jit
def block_of_rows(x, block, b, h, sizes, SPEC: tl.constexpr, CFG: tl.constexpr):
    """Which rows a block has, and the first of them. h: of as many heads as have programs of their own."""
    if SPEC.cu_q_lens is not None:
        here, start_m = ragged_place(x, block, h, sizes, SPEC)
    else:
        here, start_m = place(x, b, h, sizes, SPEC), block * (CFG.block_m // SPEC.packed)
    if SPEC.packed > 1:
        here = packed(here, CFG.block_m, SPEC)
    return windowed(here, start_m, SPEC), start_m


@triton.jit
def attn_fwd_kernel(
    q, k, v, x, sizes, o, lse_out, m_out, l_out, max_out, lost_out, SPEC: tl.constexpr, CFG: tl.constexpr
):  # fmt: skip
    """One block of query rows against every key it sees (`finish`), or against a split's part of them: then o is the
    sum of p v, and m and l are all that is known of a row (`combine.py`).

    x: the operands of `SPEC.operands`, in order, and, where that is looked up, which keys each block meets. sizes:
    (B, Sq, Sk), with pages (.., number of pages, sequences); for ragged rows B is 1 and Sq all rows. v: in latent
    attention, where values are the first columns of k, k again, of which the other columns are read.
    """
    M: tl.constexpr = CFG.block_m
    N: tl.constexpr = CFG.block_n
    EDGE_Q: tl.constexpr = edge(SPEC.q_lengths, SPEC.multiple_q, M // SPEC.packed)
    EDGE_K: tl.constexpr = edge(SPEC.kv_lengths, SPEC.multiple_k, N, SPEC.tile_keys)
    FIRST: tl.constexpr = 0 if SPEC.masks or EDGE_K != WHOLE else 1  # else no tile needs the mask
    LIFT: tl.constexpr = lift(q.dtype.element_ty, SPEC, CFG)
    TOP: tl.constexpr = LIFT > 0 and max_out is not None  # else m, of which p is doubled, is the largest logit
    HIDES: tl.constexpr = SPEC.hides or CFG.num_splits > 1
    blocks = tl.cdiv(sizes[1], M // SPEC.packed)
    if SPEC.cu_q_lens is not None:
        blocks += sizes[4] + 1
    # The last rows see most: they go first.
    block, split, b, h = program(blocks, SPEC.heads // SPEC.heads_packed, SPEC.causal, CFG.num_splits)
    here, start_m = block_of_rows(x, block, b, h, sizes, SPEC, CFG)
    last_b = here.pages - 1 if SPEC.page_size else here.b
    length = SPEC.page_size if SPEC.page_size else here.seqlen_k
    k = keys(opened(k, last_b, length, N, SPEC.k_rows, CFG), here, x, SPEC)
    if SPEC.rest is not None or not SPEC.latent:
        v = keys(opened(v, last_b, length, N, SPEC.v_rows, CFG), here, x, SPEC)
    scale = load_scale(x, here.b, SPEC)
    q_tile = counted(tile(queries(q, here), start_m, M, SPEC.q_rows, EDGE_Q), scale, SPEC, CFG)  # [M, D]
    rest = 0.0
    if SPEC.rest is not None:
        rest = counted(tile(queries(q, here), start_m, M, SPEC.rest, EDGE_Q), scale, SPEC, CFG)
    m = tl.full([M], float("-inf"), tl.float32)
    l, top = tl.zeros([M], tl.float32), m
    acc = tl.zeros([M, SPEC.block_dv], tl.float32)
    span = key_span(block, start_m, here, x, SPEC, CFG)
    if CFG.num_splits > 1:
        span = share(span, split, 1 if SPEC.listed else N, CFG.num_splits)
    # One loop body, compiled masked and then bare: the other way round, ptxas serialises wgmma where tiles come
    # through pointers.
    for BARE in tl.static_range(FIRST, 2):
        first, last = phase(span, BARE, False, SPEC)
        p_before = tl.zeros([M, N], tl.float32)  # in 16 bits it would go through shared memory
        alpha_before = tl.full([M], 1.0, tl.float32)
        for i in tl.range(first, last, 1 if SPEC.listed else N, warp_specialize=CFG.warp_specialize):
            n, part = tile_at(i, span, x, SPEC.row_tiles, SPEC.tile_keys, N, BARE, SPEC)
            k_tile = tile(k, n, N, SPEC.k_rows, WHOLE if BARE else EDGE_K)  # [N, D]
            if SPEC.page_size:
                k_tile = k_tile.to(q_tile.dtype)
            s, product, _, _ = logits(  # [M, N]
                q_tile, tl.trans(k_tile), x, here, start_m, n, part, scale, False, not BARE, SPEC, CFG,
                other_columns(rest, v, n, WHOLE if BARE else EDGE_K, SPEC, CFG), k,
            )  # fmt: skip
            if CFG.overlaps and BARE:  # runs while this tile's p is computed
                before = tile_before(i, first, here, span, x, N, BARE, SPEC)
                acc = plus_product(
                    acc, alpha_before, p_before, v, before, WHOLE if BARE else EDGE_K, q_tile.dtype, SPEC, CFG
                )
            largest, unit = exact_logit(tl.max(s, 1), product, SPEC)
            if TOP:
                top = tl.maximum(top, largest)
            m_new = tl.maximum(m, lowered(largest, LIFT))
            pivot = m_new  # finite, as the first tile shows every row a key
            if HIDES:
                pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
            if CFG.overlaps:  # takes an instruction more, and no register
                unit = exact_unit(pivot, product, SPEC)
            p = exponential(s, unit if SPEC.alters_logits else unit[:, None], pivot[:, None], SPEC)  # [M, N]
            alpha = tl.exp2(m - pivot)
            l = tl.fma(l, alpha, tl.sum(p, 1))
            if SPEC.drops:
                p = drop(p, keep(x, here, start_m, n, M, N, False, SPEC), SPEC)
            if SPEC.v_scale is not None:
                p *= load_page_scale(x, k, n, N, SPEC.v_scale, SPEC.k_rows)
            if CFG.overlaps and BARE:
                alpha_before, p_before = alpha, p
            elif SPEC.latent:
                acc = tl.dot(p.to(k_tile.dtype), k_tile, acc * alpha[:, None], input_precision=CFG.precision)
            else:
                acc = plus_product(acc, alpha, p, v, n, WHOLE if BARE else EDGE_K, q_tile.dtype, SPEC, CFG)
            m = m_new
        if CFG.overlaps and BARE and first < last:
            end = first + tl.cdiv(last - first, N) * N
            before = tile_before(end, first, here, span, x, N, BARE, SPEC)
            acc = plus_product(
                acc, alpha_before, p_before, v, before, WHOLE if BARE else EDGE_K, q_tile.dtype, SPEC, CFG
            )
    if CFG.num_splits > 1:
        part = part_of(here, split, sizes, SPEC)
        store_tile(queries(o, part), acc, start_m, SPEC.o_rows)
        store_vector(m_out, m, part, start_m, SPEC)
        store_vector(l_out, l, part, start_m, SPEC)
    else:
        top = top if TOP else m
        finish(m, l, acc, top, x, here, start_m, o, lse_out, m_out, l_out, max_out, lost_out, M, SPEC)
