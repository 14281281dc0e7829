"""Masks as predicates, dense builders, the cache of causal masks, and attention under dense masks."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import run
from reference import attention, distance, visible

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.masks import (
    Mask,
    MaskCache,
    Predicate,
    all_of,
    any_of,
    causal,
    causal_mask,
    causal_mask_cache,
    causal_mask_comparison,
    causal_mask_tril,
    dense_attention,
    dilated,
    documents,
    evaluate,
    from_dense,
    make_causal_mask,
    negate,
    padding,
    prefix_lm,
    sinks,
    sliding_window,
)

RNG = np.random.default_rng(0)
B, H, SQ, SK = 2, 3, 7, 10
I, J = np.arange(SQ)[:, None], np.arange(SK)
Q_IDS, KV_IDS = np.array([[0, 0, 1, 1, 1, -1, -1], [2, 2, 2, 0, 0, 0, -2]]), RNG.integers(-1, 3, (2, SK))
REAL = RNG.random((B, SK)) < 0.7
DENSE = RNG.random((B, H, SQ, SK)) < 0.5


def arange(n):
    return np.arange(n, dtype=np.int32)


def dense(predicate, shape=(B, H, SQ, SK)):
    return evaluate(predicate, *map(arange, shape))


def same_documents(q_ids, kv_ids):
    return (q_ids[:, None, :, None] == kv_ids[:, None, None]) & (q_ids >= 0)[:, None, :, None]


def lower(b, h, i, j):
    return j <= i


# Predicates, and what they mean in NumPy.
MEANINGS = {
    "causal": (lambda: causal(), I >= J),
    "causal, aligned to the end": (lambda: causal(SK - SQ), J <= I + SK - SQ),
    "causal, behind": (lambda: causal(-2), J <= I - 2),
    "window": (lambda: sliding_window(2, 1), (I - 2 <= J) & (J <= I + 1)),
    "window, of the past": (lambda: sliding_window(2), (I - 2 <= J) & (J <= I)),
    "window, shifted": (lambda: sliding_window(1, 0, 3), (I + 2 <= J) & (J <= I + 3)),
    "window without left": (lambda: sliding_window(None, 1), J <= I + 1),
    "window without right": (lambda: sliding_window(2, None), I - 2 <= J),
    "window without bounds": (lambda: sliding_window(None, None, 2**30), I + J >= 0),
    "window of all there is": (lambda: sliding_window(2**40, 2**40), I + J >= 0),
    "documents": (lambda: documents(Q_IDS, KV_IDS), same_documents(Q_IDS, KV_IDS)),
    "documents of one batch": (lambda: documents(Q_IDS[0], KV_IDS), same_documents(Q_IDS[:1], KV_IDS)),
    "documents of int64": (lambda: documents(Q_IDS[1], KV_IDS[1].astype(np.int64)), same_documents(Q_IDS, KV_IDS)[1:]),
    "documents on the device": (lambda: documents(*map(jnp.asarray, (Q_IDS, KV_IDS))), same_documents(Q_IDS, KV_IDS)),
    "prefix": (lambda: prefix_lm(4), (J <= I) | (J < 4)),
    "prefix, aligned to the end": (lambda: prefix_lm(4, SK - SQ), (J <= I + SK - SQ) | (J < 4)),
    "prefixes": (lambda: prefix_lm(np.array([3, 0])), (J <= I) | (np.array([3, 0])[:, None, None, None] > J)),
    "0-d prefix": (lambda: prefix_lm(jnp.int32(3)), (J <= I) | (J < 3)),
    "dilated": (lambda: dilated(2, 2), np.isin(I - J, (0, 2, 4))),
    "dilated, shifted": (lambda: dilated(1, 3, 2), np.isin(I + 2 - J, (0, 3))),
    "sinks": (lambda: sinks(3), J + 0 * I < 3),
    "padding": (lambda: padding(REAL), REAL[:, None, None]),
    "padding of integers": (lambda: padding(2 * REAL[0].astype(np.int8)), REAL[:1, None, None]),
    "dense": (lambda: from_dense(DENSE), DENSE),
    "dense, broadcast": (lambda: from_dense(jnp.asarray(DENSE[0, :, :, :1])), DENSE[:1, :, :, :1]),
    "dense, of nothing": (lambda: from_dense(np.ones((SQ, 0), bool)), False),
    "a function": (lambda: all_of(lower), I >= J),
    "a function of all four": (lambda: any_of(lambda b, h, i, j: (b + h + i + j) % 2 == 0), None),
    "a constant": (lambda: all_of(lambda b, h, i, j: True), True),
    "all": (lambda: all_of(causal(), sliding_window(2), padding(REAL)), (I >= J) & (I - J <= 2) & REAL[:, None, None]),
    "all of none": (lambda: all_of(), True),
    "any": (lambda: any_of(sinks(2), sliding_window(1), lower), (J < 2) | (I >= J)),
    "any of none": (lambda: any_of(), False),
    "negated": (lambda: negate(causal()), I < J),
    "negated function": (lambda: negate(lower), I < J),
    "operators": (lambda: causal() & (sliding_window(2) | sinks(1)) & ~padding(REAL), None),
    "function on the left": (lambda: lower & sliding_window(2) & ~(lower | sinks(1)), False),
}
MEANINGS["a function of all four"] = (
    MEANINGS["a function of all four"][0],
    sum(np.ogrid[:B, :H, :SQ, :SK]) % 2 == 0,
)
MEANINGS["operators"] = (
    MEANINGS["operators"][0],
    (I >= J) & ((I - J <= 2) | (J < 1)) & ~REAL[:, None, None],
)


@pytest.mark.parametrize("name", MEANINGS)
def test_predicates(name):
    """Each is what NumPy says it is; traced indices and traced arrays make no difference."""
    build, want = MEANINGS[name]
    want = np.broadcast_to(want, (B, H, SQ, SK))
    got = run(evaluate, build(), *map(arange, (B, H, SQ, SK)))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, want)
    if " " not in name:  # one of each kind; without jit each step is compiled by itself, which takes a while
        np.testing.assert_array_equal(dense(build()), want)


@pytest.mark.parametrize("name", ["documents", "operators", "prefixes", "a function of all four"])
def test_any_indices(name):
    """A block of a mask is that part of it, whatever the order."""
    build, want = MEANINGS[name]
    want = np.broadcast_to(want, (B, H, SQ, SK))
    b, h, i, j = np.array([1]), np.array([2, 0]), np.array([6, 0, 3]), np.array([9, 2, 2, 5])
    np.testing.assert_array_equal(run(evaluate, build(), b, h, i, j), want[np.ix_(b, h, i, j)])
    assert jax.eval_shape(evaluate, build(), arange(0), h, i, j).shape == (0, 2, 3, 4)


def test_indices_beyond_the_end():
    b, h, i, j = np.array([1, 2]), np.array([2, 3]), arange(3), arange(4)
    assert not run(evaluate, documents(Q_IDS, KV_IDS), b, h, i + SQ, j).any()
    assert not run(evaluate, documents(Q_IDS, KV_IDS), b, h, i, j + SK).any()
    seen = run(evaluate, padding(REAL) | from_dense(DENSE), b, h, i, j)
    np.testing.assert_array_equal(seen[0, 0], REAL[1, :4] | DENSE[1, 2, :3, :4])
    np.testing.assert_array_equal(seen[0, 1], np.broadcast_to(REAL[1, :4], (3, 4)))
    assert not seen[1].any()


def test_rows_are_read_once():
    """Evaluated over Q * K elements, ids are gathered Q + K times."""

    def equations(jaxpr):
        for eqn in jaxpr.eqns:
            yield from equations(eqn.params["jaxpr"]) if "jaxpr" in eqn.params else (eqn,)

    jaxpr = jax.make_jaxpr(evaluate)(documents(Q_IDS, KV_IDS), *map(arange, (B, 1, SQ, SK)))
    gathers = [eqn.outvars[0].aval.size for eqn in equations(jaxpr) if eqn.primitive.name == "gather"]
    assert sorted(gathers) == sorted([B * SQ, B * SK])


def test_equality():
    """By value where all is static, by identity where there are arrays."""

    def static():
        return causal(1) & (sliding_window(3, None) | sinks(2)) & ~dilated(1, 2) & prefix_lm(5) & lower

    assert static() == static()
    assert hash(static()) == hash(static())
    assert causal() != causal(1)
    assert causal() & sinks(1) != sinks(1) & causal()
    assert negate(negate(causal())) == causal()
    assert all_of(causal(), all_of(sinks(1), sinks(2))) == all_of(causal(), sinks(1), sinks(2))
    ids = documents(Q_IDS)
    assert ids == ids
    assert ids != documents(Q_IDS)
    assert ids & causal() == ids & causal()
    assert hash(ids & causal()) == hash(ids & causal())
    assert padding(REAL) != padding(REAL)
    assert len({static(), static(), ids, documents(Q_IDS)}) == 3
    assert "int32" in repr(ids)


def test_predicates_as_arguments():
    """A jitted function is traced anew for another structure, not for other arrays."""
    traces = []

    @jax.jit
    def count(predicate):
        traces.append(predicate)
        return dense(predicate).sum()

    for ids in (Q_IDS, Q_IDS[::-1].copy()):
        assert count(documents(ids) & causal()) == dense(documents(ids) & causal()).sum()
    assert len(traces) == 1
    assert repr(traces[0])
    count(documents(Q_IDS) & causal(1))
    assert len(traces) == 2


def test_own_class():
    """Parameters of one's own, with operators and equality."""

    @dataclasses.dataclass(frozen=True)
    class Stride(Predicate):
        n: int

        def __call__(self, b, h, i, j):
            return (i - j) % self.n == 0

    np.testing.assert_array_equal(
        dense(Stride(3) & causal()), np.broadcast_to((I >= J) & ((I - J) % 3 == 0), DENSE.shape)
    )
    assert Stride(3) & causal() == Stride(3) & causal()
    with pytest.raises(NotImplementedError, match=r"Predicate must define __call__"):
        dense(Predicate())


