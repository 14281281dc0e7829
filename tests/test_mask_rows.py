"""Rows of a block mask, as decoding takes them: as they are in the whole, wherever they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_masks import SQ, K, Q, V, dense, draw, made, statuses

from jax_flash_attn2 import explain, flash_attention, masks
from jax_flash_attn2.masks import BlockMask

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NAMES = ("documents", "local_and_sinks", "random_each", "all")
take = jax.jit(BlockMask.rows, static_argnums=2)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("name", NAMES)
def test_rows(name, count):
    """Known or traced, within a tile or over several, the last ones too."""
    mask = made(name)
    whole = dense(name)[: mask.shape[0], : mask.shape[1]]
    for start in (0, 31, SQ - count):
        want = whole[:, :, start : start + count]
        for rows in (mask.rows(start, count), take(mask, jnp.int32(start), count)):
            assert rows.shape == want.shape
            np.testing.assert_array_equal(rows.to_dense(), want)
            np.testing.assert_array_equal(rows.tiles(), statuses(want, rows.block_m, rows.block_n))


@pytest.mark.parametrize("name", ["causal", "documents"])
def test_rows_of_each_batch(name):
    """Sequences that are at different places."""
    starts = np.array([7, 120], np.int32)
    want = np.stack([dense(name)[b, :1, start : start + 3] for b, start in enumerate(starts)])
    for rows in (made(name).rows(starts, 3), take(made(name), starts, 3)):
        np.testing.assert_array_equal(rows.to_dense(), want)


def test_weights():
    weights = np.random.default_rng(0).integers(0, 9, (1, 2, 70, 90)).astype(np.float32) / 8
    weights[:, :, :, :32] = 1
    mask = BlockMask.from_mask(weights, block_m=32, block_n=32)
    rows = mask.rows(30, 5)
    np.testing.assert_allclose(rows.to_dense(), weights[:, :, 30:35], rtol=1e-6)
    assert (rows.tiles()[..., 0] == 1).all()
    assert (rows.tiles()[..., 1:] == 2).all()


def test_decoding(capsys):
    """One compiled step for every row: attention under the rows is the rows of attention, and skips what they do."""
    mask, traces = made("local_and_sinks"), []

    @jax.jit
    def step(q, k, v, t, mask):
        traces.append(t)
        return flash_attention(jax.lax.dynamic_slice_in_dim(q, t, 1, 1), k, v, mask=mask.rows(t))

    want = flash_attention(Q, K, V, mask=mask)
    for t in (0, 33, SQ - 1):
        np.testing.assert_allclose(step(Q, K, V, t, mask), want[:, t : t + 1], rtol=1e-5, atol=2e-6)
    assert len(traces) == 1
    n = 4096
    whole = BlockMask.from_predicate(masks.causal() & (masks.sliding_window(255) | masks.sinks(64)), (1, 1, n, n))
    row, cache = draw(1, 1, 2, 64), jnp.zeros((1, n, 2, 64), jnp.float32)
    assert int((whole.rows(3000).tiles() != 0).sum()) == 4  # keys 0 to 127, and 2745 to 3000 in three tiles
    assert explain(row, cache, cache, mask=whole.rows(3000)).passes[0].visited == 2 * 4  # of two heads
    capsys.readouterr()


def test_rows_that_do_not_exist():
    mask = made("causal")
    assert not take(mask, SQ - 2, 2).overflow
    for start in (-1, SQ - 1):
        rows = take(mask, start, 2)
        assert rows.overflow
        assert jnp.isnan(flash_attention(Q[:, :2], K, V, mask=rows)).all()


@pytest.mark.parametrize(
    ("start", "count", "error", "message"),
    [
        (0, 0, ValueError, "count must be an integer from 1 to the mask's 150 rows, got 0"),
        (0, jnp.int32(1), ValueError, "count must be an integer"),
        (149, 2, ValueError, "start must be from 0 to 148, so that 2 of the mask's 150 rows follow, got 149"),
        (-1, 1, ValueError, "got -1"),
        (1.0, 1, TypeError, r"start must be an array of integers \[\] or \[B\], got"),
        (np.zeros(3, int), 1, ValueError, r"start must have shape \[\] or \[2\], .* got \(3,\)"),
    ],
)
def test_messages(start, count, error, message):
    with pytest.raises(error, match=message):
        made("documents").rows(start, count)
