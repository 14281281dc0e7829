"""Decoding kernels, in Triton's interpreter: few rows against many keys, split or whole, in order or in pages."""

import jax
import jax.numpy as jnp
import numpy as np
import paged_cases
import pytest
import reference

from jax_flash_attn2 import Config, flash_attention, paged_attention
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.gpu import short
from jax_flash_attn2.gpu.target import Target

RNG = np.random.default_rng(0)
B, H, HKV, D, SQ, SK = 2, 6, 2, 16, 3, 140  # a group of 3: rows of a tile are there twice


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


Q, K, V = draw(B, SQ, H, D), draw(B, SK, HKV, D), draw(B, SK, HKV, D)
LOW = {"causal_alignment": "bottom_right"}
IDS = jnp.asarray(np.sort(RNG.integers(0, 3, (B, SK)), 1), jnp.int32)
OPTIONS = {
    "causal": {"causal": True, **LOW},
    "window": {"window_size": (40, 3), **LOW},
    "lengths": {"kv_lengths": jnp.int32([139, 40]), "q_lengths": jnp.int32([2, 0])},
    "empty": {"kv_lengths": jnp.int32([0, 70]), "sinks": draw(H)},
    "bias": {"bias": draw(B, H, SQ, SK)},
    "bias by head": {"bias": draw(1, H, 1, SK)},
    "mask": {"mask": jnp.asarray(RNG.random((B, 1, SQ, SK)) < 0.5)},
    "mask by head": {"mask": jnp.asarray(RNG.random((B, H, SQ, SK)) < 0.5)},
    "segments": {"q_segment_ids": IDS[:, -SQ:], "kv_segment_ids": IDS},
    "positions": {
        "causal": True, "q_positions": jnp.asarray(RNG.integers(0, SK, (B, SQ)), jnp.int32),
        "kv_positions": jnp.asarray(np.stack([RNG.permutation(SK)] * B), jnp.int32),
    },
    "cap": {"logits_soft_cap": 2.0},
    "slopes": {"alibi_slopes": draw(B, H) * 0.01},
    "score": {"score_mod": lambda s, b, h, i, j: s * 1.1 + jnp.where((j + h + i) % 2 == 0, 0.3, -0.2)},
    "all": {
        "bias": draw(B, H, SQ, SK), "sinks": draw(H), "alibi_slopes": draw(H) * 0.01, "logits_soft_cap": 3.0,
        "causal": True, **LOW, "kv_lengths": jnp.int32([130, 40]),
    },
    # What the definition has no words for, the XLA path has.
    "function": {"mask": lambda b, h, i, j: (i * 7 + j) % 5 < 2},
    "function by head": {"mask": lambda b, h, i, j: (i * 7 + j + h) % 5 < 2},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": 5, "causal": True, **LOW},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_few_rows(name):
    options, several = OPTIONS[name], sum(map(ord, name)) % 2 == 0
    if name.startswith("function") or name == "dropout":
        want = flash_attention(Q, K, V, **options, return_lse=True, return_max_logits=True, implementation="xla")
    else:
        want = reference.attention(Q, K, V, **options, compute=jnp.float32)
    for splits, block_ptr in ((1, several), (3, not several)):
        how = {"config": {"fwd": Config(num_splits=splits)}, "block_ptr": block_ptr, "implementation": "triton"}
        got = flash_attention(Q, K, V, **options, **how, return_lse=True, return_max_logits=True)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=f"{name}, {splits} splits")


def test_gradients_do_not_mind_splits():
    def gradients(implementation, config):
        loss = lambda q, k, v, sinks: flash_attention(
            q, k, v, sinks=sinks, logits_soft_cap=2.0, implementation=implementation, config=config
        ).sum()
        return jax.grad(loss, (0, 1, 2, 3))(Q, K[:, :70], V[:, :70], draw(H) * 0 + 0.5)

    for x, y in zip(gradients("triton", {"fwd": Config(num_splits=2)}), gradients("xla", None), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


@pytest.mark.parametrize("numbers", paged_cases.numbers(12, 2))
def test_paged_drawn(numbers):
    for n in numbers:
        for block_ptr in (False, True) if len(numbers) > 1 and "DRAWN" in paged_cases.os.environ else (n % 2 == 1,):
            paged_cases.check(n, "triton", **_fitting(n, block_ptr))


def _fitting(n, block_ptr):
    """Descriptors, where rows are multiples of 16 bytes and a tile fits a page."""
    x = paged_cases.draw(n).arrays
    odd = any(x[name].shape[3] * x[name].dtype.itemsize % 16 for name in ("k_pages", "v_pages") if name in x)
    return {"block_ptr": block_ptr and not odd}


def test_sequences_do_not_influence_each_other():
    pages, table = draw(2, 24, 16, HKV, D), jnp.asarray(RNG.permutation(24).reshape(3, 8), jnp.int32)
    q, lengths = draw(3, 2, H, D), jnp.int32([100, 7, 128])
    attend = lambda q, table, lengths: paged_attention(
        q, pages[0], pages[1], table, lengths, splits=3, implementation="triton", return_lse=True
    )
    whole, turned = attend(q, table, lengths), attend(q[::-1], table[::-1], lengths.at[2].set(0)[::-1])
    for x, y in zip(whole, turned, strict=True):
        np.testing.assert_array_equal(x[:2], y[::-1][:2])
    np.testing.assert_array_equal(turned[0][0], 0)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "rows", "keys"),
    [(1, 32, 8, 1, 32768), (1, 32, 8, 16, 32768), (8, 32, 8, 1, 4096), (1, 64, 1, 1, 32768), (64, 32, 8, 1, 4096)],
)
def test_programs_fill_a_chip(batch, heads, kv_heads, rows, keys):
    for chip in (80, 86, 90, 100):
        target, make = Target(chip), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        q, k = make(batch, rows, heads, 128), make(batch, keys, kv_heads, 128)
        spec = Spec.of(Rules(), q, k, k, {})
        spec, config = short.choose(spec, q, k, {}, target, Config())
        programs = short.programs(spec, config, q, {}) * config.num_splits
        assert programs >= 2 * target.multiprocessors or config.num_splits == 64
        assert config.num_splits == 1 or programs < 3 * target.multiprocessors
        # All rows of a group are one tile, and no key is read more often than need be.
        tiles = -(-rows * spec.packed // config.block_m)
        assert short.programs(spec, config, q, {}) == batch * kv_heads * tiles * max(
            heads // kv_heads // config.block_m, 1
        )