REFUSED = {
    "causal(1.5)": (lambda: causal(1.5), TypeError, "offset must be an integer"),
    "causal(True)": (lambda: causal(True), TypeError, "offset must be an integer"),
    "causal(array)": (lambda: causal(jnp.int32(1)), TypeError, "for a traced one write the predicate as a function"),
    "causal(2**40)": (lambda: causal(2**40), ValueError, "offset must be within"),
    "window(-1)": (lambda: sliding_window(-1), ValueError, r"left must be at least 0 or None \(no bound\), got -1"),
    "window(right=x)": (lambda: sliding_window(1, "x"), TypeError, "right must be an integer or None"),
    "dilated(1, 0)": (lambda: dilated(1, 0), ValueError, "dilation must be at least 1, got 0"),
    "sinks(-1)": (lambda: sinks(-1), ValueError, "size must be at least 0"),
    "prefix of floats": (lambda: prefix_lm(np.ones(2)), TypeError, r"prefix must be an array of integers \[B\]"),
    "documents of a list": (lambda: documents([1, 2]), TypeError, r"q_ids must be an array of integers \[B, Sq\]"),
    "documents of floats": (lambda: documents(Q_IDS, KV_IDS * 1.0), TypeError, "kv_ids must be .* float64"),
    "documents [1, 1, S]": (lambda: documents(Q_IDS[None]), ValueError, "q_ids must have axes"),
    "documents 2 and 3": (lambda: documents(Q_IDS, np.zeros((3, 5), int)), ValueError, "one batch size"),
    "padding of floats": (lambda: padding(REAL * 1.0), TypeError, "booleans or integers"),
    "dense of integers": (lambda: from_dense(DENSE * 1), TypeError, "of numbers, mask != 0"),
    "dense of 5 axes": (lambda: from_dense(DENSE[None]), ValueError, "mask must have axes"),
    "all of an array": (lambda: all_of(DENSE), TypeError, "a dense mask is a predicate through from_dense"),
    "& 3": (lambda: causal() & 3, TypeError, "unsupported operand"),
    "a number": (lambda: dense(lambda b, h, i, j: j), TypeError, "must return a bool, got .*int32"),
    "nothing": (lambda: dense(lambda b, h, i, j: None), TypeError, "must return a bool, got None"),
    "a number within": (lambda: dense(causal() & (lambda b, h, i, j: j)), TypeError, "must return a bool"),
    "a row": (lambda: dense(lambda b, h, i, j: jnp.asarray(REAL)[b]), ValueError, "must return a single bool"),
    "2-D indices": (lambda: evaluate(causal(), I, arange(1), arange(2), arange(2)), ValueError, "b must have axes"),
    "float indices": (lambda: evaluate(causal(), arange(1), arange(1), arange(2), np.ones(2)), TypeError, "j must be"),
    "x of one axis": (lambda: make_causal_mask(np.ones(3)), ValueError, "at least the axes"),
    "shape of three": (lambda: causal_mask_tril((1, 2, 3)), TypeError, r"two integers \(B, T\)"),
    "negative shape": (lambda: causal_mask_comparison((1, -2)), ValueError, "must not be negative"),
    "a string": (lambda: make_causal_mask("x"), TypeError, r"x_or_shape must be an array \[B, T, ...\]"),
    "padding of half": (
        lambda: causal_mask_tril((2, 3), padding_mask=np.full((2, 3), 0.5)), TypeError, "padding_mask must be"
    ),
    "padding [B, T + 1]": (
        lambda: make_causal_mask((2, 3), padding_mask=np.ones((2, 4), int)), ValueError, r"padding_mask must have shape"
    ),
    "padding list": (lambda: causal_mask_comparison((1, 1), padding_mask=[[1]]), TypeError, "padding_mask must be an"),
    "segments of bool": (
        lambda: make_causal_mask((2, 3), segment_ids=np.ones((2, 3), bool)), TypeError, "segment_ids must be .*int"
    ),
    "window of three": (lambda: make_causal_mask((1, 3), sliding_window=(1, 2, 3)), TypeError, "sliding_window"),
    "negative window": (lambda: make_causal_mask((1, 3), sliding_window=-1), ValueError, "sliding_window must not"),
    "cache of 0": (lambda: MaskCache(0), ValueError, "maxsize must be an integer of at least 1"),
    "cache of -1 bytes": (lambda: MaskCache(max_bytes=-1), ValueError, "max_bytes must be an integer of at least 1"),
    "length 1.5": (lambda: causal_mask(1.5), TypeError, "seqlen_q must be an integer"),
    "traced length": (lambda: jax.jit(causal_mask)(3), TypeError, r"seqlen_q must be an integer \(static under jit"),
    "length -1": (lambda: causal_mask(1, -1), ValueError, "seqlen_k must not be negative"),
    "alignment": (lambda: causal_mask(2, causal_alignment="left"), ValueError, "causal_alignment must be one of"),
    "dtype": (lambda: causal_mask(2, dtype=int), TypeError, "dtype must be bool .* or floating"),
    "float64": (lambda: causal_mask(2, dtype=np.float64), TypeError, "needs jax_enable_x64"),
    "window x": (lambda: causal_mask(2, window="x"), TypeError, "window must be an integer, a pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


# Dense builders.


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("padded", [None, "bool", "int", "one for all", "left"])
def test_builders_agree(padded, jit):
    """Three ways, one mask, bit for bit; it is the reference's."""
    x = jnp.zeros((3, 17, 4))
    real = RNG.random((3, 17)) < 0.6
    real = np.arange(17) >= np.array([[0], [5], [17]]) if padded == "left" else real
    real = {None: None, "int": real.astype(np.int32) * 3, "one for all": real[:1]}.get(padded, real)
    masks = []
    for build in (make_causal_mask, causal_mask_tril, causal_mask_comparison):
        build = functools.partial(build, padding_mask=real)
        masks += [(jax.jit(build) if jit else build)(x), build((3, 17)), build(jax.ShapeDtypeStruct((3, 17), int))]
    want = visible(distance(x[:, :, None], x[:, :, None]), causal=True)
    want = np.broadcast_to(want if real is None else want & (real != 0)[:, None, None], (3, 1, 17, 17))
    for mask in masks:
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, want)


def test_builder_composes():
    """Padding, documents and a window at once, given to attention, are what attention makes of its own arguments."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 24, 2, 16)).astype(np.float32) for _ in range(3))
    ids = np.sort(rng.integers(0, 4, (2, 24)), -1)
    ids[1, 20:] = -1
    real = np.arange(24) < np.array([[24], [18]])
    mask = jax.jit(make_causal_mask, static_argnames="sliding_window")(
        q, padding_mask=real, segment_ids=ids, sliding_window=(5, 3)
    )
    options = {"causal": True, "window_size": 5, "q_segment_ids": ids, "kv_lengths": real.sum(-1)}
    want = visible(distance(q, k), causal=True, window_size=5, q_segment_ids=ids, kv_lengths=real.sum(-1))
    np.testing.assert_array_equal(mask, want)
    assert not want.any(-1).all()  # some rows see nothing
    got, meant = run(
        lambda q, k, v: (flash_attention(q, k, v, mask=mask), flash_attention(q, k, v, **options)), q, k, v
    )
    np.testing.assert_allclose(got, meant, atol=2e-6)
    np.testing.assert_array_equal(make_causal_mask(q, sliding_window=5), make_causal_mask(q, sliding_window=(5, None)))
    assert make_causal_mask((0, 3)).shape == (0, 1, 3, 3)
    assert make_causal_mask((2, 0), padding_mask=np.ones((2, 0), bool)).shape == (2, 1, 0, 0)


# The cache.


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(5, None), (4, 9), (9, 4), (0, 3), (3, 0)])
@pytest.mark.parametrize("window", [None, 2, (1, 5), (None, 0)])
def test_cached_masks(lengths, window, alignment):
    """What is cached is what the reference sees, causal and not, bool and added."""
    cache = MaskCache()
    seqlen_q, seqlen_k = lengths[0], lengths[0] if lengths[1] is None else lengths[1]
    ahead = distance(np.zeros((seqlen_q, 1, 1)), np.zeros((seqlen_k, 1, 1)), alignment)
    options = {"window": window, "causal_alignment": alignment}
    want = np.asarray(visible(ahead, causal=True, window_size=window))[None, None]
    np.testing.assert_array_equal(cache.causal(*lengths, **options), want)
    np.testing.assert_array_equal(cache.window(*lengths, **options), visible(ahead, window_size=window)[None, None])
    for dtype in ("float32", jnp.bfloat16):
        added = cache.causal(*lengths, **options, dtype=dtype)
        assert added.dtype == dtype
        np.testing.assert_array_equal(added, np.where(want, 0.0, -np.inf))


def test_counts_and_clear():
    cache = MaskCache()
    first = cache.causal(8)
    assert cache.info() == (0, 1, 32, 1, 64)
    assert cache.causal(8, 8, window=None, dtype=np.bool_) is first
    assert cache.causal(8, causal_alignment="bottom_right") is first  # as lengths are equal
    assert cache.causal(8, window=(None, 4)) is first  # as causality is the nearer bound
    assert cache.info() == (3, 1, 32, 1, 64)
    others = [
        {"window": 3},
        {"seqlen_k": 9},
        {"seqlen_k": 9, "causal_alignment": "bottom_right"},
        {"dtype": np.float16},
    ]
    assert all(cache.causal(8, **other) is not first for other in others)
    assert cache.info() == (3, 5, 32, 5, 64 + 64 + 72 + 72 + 128)
    cache.clear()
    assert cache.info() == (0, 0, 32, 0, 0)
    assert cache.causal(8) is not first


def test_least_recently_used_go():
    cache = MaskCache(maxsize=2)
    one, two = cache.causal(1), cache.causal(2)
    assert cache.causal(1) is one
    cache.causal(3)  # and 2 goes
    assert cache.causal(1) is one
    assert cache.causal(2) is not two
    assert cache.info() == (2, 4, 2, 2, 1 + 4)


def test_memory_is_bounded():
    cache = MaskCache(max_bytes=100)
    cache.causal(7)
    cache.causal(5)
    assert cache.info() == (0, 2, 32, 2, 49 + 25)
    cache.causal(8)  # 64 bytes more: 7 goes, and that is enough
    assert cache.info() == (0, 3, 32, 2, 25 + 64)
    assert cache.causal(11).shape == (1, 1, 11, 11)  # larger than all there may be: not kept, nothing goes for it
    cache.causal(11)
    assert cache.info() == (0, 5, 32, 2, 25 + 64)


def test_no_tracer_is_cached():
    """Under jit, grad and vmap a call gives a concrete array, whichever comes first."""
    cache = MaskCache()
    seen = []

    @jax.jit
    def inside(x):
        mask = cache.causal(4, dtype=jnp.float32)
        seen.append(mask)
        return x + mask

    want = np.where(np.tril(np.ones((4, 4))), 0.0, -np.inf)
    np.testing.assert_array_equal(inside(jnp.zeros((4, 4)))[0, 0], want)
    assert not isinstance(seen[0], jax.core.Tracer)
    assert cache.causal(4, dtype=jnp.float32) is seen[0]
    inside(jnp.zeros((2, 1, 4, 4)))  # traced anew
    assert seen[1] is seen[0]

    def weighted(x):
        return jnp.where(cache.causal(5), x, 0.0).sum()

    np.testing.assert_array_equal(
        jax.jit(jax.vmap(jax.grad(weighted)))(jnp.zeros((2, 5, 5)))[1], np.tril(np.ones((5, 5)))
    )
    jax.eval_shape(lambda: cache.causal(6))
    jax.lax.scan(lambda c, _: (c + cache.causal(7).sum(), None), jnp.int32(0), length=2)
    assert cache.info()[:2] == (2, 4)
    for n in (5, 6, 7):
        np.testing.assert_array_equal(cache.causal(n)[0, 0], np.tril(np.ones((n, n), bool)))
    assert cache.info()[:2] == (5, 4)


def test_deleted_masks_are_built_again():
    """As after somebody donated one to a jitted function."""
    cache = MaskCache()
    cache.causal(4).delete()
    np.testing.assert_array_equal(cache.causal(4)[0, 0], np.tril(np.ones((4, 4), bool)))
    assert cache.info() == (0, 2, 32, 1, 16)


def test_threads():
    """Many at once, in and out of jit: every mask is right, no count is lost, one mask is built once."""
    cache, wrong = MaskCache(maxsize=4), []
    start = threading.Barrier(8)

    def work(seed):
        rng = np.random.default_rng(seed)
        start.wait()
        for n in rng.integers(1, 8, 60):
            mask = jax.eval_shape(lambda: cache.causal(3)) and cache.causal(int(n))
            if not (np.asarray(mask)[0, 0] == np.tril(np.ones((n, n), bool))).all():
                wrong.append(n)

    def guarded(seed):
        try:
            work(seed)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    info = cache.info()
    assert not wrong
    assert info.hits + info.misses == 8 * 2 * 60
    assert info.currsize == 4

    cache = MaskCache()
    start.reset()
    threads = [threading.Thread(target=lambda: (start.wait(), cache.causal(64))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.info()[:2] == (7, 1)


def test_default_cache():
    causal_mask_cache.clear()
    first = causal_mask(6, 8, window=2, causal_alignment="bottom_right")
    assert causal_mask(6, 8, window=(2, 0), causal_alignment="bottom_right") is first
    assert causal_mask_cache.info()[:2] == (1, 1)


# Attention with a dense mask.

DENSE_CASES = {
    "causal window": {"causal": True, "window_size": 2, "causal_alignment": "bottom_right"},
    "bias and window": {"window_size": (1, 3), "bias": (1, 4, 7, 9)},
    "mask and causal": {"mask": (7, 9), "causal": True},
    "scale": {"scale": -0.7},
    "bfloat16": {"causal": True, "dtype": "bfloat16"},
    "float16, wider v": {"dtype": "float16", "v_dim": 24},
    "more rows than keys": {"causal": True, "causal_alignment": "bottom_right", "seqlen_q": 13},
    "two batch axes": {"causal": True, "batch": (2, 3), "mask": (2, 3, 1, 7, 9)},
    "no batch axis, one row": {"causal": True, "causal_alignment": "bottom_right", "batch": (), "seqlen_q": 1},
    "no keys": {"seqlen_k": 0},
}
DIFFERENTIATED = ("causal window", "bias and window", "mask and causal", "bfloat16")


@pytest.mark.parametrize("name", DENSE_CASES)
def test_dense_attention(name):
    """o and its gradients are the definition's."""
    rng, given = np.random.default_rng(2), dict(DENSE_CASES[name])
    dtype, batch, v_dim = given.pop("dtype", "float32"), given.pop("batch", (2,)), given.pop("v_dim", 16)
    seqlen_q, seqlen_k, scale = given.pop("seqlen_q", 7), given.pop("seqlen_k", 9), given.pop("scale", None)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal((*batch, n, heads, d)), dtype)
        for n, heads, d in ((seqlen_q, 4, 16), (seqlen_k, 2, 16), (seqlen_k, 2, v_dim), (seqlen_q, 4, v_dim))
    )
    if "bias" in given:
        given["bias"] = jnp.asarray(rng.standard_normal(given["bias"]), dtype)
    if "mask" in given:
        given["mask"] = rng.random(given["mask"]) < 0.4

    def defined(q, k, v):
        return attention(q, k, v, **given, scale=scale, compute=jnp.float32, round_p=jnp.dtype(dtype))[0].astype(dtype)

    def ours(q, k, v):
        return dense_attention(q, k, v, **given, softmax_scale=scale, return_weights=True)

    def both(q, k, v, do):
        if name not in DIFFERENTIATED:
            got, weights = ours(q, k, v)
            return (got,), (defined(q, k, v),), weights
        (got, pull, weights), (want, pull_wanted) = jax.vjp(ours, q, k, v, has_aux=True), jax.vjp(defined, q, k, v)
        return (got, *pull(do)), (want, *pull_wanted(do)), weights

    got, want, weights = run(both, q, k, v, do)
    tolerance = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 4e-3}[dtype]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)
    assert (weights.dtype, weights.shape) == (np.float32, (*batch, 4, seqlen_q, seqlen_k))
    np.testing.assert_allclose(weights.sum(-1), (weights > 0).any(-1), atol=1e-6)


