"""Block masks: made right from whatever says who sees whom, cheap to make and to keep, and attention under them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_masks import (
    DEFINITION,
    PREDICATES,
    SK,
    SQ,
    K,
    Q,
    V,
    assert_bounds_cut_full_tiles,
    dense,
    draw,
    made,
    results,
    statuses,
)
from checks import QUICK
from reference import attention

from jax_flash_attn2 import Config, explain, flash_attention, gpu_target, masks
from jax_flash_attn2.masks import BlockMask, Mask, block, evaluation, reading, sources

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RNG = np.random.default_rng(1)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, (32, 32)) for name in PREDICATES),
        *((name, (16, 64)) for name in ("causal", "random_each")),
        *((name, (128, 128)) for name in ("documents", "random_1", "all")),
    ],
    ids=str,
)
def test_tiles(name, sizes):
    """Every tile is what its elements say, and the elements come back."""
    mask, want = made(name, *sizes), dense(name)
    want = want[: mask.shape[0], : mask.shape[1]]
    np.testing.assert_array_equal(mask.to_dense(), want)
    assert mask.density() == pytest.approx(want.mean(), abs=1e-6)
    np.testing.assert_array_equal(mask.tiles(), statuses(want, *sizes))
    by_columns = dataclasses.replace(  # the transposed lists say the same
        mask, row_ends=mask.col_ends, row_tiles=mask.col_tiles, col_ends=mask.row_ends, col_tiles=mask.row_tiles
    )
    np.testing.assert_array_equal(by_columns.tiles(), mask.tiles().swapaxes(2, 3))


FLASH = results(lambda q, k, v, mask: flash_attention(q, k, v, mask=mask))


@pytest.mark.parametrize("name", PREDICATES)
def test_attention(name):
    """Values and gradients against the definition."""
    got, want = FLASH(Q, K, V, made(name)), DEFINITION(Q, K, V, dense(name))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, want)


def test_bounds_cut_full_tiles():
    assert_bounds_cut_full_tiles()


def test_mask_is_data():
    """One compiled function serves every mask of the same sizes, and vmap maps masks as it maps arrays."""
    arrays = jax.device_put(RNG.random((3, 1, 2, 64, 96)) < 0.1)
    make = functools.partial(BlockMask.from_mask, block_m=32, block_n=32, max_tiles=6, max_parts=12)
    q, k = draw(3, 1, 64, 2, 16), draw(3, 1, 96, 2, 16)

    @jax.jit
    def attend(q, k, mask):
        return flash_attention(q, k, k, mask=mask)

    want = [attention(q[i], k[i], k[i], mask=arrays[i], compute=jnp.float32)[0] for i in range(3)]
    got = [attend(q[i], k[i], make(arrays[i])) for i in range(3)]
    assert attend._cache_size() <= 3  # as many as there are counts of partial tiles
    traced = jax.jit(jax.vmap(lambda q, k, mask: attend(q, k, make(mask))))(q, k, arrays)
    for out in (got, traced):
        np.testing.assert_allclose(jnp.stack(list(out)), jnp.stack(want), rtol=1e-5, atol=2e-6)
    shared = jax.vmap(attend, (0, 0, None))(q, k, make(arrays[0]))
    np.testing.assert_allclose(shared[0], want[0], rtol=1e-5, atol=2e-6)


def test_overflow_under_jit_is_heard():
    mask = jax.device_put(RNG.random((1, 1, 64, 64)) < 0.5)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def attend(mask, *most):
        made, x = BlockMask.from_mask(mask, block_m=32, block_n=32, max_tiles=most[0], max_parts=most[1]), Q[:1, :64]
        results = functools.partial(flash_attention, return_lse=True, return_max_logits=True)
        dq = jax.grad(lambda q: results(q, x, x, mask=made)[0].sum())(x)
        rows = results(x[:, :1], x, x, mask=made.rows(63))  # which meet no tile if there is room for one
        return (results(x, x, x, mask=made), dq, rows), made.overflow

    out, overflow = attend(mask, 4, 4)
    assert not overflow
    assert not any(jnp.isnan(x).any() for x in jax.tree.leaves(out))
    for most in ((4, 3), (1, 4)):
        out, overflow = attend(mask, *most)
        assert overflow
        assert all(jnp.isnan(x).all() for x in jax.tree.leaves(out))
    with pytest.raises(ValueError, match=r"max_parts must be at least 4, which is what the mask has, got 3"):
        BlockMask.from_mask(mask, block_m=32, block_n=32, max_parts=3)


def read(mask):
    dense = mask.to_dense(jnp.float32), masks.dense_attention(Q, K, V, mask=mask)
    return *dense, mask.density(), mask.sparsity()


def test_overflow_is_heard_where_a_mask_is_read():
    """Known it is an error; under jit NaN, or an error where nothing can be NaN."""
    make = lambda mask, n: BlockMask.from_mask(mask, block_m=32, block_n=32, max_tiles=n, max_parts=n)
    made = jax.jit(make, static_argnums=1)(dense("causal")[:1, :1], 9)
    for use in (BlockMask.tiles, BlockMask.to_dense, BlockMask.density, BlockMask.sparsity):
        with pytest.raises(ValueError, match="must be all there, got overflow=True"):
            use(made)
    assert str(made) == repr(made)
    assert all(jnp.isnan(x).all() for x in jax.jit(read)(made))
    assert reading.as_mask(made).overflow  # as attention on several devices reads it
    for use in (BlockMask.tiles, BlockMask.to_dense):
        with pytest.raises(TypeError, match="must say under jit whether"):
            jax.jit(use)(made)
    whole = jax.jit(make, static_argnums=1)(dense("causal")[:1, :1], 35)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), jax.jit(read)(whole), read(whole))


@pytest.mark.parametrize("kind", ["dense", "sparse", "block", "block_of_sparse"])
def test_weights(kind):
    """A weight w is the share of its like that a key stands for: its logit gets -log(w)."""
    weights = jnp.asarray(
        np.where(RNG.random((2, 1, SQ, SK)) < 0.3, RNG.uniform(0.1, 1, (2, 1, SQ, SK)), 0), jnp.float32
    )
    mask = Mask.from_dense(weights)
    mask = mask if kind in ("dense", "block") else mask.to_indices()
    if "block" in kind:
        mask = BlockMask.from_mask(mask, block_m=32, block_n=64)
        np.testing.assert_allclose(mask.to_dense(), weights, rtol=1e-6)
    want = attention(Q, K, V, mask=weights > 0, weights=weights, compute=jnp.float32)[0]
    np.testing.assert_allclose(flash_attention(Q, K, V, mask=mask), want, rtol=1e-5, atol=2e-6)


def test_weights_below_float32():
    """Their logarithms are not: equal ones change nothing, however small."""
    with jax.enable_x64(True):
        weights, sizes = jnp.full((1, 1, 64, 64), 1e-60, jnp.float64), {"max_tiles": 1, "max_parts": 1}
        x = Q[:1, :64].astype(jnp.float32)
        want = flash_attention(x, x, x)
        of_traced = jax.jit(lambda w: flash_attention(x, x, x, mask=BlockMask.from_mask(w, **sizes)))
        for got in (
            flash_attention(x, x, x, mask=BlockMask.from_mask(weights)),
            of_traced(weights),
            masks.dense_attention(x, x, x, mask=Mask.from_dense(weights)),
        ):
            np.testing.assert_allclose(got, want, atol=5e-5)  # logits of 138 are in steps of 1.5e-5


def test_sampled_attention_is_exact_in_expectation():
    """Keys kept with probability w, weighted 1 / w: the mean of the softmax's sum is that of all keys."""
    q, k, share = draw(1, 4, 1, 8), draw(1, 32, 1, 8), np.linspace(0.3, 1, 32)
    sampled = np.where(RNG.random((4000, 1, 1, 4, 32)) < share, share, 0).astype(np.float32)

    def sums(weights):
        return jnp.exp(flash_attention(q, k, k, mask=Mask.from_dense(weights), return_lse=True)[1])

    drawn = jax.jit(jax.vmap(sums))(jnp.asarray(sampled))
    want = jnp.exp(flash_attention(q, k, k, return_lse=True)[1])
    deviation = drawn.std(0) / np.sqrt(len(sampled))
    assert (abs(drawn.mean(0) - want) < 4 * deviation).all()


