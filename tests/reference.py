"""Attention as it is defined. Everything else is measured against this."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def attention(
    q, k, v, bias=None, scale=None, *, keep=None, dropout_rate=0.0, compute=jnp.float64, round_p=None, **options
):  # fmt: skip
    """o `[*batch, Sq, H, Dv]`, lse `[*batch, H, Sq]` and max_logits `[*batch, H]`, all of it computed in `compute`.

    `options` are those of `flash_attention`, under its names, but for the dropout's seed: `keep` is what it spares,
    bool `[*batch, H, Sq, Sk]` (see `kept`). `round_p`: the dtype in which p is multiplied by v; by default `compute`.
    """
    q, k, v = (x.astype(compute) for x in (q, k, v))
    p, lse, max_logits = probabilities(q, k, bias, scale, **options)
    p = p if keep is None else jnp.where(keep, p / (1 - dropout_rate), 0)
    p, v = (p, v) if round_p is None else (x.astype(round_p).astype(compute) for x in (p, v))
    return jnp.einsum("...hqk,...khd->...qhd", p, by_query_head(v, q), precision="highest"), lse, max_logits


def probabilities(
    q, k, bias=None, scale=None, *, score_mod=None, logits_soft_cap=None, alibi_slopes=None, sinks=None, q_lengths=None,
    weights=None, q_positions=None, kv_positions=None, **sight,
):  # fmt: skip
    """The softmax before dropout, p `[*batch, H, Sq, Sk]`; lse and max_logits; in q's dtype."""
    ahead = distance(q, k, sight.get("causal_alignment"), q_positions, kv_positions)
    rows = jnp.arange(q.shape[-3], dtype=jnp.int32)[:, None]
    rows = rows >= 0 if q_lengths is None else rows < q_lengths[..., None, None, None]  # those there are
    seen = rows & visible(ahead, **sight)
    s = logits(q, k, bias, scale, ahead, logits_soft_cap, alibi_slopes, score_mod, seen)
    if weights is not None:  # a key kept with probability w stands for 1 / w of its kind
        s = s - jnp.log(jnp.where(weights > 0, weights, 1).astype(s.dtype))
    s = jnp.where(seen, s, -jnp.inf)
    max_logits = jax.lax.stop_gradient(jnp.max(s, (-2, -1), initial=-jnp.inf))
    if sinks is not None:  # one more key, whose value is 0
        sink = jnp.where(rows, sinks.astype(s.dtype)[:, None, None], -jnp.inf)
        s = jnp.concatenate([s, jnp.broadcast_to(sink, (*s.shape[:-1], 1))], -1)
    m = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=-jnp.inf))
    m = jnp.where(m == -jnp.inf, 0, m)
    e = jnp.exp(s - m)
    l = e.sum(-1, keepdims=True)
    empty = l == 0  # a row that sees nothing: o = 0, lse = -inf, gradients 0
    l = jnp.where(empty, 1, l)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(l))[..., 0]
    return (e / l)[..., : k.shape[-3]], lse, max_logits


def logits(q, k, bias=None, scale=None, ahead=None, soft_cap=None, slopes=None, score_mod=None, seen=True):
    """What is compared, seen or not: `[*batch, H, Sq, Sk]`."""
    scale = jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    s = jnp.einsum("...qhd,...khd->...hqk", q, by_query_head(k, q), precision="highest") * scale
    s = s if score_mod is None else everywhere(score_mod, s, seen)
    s = s if soft_cap is None else capped(s, soft_cap)
    s = s if bias is None else s + bias.astype(s.dtype)
    return s if slopes is None else s - slopes.astype(s.dtype)[..., None, None] * jnp.abs(ahead).astype(s.dtype)


def everywhere(function, s, seen):
    """function(score, b, h, i, j), of scalars, of all scores `[*batch, H, Sq, Sk]` that are seen; b counts batches.
    What is hidden is as the first row's first key, which is hidden in its turn: it may be NaN where it is."""
    whole = s.reshape(math.prod(s.shape[:-3]), *s.shape[-3:])
    seen = jnp.broadcast_to(seen, s.shape).reshape(whole.shape)
    b, h, i, j = jnp.indices(whole.shape, dtype=jnp.int32)
    places = (jnp.where(seen, x, 0).ravel() for x in (i, j))
    made = jax.vmap(function)(jnp.where(seen, whole, 0).ravel(), b.ravel(), h.ravel(), *places)
    return made.reshape(*s.shape, *made.shape[1:])


def capped(s, soft_cap):
    return soft_cap * jnp.tanh(s / soft_cap)


def distance(q, k, causal_alignment=None, q_positions=None, kv_positions=None):
    """How far each row's position is ahead of each key's: `[Sq, Sk]`, or `[*batch, 1, Sq, Sk]` of positions."""
    if q_positions is not None:
        return q_positions[..., None, :, None] - kv_positions[..., None, None, :]
    seqlen_q, seqlen_k = q.shape[-3], k.shape[-3]
    offset = seqlen_k - seqlen_q if causal_alignment == "bottom_right" else 0
    return jnp.arange(seqlen_q)[:, None] + offset - jnp.arange(seqlen_k)


