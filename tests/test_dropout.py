"""Dropout's random numbers: Philox by its published answers, and every way to give a seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from checks import assert_near, flash
from reference import kept, philox

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.base import dropout

# Random123's kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox(counter, key, want):
    """The package's, and the definition's."""
    counter, key, want = ([int(word, 16) for word in words.split()] for words in (counter, key, want))
    assert [int(word) for word in philox(counter, key)] == want
    assert [int(word) for word in dropout.philox(*(np.uint32(word) for word in (*counter, *key)))] == want


CASE = Case("seeds", 20, 30, (2, 2), 2, 1, 16, dropout=0.4)
INTS = np.random.default_rng(0).integers(0, 2**31, (2, 2, 2), np.int32)
KEY = jax.random.key(5)
SEEDS = {
    "zero": (0, 0),
    "small": (7, 7),
    "64 bits": (2**63 + 12345, 2**63 + 12345),
    "NumPy's": (np.int64(7 << 33), 7 << 33),
    "0-d": (jnp.int32(123), 123),
    "0-d, negative": (jnp.int32(-2), 2**64 - 2),
    "0-d, unsigned": (jnp.uint32(2**32 - 2), 2**32 - 2),
    "0-d, NumPy": (np.asarray(9, np.uint8), 9),
    "key": (KEY, int(jax.random.key_data(KEY)[0]) | int(jax.random.key_data(KEY)[1]) << 32),
    "each its own": (jnp.asarray(INTS), INTS),
    "by head": (jnp.asarray(INTS[0, 0]).reshape(1, 1, 2), INTS[0, 0]),
    "by batch": (INTS[:, :1, :1], INTS[:, :1, :1]),
}


@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
@pytest.mark.parametrize("name", SEEDS)
def test_seeds(name, traced):
    """A seed drops what the definition says, given as it is or to a function under jit."""
    seed, means = SEEDS[name]
    if traced and not isinstance(seed, jax.Array | np.ndarray):
        pytest.skip("it is static")
    x = CASE.inputs()
    want = kept(means, CASE.batch, CASE.heads, 20, 30, CASE.dropout)
    units = jnp.broadcast_to(jnp.eye(30)[:, None], (*CASE.batch, 30, 1, 30))

    def read(seed):
        return flash_attention(jnp.zeros_like(x["q"]), x["k"], units, dropout_rate=CASE.dropout, dropout_seed=seed)

    np.testing.assert_array_equal((jax.jit(read) if traced else read)(seed).swapaxes(-2, -3) > 0, want)


def test_equal_seeds_share_a_mask():
    x = CASE.inputs() | {"keep": kept(np.full((1, 1), 5), CASE.batch, CASE.heads, 20, 30, CASE.dropout)}
    assert (x["keep"] == x["keep"][0, 0, 0]).all()
    assert_near(CASE, flash(CASE, x, dropout_seed=jnp.full((1, 1, 1), 5)), x)


def test_rate():
    """As many as asked for are dropped, no matter the row, the word of Philox, the head."""
    keep = kept(11, (4,), 4, 256, 256, 0.3)
    for axes in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        share = keep.mean(axes)
        deviation = (0.3 * 0.7 / (keep.size / share.size)) ** 0.5
        assert abs(share - 0.7).max() < 5 * deviation


def test_no_rate_no_dropout():
    x = {k: CASE.inputs()[k] for k in "qkv"}
    np.testing.assert_array_equal(flash_attention(**x, dropout_seed=1), flash_attention(**x))


def test_last_rows_alone():
    """Rows that are computed alone, aligned to the last key, drop what they drop among all rows."""
    case = Case("last_rows", 40, 40, causal=True, alignment="bottom_right", dropout=0.5, alibi="h", window=(20, 0))
    x = {k: a for k, a in case.inputs().items() if k in ("q", "k", "v", "alibi_slopes")}
    every = flash_attention(**x, **case.static)
    last = flash_attention(**(x | {"q": x["q"][:, -7:]}), **case.static)
    np.testing.assert_allclose(every[:, -7:], last, rtol=1e-5, atol=1e-6)
    few = dataclasses.replace(case, seqlen_q=7)
    np.testing.assert_array_equal(few.inputs()["keep"], case.inputs()["keep"][:, :, -7:])
