"""The table of tiles that the XLA path follows says what its elements are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.tiles import block_lists, ragged, spans

B, H, D = 2, 2, 8
EVEN, CUT = (96, 128, 32, 32), (90, 117, 32, 48)  # rows, keys, and the sizes of a tile


def seen(rules, operands, seqlen_q, seqlen_k):
    """[B, H, Sq, Sk]: the definition."""
    rows, cols = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None]
    x = {name: np.asarray(x) for name, x in operands.items()}
    rows_at = x.get("q_positions", rows + x.get("offset", np.zeros((1, 1, 1, 1), int)))
    cols_at = x.get("kv_positions", cols)
    visible = np.ones((B, H, seqlen_q, seqlen_k), bool)
    if rules.left is not None:
        visible &= cols_at >= rows_at - rules.left
    if rules.right is not None:
        visible &= cols_at <= rows_at + rules.right
    if "q_lengths" in x:
        visible &= (rows < x["q_lengths"]) & (cols < x["kv_lengths"])
    if "q_segments" in x:
        visible &= (x["q_segments"] == x["kv_segments"]) & (x["q_segments"] >= 0)
    return visible & x.get("mask", True)


def drawn(kind, seqlen_q, seqlen_k):
    rng = np.random.default_rng(0)
    if kind == "window":
        return Rules(left=100, right=0), {"offset": np.int32([[[[20]]]])}
    if kind == "lengths":
        ends = (np.int32([n, n * 2 // 3])[:, None, None, None] for n in (seqlen_q, seqlen_k))
        return Rules(), dict(zip(("q_lengths", "kv_lengths"), ends, strict=True))
    if kind == "mask":  # with holes between tiles that are met
        tiles = rng.random((1, H, seqlen_q // 16 + 1, seqlen_k // 16 + 1)) < 0.3
        return Rules(), {"mask": np.repeat(np.repeat(tiles, 16, 2), 16, 3)[:, :, :seqlen_q, :seqlen_k]}
    if kind.startswith("positions"):  # apart by 2, turned round at some place
        q, kv = (np.roll(2 * np.arange(n), turn)[None] for n, turn in ((seqlen_q, 32), (seqlen_k, 96)))
        if kind.endswith("order"):
            q, kv = rng.permuted(np.repeat(q, B, 0), axis=1), np.repeat(kv, B, 0)
        q, kv = np.int32(q)[:, None, :, None], np.int32(kv)[:, None, None, :]
        return Rules(left=30 if "narrow" in kind else 140, right=60), {"q_positions": q, "kv_positions": kv}
    q, kv = (np.sort(rng.integers(-1, 4, (B, n)).astype(np.int32)) for n in (seqlen_q, seqlen_k))
    if kind == "segments in any order":
        q, kv = rng.permutation(q, axis=1), np.repeat(kv[:, ::-1], 1, 1)
    return Rules(right=0), {"q_segments": q[:, None, :, None], "kv_segments": kv[:, None, None, :]}


@pytest.mark.parametrize("sizes", [EVEN, CUT], ids=["even", "cut"])
@pytest.mark.parametrize(
    "kind",
    [
        *("window", "lengths", "mask", "segments", "segments in any order"),
        *("positions", "positions, narrow", "positions in any order"),
    ],
)
def test_table(kind, sizes):
    """A tile that is skipped shows nothing to anybody; one that needs no mask shows everything to all."""
    seqlen_q, seqlen_k, block_m, block_n = sizes
    rules, operands = drawn(kind, seqlen_q, seqlen_k)
    operands = {name: jnp.asarray(x) for name, x in operands.items()}
    q, k = jnp.zeros((B, seqlen_q, H, D)), jnp.zeros((B, seqlen_k, H, D))
    spec = Spec.of(rules, q, k, k, operands)
    starts = np.minimum(np.arange(0, seqlen_q, block_m), seqlen_q - block_m)
    table = np.asarray(spans.query_tiles(spec, operands, B, seqlen_q, seqlen_k, starts, block_m, block_n))
    visible = seen(rules, operands, seqlen_q, seqlen_k)
    tiles = [visible[:, :, i : i + block_m, j : j + block_n] for i in starts for j in range(0, seqlen_k, block_n)]
    some = np.reshape([tile.any() for tile in tiles], table.shape)
    whole = [tile.all() and tile.shape[3] == block_n for tile in tiles]
    whole = np.reshape(whole, table.shape)
    assert not (some & (table == spans.EMPTY)).any()
    assert not (~whole & (table == spans.FULL)).any()
    if kind in ("window", "lengths", "mask"):  # others are compared by the least and the largest of a tile
        assert (some == (table != spans.EMPTY)).all()
        assert (whole == (table == spans.FULL)).all()
    if kind in ("window", "positions"):
        assert len(np.unique(table)) == 3


def test_blocks_of_ragged_rows():
    table = np.asarray(ragged.blocks_of_rows(jnp.asarray([0, 1, 1, 20], jnp.int32), 23, 8))
    assert table.shape == (-(-23 // 8) + 3 + 1, 4)
    np.testing.assert_array_equal(
        table[:5], [[0, 0, 0, 1], [2, 0, 1, 19], [2, 8, 1, 19], [2, 16, 1, 19], [-1, 0, 20, 3]]
    )
    np.testing.assert_array_equal(table[5:, 0], -1)
    np.testing.assert_array_equal(table[5:, 3], 0)


@pytest.mark.parametrize("starts", [[0, 9, 99, 3], [5, 2, -7, 30], [-1, 0, 2**30, -(2**30)]])
def test_blocks_stay_within_the_rows(starts):
    """Starts that do not fit, which under jit nobody can refuse, let no kernel write elsewhere."""
    table = np.asarray(ragged.blocks_of_rows(jnp.asarray(starts, jnp.int32), 23, 8))
    assert (table[:, 2:] >= 0).all()
    assert (table[:, 2] + table[:, 3] <= 23).all()


def test_lists_are_not_longer_than_kernels_count():
    """Nothing is that large here: only shapes are seen."""
    q, spec = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32), Spec(2, 2, 16, 16, Rules(tiles=(64, 128)))
    made = lambda heads, size: {
        f"{side}_{what}": jax.ShapeDtypeStruct((1, heads, *shape), jnp.int32)
        for side in ("row", "col")
        for what, shape in (("ends", (1, 3)), ("tiles", (size, 2)))
    }
    run = lambda x: block_lists.for_kernels(spec, x, q, q, q)[1]
    assert jax.eval_shape(run, made(2, 2**27 - 1))["row_tiles"].shape == (1, 2, 2**27 - 1, 2)
    with pytest.raises(ValueError, match=r"mask has too many tiles .* got 2147483648: 1 \* 2 planes .* larger"):
        jax.eval_shape(run, made(2, 2**27))
