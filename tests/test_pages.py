"""`write_pages` puts tokens where `paged_attention` finds them, in place, and in 8 bits as near as these allow."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention

from jax_flash_attn2 import paged_attention, write_pages

SIZE, PAGES, H, HKV, D, DV = 16, 24, 4, 2, 8, 6
TABLE = np.random.default_rng(0).permutation(PAGES)[:18].reshape(3, 6).astype(np.int32)
CAPACITY = TABLE.shape[1] * SIZE


@functools.cache
def tokens():
    """k and v of three sequences of 60; in one a head's keys grow, and some values are 0."""
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(3, 60, HKV, d)).astype(np.float32) for d in (D, DV))
    k[2, 3, 1, 0], k[2, 10, 1, 2] = 8, 20
    v[0, :20] = 0
    return k, v


def empty(dtype, value=0):
    return jnp.full((PAGES, SIZE, HKV, D), value, dtype), jnp.full((PAGES, SIZE, HKV, DV), value, dtype)


def in_order(pages, table):
    """`[B, capacity, Hkv, D]` of a cache."""
    return np.asarray(pages)[table].reshape(len(table), -1, *pages.shape[2:])


def ragged(x, ends, counts):
    """The newest counts[b] of the first ends[b] tokens, and one that is nobody's."""
    row = np.concatenate([x[b, n - c : n] for b, (n, c) in enumerate(zip(ends, counts, strict=True))])
    return np.pad(row, ((0, 1), (0, 0), (0, 0)), constant_values=9)


# How many tokens there are after each step, of each sequence; each has none, one or more new ones.
STEPS = [
    ([20, 0, 3], "ragged"),
    ([21, 1, 4], "one"),
    ([21, 40, 20], "ragged"),
    ([31, 50, 30], "ten"),
    ([31, 50, 31], "ragged"),
]


