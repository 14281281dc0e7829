"""Maskers: every implementation against a definition in NumPy and so, bit for bit, against the others."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2.masks import (
    LocalMasker,
    Mask,
    SinkMasker,
    TopKMasker,
    causal_mask,
    dilated,
    evaluate,
    make_causal_mask,
    sliding_window,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")


LOCAL = ("sparse", "broadcast", "triangle")
SINK = ("sparse", "dense")
SHAPES = [(1, 2, 1, 9), (2, 1, 6, 9), (1, 1, 9, 4)]


def position(i, shape):
    return i + shape[3] - shape[2]


def where(shape, shows):
    """The bool array of `shows(i, j)`."""
    return np.broadcast_to([[shows(i, j) for j in range(shape[3])] for i in range(shape[2])], shape)


def local(shape, window):
    return where(shape, lambda i, j: 0 <= position(i, shape) - j < window)


def sink(shape, size, causal=True):
    return where(shape, lambda i, j: j < size and (j <= position(i, shape) or not causal))


def assert_shows(mask, want, shown=1):
    assert mask.shape == want.shape
    np.testing.assert_array_equal(mask.to_dense(), np.where(want, shown, 0).astype(mask.dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def traced(masker, previous, implementation):
    return masker(previous, implementation=implementation)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", LOCAL)
@pytest.mark.parametrize("window", [0, 3, 99])
def test_local(shape, implementation, window):
    mask = LocalMasker(window)(Mask.empty(shape), implementation=implementation)
    assert (mask.kind == "sparse") == (implementation == "sparse")
    assert mask.dtype == np.float32
    assert_shows(mask, local(shape, window))


@pytest.mark.parametrize("window", [1, 4])
def test_what_a_window_counts(window):
    """A masker counts the keys that a row sees; left and right of a window do not count the row's own position."""
    shape = (1, 1, 8, 8)
    by_masker = np.asarray(LocalMasker(window)(Mask.empty(shape, bool)).to_dense())
    assert by_masker[0, 0, -1].sum() == window
    index = [np.arange(n) for n in shape]
    np.testing.assert_array_equal(evaluate(sliding_window(window - 1), *index), by_masker)
    np.testing.assert_array_equal(evaluate(dilated(window - 1, 1), *index), by_masker)
    np.testing.assert_array_equal(make_causal_mask((1, 8), sliding_window=window - 1), by_masker)
    np.testing.assert_array_equal(causal_mask(8, window=window - 1), by_masker)


def test_readme_counts_as_we_do():
    """The window that the README calls one of so many keys shows so many."""
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    keys, left = re.search(r"A row sees (\d+) keys,.*\n.*sliding_window\((\d+)\)", text).groups()
    row = [np.arange(n) + first for n, first in ((1, 0), (1, 0), (1, 1000), (2000, 0))]
    assert int(np.asarray(evaluate(sliding_window(int(left)), *row)).sum()) == int(keys)
    assert f"a window of {keys} and" in text
    assert f"where Sq = Sk, `LocalMasker({keys})` shows what\n`sliding_window({left})` does" in text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_window_of_another_alignment(shape):
    """A masker's last row is at the last key, a rule's first at the first: the offset is what lies between."""
    by_masker = LocalMasker(3)(Mask.empty(shape, bool)).to_dense()
    rule = sliding_window(2, offset=shape[3] - shape[2])
    np.testing.assert_array_equal(evaluate(rule, *map(np.arange, shape)), by_masker)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", SINK)
@pytest.mark.parametrize(("size", "causal"), [(0, True), (3, True), (3, False), (99, True)])
def test_sink(shape, implementation, size, causal):
    mask = SinkMasker(size, causal=causal)(Mask.empty(shape, bool), implementation=implementation)
    assert (mask.kind == "sparse") == (implementation == "sparse")
    assert mask.dtype == bool
    assert_shows(mask, sink(shape, size, causal))