def test_gradient_of_weights():
    """A dense `Mask` has one, as the definition has; a block mask says that it has none."""
    weights = jnp.asarray(
        np.where(RNG.random((1, 1, 20, 24)) < 0.5, RNG.uniform(0.2, 1, (1, 1, 20, 24)), 0), jnp.float32
    )
    q, k = draw(1, 20, 2, 16), draw(1, 24, 2, 16)

    def definition(weights):
        return (attention(q, k, k, mask=weights > 0, weights=weights, compute=jnp.float32)[0] ** 2).sum()

    def flash(weights, kind):
        return (flash_attention(q, k, k, mask=kind(weights)) ** 2).sum()

    got = jax.grad(flash)(weights, Mask.from_dense)
    np.testing.assert_allclose(got, jax.grad(definition)(weights), rtol=1e-4, atol=1e-4)
    of_blocks = functools.partial(BlockMask.from_mask, max_tiles=1, max_parts=1)
    with pytest.raises(TypeError, match="mask is a BlockMask whose weights have no gradient"):
        jax.grad(flash)(weights, of_blocks)


def test_empty_and_full_masks():
    full, empty = Mask.full((1, 1, SQ, SK)), Mask.empty((2, 1, SQ, SK))
    np.testing.assert_array_equal(flash_attention(Q, K, V, mask=full), flash_attention(Q, K, V))
    assert not flash_attention(Q, K, V, mask=empty).any()
    for mask, share in ((full, 1), (empty, 0)):
        assert BlockMask.from_mask(mask).density() == share


