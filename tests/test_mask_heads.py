"""Masks that differ from head to head on the XLA path: each key head meets its own tiles, and computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import QUICK
from reference import attention

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.masks import BlockMask
from jax_flash_attn2.xla import by_head

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RNG = np.random.default_rng(3)
B, SQ, SK, H, G, D = 2, 150, 200, 4, 2, 16
TILES = RNG.random((1, H, 3, 4)) < 0.4
MASK = BlockMask.from_tiles(TILES, (B, H, SQ, SK), block_m=64, block_n=64)


def draw(*shape):
    return jax.device_put(RNG.standard_normal(shape).astype(np.float32))


Q, K, V, DO = draw(B, SQ, H, D), draw(B, SK, H // G, D), draw(B, SK, H // G, D), draw(B, SQ, H, D)
ARRAYS = {"bias": draw(1, H, SQ, 1), "sinks": draw(H), "alibi_slopes": abs(draw(H)), "softmax_scale": jnp.float32(0.3)}
OPTIONS = {
    "causal": True, "causal_alignment": "bottom_right", "window_size": (120, 0), "kv_lengths": np.array([170, 200]),
    "logits_soft_cap": 5.0, "dropout_rate": 0.2, "dropout_seed": 3,
}  # fmt: skip


def step(q, k, v, arrays, mask, **options):
    """Outputs, and the gradients of all that has one."""

    def attend(q, k, v, arrays):
        return flash_attention(q, k, v, mask=mask, **arrays, **options, return_lse=True)

    out, pull = jax.vjp(attend, q, k, v, arrays)
    return out, pull((DO, DO[..., 0].swapaxes(1, 2)))


def count(monkeypatch):
    """How many passes went from head to head."""
    passes, plain = [], by_head.pays
    monkeypatch.setattr(by_head, "pays", lambda *args: passes.append(plain(*args)) or passes[-1])
    return passes


@pytest.mark.parametrize("shared_bias", [False, True], ids=["bias by head", "one bias"])
def test_computes_the_same(monkeypatch, shared_bias):
    """With every option at once, to the last bit where it sums in the same order."""
    arrays = ARRAYS | {"bias": draw(1, 1, SQ, SK)} if shared_bias else ARRAYS
    run = lambda: jax.jit(functools.partial(step, **OPTIONS), compiler_options=QUICK)(Q, K, V, arrays, MASK)
    passes = count(monkeypatch)
    own = run()
    assert passes.count(True) == (1 if shared_bias else 2)  # a gradient as large as the logits is not held by head
    monkeypatch.setattr(by_head, "pays", lambda *_: False)
    jax.clear_caches()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), own, run())


def test_a_function_counts_heads():
    """A function is asked about the heads there are, not about the first of each."""
    x = draw(1, 256, H, D)
    near = lambda b, h, i, j: (j <= i) & (i - j < 40 * (h + 1))
    i = np.arange(256)
    dense = np.stack([near(0, h, i[:, None], i) for h in range(H)])[None]
    want = attention(x, x, x, mask=dense, compute=jnp.float32)[0]
    np.testing.assert_allclose(flash_attention(x, x, x, mask=near), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("what", "pays"), [("by head", True), ("one for all", False), ("few rows", False), ("one key head", False)]
)
def test_where_it_pays(monkeypatch, what, pays):
    passes = count(monkeypatch)
    mask = BlockMask.from_tiles(TILES[:, :1], MASK.shape, block_m=64, block_n=64) if what == "one for all" else MASK
    rows = 4 if what == "few rows" else SQ
    mask = mask.rows(100, 4) if what == "few rows" else mask
    k = K[:, :, :1] if what == "one key head" else K
    attend = lambda q, k, mask: flash_attention(q, k, k, mask=mask)
    jax.jit(attend).lower(Q[:, :rows], k, mask)
    assert (True in passes) == pays