@pytest.mark.parametrize("implementation", LOCAL)
def test_under_jit(implementation):
    shape = (2, 1, 6, 9)
    mask = traced(LocalMasker(4), Mask.empty(shape), implementation)
    assert mask.overflow is None
    sinks = "sparse" if implementation == "sparse" else "dense"
    assert_shows(traced(SinkMasker(2), mask, sinks), local(shape, 4) | sink(shape, 2))
    bools = traced(LocalMasker(4), Mask.empty(shape, bool), implementation)
    np.testing.assert_array_equal(jax.jit(Mask.to_dense)(bools), local(shape, 4))


@pytest.mark.parametrize(
    ("fraction", "keys", "count"),
    [(1.0, 10, 10), (0.5, 10, 5), (0.29, 100, 29), (0.1, 30, 3), (0.01, 10, 1), (np.float32(0.25), 10, 2)],
)
def test_fractions(fraction, keys, count):
    """Rounded to the nearest number of keys, and one at least."""
    shape = (1, 1, 1, keys)
    assert_shows(LocalMasker(fraction)(Mask.empty(shape)), local(shape, count))
    assert_shows(SinkMasker(fraction)(Mask.empty(shape)), sink(shape, count))


def test_one_is_not_all():
    """1 is a key and 1.0 is all of them, though they are equal in Python: jit must tell them apart."""
    shape = (1, 1, 1, 8)
    for masker in (LocalMasker, SinkMasker, TopKMasker):
        assert masker(1) != masker(1.0)
        assert (masker(2), hash(masker(2))) == (masker(np.int64(2)), hash(masker(2)))
    assert [traced(LocalMasker(w), Mask.empty(shape), "broadcast").density() * 8 for w in (1, 1.0)] == [1, 8]
    assert repr(LocalMasker(3)) == "LocalMasker(window=3)"


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("implementation", LOCAL)
def test_merges_into_previous(implementation, kind):
    """Weights stay where nothing is shown, whichever way both are held."""
    shape = (2, 1, 6, 9)
    weights = np.random.default_rng(0).integers(0, 9, shape).astype(np.float16) / np.float16(8)
    previous = Mask.from_dense(weights)
    previous = previous if kind == "dense" else previous.to_indices()
    want = np.where(local(shape, 2), 1, weights).astype(np.float16)
    mask = LocalMasker(2)(previous, implementation=implementation)
    assert mask.dtype == np.float16
    np.testing.assert_array_equal(mask.to_dense(), want)
    sinks = SinkMasker(3)(mask, implementation="sparse" if implementation == "sparse" else "dense")
    np.testing.assert_array_equal(sinks.to_dense(), np.where(sink(shape, 3), 1, want))
    assert LocalMasker(2)(Mask.full(shape), implementation=implementation).kind == "full"


def test_sizes():
    """The room of a sparse result is what is asked for, and what does not fit is not lost in silence."""
    shape = (1, 1, 4, 6)
    weights = jnp.asarray(local(shape, 1), jnp.float32)
    more = lambda mask: LocalMasker(2)(mask, implementation="sparse")
    add = lambda size: lambda w: more(Mask.from_dense(w).to_indices(4)).to_indices(size)
    assert add(20)(weights).size == jax.jit(add(20))(weights).size == 20
    assert_shows(jax.jit(add(8))(weights), local(shape, 2))
    assert jax.jit(add(7))(weights).overflow
    with pytest.raises(ValueError, match="number of entries, 8, got 7"):
        add(7)(weights)
    with pytest.raises(ValueError, match="size must be given"):
        jax.jit(lambda w: more(Mask.from_dense(w)))(weights)


