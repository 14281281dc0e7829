"""Block masks of chosen tiles: each tile as chosen, whole or divided, known or traced; and what is said of them."""

import functools
import re

import jax
import numpy as np
import pytest
from block_masks import DEFINITION, SK, SQ, K, Q, V, results, statuses

from jax_flash_attn2 import flash_attention, masks
from jax_flash_attn2.masks import BlockMask, block_mask_cache, chosen

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RNG = np.random.default_rng(2)
M, N = 32, 64
SHAPE = (2, 2, SQ, SK)
BLOCKS = (2, 2, -(-SQ // M), -(-SK // N))
TILES = RNG.random(BLOCKS) < 0.4
TILES[0, 0, :, -1] = TILES[1, 1, -1, -1] = True  # what sticks out
ALL = {"max_tiles": BLOCKS[2] * BLOCKS[3], "max_parts": 60}  # masks of one size share compiled functions
make = functools.partial(BlockMask.from_tiles, shape=SHAPE, block_m=M, block_n=N)


def by_head(b, h, i, j):
    return (i + j) % (h + 2) == 0


def spread(tiles):
    """Tiles as elements."""
    return tiles.repeat(M, 2).repeat(N, 3)[:, :, :SQ, :SK]


def dense(predicate, shape=SHAPE):
    return np.asarray(jax.jit(lambda: masks.evaluate(predicate, *map(np.arange, shape)))())


def assert_is(mask, want):
    """It is the mask of these elements, in its lists both ways."""
    assert mask.shape == want.shape
    np.testing.assert_array_equal(mask.to_dense(), want)
    tiles = statuses(want, M, N)
    np.testing.assert_array_equal(mask.tiles(), tiles)
    for ends, axis in ((mask.row_ends, 3), (mask.col_ends, 2)):
        counts = np.stack([(tiles == status).sum(axis) for status in (2, 1)], -1)
        np.testing.assert_array_equal(np.diff(ends), counts)


@pytest.mark.parametrize("traced", [False, True], ids=["known", "jit"])
@pytest.mark.parametrize(
    ("planes", "within"),
    [((2, 2), None), ((1, 2), None), ((2, 2), masks.causal()), ((2, 1), by_head), ((1, 1), None)],
    ids=["each", "by head", "causal", "by batch, a function by head", "one"],
)
def test_tiles(planes, within, traced):
    tiles = TILES[: planes[0], : planes[1]]
    own = lambda tiles: make(tiles, within=within, **ALL)
    mask = (jax.jit(own) if traced else own)(tiles)
    want = spread(tiles)
    if within is not None:
        want = want & dense(within)[: planes[0]]
        want = want[:, : planes[1]] if within is not by_head else want
    assert mask.overflow is None
    assert_is(mask, want)
    if planes == (1, 1):
        np.testing.assert_array_equal(make(tiles[0, 0]).to_dense(), want)  # leading axes left out


@pytest.mark.parametrize("traced", [False, True], ids=["known", "jit"])
def test_within_a_block_mask(traced):
    """Nothing is evaluated; weights and overflow stay."""
    weights = np.where(RNG.random((1, 2, SQ, SK)) < 0.3, RNG.integers(1, 9, (1, 2, SQ, SK)) / 8, 0).astype(np.float32)
    weights[:, :, :M, :N] = 1
    divide = BlockMask.from_mask(weights, block_m=M, block_n=N)
    choose = jax.jit(lambda tiles, within: make(tiles, within=within)) if traced else make
    mask = choose(TILES[:, :1], within=divide)
    np.testing.assert_allclose(mask.to_dense(), np.where(spread(TILES[:, :1]), weights, 0), rtol=1e-6)
    assert (mask.tiles()[TILES[:, 0, 0, 0], :, 0, 0] == 1).all()
    small = jax.jit(lambda w: BlockMask.from_mask(w, block_m=M, block_n=N, max_tiles=1, max_parts=1))(weights)
    assert choose(TILES, within=small).overflow


def test_attention():
    """Values and gradients, of tiles chosen under jit."""
    flash = results(lambda q, k, v, tiles: flash_attention(q, k, v, mask=make(tiles, within=masks.causal())))
    got = flash(Q, K, V, TILES)
    want = DEFINITION(Q, K, V, spread(TILES) & dense(masks.causal()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, want)


def test_no_work_for_elements(monkeypatch):
    """At 8 heads of 32768 they would be 8 thousand million; a predicate is asked only about what is chosen."""
    shape, tiles = (1, 8, 2**15, 2**15), RNG.random((1, 8, 256, 256)) < 0.1
    mask = BlockMask.from_tiles(tiles, shape)
    assert mask.tile_bits.shape == (1, 1, 1, 512)  # nothing sticks out: no element mask
    assert mask.sparsity() == pytest.approx(100 - 100 * tiles.mean(), abs=1e-3)
    asked, elements = [], chosen._elements

    def counted(source, at, *sizes):
        asked.append(len(at))
        return elements(source, at, *sizes)

    monkeypatch.setattr(chosen, "_elements", counted)
    diagonal = np.zeros((256, 256), bool)
    np.fill_diagonal(diagonal, True)
    mask = BlockMask.from_tiles(np.broadcast_to(diagonal, (1, 8, 256, 256)), shape, within=masks.causal())
    assert asked == [256]
    assert mask.tile_bits.shape[2] == 1  # that of each of them
    np.testing.assert_array_equal(mask.tiles()[0, 5], 2 * diagonal)


def test_sizes():
    """Masks of one size have the same shapes; one that has more says so."""
    shapes = lambda mask: [x.shape for x in jax.tree.leaves(mask)]
    sized = functools.partial(make, within=masks.causal(), max_tiles=9, max_parts=40)
    assert shapes(sized(TILES[:1])) == shapes(sized(TILES[1:]))
    most = int(TILES.sum((2, 3)).max())
    with pytest.raises(ValueError, match=f"max_tiles must be at least {most}, which is what the mask has, got 3"):
        make(TILES, max_tiles=3)
    with pytest.raises(ValueError, match="max_parts must be at least 2, which is what the mask has, got 1"):
        jax.jit(functools.partial(make, max_parts=1))(TILES)
    limited = jax.jit(make, static_argnames="max_tiles")
    assert not limited(TILES, max_tiles=most).overflow
    assert limited(TILES, max_tiles=most - 1).overflow
    assert_is(limited(TILES, max_tiles=most), spread(TILES))
    block_mask_cache.clear()
    for _ in range(2):
        jax.jit(lambda tiles: make(tiles, within=masks.causal()))(TILES)
    assert block_mask_cache.info()[:2] == (1, 1)  # of predicates where tiles are traced: made once


def listed(tiles, room):
    """Numbers of tiles as FlexAttention has them: how many, and which, in any order, with junk behind them."""
    counts = tiles.sum(-1)
    indices = np.full((*tiles.shape[:-1], room), 77, np.int32)
    for at in np.ndindex(counts.shape):
        indices[(*at, slice(counts[at]))] = RNG.permutation(np.nonzero(tiles[at])[0])
    return counts.astype(np.int32), indices


@pytest.mark.parametrize("traced", [False, True], ids=["known", "jit"])
@pytest.mark.parametrize("mod", [None, by_head], ids=["no mask_mod", "mask_mod"])
def test_kv_blocks(mod, traced):
    """Partial blocks are divided by mask_mod, full ones are not."""
    partial, full = TILES, ~TILES & (RNG.random(BLOCKS) < 0.5)
    from_blocks = lambda *lists: BlockMask.from_kv_blocks(*lists, mask_mod=mod, shape=SHAPE, block_size=(M, N), **ALL)
    own = jax.jit(from_blocks) if traced else from_blocks
    divided = spread(partial) if mod is None else spread(partial) & dense(mod)
    assert_is(own(*listed(partial, BLOCKS[3] + 1)), divided)
    assert_is(own(*listed(partial, BLOCKS[3]), *listed(full, BLOCKS[3])), divided | spread(full))
    if traced:  # which cannot be refused there
        both = own(*listed(partial, BLOCKS[3]), *listed(partial | full, BLOCKS[3]))
        assert_is(both, spread(partial | full))


def test_blocks_that_do_not_exist():
    """Under jit they cannot be refused: the mask is not all there."""
    counts, indices = listed(TILES, BLOCKS[3])
    own = jax.jit(lambda *lists: BlockMask.from_kv_blocks(*lists, shape=SHAPE, block_size=(M, N)))
    assert not own(counts, indices).overflow
    assert not own(counts, indices, counts, indices).overflow
    wrong = (counts + 4, indices), (counts - 4, indices), (counts, indices - 1), (counts, indices + 1)
    assert all(own(*lists).overflow and own(counts, indices, *lists).overflow for lists in wrong)


def test_lists_of_one_plane():
    counts, indices = listed(TILES[:1, :1], 4)
    square = BlockMask.from_kv_blocks(counts[0, 0], indices[0, 0], shape=(1, 1, SQ, SK), block_size=(M, N))
    np.testing.assert_array_equal(square.to_dense(), spread(TILES[:1, :1]))


def test_what_is_said():
    """How much is skipped, as a number and as a picture."""
    mask = make(TILES)
    assert mask.sparsity() == pytest.approx(100 * (1 - TILES.mean()), abs=1e-4)
    assert mask.density() == pytest.approx(spread(TILES).mean(), abs=1e-6)
    assert float(jax.jit(BlockMask.sparsity)(mask)) == pytest.approx(mask.sparsity())
    assert BlockMask.from_predicate(masks.all_of(), SHAPE).sparsity() == 0
    assert repr(mask) == f"BlockMask(shape={SHAPE}, block_m=32, block_n=64)"
    assert str(mask) == f"{mask}" == mask.show(width=40)
    said = []
    jax.jit(lambda mask: said.append(str(mask)))(mask)
    said += [str(jax.eval_shape(make, TILES)), str(jax.vmap(make)(TILES[None]))]
    assert said == [repr(mask)] * 3


LISTS = listed(TILES, BLOCKS[3])
WRONG = {
    "type": (lambda: make([[True]]), TypeError, "tiles must be an array of booleans (True: visited), got list"),
    "dtype": (lambda: make(TILES.astype(int)), TypeError, "got int64; compare scores with a threshold"),
    "axes": (lambda: make(TILES[0, 0, 0]), ValueError, "tiles must have axes [B, H, row blocks, key blocks]"),
    "blocks": (lambda: make(TILES[..., 1:]), ValueError, "shape (2, 2, 5, 4) (B and H may be 1), got (2, 2, 5, 3)"),
    "batch": (lambda: make(TILES.repeat(2, 0)), ValueError, "got (4, 2, 5, 4)"),
    "block_m": (lambda: make(TILES, block_m=48), ValueError, "block_m must be a power of two from 16 to 512"),
    "no keys": (lambda: make(TILES, shape=(1, 1, SQ, 0)), ValueError, "at least one batch, head, row and key"),
    "max_tiles": (lambda: make(TILES, max_tiles=0), ValueError, "max_tiles must be a positive integer or None"),
    "within": (lambda: make(TILES, within=3), TypeError, "within must be a function of (b, h, i, j), got 3"),
    "arguments": (
        lambda: make(TILES, within=lambda i, j: True), TypeError, "within must take four arguments, (b, h, i, j), got"
    ),
    "mask_mod": (
        lambda: BlockMask.from_kv_blocks(*LISTS, mask_mod=3, shape=SHAPE, block_size=(M, N)), TypeError,
        "mask_mod must be a function of (b, h, i, j), got 3",
    ),
    "other tiles": (lambda: make(TILES, block_m=64), ValueError, "tiles must have shape (2, 2, 3, 4)"),
    "within tiles": (
        lambda: make(TILES, within=BlockMask.from_predicate(masks.causal(), SHAPE, block_m=64, block_n=64)), ValueError,
        "within must be a BlockMask of shape (2, 2, 150, 210) (B and H may be 1) with block_m=32 and block_n=64, got "
        "BlockMask(shape=(2, 2, 150, 210), block_m=64, block_n=64)",
    ),
    "traced predicate": (
        lambda: jax.jit(lambda n: make(TILES, within=lambda b, h, i, j: j < n, **ALL).row_ends)(3), ValueError,
        "within must not depend on traced values here, got",
    ),
    "traced tiles and predicate": (
        lambda: jax.jit(lambda n, t: make(t, within=lambda b, h, i, j: j < n, **ALL).row_ends)(3, TILES), ValueError,
        "pass within=BlockMask.from_predicate(predicate, shape, block_m=32, block_n=64, max_tiles=..., max_parts=...)",
    ),
    "half": (
        lambda: BlockMask.from_kv_blocks(*LISTS, LISTS[0], shape=SHAPE, block_size=(M, N)), ValueError,
        "full_kv_num_blocks and full_kv_indices must be given together, got only full_kv_num_blocks",
    ),
    "both": (
        lambda: BlockMask.from_kv_blocks(*LISTS, *LISTS, shape=SHAPE, block_size=(M, N)), ValueError,
        "must have no block of a row in common, got one in both",
    ),
    "counts": (
        lambda: BlockMask.from_kv_blocks(LISTS[0] + 9, LISTS[1], shape=SHAPE, block_size=(M, N)), ValueError,
        f"from 0 to 4, for which kv_indices has room, got {LISTS[0].min() + 9} to {LISTS[0].max() + 9};",
    ),
    "indices": (
        lambda: BlockMask.from_kv_blocks(LISTS[0], LISTS[1] + 1, shape=SHAPE, block_size=(M, N)), ValueError,
        "kv_indices must be numbers of key blocks, from 0 to 3, got",
    ),
    "lists": (
        lambda: BlockMask.from_kv_blocks(LISTS[0][:, :, 1:], LISTS[1], shape=SHAPE, block_size=(M, N)), ValueError,
        "kv_num_blocks must have shape (2, 2, 5) (B and H may be 1), got (2, 2, 4)",
    ),
    "block_size": (
        lambda: BlockMask.from_kv_blocks(*LISTS, shape=SHAPE, block_size=1000), ValueError,
        "block_size must be a power of two from 16 to 512, or None, got 1000",
    ),
    "block_size of three": (
        lambda: BlockMask.from_kv_blocks(*LISTS, shape=SHAPE, block_size=(1, 2, 3)), ValueError,
        "block_size must be a number or a pair, of rows and of keys, got (1, 2, 3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    function, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        function()
