"""`varlen_attention` is attention of each sequence by itself and visits no tile in vain; `masks` says where they lie."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import run
from reference import attention, kept

import jax_flash_attn2 as fa
from jax_flash_attn2 import explain, flash_attention, gpu_target, masks, varlen_attention
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.serving.varlen import places
from jax_flash_attn2.tiles import spans

ROWS, KEYS = [5, 0, 37, 1, 20, 12], [5, 4, 50, 18, 9, 0]  # rows without keys, keys without rows, more of either
T, TK, H, HKV, D, DV = 80, 90, 4, 2, 16, 12  # both with padding behind
CONFIG = fa.Config(16, 16)


def starts(lengths):
    return np.cumsum([0, *lengths]).astype(np.int32)


@functools.cache
def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"q": (T, H, D), "k": (TK, HKV, D), "v": (TK, HKV, DV), "sinks": (H,), "alibi_slopes": (H,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def one_by_one(q, k, v, cu_q, cu_k, **options):
    """o, lse and the largest logits: the definition, in fp64."""
    results = []
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = {**options, "keep": options["keep"][:, rows, keys]} if "keep" in options else options
        results.append(attention(q[rows], k[keys], v[keys], causal_alignment="bottom_right", **own))
    o, lse, largest = (jnp.concatenate(x, axis) for x, axis in zip(zip(*results, strict=True), (0, 1, 0), strict=True))
    missing = q.shape[0] - o.shape[0]
    lse = jnp.pad(lse, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return jnp.pad(o, ((0, missing), (0, 0), (0, 0))), lse, largest.reshape(-1, q.shape[1]).max(0)


def with_gradients(function, given):
    """The results of function(**given), and the gradients of all that it is given, through o and lse."""
    rng = np.random.default_rng(1)
    out, vjp = jax.vjp(lambda given: function(**given), given)
    o, lse, *rest = out
    do, dlse = (rng.normal(size=x.shape).astype(x.dtype) for x in (o, lse))
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0)
    return out, vjp((do, dlse, *map(jnp.zeros_like, rest)))[0]


OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "logits_soft_cap": 2.0, "sinks": True},
    "window": {"window_size": (6, 3), "alibi_slopes": True},
    "causal window": {"causal": True, "window_size": 4, "dropout_rate": 0.3, "sinks": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_is_each_sequence_by_itself(name):
    """Values, and the gradients of all that has one; padding may hold NaN, which reaches nothing."""
    given = {n: x for n, x in inputs().items() if n in ("q", "k", "v") or n in OPTIONS[name]}
    options = {n: x for n, x in OPTIONS[name].items() if n not in inputs()}
    cu_q, cu_k = starts(ROWS), starts(KEYS)
    spoiled = {n: x.copy() for n, x in given.items()}
    for n, end in (("q", cu_q[-1]), ("k", cu_k[-1]), ("v", cu_k[-1])):
        spoiled[n][end:] = np.nan
    ours = functools.partial(
        *(varlen_attention,), cu_q_lens=cu_q, cu_k_lens=cu_k, config=CONFIG, dropout_seed=7, return_lse=True,
        return_max_logits=True, **options,
    )  # fmt: skip
    (o, lse, largest), gradients = run(functools.partial(with_gradients, ours), spoiled)
    with jax.enable_x64(True):
        if "dropout_rate" in options:
            options["keep"] = kept(7, (), H, T, TK, options["dropout_rate"])
        own = functools.partial(one_by_one, cu_q=cu_q, cu_k=cu_k, **options)
        double = {n: x.astype(np.float64) for n, x in given.items()}
        wanted, wanted_gradients = run(functools.partial(with_gradients, own), double)
    np.testing.assert_allclose(o, wanted[0], atol=2e-5)
    np.testing.assert_allclose(lse, wanted[1], atol=2e-5)
    np.testing.assert_allclose(largest, wanted[2], atol=2e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for n, x in gradients.items():
        np.testing.assert_allclose(x, wanted_gradients[n], atol=1e-4, err_msg=n)


def test_one_set_of_starts_means_the_same_for_keys():
    """Equal to both given, but for rounding, though it has no positions; in padding too, whatever that holds."""
    x = {n: x[:T].copy() if x.ndim == 3 else x for n, x in inputs().items() if n != "alibi_slopes"}
    for n in ("q", "k", "v"):
        x[n][sum(ROWS) :] = np.nan
    call = functools.partial(varlen_attention, **x, causal=True, window_size=8, config=CONFIG, return_lse=True)
    (o, lse), wanted = (jax.jit(call)(cu_q_lens=starts(ROWS), **more) for more in ({}, {"cu_k_lens": starts(ROWS)}))
    np.testing.assert_allclose(o, wanted[0], atol=1e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-6)
    assert (lse[:, sum(ROWS) :] == -np.inf).all()


def test_a_score_function_is_told_of_the_one_row():
    """So arrays over the row say which sequence a token is of."""
    lengths = np.int32([10, 20])
    x = {n: x[:30] for n, x in inputs().items() if n in ("q", "k", "v")}
    ids, place = np.repeat(np.int32([0, 1]), lengths), np.r_[:10, :20].astype(np.int32)
    heat, far = jnp.float32([0.5, 2.0]), jnp.float32(0.1)
    row_ids, row_places = masks.segment_ids(lengths, 30), masks.positions(lengths, 30)

    def by_sequence(score, b, h, i, j):
        return score * heat[row_ids[i]] - far * (row_places[i] + row_places[j]).astype(score.dtype) + b

    def plainly(start, length, temperature):
        tokens = slice(start, start + length)
        mod = lambda s, b, h, i, j: s * temperature - 0.1 * (i + j).astype(s.dtype)
        with jax.numpy_dtype_promotion("standard"):
            return attention(*(x[n][tokens] for n in ("q", "k", "v")), score_mod=mod, compute=jnp.float32)[0]

    with jax.numpy_dtype_promotion("standard"):
        o = jax.jit(functools.partial(varlen_attention, score_mod=by_sequence))(**x, cu_q_lens=masks.cu_lens(lengths))
    assert np.array_equal(row_ids, ids)
    assert np.array_equal(row_places, place)
    np.testing.assert_allclose(o, np.concatenate([plainly(0, 10, 0.5), plainly(10, 20, 2.0)]), atol=1e-5)


def test_transforms():
    """vmap over rows with their own sequences, by a device each, remat, and forward mode."""
    x, cu = inputs()["q"][:40], np.stack([starts([3, 20, 10]), starts([0, 40, 0])])

    def loss(x, cu, **options):
        return (varlen_attention(x, x[:, :HKV], x[:, 2:, :DV], cu, causal=True, **options) ** 2).sum()

    both = np.stack([x, x[::-1]])
    mesh, each = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,)), jax.P("x")
    gradient = jax.vmap(jax.grad(jax.checkpoint(loss)))
    mapped = run(jax.shard_map(gradient, mesh=mesh, in_specs=each, out_specs=each), both, cu)
    for own, one, ends in zip(mapped, both, cu, strict=True):
        np.testing.assert_allclose(own, jax.jit(jax.grad(loss))(one, ends), atol=1e-5)
    along = jax.jvp(lambda x: loss(x, cu[0], higher_order=True), (x,), (x,))[1]
    np.testing.assert_allclose(along, (mapped[0] * x).sum(), rtol=1e-4)


BAD = [[1, 5, 9], [0, 9, 5], [0, 5, 41], [0, -1, 5]]


@pytest.mark.parametrize("cu_k", [False, True])
def test_wrong_starts_under_jit_give_nan(cu_k, compiled_fully):
    """In all rows, and in all gradients, never what another sequence holds; the same call then does what is right."""
    x = inputs()["q"][:40]
    good = np.int32([0, 5, 40])

    @jax.jit
    def both(x, starts):
        given = {"cu_q_lens": good, "cu_k_lens": starts} if cu_k else {"cu_q_lens": starts}
        call = functools.partial(varlen_attention, **given, causal=True, return_lse=True, return_max_logits=True)
        out, vjp = jax.vjp(call, x, x, x)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    for bad in BAD:
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(both(x, np.int32(bad)))), bad
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(both(x, good)))


LAYOUTS = {
    "documents": ([30, 1, 0, 64, 5, 5, 90, 40], None),
    "decoding": ([1] * 8 + [50, 0, 3], [100, 3, 0, 64, 65, 10, 1, 1, 80, 70, 30]),
    "fewer keys": ([5, 40, 0, 100, 33], [9, 80, 50, 2, 64]),
}
SIGHTS = [(None, None), (None, 0), (20, None), (20, 0), (9, 14), (None, 2)]
"""How far a row sees to the left and to the right."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_visits_the_tiles_that_show_something_and_no_others(layout):
    """For every bound, with tiles of two shapes by turns."""
    rows, keys = LAYOUTS[layout]
    cu_q, cu_k = starts(rows), starts(keys or rows)
    n, m = int(cu_q[-1]) + 13, int(cu_k[-1]) + 13  # padding
    q, k = jnp.zeros((1, n, 1, 8)), jnp.zeros((1, m, 1, 8))
    whose_q, whose_k = (np.repeat(np.arange(len(c) - 1), np.diff(c)) for c in (cu_q, cu_k))
    to_end_q, to_end_k = cu_q[1:][whose_q] - np.arange(cu_q[-1]), cu_k[1:][whose_k] - np.arange(cu_k[-1])
    for turn, (left, right) in enumerate(SIGHTS):
        where, _ = places(cu_q, cu_k if keys else None, n, m, left, right)
        where.setdefault("kv_segment_ids", where["q_segment_ids"])
        names = {"q_segment_ids": "q_segments", "kv_segment_ids": "kv_segments"}
        shape = {"q": (1, 1, -1, 1), "kv": (1, 1, 1, -1)}
        operands = {names.get(name, name): x.reshape(shape[name.split("_")[0]]) for name, x in where.items()}
        spec = Spec.of(Rules(left=left, right=right), q, k, k, operands)
        ahead = to_end_k[None] - to_end_q[:, None]  # of a row's position before a key's
        seen = np.zeros((n, m), bool)
        seen[: len(whose_q), : len(whose_k)] = whose_q[:, None] == whose_k
        for bound, far in ((left, ahead), (right, -ahead)):
            if bound is not None:
                seen[: len(whose_q), : len(whose_k)] &= far <= bound
        block_m, block_n = ((16, 32), (64, 16))[turn % 2]
        at = np.arange(0, n, block_m)
        tiles = [seen[i : i + block_m, j : j + block_n].any() for i in at for j in range(0, m, block_n)]
        table = np.asarray(spans.query_tiles(spec, operands, 1, n, m, at, block_m, block_n))
        assert np.array_equal(table != spans.EMPTY, np.reshape(tiles, table.shape)), (left, right)
        if not keys:  # then the kernels, which go over a span of tiles, visit no more either
            begin, _, _, end = np.moveaxis(spans.query_spans(spec, operands, 1, n, m, at, block_m, block_n), -1, 0)
            assert (end - begin).sum() == np.sum(tiles)