def visible(
    ahead, *, causal=False, causal_alignment=None, window_size=None, mask=None, q_segment_ids=None, kv_segment_ids=None,
    kv_lengths=None,
):  # fmt: skip
    """Which keys the rows see: bool, broadcasts to `[*batch, H, Sq, Sk]`."""
    left, right = window_size if isinstance(window_size, tuple) else (window_size, window_size)
    seen = ahead >= 0 if causal else jnp.ones_like(ahead, bool)
    seen = seen if left is None else seen & (ahead <= left)
    seen = seen if right is None else seen & (-ahead <= right)
    seen = seen if mask is None else seen & mask
    if q_segment_ids is not None:
        kv_segment_ids = q_segment_ids if kv_segment_ids is None else kv_segment_ids
        ids_q, ids_k = q_segment_ids[..., None, :, None], kv_segment_ids[..., None, None, :]
        seen = seen & (ids_q == ids_k) & (ids_q >= 0)
    if kv_lengths is not None:
        seen = seen & (jnp.arange(ahead.shape[-1], dtype=jnp.int32) < kv_lengths[..., None, None, None])
    return seen


def by_query_head(x, q):
    """k or v, with a head for each of q's."""
    return jnp.repeat(x, q.shape[-2] // x.shape[-2], -2)


WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011), in NumPy: four words for a counter of four and a key of two."""
    c0, c1, c2, c3, k0, k1 = (np.asarray(x, np.uint64) for x in (*counter, *key))
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & WORD, a >> 32 ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def kept(seed, batch, heads, seqlen_q, seqlen_k, rate, offset=0):
    """The keys that dropout spares: bool `[*batch, heads, Sq, Sk]`; a row's position is its index + `offset`.

    `seed`: an integer; or an array of them that broadcasts to `[*batch, heads]`, one for each.
    """
    flat = np.arange(int(np.prod(batch)))[:, None, None, None], np.arange(heads)[:, None, None]
    if isinstance(seed, int):
        key = philox((*flat, 0, 0), (seed & WORD, seed >> 32 & WORD))[:2]
    else:
        key = np.broadcast_to(seed, (*batch, heads)).reshape(-1, heads, 1, 1), 0
    rows, cols = np.arange(seqlen_q)[:, None] + offset & WORD, np.arange(seqlen_k)
    words = np.broadcast_arrays(*philox((rows, cols // 4, 0, 0), key))
    return (np.choose(cols % 4, words) >= round(rate * 2**32)).reshape(*batch, heads, seqlen_q, seqlen_k)


def paged(q, k_pages, v_pages, page_table, lengths, *, cu_q_lens=None, causal=True, k_scale=None, v_scale=None,
          head_dim_v=None, softmax_scale=None, **options):  # fmt: skip
    """o and lse of `paged_attention`, sequence by sequence: o in q's shape, lse `[B, H, Sq]` or `[H, T]`."""
    full = lambda pages, scale: (
        np.asarray(pages, np.float64)
        * (
            1
            if scale is None
            else np.broadcast_to(np.asarray(scale, np.float64), pages.shape[::2][:2])[:, None, :, None]
        )
    )
    v_pages, v_scale = (k_pages[..., :head_dim_v], k_scale) if v_pages is None else (v_pages, v_scale)
    k_pages, v_pages = full(k_pages, k_scale), full(v_pages, v_scale)
    ragged = cu_q_lens is not None
    size, batch = k_pages.shape[1], len(lengths)
    results = []
    for b in range(batch):
        rows = q[cu_q_lens[b] : cu_q_lens[b + 1]] if ragged else q[b]
        n = int(lengths[b])
        table = np.asarray(page_table)[b, : -(-n // size)]
        if options.get("window_size") is not None:  # what lies left of it may be anybody's, or nobody's
            table = np.clip(table, 0, k_pages.shape[0] - 1)
        k, v = (pages[table].reshape(-1, *pages.shape[2:])[:n] for pages in (k_pages, v_pages))
        o, lse, _ = attention(
            rows, jnp.asarray(k), jnp.asarray(v), scale=softmax_scale, causal=causal, causal_alignment="bottom_right",
            **options,
        )  # fmt: skip
        results.append((o, lse))
    if not ragged:
        return tuple(jnp.stack(x) for x in zip(*results, strict=True))
    o, lse = (jnp.concatenate(x, axis) for x, axis in zip(zip(*results, strict=True), (0, 1), strict=True))
    missing = q.shape[0] - o.shape[0]
    return jnp.pad(o, ((0, missing), (0, 0), (0, 0))), jnp.pad(lse, ((0, 0), (0, missing)), constant_values=-jnp.inf)