def steps(write):
    """write(k, v, lengths, cu_q_lens) of each, then the lengths."""
    k, v = tokens()
    before = np.zeros(3, np.int32)
    for ends, form in STEPS:
        lengths = np.int32(ends)
        counts = lengths - before
        if form == "ragged":
            cu = np.cumsum([0, *counts]).astype(np.int32)
            write(ragged(k, lengths, counts), ragged(v, lengths, counts), lengths, cu)
        else:
            at = (lengths[:, None] - (1 if form == "one" else 10) + np.arange(1 if form == "one" else 10))[
                ..., None, None
            ]
            own = (np.take_along_axis(x, at, 1) for x in (k, v))
            write(*((x[:, 0] for x in own) if form == "one" else own), lengths, None)
        before = lengths
    return before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_written_is_read(dtype):
    """By every form, across pages; and what no token went to is as it was."""
    held = empty(dtype, 5)

    def write(k, v, lengths, cu):
        nonlocal held
        held = write_pages(*held, k, v, TABLE, lengths, cu_q_lens=cu)

    lengths = steps(write)
    for pages, x in zip(held, tokens(), strict=True):
        wanted = np.full((PAGES, SIZE, *x.shape[2:]), 5, pages.dtype)
        for b, n in enumerate(lengths):
            at = np.arange(n)
            wanted[TABLE[b, at // SIZE], at % SIZE] = x[b, :n].astype(pages.dtype)
        assert np.array_equal(pages, wanted)
    q = np.random.default_rng(2).normal(size=(3, 2, H, D)).astype(np.float32)
    o = jax.jit(paged_attention)(q, *held, TABLE, lengths)
    for b, n in enumerate(lengths):
        k, v = (np.asarray(jnp.asarray(x[b, :n], dtype), np.float32) for x in tokens())
        wanted = attention(q[b], k, v, causal=True, causal_alignment="bottom_right", compute=jnp.float32)[0]
        np.testing.assert_allclose(o[b], wanted, atol=1e-5)


def relative(dtype):
    """Half a step of a number, in its own size, and of the least numbers, in units of the scale."""
    info = jnp.finfo(dtype)
    return 2.0 ** -(info.nmant + 1), float(info.smallest_subnormal) / 2


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bits(dtype):
    """Each element is within half a step, for int8 once for each time that its page's scale was chosen; scales and pages
    begin as anything, and what no token went to is as it was. `paged_attention` reads it so."""
    held, scales = empty(dtype, 1), tuple(jnp.full((PAGES, HKV), jnp.nan, jnp.float32) for _ in range(2))
    history = [np.asarray(scales[0])]

    def write(k, v, lengths, cu):
        nonlocal held, scales
        *held, k_scale, v_scale = write_pages(
            *held, k, v, TABLE, lengths, cu_q_lens=cu, k_scale=scales[0], v_scale=scales[1]
        )
        scales = k_scale, v_scale
        history.append(np.asarray(k_scale))

    lengths = steps(write)
    chosen = sum((new != old) & ~np.isnan(new) for old, new in itertools.pairwise(history))
    assert chosen.max() >= 3  # of some page the scale grew twice
    for name, pages, scale, x in zip("kv", held, scales, tokens(), strict=True):
        scale, pages = np.asarray(scale), np.asarray(pages).astype(np.float32)
        for b, n in enumerate(lengths):
            for page, start in zip(TABLE[b], range(0, CAPACITY, SIZE), strict=True):
                if start >= n:
                    assert np.isnan(scale[page]).all()
                    assert (pages[page] == 1).all()
                    continue
                own = x[b, start : min(n, start + SIZE)]
                error = np.abs(pages[page, : len(own)] * scale[page][:, None] - own).max((0, 2))
                largest = np.abs(own).max((0, 2))
                if dtype == jnp.int8:
                    times = chosen[page] if name == "k" else np.full(HKV, len(STEPS))
                    assert (error <= times / 254 * largest * 1.0001).all()
                    np.testing.assert_allclose(scale[page], largest / 127, rtol=1e-6)
                else:
                    part, least = relative(dtype)
                    bound = np.maximum(part * np.abs(own), least * scale[page][:, None])
                    assert (np.abs(pages[page, : len(own)] * scale[page][:, None] - own) <= bound).all()
                    assert (np.frexp(scale[page])[0] == 0.5).sum() == (scale[page] > 0).sum()  # powers of two
    q = np.ones((3, H, D), np.float32)
    o = jax.jit(paged_attention)(q, *held, TABLE, lengths, k_scale=scales[0], v_scale=scales[1])
    for b, n in enumerate(lengths):
        k, v = (
            (in_order(np.asarray(x, np.float32) * np.nan_to_num(np.asarray(s))[:, None, :, None], TABLE)[b, :n])
            for x, s in zip(held, scales, strict=True)
        )
        np.testing.assert_allclose(o[b], attention(q[b : b + 1], k, v, compute=jnp.float32)[0][0], atol=1e-5)


def test_a_page_written_once_is_within_half_a_step():
    """The whole prompt at once, in int8: 1/254 of a page's largest number."""
    k, _ = tokens()
    pages, scale = empty(jnp.int8)[0], jnp.zeros((PAGES, HKV), jnp.float32)
    pages, _, scale, _ = write_pages(pages, None, k, None, TABLE, np.int32([60] * 3), k_scale=scale)
    full = in_order(np.asarray(pages, np.float32) * np.asarray(scale)[:, None, :, None], TABLE)[:, :60]
    for start in range(0, 60, SIZE):
        own = k[:, start : start + SIZE]
        bound = np.abs(own).max((1, 3), keepdims=True) / 254 * 1.0001
        assert (np.abs(full[:, start : start + SIZE] - own) <= bound).all()


def test_nan_in_eight_bits():
    """int8 has none: under a number it is 0, a scale of the page becomes it; float8 has its own."""
    k = tokens()[0][:, :1].copy()
    k[0, 0, 0, 0] = np.nan
    lengths, write = np.int32([1, 1, 1]), functools.partial(write_pages, v_pages=None, v=None, page_table=TABLE)
    first = TABLE[0, 0]
    for dtype, want in ((jnp.int8, 0), (jnp.float8_e5m2, np.nan)):
        pages, _ = write(k_pages=empty(dtype)[0], k=k, lengths=lengths, k_scale=0.1)
        np.testing.assert_array_equal(float(pages[first, 0, 0, 0]), want)
    scale = jnp.zeros((PAGES, HKV), jnp.float32)
    _, _, scale, _ = write(k_pages=empty(jnp.int8)[0], k=k, lengths=lengths, k_scale=scale)
    assert np.isnan(scale[first, 0])
    assert np.isfinite(scale).sum() == PAGES * HKV - 1


def test_a_number_is_taken_as_it_is():
    """And what it cannot hold is clipped; one scale may be a number beside another that is not."""
    k, v = (x[:, :1] for x in tokens())
    k = k.copy()
    k[0, 0, 0, 0] = 1e6
    lengths, held, scale = np.int32([1, 1, 1]), empty(jnp.int8), jnp.zeros((PAGES, HKV), jnp.float32)
    k_pages, _, k_scale, v_scale = write_pages(*held, k, v, TABLE, lengths, k_scale=0.1, v_scale=scale)
    assert k_scale == 0.1
    assert v_scale.shape == (PAGES, HKV)
    assert np.array_equal(k_pages[TABLE[:, 0], 0], np.clip(np.round(k[:, 0] / np.float32(0.1)), -127, 127))
    k_pages, _ = write_pages(*empty(jnp.float8_e4m3fn), k, v, TABLE, lengths, k_scale=0.1)
    assert float(k_pages[TABLE[0, 0], 0, 0, 0]) == 448


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_is_in_place(dtype, compiled_fully):
    """By itself, and in a loop of decoding steps within jit: the same buffers, and no room for another cache."""
    count, width = 1024, 64
    pages = jnp.zeros((count, SIZE, HKV, D), dtype)
    scales = [jnp.zeros((count, HKV), jnp.float32)] * (dtype == jnp.int8)
    table = jnp.arange(3 * width, dtype=jnp.int32).reshape(3, width)
    k = jnp.ones((3, HKV, D))
    names = ("k_scale", "v_scale")

    def written(held, lengths):
        k_pages, *scale = held
        out = write_pages(k_pages, None, k, None, table, lengths, **dict(zip(names, scale, strict=False)))
        return tuple(x for x in out if x is not None)

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(held, lengths):
        return jax.lax.scan(lambda held, n: (written(held, lengths + n), None), held, jnp.arange(20, dtype=jnp.int32))[
            0
        ]

    memory = decode.lower((pages, *scales), jnp.int32([1, 30, 80])).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 8
    before = pages.unsafe_buffer_pointer()
    held = written((pages, *scales), jnp.int32([1, 30, 80]))
    assert pages.is_deleted()
    assert held[0].unsafe_buffer_pointer() == before
    held = decode(held, jnp.int32([2, 31, 81]))
    assert held[0].unsafe_buffer_pointer() == before
    assert (np.asarray(held[0][table[0, 1], :5]) != 0).all()


def named(b, number, page):
    """The table, with another page there."""
    table = TABLE.copy()
    table[b, number] = page
    return table


DROPPED = {
    "negative": (TABLE, [1, 30, 31], None),
    "behind": (TABLE, [CAPACITY + 1, 30, 31], None),
    "no page": (named(0, 1, PAGES), [18, 30, 31], None),
    "below": (named(0, 1, -1), [18, 30, 31], None),
    "starts": (TABLE, [20, 30, 31], [0, 3, 2, 6]),
    "past the end": (TABLE, [20, 30, 31], [0, 2, 4, 7]),
    "nobody there": (TABLE, [0, 30, 31], None),
}


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_what_has_no_place_is_dropped_under_jit(name):
    """And all else is written."""
    held = empty(name, 5)
    scales = {n: jnp.zeros((PAGES, HKV), jnp.float32) for n in ("k_scale", "v_scale") if name == "int8"}
    x, y = np.ones((6, HKV, D), np.float32), np.ones((6, HKV, DV), np.float32)
    write = jax.jit(functools.partial(write_pages, **scales))
    for case, (table, lengths, cu) in DROPPED.items():
        counts = np.int32([2, 2, 2])
        cu_q = np.int32([0, 2, 4, 6]) if cu is None else np.int32(cu)
        pages, *_ = write(*held, x, y, table, np.int32(lengths), cu_q_lens=cu_q)
        wanted = set()
        for b, n in enumerate(lengths if cu is None else ()):
            for at in range(n - counts[b], n):
                if 0 <= at < CAPACITY and 0 <= table[b, at // SIZE] < PAGES:
                    wanted.add((int(table[b, at // SIZE]), at % SIZE))
        value = 127 if name == "int8" else 1
        changed = np.argwhere((np.asarray(pages) == value).all((2, 3)))
        assert {tuple(map(int, place)) for place in changed} == wanted, case


def call(k=None, v=None, table=TABLE, lengths=(5, 30, 40), dtype="float32", no_v=False, **options):
    k, v = (x[:, :4] if own is None else own for x, own in zip(tokens(), (k, v), strict=True))
    held = empty(dtype)
    return write_pages(held[0], None if no_v else held[1], k, v, table, np.int32(lengths), **options)


SCALE = np.zeros((PAGES, HKV), np.float32)
WRONG = {
    "v": (lambda: call(no_v=True), ValueError, "v_pages and v go together, got v and no v_pages"),
    "integers": (lambda: call(k=np.zeros((3, HKV, D), int)), TypeError, "k must have one of the dtypes"),
    "heads": (lambda: call(k=np.zeros((3, 4, 1, D), np.float32)), ValueError, "k must have the heads and the head_dim of k_pages, (2, 8), got (1, 8)"),
    "axes": (lambda: call(k=np.zeros((HKV, D), np.float32)), ValueError, "k must have shape [B, Sq, Hkv, D], [B, Hkv, D] (one token of each sequence), or [T, Hkv, D] with cu_q_lens, got (2, 8)"),
    "ragged": (lambda: call(cu_q_lens=np.int32([0, 1, 2, 3])), ValueError, "k must have shape [T, Hkv, D] with cu_q_lens, got (3, 4, 2, 8)"),
    "tokens": (lambda: call(v=np.zeros((3, 5, HKV, DV), np.float32)), ValueError, "v must have the tokens of k, (3, 4), got (3, 5)"),
    "lengths": (lambda: call(lengths=(5, 30)), ValueError, "lengths must have shape [3], got (2,)"),
    "short": (lambda: call(lengths=(5, 3, 40)), ValueError, "lengths must count the new tokens too, got 3 of sequence 1, which has 4 new ones"),
    "long": (lambda: call(lengths=(5, 97, 40)), ValueError, "lengths must be from 0 to 96, the keys of 6 pages of 16, got 97 of sequence 1; widen page_table"),
    "page": (lambda: call(table=named(1, 1, 24)), ValueError, "page_table must name pages from 0 to 23, got 24 as page 1 of sequence 1, to which new tokens go"),
    "shared": (lambda: call(table=named(2, 2, TABLE[1, 0])), ValueError, f"got {TABLE[1, 0]} as page 2 of sequence 2, which sequence 1 holds too; copy it to a page of its own"),
    "starts": (lambda: call(tokens()[0][0, :9], tokens()[1][0, :9], cu_q_lens=np.int32([0, 4, 9, 10])), ValueError, "cu_q_lens must rise from 0 to at most the 9 rows of k, got cu_q_lens[2:4] = [9, 10]"),
    "no_scale": (lambda: call(dtype="int8"), ValueError, "k_pages of int8 need k_scale, by which their numbers are multiplied"),
    "scale_shape": (lambda: call(dtype="int8", k_scale=SCALE[:3], v_scale=1.0), ValueError, "k_scale must be a number or have shape [num_pages, Hkv] = (24, 2), got (3, 2)"),
    "scale_dtype": (lambda: call(dtype="int8", k_scale=SCALE.astype(np.float16), v_scale=1.0), TypeError, "k_scale must be float32 to be written to, got float16"),
    "wide": (lambda: call(k_scale=SCALE), TypeError, "k_scale must be a number or None for pages in float32"),
    "latent": (lambda: write_pages(empty("float32")[0], None, tokens()[0], None, TABLE, np.int32([60] * 3), v_scale=2.0), ValueError, "v_scale is of v_pages, which is None; leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    wrong, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        wrong()


def test_a_prefix_may_be_shared():
    """While nobody writes to it; and a sequence that is not there holds nothing."""
    table = TABLE.copy()
    table[1, 0] = table[0, 0]
    table[2] = table[0]
    k_pages, _ = call(table=table, lengths=(20, 30, 0))
    assert np.array_equal(k_pages[table[1, 1], 10:14], tokens()[0][1, :4])