def test_what_runs_where_nobody_says():
    """Few keys are listed in an empty mask, all else is an array; the same keys as any other way."""
    shape = (1, 1, 3, 40)
    q, k = queries(shape, 1)
    empty, some = Mask.empty(shape), Mask.from_dense(np.eye(3, 40, dtype=np.float32)[None, None])
    for masker, few in ((LocalMasker(2), True), (LocalMasker(3), False), (SinkMasker(2), True)):
        for previous, kind in ((empty, "sparse" if few else "dense"), (some, "dense"), (some.to_indices(), "dense")):
            mask = masker(previous)
            assert mask.kind == kind
            np.testing.assert_array_equal(mask.to_dense(), masker(previous, implementation="sparse").to_dense())
    assert TopKMasker(1)(empty, q=q, k=k).kind == "dense"


# TopKMasker.


def queries(shape, kv_heads, width=4, seed=0):
    """Whole numbers, so that there are equal logits and none is rounded."""
    rng = np.random.default_rng(seed)
    batch, heads, rows, keys = shape
    q, k = rng.integers(-2, 3, (batch, rows, heads, width)), rng.integers(-2, 3, (batch, keys, kv_heads, width))
    return q.astype(np.float32), k.astype(np.float32)


def top(q, k, count, visible, sign=1):
    """The definition: each row's visible keys by logit, then by index; the first of them."""
    batch, rows, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    shown = np.zeros((batch, heads, rows, keys), bool)
    for b, h, i in np.ndindex(batch, heads, rows):
        logits = sign * k[b, :, h // (heads // kv_heads)] @ q[b, i, h]
        seen = [j for j in range(keys) if visible[b, h, i, j]]
        shown[b, h, i, sorted(seen, key=lambda j: (-logits[j], j))[:count]] = True
    return shown


def seen(shape, causal):
    return local(shape, 99) if causal else np.ones(shape, bool)


@pytest.mark.parametrize("implementation", ["sparse", "dense"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("shape", "kv_heads", "count", "causal"),
    [
        ((2, 4, 6, 9), 2, 3, True),
        ((1, 2, 1, 12), 1, 5, True),
        ((1, 2, 7, 4), 2, 2, True),
        ((1, 2, 3, 8), 1, 0.5, False),
    ],
    ids=["grouped", "decode", "Sq > Sk", "fraction"],
)
def test_top_k(shape, kv_heads, count, causal, implementation, jit):
    q, k = queries(shape, kv_heads)
    allowed = np.random.default_rng(1).random((1, shape[1], 1, shape[3])) < 0.8
    masker = TopKMasker(count, causal=causal)
    find = lambda q, k, allowed: masker(Mask.empty(shape), q=q, k=k, allowed=allowed, implementation=implementation)
    mask = (jax.jit(find) if jit else find)(q, k, allowed)
    number = round(count * shape[3]) if isinstance(count, float) else count
    assert_shows(mask, top(q, k, number, seen(shape, causal) & allowed))


@pytest.mark.parametrize("implementation", ["sparse", "dense"])
def test_top_k_of_a_mask(implementation):
    """Into a previous mask that is broadcast, of keys with weights in another; the other's overflow is not lost."""
    shape = (2, 4, 3, 9)
    q, k = queries(shape, 2)
    previous = SinkMasker(1)(Mask.empty((1, 1, 3, 9)))
    weights = np.random.default_rng(2).integers(0, 3, shape).astype(np.float32) / 2
    masker = functools.partial(TopKMasker(2), q=q, k=k, implementation=implementation)
    want = sink(shape, 1) | top(q, k, 2, seen(shape, True) & (weights != 0))
    allowed = Mask.from_dense(weights)
    for held in (allowed, allowed.to_indices(), allowed.astype(bool)):
        assert_shows(masker(previous, allowed=held), want)
    everything = sink(shape, 1) | top(q, k, 2, seen(shape, True))
    assert_shows(masker(previous, allowed=Mask.full(shape)), everything)
    assert_shows(masker(previous), everything)
    find = jax.jit(lambda m, size: masker(previous, allowed=m.to_indices(size)).to_dense(), static_argnums=1)
    np.testing.assert_array_equal(find(allowed, weights.size), want)
    assert np.isnan(find(allowed, 5)).all()
    assert np.isnan(find(allowed.astype(bool), 5)).all()


@pytest.mark.parametrize("nan", [np.nan, -np.nan], ids=["+", "-"])
def test_top_k_of_nan(nan):
    """It is shown, so that attention is NaN where it would be under a mask that shows all."""
    shape = (1, 1, 4, 4)
    q, k = queries(shape, 1)
    bad_q, bad_k = (jnp.asarray(x).at[0, 1, 0, 0].set(nan) for x in (q, k))
    find = functools.partial(TopKMasker(2), Mask.empty(shape))
    shown = find(q=bad_q, k=k).to_dense()[0, 0]
    np.testing.assert_array_equal(shown[1], [1, 1, 0, 0])
    np.testing.assert_array_equal(find(q=q, k=bad_k).to_dense()[0, 0, 1:, 1], [1, 1, 1])
    allowed = jax.jit(lambda w: find(q=q, k=k, allowed=Mask.from_dense(w)).to_dense())(jnp.full(shape, nan))
    np.testing.assert_array_equal(allowed, find(q=q, k=k).to_dense())


def test_top_k_scale():
    """The scale orders nothing unless it is negative; it may be traced."""
    shape = (1, 1, 2, 9)
    q, k = queries(shape, 1)
    find = jax.jit(lambda scale: TopKMasker(3)(Mask.empty(shape), q=q, k=k, scale=scale))
    assert_shows(find(-0.5), top(q, k, 3, seen(shape, True), -1))
    assert_shows(find(7.0), top(q, k, 3, seen(shape, True)))
    halves = TopKMasker(3)(Mask.empty(shape), q=q.astype(np.float16), k=k.astype(np.float16))
    assert_shows(halves, top(q, k, 3, seen(shape, True)))


EMPTY = Mask.empty((1, 2, 3, 8))
Q, K = queries((1, 2, 3, 8), 1)
MESSAGES = {
    "window": (lambda: LocalMasker(-1), ValueError, "window must be an int of at least 0 (a number of keys) or"),
    "window 0.0": (lambda: LocalMasker(0.0), ValueError, "(0, 1] (a fraction of them), got 0.0"),
    "window 1.5": (lambda: LocalMasker(1.5), ValueError, "(0, 1] (a fraction of them), got 1.5"),
    "window bool": (lambda: LocalMasker(True), ValueError, "got True"),
    "window type": (lambda: LocalMasker("8"), ValueError, "got '8'"),
    "size": (lambda: SinkMasker(-1), ValueError, "size must be an int of at least 0"),
    "k": (lambda: TopKMasker(float("nan")), ValueError, "k must be an int of at least 0"),
    "causal": (lambda: SinkMasker(1, causal=1), TypeError, "causal must be a bool, got 1"),
    "previous": (lambda: LocalMasker(1)((1, 1, 2, 2)), TypeError, "got tuple; start from Mask.empty(shape)"),
    "local implementation": (
        lambda: LocalMasker(1)(EMPTY, implementation="dense"), ValueError,
        "implementation must be one of 'sparse', 'broadcast', 'triangle' or None, got 'dense'",
    ),
    "sink implementation": (lambda: SinkMasker(1)(EMPTY, implementation="triangle"), ValueError, "got 'triangle'"),
    "top k implementation": (
        lambda: TopKMasker(1)(EMPTY, q=Q, k=K, implementation="oracle"), ValueError, "got 'oracle'",
    ),
    "q type": (lambda: TopKMasker(1)(EMPTY, q=Q.astype(int), k=K), TypeError, "q must be a floating array, got int64"),
    "k type": (lambda: TopKMasker(1)(EMPTY, q=Q, k=None), TypeError, "k must be a floating array, got NoneType"),
    "q axes": (lambda: TopKMasker(1)(EMPTY, q=Q[0], k=K), ValueError, "[B, S, H, D], got shape (3, 2, 4)"),
    "dtypes": (lambda: TopKMasker(1)(EMPTY, q=Q.astype("f2"), k=K), TypeError, "one dtype, got float16 and float32"),
    "k width": (lambda: TopKMasker(1)(EMPTY, q=Q, k=K[..., 1:]), ValueError, "k must have shape [B, Sk, Hkv, D]"),
    "k heads": (
        lambda: TopKMasker(1)(EMPTY, q=Q, k=np.repeat(K, 3, 2)), ValueError, "got (1, 8, 3, 4) for q (1, 3, 2, 4)",
    ),
    "previous shape": (lambda: TopKMasker(1)(EMPTY, q=Q, k=K[:, 1:]), ValueError, "must have the shape (1, 2, 3, 7)"),
    "allowed": (lambda: TopKMasker(1)(EMPTY, q=Q, k=K, allowed=Q), TypeError, "Mask or a bool array, got float32"),
    "allowed shape": (
        lambda: TopKMasker(1)(EMPTY, q=Q, k=K, allowed=np.ones((2, 1, 1, 1), bool)), ValueError,
        "got shape (2, 1, 1, 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    f, error, message = MESSAGES[name]
    with pytest.raises(error, match=re.escape(message)):
        f()


# Decoding: one query, 32 heads, 32768 keys.

DECODE = (1, 32, 1, 32768)


@pytest.mark.in_thirds
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_decode(sparsity, mode):
    """Random weights at four sparsities: applied, divided by and merged, in either mode as NumPy does it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(DECODE, np.float32)
    weights, other = (
        ((rng.random(DECODE, np.float32) >= sparsity) * rng.integers(1, 9, DECODE) / 8).astype(np.float32)
        for _ in range(2)
    )
    a, b = Mask.from_dense(weights), Mask.from_dense(other)
    if mode == "sparse":
        a, b = a.to_indices(), b.to_indices()
        assert a.size == np.count_nonzero(weights)
    np.testing.assert_allclose(a.density(), 1 - sparsity, rtol=0.05)
    np.testing.assert_array_equal(a.apply(x, mode), x * weights)
    inverse = np.divide(x, weights, out=np.zeros_like(x), where=weights != 0)
    np.testing.assert_allclose(a.apply_inverse(x, mode), inverse, rtol=1e-6)
    merged = a.merge(b, mode)
    assert merged.kind == mode
    np.testing.assert_array_equal(merged.to_dense(), np.minimum(weights + other, 1))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.995])
def test_decode_maskers(sparsity):
    """Every masker shows the share of the keys that is asked for, the same ones in every implementation."""
    count = round((1 - sparsity) * DECODE[3])
    for masker, implementations in ((LocalMasker(1 - sparsity), LOCAL), (SinkMasker(1 - sparsity), SINK)):
        want = np.zeros(DECODE, np.float32)
        want[..., slice(-count, None) if isinstance(masker, LocalMasker) else slice(count)] = 1
        for implementation in implementations:
            mask = masker(Mask.empty(DECODE), implementation=implementation)
            np.testing.assert_array_equal(mask.to_dense(), want)


@pytest.mark.parametrize("sparsity", [0.1, 0.995])
def test_decode_top_k(sparsity):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 1, 32, 8), np.float32), rng.standard_normal((1, DECODE[3], 8, 8), np.float32)
    count = round((1 - sparsity) * DECODE[3])
    masks = [TopKMasker(count)(Mask.empty(DECODE), q=q, k=k, implementation=i).to_dense() for i in ("sparse", "dense")]
    np.testing.assert_array_equal(*masks)
    logits = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 4, 2))
    assert (np.asarray(masks[0]).sum(-1) == count).all()
    least, most = np.where(masks[0], logits, np.inf).min(-1), np.where(masks[0], -np.inf, logits).max(-1)
    assert (least >= most - 1e-4).all()