def test_explain_counts_as_many():
    """Sixteen documents in 4096 tokens: tiles on the diagonals of documents, in every kernel."""
    x = jnp.zeros((4096, 2, 64), jnp.bfloat16)
    where, _ = places(starts([256] * 16), None, 4096, 4096, None, 0)
    with gpu_target(compute_capability=80):
        passes = explain(x, x, x, causal=True, config=fa.Config(64, 64), **where).passes
    assert [p.visited for p in passes] == [2 * 16 * 10] * 3


WRONG = {
    "batch": (lambda x, c: varlen_attention(x[None], x, x, c), ValueError, "q must have shape [T, H, D], all sequences in one row, got (1, 40, 4, 16); `masks.pack`"),
    "type": (lambda x, c: varlen_attention(x, x, x, c.astype(float)), TypeError, "cu_q_lens must be an array [B + 1] of integers, got ndarray of dtype float64"),
    "empty": (lambda x, c: varlen_attention(x, x, x, c[:0]), ValueError, "cu_q_lens must have shape [B + 1] (where the rows of each sequence begin"),
    "batches": (lambda x, c: varlen_attention(x, x, x, c, c[1:]), ValueError, "cu_k_lens must have shape [B + 1] = [3] (where the keys of each sequence begin, and the last end), got (2,)"),
    "first": (lambda x, c: varlen_attention(x, x, x, c + np.int32(1)), ValueError, "cu_q_lens must rise from 0 to at most the 40 rows of q, got cu_q_lens[0:2] = [1, 6]"),
    "falls": (lambda x, c: varlen_attention(x, x, x, c, c[[0, 2, 1]]), ValueError, "cu_k_lens must rise from 0 to at most the 40 keys of k, got cu_k_lens[1:3] = [40, 5]"),
    "keys": (lambda x, c: varlen_attention(x, x[:9], x[:9], c), ValueError, "k must have as many rows as q where there is no cu_k_lens, got 9 and 40"),
    "option": (lambda x, c: varlen_attention(x, x, x, c, logits_soft_cap=0), ValueError, "logits_soft_cap must be positive"),
    "sum": (lambda x, c: masks.cu_lens(np.int32([2**30] * 3)), ValueError, "lengths must sum to at most 2147483647 (int32), got 3221225472"),
    "lengths": (lambda x, c: masks.cu_lens(np.int32([3, -1])), ValueError, "lengths must be at least 0, got [3, -1]"),
    "lengths_type": (lambda x, c: masks.positions([3], 4), TypeError, "lengths must be an array of integers [B], got [3]"),
    "total": (lambda x, c: masks.segment_ids(np.int32([3, 4]), 6), ValueError, "lengths must sum to at most the 6 tokens of the row, got 7"),
    "total_type": (lambda x, c: masks.segment_ids(np.int32([3, 4]), 6.0), ValueError, "total must be an integer of at least 0 (it is static under jit), got 6.0"),
    "hole": (lambda x, c: masks.lengths_from(padding_mask=np.bool_([[1, 1, 1], [1, 0, 1]])), ValueError, "padding_mask must have all its padding on the right, got padding at token 1 of row (1,)"),
    "which": (lambda x, c: masks.lengths_from(), ValueError, "lengths_from takes a padding_mask or segment_ids; give one of them"),
    "float": (lambda x, c: masks.lengths_from(padding_mask=x), TypeError, "padding_mask must be an array of booleans or integers [*batch, S], got"),
    "count": (lambda x, c: masks.lengths_from(padding_mask=c, num_segments=2), ValueError, "num_segments says how many lengths come of segment_ids"),
    "order": (lambda x, c: masks.lengths_from(segment_ids=np.int32([0, -1, 1])), ValueError, "segment_ids must rise, with padding (negative ids) at the end only, got 1 at token 2 behind -1"),
    "more": (lambda x, c: masks.lengths_from(segment_ids=np.int32([0, 1]), num_segments=1), ValueError, "segment_ids must be below num_segments, 1, got 1"),
    "traced": (lambda x, c: jax.jit(lambda n: masks.pack(x[None], n))(c[:1]), ValueError, "total must be given under jit, where it cannot follow from lengths"),
    "pack": (lambda x, c: masks.pack(x, c), ValueError, "lengths must have shape [40], as x has sequences, got (3,)"),
    "long": (lambda x, c: masks.pack(x[:2], np.int32([3, 5])), ValueError, "lengths must be at most 4 (the S tokens of x), got [3, 5]"),
    "short": (lambda x, c: masks.unpack(x, np.int32([3, 5]), 4), ValueError, "lengths must be at most 4 (seqlen), got [3, 5]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(inputs()["q"][:40], np.int32([0, 5, 40]))


def test_where_sequences_lie():
    """Known and traced alike."""
    lengths = np.int32([3, 0, 2])
    for call in (lambda f, *x: f(*x), lambda f, *x: jax.jit(f)(*x)):
        assert np.array_equal(call(masks.cu_lens, lengths), [0, 3, 3, 5])
        assert np.array_equal(call(lambda n: masks.segment_ids(n, 7), lengths), [0, 0, 0, 2, 2, -1, -1])
        assert np.array_equal(call(lambda n: masks.positions(n, 7), lengths), [0, 1, 2, 0, 1, 0, 0])
        ids = np.int32([[0, 0, 0, 2, 2, -1], [1, 1, 1, 1, 1, 1]])
        counted = call(lambda ids: masks.lengths_from(segment_ids=ids, num_segments=3), ids)
        assert np.array_equal(counted, [[3, 0, 2], [0, 6, 0]])
        real = np.arange(4) < lengths[:, None]
        assert np.array_equal(call(lambda m: masks.lengths_from(padding_mask=m), real), lengths)
    assert np.array_equal(masks.lengths_from(segment_ids=ids[0]), lengths)
    assert all(x.dtype == jnp.int32 for x in (masks.cu_lens(lengths), counted, masks.positions(lengths, 7)))
    # What does not fit is cut off where nobody can look.
    assert np.array_equal(jax.jit(lambda n: masks.segment_ids(n, 4))(lengths), [0, 0, 0, 2])
    assert np.array_equal(jax.jit(masks.cu_lens)(np.int32([3, -2])), [0, 3, 3])


def test_pack_and_unpack():
    """There and back, and in between the attention of the padded batch."""
    lengths = np.int32([5, 0, 8, 3])
    x = np.random.default_rng(0).normal(size=(4, 8, 2, 16)).astype(np.float32)
    row = masks.pack(x, lengths, 20)
    assert np.array_equal(row[:16], np.concatenate([x[b, :n] for b, n in enumerate(lengths)]))
    assert not row[16:].any()
    assert masks.pack(x, lengths).shape[0] == 16
    assert masks.pack(x[..., 0, 0] > 0, lengths).dtype == bool
    padded = flash_attention(x, x, x, causal=True, q_lengths=lengths, kv_lengths=lengths)

    @jax.jit
    def packed(x, lengths):
        row = masks.pack(x, lengths, 20)
        return masks.unpack(varlen_attention(row, row, row, masks.cu_lens(lengths), causal=True), lengths, 8)

    np.testing.assert_allclose(packed(x, lengths), padded, atol=1e-6)
    assert masks.unpack(row, lengths).shape == (4, 8, 2, 16)
    there = np.arange(8) < lengths[:, None]
    gradient = jax.jit(jax.grad(lambda x: masks.unpack(masks.pack(x, lengths, 20), lengths, 8).sum()))(x)
    assert np.array_equal(gradient, np.broadcast_to(there[..., None, None], x.shape))
