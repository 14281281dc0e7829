"""Dense builders of causal masks, and the cache of causal masks."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import run
from reference import distance, visible

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.masks import (
    MaskCache,
    causal_mask,
    causal_mask_cache,
    causal_mask_comparison,
    causal_mask_tril,
    make_causal_mask,
)

RNG = np.random.default_rng(0)

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


REFUSED = {
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
    "dtype": (lambda: causal_mask(2, dtype=int), TypeError, "dtype must be bool .*float16, .* got int"),
    "float8": (lambda: causal_mask(2, dtype=jnp.float8_e4m3fn), TypeError, "dtype must be bool .* got float8_e4m3fn"),
    "float64": (lambda: causal_mask(2, dtype=np.float64), TypeError, "needs jax_enable_x64"),
    "window x": (lambda: causal_mask(2, window="x"), TypeError, "window must be an integer, a pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
