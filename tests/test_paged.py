"""Attention over pages on the XLA path: what is drawn, what must hold for every sequence, every message."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import paged_cases
import pytest
import reference
from checks import QUICK

from jax_flash_attn2 import Config, paged_attention

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TILES = Config(block_m=16, block_n=32)
KV_HEADS, HEADS, D, SIZE = 2, 4, 16, 16
attend = jax.jit(
    functools.partial(paged_attention, return_lse=True, config=TILES),
    static_argnames="window_size",
    compiler_options=QUICK,
)


@pytest.mark.parametrize("seeds", paged_cases.numbers(24, 6))
def test_drawn(seeds):
    """In blocks and tiles that are smaller than most problems, but for every third."""
    for seed in seeds:
        paged_cases.check(seed, config=TILES if seed % 3 else None)


def defined(*args, **options):
    with jax.enable_x64(True):
        return tuple(np.asarray(x) for x in reference.paged(*args, **options))


def cache(pages=64, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((pages, SIZE, KV_HEADS, D)).astype(dtype) for _ in range(2))


def queries(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal((*shape, HEADS, D)).astype(np.float32)


def starts(*rows):
    return np.append(0, np.cumsum(rows)).astype(np.int32)


def tables(batch, width, seed=2):
    """Pages of their own for every sequence, in no order."""
    return np.random.default_rng(seed).permutation(64)[: batch * width].reshape(batch, width).astype(np.int32)


def int32(*numbers):
    return np.array(numbers, np.int32)


def test_chunks_of_a_prompt():
    """Prefill in chunks, whatever their sizes, is prefill at once; two prompts, in one compiled program."""
    n, (k, v), q, table = int32(150, 90), cache(), queries(240), tables(2, 10)
    whole, whole_lse = defined(q, k, v, table, n, cu_q_lens=starts(*n), window_size=(70, 0))
    bounds = starts(*n)
    for size in (1, 7, 64, 65, 150):
        o = np.full(q.shape, np.nan, np.float32)
        lse = np.full((HEADS, 240), np.nan, np.float32)
        for start in range(0, 150, size) if size > 1 else (0, 80, 149):
            own = np.clip(n - start, 0, size)
            rows = np.concatenate([b + start + np.arange(m) for b, m in zip(bounds, own, strict=False)])
            some = np.zeros_like(q)
            some[: len(rows)] = q[rows]
            lengths = np.minimum(n, start + size).astype(np.int32)
            got = attend(some, k, v, table, lengths, cu_q_lens=starts(*own), window_size=(70, 0))
            o[rows], lse[:, rows] = got[0][: len(rows)], got[1][:, : len(rows)]
        done = np.isfinite(lse).all(0)
        assert done.all() or size == 1
        np.testing.assert_allclose(o[done], whole[done], atol=2e-6)
        np.testing.assert_allclose(lse[:, done], whole_lse[:, done], atol=2e-6)


@pytest.mark.parametrize("ragged", [False, True])
def test_sequences_are_apart(ragged):
    """The same bits in another slot, with other neighbours, with NaN or inf in all that is not the sequence's own."""
    table, (k, v) = tables(4, 8), cache()
    rows = dict(enumerate((1, 20, 3, 70) if ragged else (3,) * 4))
    q = {b: queries(n, seed=b) for b, n in rows.items()}
    seen = {}
    for order, lengths, others in (
        ((0, 1, 2, 3), (100, 70, 128, 90), 0.5),
        ((2, 0, 3, 1), (100, 70, 128, 90), 0.5),
        ((3, 2, 1, 0), (100, 70, 3, 0), np.nan),
        ((1, 3, 0, 2), (100, 70, 40, 127), np.inf),
    ):
        pages = [np.full_like(x, others) for x in (k, v)]
        for b in (0, 1):  # the two that are looked at
            for x, own in zip(pages, (k, v), strict=True):
                for i in range(-(-lengths[b] // SIZE)):
                    live = min(lengths[b] - i * SIZE, SIZE)
                    x[table[b, i], :live] = own[table[b, i], :live]
        given = [q[b] for b in order]
        options = {"cu_q_lens": starts(*map(len, given))} if ragged else {}
        given = np.concatenate(given) if ragged else np.stack(given)
        lengths = int32(*(lengths[b] for b in order))
        o, lse = (np.asarray(x) for x in attend(given, *pages, table[list(order)], lengths, **options))
        for b in (0, 1):
            at = order.index(b)
            here = slice(*options["cu_q_lens"][at : at + 2]) if ragged else at
            got = o[here].tobytes(), (lse[:, here] if ragged else lse[here]).tobytes()
            assert np.isfinite(o[here]).all()
            assert seen.setdefault(b, got) == got


def test_rows_of_nobody():
    """Decoding and prompts in one call, sequences without rows, and rows behind the last."""
    rows, n, (k, v), table = (1, 0, 40, 1, 2, 5), int32(100, 3, 40, 1, 0, 30), cache(), tables(6, 8)
    q = queries(sum(rows) + 3)
    q[-3:] = np.nan
    o, lse = attend(q, k, v, table, n, cu_q_lens=starts(*rows))
    want, want_lse = defined(q[:-3], k, v, table, n, cu_q_lens=starts(*rows))
    np.testing.assert_allclose(o[:-3], want, atol=2e-6)
    np.testing.assert_allclose(lse[:, :-3], want_lse, atol=2e-6)
    assert (o[-3:] == 0).all()
    assert (lse[:, -3:] == -np.inf).all()


LENGTHS, TABLE, ROWS = int32(100, 40), tables(2, 8), starts(3, 5)


def changed(x, at, value):
    x = x.copy()
    x[at] = value
    return x


BAD = {
    "no such page": (
        changed(TABLE, (1, 2), 64),
        LENGTHS,
        ROWS,
        r"from 0 to 63, got 64 as page 2 of sequence 1",
    ),
    "a negative page": (changed(TABLE, (1, 0), -1), LENGTHS, ROWS, r"got -1 as page 0 of sequence 1"),
    "too long": (TABLE, int32(100, 129), ROWS, r"from 0 to 128, the keys of 8 pages of 16, got 129 of sequence 1"),
    "shorter than nothing": (TABLE, int32(100, -1), ROWS, r"lengths must be from 0 to 128.* got -1 of sequence 1$"),
    "too many rows": (TABLE, LENGTHS, int32(0, 3, 2**30), r"cu_q_lens must rise from 0 to at most the 10 rows of q"),
    "falling rows": (TABLE, LENGTHS, int32(0, 5, 3), r"must rise from 0 .* got cu_q_lens\[1:3\] = \[5, 3\]$"),
    "rows from 1 on": (TABLE, LENGTHS, int32(1, 3, 8), r"must rise from 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers(name):
    """An error where they are known, NaN where they are not, and nothing else is touched."""
    table, lengths, rows, message = BAD[name]
    (k, v), q = cache(), queries(10)
    with pytest.raises(ValueError, match=message):
        paged_attention(q, k, v, table, lengths, cu_q_lens=rows)
    o, lse = (np.asarray(x) for x in attend(q, k, v, table, lengths, cu_q_lens=rows))
    if "rows" in name:
        assert np.isnan(o[:8]).all()
        return
    clean, clean_lse = attend(q, k, v, TABLE, LENGTHS, cu_q_lens=ROWS)
    assert np.isnan(o[3:8]).all()
    assert np.isnan(lse[:, 3:8]).all()
    for rest in (slice(3), slice(8, None)):
        np.testing.assert_array_equal(o[rest], clean[rest])
        np.testing.assert_array_equal(lse[:, rest], clean_lse[:, rest])
    o, lse = attend(q.reshape(2, 5, HEADS, D), k, v, table, lengths)
    assert np.isnan(o[1]).all()
    assert np.isnan(lse[1]).all()
    assert np.isfinite(o[0]).all()


def test_windows_touch_no_page_outside():
    """Left of the window there may be no pages at all; and the call may know it."""
    (k, v), table = cache(), np.arange(1, 17, dtype=np.int32).reshape(2, 8)
    n, q = int32(120, 100), queries(2, 3)
    want = defined(q, k, v, table, n, window_size=(20, 0))
    first = (n - 3 - 20) // SIZE
    k[0] = v[0] = k[-1] = v[-1] = np.nan  # what a number that is no page's might be read as
    for b in range(2):
        k[table[b, : first[b]]] = v[table[b, : first[b]]] = np.nan
        table[b, : first[b]] = (-1, 2**30)[b]
    for call in (attend, functools.partial(paged_attention, return_lse=True)):
        for got, x in zip(call(q, k, v, table, n, window_size=(20, 0)), want, strict=True):
            np.testing.assert_allclose(got, x, atol=2e-6)


def test_float64():
    with jax.enable_x64(True):
        (k, v), q, table, n = cache(dtype=np.float64), queries(2, 3).astype(np.float64), tables(2, 8), int32(100, 33)
        got, want = paged_attention(q, k, v, table, n, return_lse=True), defined(q, k, v, table, n)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_memory(dtype):
    """Temporary memory is at most a twentieth of the cache, which is neither copied nor widened."""
    shape = jax.ShapeDtypeStruct
    pages = shape((2048, 32, 8, 128), dtype)
    args = shape((8, 32, 128), "bfloat16"), pages, pages, shape((8, 256), "int32"), shape((8,), "int32")
    scales = {name: shape((2048, 8), "float32") for name in ("k_scale", "v_scale")} if dtype == "int8" else {}
    compiled = jax.jit(paged_attention, compiler_options=QUICK).lower(*args, **scales).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * pages.size * pages.dtype.itemsize / 20


Q, (K, V), N = queries(2, 3), cache(), int32(100, 40)
FLAT = Q.reshape(6, HEADS, D)
WRONG = {
    "pages of another kind": (TypeError, "k_pages must be an array", {"k_pages": [1]}),
    "pages of bool": (TypeError, "k_pages must have one of the dtypes", {"k_pages": K > 0}),
    "pages with three axes": (ValueError, r"k_pages must have shape \[num_pages", {"k_pages": K[0]}),
    "pages of 8": (ValueError, "a power of two from 16 to 256 tokens, got 8", {"k_pages": K[:, :8]}),
    "pages of 48": (ValueError, "got 48", {"v_pages": np.repeat(V, 3, 1)}),
    "fewer pages": (ValueError, "v_pages must have k_pages' pages", {"v_pages": V[:3]}),
    "two dtypes": (TypeError, "the dtype of k_pages, float32, got float16", {"v_pages": V.astype(np.float16)}),
    "another width": (ValueError, "k_pages must have q's head_dim 16, got 8", {"k_pages": K[..., :8]}),
    "heads": (ValueError, "must be a multiple of those of the pages, got 3 and 2", {"q": Q[:, :, :3]}),
    "no width of values": (ValueError, "say how many: head_dim_v=512", {"v_pages": None}),
    "a wide width": (ValueError, "from 1 to the head_dim of k_pages, 16", {"v_pages": None, "head_dim_v": 17}),
    "two widths": (ValueError, "head_dim_v must be that of v_pages, 16", {"head_dim_v": 8}),
    "q of one axis": (ValueError, "q must have shape", {"q": Q[0, 0, 0]}),
    "ragged q": (ValueError, r"\[T, H, D\] with cu_q_lens", {"cu_q_lens": starts(1, 2)}),
    "table of floats": (TypeError, "page_table must be an array .* of integers", {"page_table": TABLE.astype(float)}),
    "table of one": (ValueError, r"page_table must have shape \[2, pages", {"page_table": TABLE[:1]}),
    "lengths of a list": (TypeError, r"of integers, got \[1, 2\]; pass jnp.asarray", {"lengths": [1, 2]}),
    "more rows than keys": (ValueError, "got 2 of sequence 1, which has 3 new ones", {"lengths": int32(9, 2)}),
    "lengths of three": (ValueError, r"lengths must have shape \[2\]", {"lengths": int32(1, 2, 3)}),
    "starts of two": (ValueError, r"\[B \+ 1\] = \[3\]", {"q": FLAT, "cu_q_lens": int32(0, 3)}),
    "int8 alone": (ValueError, "of int8 need k_scale", {"k_pages": K.astype(np.int8), "v_pages": V.astype(np.int8)}),
    "a scale of pages": (ValueError, r"k_scale must be a number or have shape", {"k_scale": np.ones(64, np.float32)}),
    "an integer scale": (TypeError, "v_scale must be a number or a floating array", {"v_scale": np.ones((64, 2), int)}),
    "splits": (ValueError, "splits must be from 1 to 256", {"splits": 0}),
    "splits on XLA": (ValueError, "^splits speaks to the Triton", {"splits": 4, "implementation": "xla"}),
    "odd rows": (ValueError, "of 16 bytes, got head_dim 6 of v_pages", {"v_pages": V[..., :6], "block_ptr": True}),
    "a mapping": (TypeError, "config must be a Config of the forward kernel", {"config": {"dq": Config()}}),
    "two splits": (ValueError, "contradicts", {"splits": 2, "config": Config(num_splits=3)}),
    "causal": (TypeError, "causal must be", {"causal": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    error, message, wrong = WRONG[name]
    arguments = {"q": Q, "k_pages": K, "v_pages": V, "page_table": TABLE, "lengths": N}
    with pytest.raises(error, match=message):
        paged_attention(**arguments | wrong)


@pytest.mark.parametrize("kind", ["uint8", "int64"])
def test_integers_of_any_width(kind):
    """What int32 does not hold is not taken for what its last bits say, and what is known stays so under jit."""
    want = attend(FLAT, K, V, TABLE, N, cu_q_lens=starts(3, 3))[0]
    with jax.enable_x64(True):
        for of in (np.asarray, jnp.asarray):
            table, n, cu = (of(x.astype(kind)) for x in (TABLE, N, starts(3, 3)))
            np.testing.assert_array_equal(attend(FLAT, K, V, table, n, cu_q_lens=cu)[0], want)
            if kind == "int64":
                far = n + 2**32
                with pytest.raises(ValueError, match="lengths must be from 0 to 128"):
                    jax.jit(lambda q, t=table, n=far, cu=cu: paged_attention(q, K, V, t, n, cu_q_lens=cu))(FLAT)
                assert np.isnan(attend(FLAT, K, V, table + 2**32, n, cu_q_lens=cu)[0]).all()


def test_no_gradient():
    with pytest.raises(TypeError, match="paged_attention has no gradient"):
        jax.grad(lambda q: paged_attention(q, K, V, TABLE, N).sum())(Q)