def held():
    """The block masks in the cache, the last used at the end."""
    return [mask for mask, _ in block.block_mask_cache._held.values()]


def test_predicates_are_made_once():
    """Equal predicates share a block mask, under jit too, and what they do not look at is not asked."""
    masks.block_mask_cache.clear()
    for _ in range(2):
        jax.jit(lambda q: flash_attention(q, q, q, mask=masks.sliding_window(9)))(Q)
    assert [mask.shape for mask in held()] == [(1, 1, SQ, SQ)]
    assert not any(isinstance(x, jax.core.Tracer) for mask in held() for x in jax.tree.leaves(mask))
    flash_attention(Q, K, V, mask=lambda b, h, i, j: j <= i + h)
    ids = (np.arange(2)[:, None] + np.arange(n) // 50 for n in (SQ, SK))
    flash_attention(Q, K, V, mask=masks.documents(*ids))
    assert [mask.shape for mask in held()][1:] == [(1, 2, SQ, SK), (2, 1, SQ, SK)]
    masks.block_mask_cache.clear()


T, WINDOW, SINKS = 8192, 256, 64
LOCAL = masks.causal() & (masks.sliding_window(WINDOW - 1) | masks.sinks(SINKS))


@pytest.mark.in_thirds
@pytest.mark.parametrize("sizes", [(128, 128), (128, 64), (64, 64)], ids=str)
def test_no_more_tiles_than_needed(sizes, capsys):
    """At T = 8192 with a window of 256 and 64 sinks, of every pass."""
    block_m, block_n = sizes
    mask = BlockMask.from_predicate(LOCAL, (1, 1, T, T), block_m=block_m, block_n=block_n)
    first, last = np.arange(0, T, block_m)[:, None], np.arange(0, T, block_m)[:, None] + block_m - 1
    tile = np.arange(T // block_n)
    local = (tile * block_n <= last) & ((tile + 1) * block_n > first - WINDOW + 1)
    least = int((local | ((tile * block_n < SINKS) & (tile * block_n <= last))).sum())
    assert int((mask.tiles() != 0).sum()) == least
    x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.bfloat16)
    x = jnp.zeros(x.shape, x.dtype)
    xla = explain(x, x, x, mask=mask)
    with gpu_target(compute_capability=90):
        kernels = explain(x, x, x, mask=mask)
    for p in (*xla.passes, *kernels.passes):
        pieces = block_m * block_n // (p.block_m * p.block_n)
        assert p.visited == least * pieces, p.name
    capsys.readouterr()


def test_no_logits_in_memory():
    """No [T, T] buffer, forward and backward; and making the mask at T = 32768 takes little."""
    mask = BlockMask.from_predicate(LOCAL, (1, 1, T, T))
    x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
    grad = jax.grad(lambda q, k, v: flash_attention(q, k, v, mask=mask).sum(), (0, 1, 2))
    text = jax.jit(grad).lower(x, x, x).compile(QUICK).as_text()
    assert f"{T},{T}" not in text
    shape = (1, 1, 4 * T, 4 * T)
    source, at = sources.OfPredicate(evaluation.trace(LOCAL), 4 * T), jax.ShapeDtypeStruct((4,), jnp.int32)
    memory = sources._words.lower(source, at, 128, 4 * T).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 64 * 10**6
    made = BlockMask.from_predicate(LOCAL, shape)
    assert sum(x.nbytes for x in jax.tree.leaves(made)) <= 2**20


def call(mask, **options):
    return flash_attention(Q, K, V, mask=mask, **options)


WRONG = {
    "shape": (lambda: call(BlockMask.from_predicate(masks.causal(), (1, 1, SQ, SQ))), ValueError, "mask must be a BlockMask of shape (2, 2, 150, 210) (B and H may be 1), got (1, 1, 150, 150)"),
    "weights_shape": (lambda: call(Mask.full((1, 3, SQ, SK))), ValueError, "mask must be a Mask of shape (2, 2, 150, 210) (B and H may be 1), got (1, 3, 150, 210)"),
    "config": (lambda: call(made("causal"), config=Config(64)), ValueError, "config.block_m must be at most 32, as the tiles of the block mask are, got 64 for 'fwd'"),
    "block_m": (lambda: BlockMask.from_predicate(masks.causal(), (1, 1, SQ, SK), block_m=48), ValueError, "block_m must be a power of two from 16 to 512, or None, got 48"),
    "block_n": (lambda: BlockMask.from_predicate(masks.causal(), (1, 1, SQ, SK), block_n=16), ValueError, "block_n must be a power of two from 32 to 512, or None, got 16"),
    "max_tiles": (lambda: BlockMask.from_predicate(masks.causal(), (1, 1, SQ, SK), max_tiles=0), ValueError, "max_tiles must be a positive integer or None (counted), got 0"),
    "no_shape": (lambda: BlockMask.from_predicate(masks.causal(), (SQ, SK)), ValueError, "shape must be four lengths (B, H, Sq, Sk), got (150, 210)"),
    "no_keys": (lambda: BlockMask.from_predicate(masks.causal(), (1, 1, SQ, 0)), ValueError, "a block mask needs at least one batch, head, row and key, got shape (1, 1, 150, 0)"),
    "not_a_mask": (lambda: BlockMask.from_mask(masks.causal()), TypeError, "mask must be a Mask or an array [B, H, Sq, Sk], got _Causal"),
    "traced": (lambda: jax.jit(lambda n: BlockMask.from_predicate(lambda b, h, i, j: j < n, (1, 1, SQ, SK)).row_ends)(3), ValueError, "this block mask depends on traced values, so that jit cannot know how many tiles it has"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    function, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        function()
    assert message in str(caught.value)


@pytest.mark.parametrize("mask", [masks.causal(), lambda b, h, i, j: j <= i], ids=["predicate", "function"])
def test_blocks_larger_than_short_rows(mask):
    """One tile is all there is, however large a block was asked for."""
    x = draw(1, 20, 1, 16)
    got = flash_attention(x, x, x, mask=mask, config=Config(64, 64))
    np.testing.assert_allclose(got, flash_attention(x, x, x, causal=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("higher_order", [False, True])
def test_of_one_tile(higher_order):
    """Where the mask is smaller than a tile."""
    x = draw(1, 5, 1, 16)
    got = flash_attention(x, x, x, mask=masks.causal(), higher_order=higher_order)
    np.testing.assert_allclose(got, flash_attention(x, x, x, causal=True), rtol=1e-5, atol=1e-6)