def test_dense_attention_of_rows_that_see_nothing():
    """Output, weights and gradients are 0, whatever hides the keys."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 6, 2, 8)), jnp.float32) for _ in range(3))
    hidden = np.ones((6, 6), bool)
    hidden[2] = False
    for options in ({"mask": hidden}, {"bias": np.where(hidden, 0, -np.inf).astype(np.float32)}):

        def summed(q, k, v):
            o, weights = dense_attention(q, k, v, **options, return_weights=True)  # noqa: B023
            return o.sum(), (o, weights)

        (dq, dk, dv), (o, weights) = run(jax.grad(summed, (0, 1, 2), has_aux=True), q, k, v)
        assert not o[:, 2].any()
        assert not weights[:, :, 2].any()
        assert not dq[:, 2].any()
        assert all(np.isfinite(x).all() for x in (dq, dk, dv))


def test_dense_attention_uses_the_cache():
    q = jnp.ones((2, 6, 2, 8))
    cache = MaskCache()
    for _ in range(3):
        dense_attention(q, q, q, causal=True, cache=cache)
    jax.jit(lambda q: dense_attention(q, q, q, causal=True, cache=cache))(q)  # compares indices
    assert cache.info()[:2] == (2, 1)
    dense_attention(q, q, q, cache=cache)  # needs none
    assert cache.info()[:2] == (2, 1)
    dense_attention(q, q, q, window_size=2, cache=cache)
    assert cache.info()[:2] == (2, 2)
    before = causal_mask_cache.info()
    built = dense_attention(q, q, q, causal=True, cache=None)
    assert causal_mask_cache.info() == before
    np.testing.assert_array_equal(built, dense_attention(q, q, q, causal=True))


class Weights:
    """As much of a `Mask` as `dense_attention` looks at."""

    def __init__(self, weights):
        self.weights = weights

    def to_dense(self):
        return self.weights


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_dense_attention_under_weights(batch):
    """A weight w divides what its key counts: logits lose log(w), and no key of weight 0 is seen."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((*batch, 5, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    weights = rng.random((max(batch, default=1), 1, 5, 5)).astype(np.float32) * (rng.random((1, 1, 5, 5)) < 0.7)
    shown = weights.reshape(*batch, 1, 5, 5)
    bias = np.where(shown > 0, -np.log(np.where(shown > 0, shown, 1)), -np.inf).astype(np.float32)

    def pairs(q, k, v, weights):
        return (
            (
                dense_attention(q, k, v, mask=Mask.from_dense(weights), causal=True),
                dense_attention(q, k, v, bias, causal=True),
            ),
            (dense_attention(q, k, v, mask=Mask.from_dense(weights > 0)), dense_attention(q, k, v, mask=shown > 0)),
        )

    for got, want in run(pairs, q, k, v, jnp.asarray(weights)):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_dense_attention_under_a_predicate():
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 8)), jnp.float32) for n in (SQ, SK, SK))
    mask = sliding_window(2) & documents(Q_IDS, KV_IDS) | sinks(1)
    got = run(lambda mask: dense_attention(q, k, v, mask=mask), mask)
    want = run(lambda: dense_attention(q, k, v, mask=dense(mask, (2, 1, SQ, SK))))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_dense_attention_refuses():
    q = jnp.ones((2, 6, 2, 8))
    for options, error, message in [
        ({"cache": 3}, TypeError, "cache must be a MaskCache, or None"),
        ({"return_weights": 1}, TypeError, "return_weights must be True or False"),
        ({"mask": 3}, TypeError, "mask must be an array of booleans, a Mask or a predicate, got int"),
        ({"mask": jnp.ones((6, 6))}, TypeError, "mask must have dtype bool"),
        ({"mask": Weights(jnp.ones((2, 2, 6, 7)))}, ValueError, r"mask must have the axes \[B, H, Sq, Sk\]"),
        ({"mask": Weights(jnp.ones((6, 6)))}, ValueError, r"mask must have the axes \[B, H, Sq, Sk\]"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"causal_alignment": "x"}, ValueError, "causal_alignment must be one of"),
        ({"window_size": -1}, ValueError, "window_size must not be negative"),
        ({"softmax_scale": "x"}, TypeError, "softmax_scale must be"),
    ]:
        with pytest.raises(error, match=message):
            dense_attention(q, q, q, **options)
