"""Decoding kernels, in Triton's interpreter: few rows against many keys, split or whole, in order or in pages."""

import jax
import jax.numpy as jnp
import numpy as np
import paged_cases
import pytest
import reference
import triton
import triton.language as tl
from jax_flash_attn2.kernels.mask import reckoned, share
from jax_flash_attn2.kernels.place import Place

from jax_flash_attn2 import Config, flash_attention, paged_attention
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.gpu import interpret, short
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


ALWAYS = ("causal", "lengths", "positions", "all")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.in_thirds) for name in OPTIONS]
)
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


def test_many_rows_are_split_if_asked():
    q, k, v = draw(1, 40, 2, D), draw(1, 90, 1, D), draw(1, 90, 1, D)
    options = {"window_size": (30, 0), **LOW, "kv_lengths": jnp.int32([80])}
    want = reference.attention(q, k, v, **options, compute=jnp.float32)
    how = {"config": {"fwd": Config(32, 16, num_splits=3)}, "implementation": "triton", "return_lse": True}
    for x, y in zip(flash_attention(q, k, v, **options, **how), want[:2], strict=True):
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_gradients_do_not_mind_splits():
    def gradients(implementation, config):
        loss = lambda q, k, v, sinks: flash_attention(
            q, k, v, sinks=sinks, logits_soft_cap=2.0, implementation=implementation, config=config
        ).sum()
        return jax.grad(loss, (0, 1, 2, 3))(Q, K[:, :70], V[:, :70], draw(H) * 0 + 0.5)

    for x, y in zip(gradients("triton", {"fwd": Config(num_splits=2)}), gradients("xla", None), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


# The last: a cache of bytes under bf16.
@pytest.mark.parametrize("numbers", [*paged_cases.numbers(8, 2), pytest.param(range(43, 44), id="bytes")])
def test_paged_drawn(numbers):
    for n in numbers:
        for block_ptr in (False, True) if len(numbers) > 1 and "DRAWN" in paged_cases.os.environ else (n % 2 == 1,):
            paged_cases.check(n, "triton", **_fitting(n, block_ptr))


def _fitting(n, block_ptr):
    """Descriptors, where rows are multiples of 16 bytes and a tile fits a page."""
    x = paged_cases.draw(n).arrays
    odd = any(x[name].shape[3] * x[name].dtype.itemsize % 16 for name in ("k_pages", "v_pages") if name in x)
    return {"block_ptr": block_ptr and not odd}


@pytest.mark.parametrize("block_ptr", [False, True])
def test_sequences_do_not_influence_each_other(block_ptr):
    pages, table = draw(2, 6, 64, 1, D), jnp.asarray(RNG.permutation(6).reshape(3, 2), jnp.int32)
    q, lengths = draw(3, 1, 2, D), jnp.int32([100, 7, 128])
    attend = lambda q, table, lengths: paged_attention(
        q, *pages, table, lengths, splits=2, implementation="triton", block_ptr=block_ptr, return_lse=True
    )
    for x, y in zip(
        attend(q, table, lengths), reference.paged(q, *pages, table, lengths, compute=jnp.float32), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=2e-6)
    whole, turned = attend(q, table, lengths), attend(q[::-1], table[::-1], lengths.at[2].set(0)[::-1])
    for x, y in zip(whole, turned, strict=True):
        np.testing.assert_array_equal(x[:2], y[::-1][:2])
    np.testing.assert_array_equal(turned[0][0], 0)


@pytest.mark.parametrize(("block_ptr", "splits"), [(False, 2), (True, 1)])
def test_ragged_rows_of_a_cache_of_bytes(block_ptr, splits):
    """Scales of each page and head, splits that rows behind the last sequence are not in, sinks."""
    pages = RNG.integers(-127, 128, (2, 5, 64, 2, D)).astype(np.int8)
    k_scale, v_scale = (jnp.asarray(RNG.uniform(0.01, 0.03, (5, 2)), jnp.float32) for _ in "kv")
    table, lengths = jnp.int32([[3, 1], [0, 2]]), jnp.int32([100, 66])
    options = {"cu_q_lens": jnp.int32([0, 1, 4]), "k_scale": k_scale, "v_scale": v_scale, "sinks": draw(4)}
    args = draw(6, 4, D), *pages, table, lengths
    how = {"splits": splits, "block_ptr": block_ptr, "implementation": "triton"}
    got = paged_attention(*args, **options, **how, return_lse=True)
    for x, y in zip(got, reference.paged(*args, **options, compute=jnp.float32), strict=True):
        np.testing.assert_allclose(x, y, atol=4e-6)


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


def test_a_window_to_the_left_shows_all_to_the_right():
    """So its keys are split as if there were none; a window to both sides leaves few."""
    q, k = (jax.ShapeDtypeStruct((1, n, 8, 128), jnp.bfloat16) for n in (1, 32768))
    splits = []
    for left, right in ((None, None), (64, None), (64, 0)):
        spec = Spec.of(Rules(left, right), q, k, k, {})
        splits.append(short.choose(spec, q, k, {}, Target(90), Config())[1].num_splits)
    assert splits[0] == splits[1] > splits[2] == 1


@triton.jit
def reckon_kernel(cases, out, ROWS: tl.constexpr, N: tl.constexpr, SPEC: tl.constexpr):
    at = cases + tl.program_id(0) * 4
    start, end_q, end_k, offset = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    here = Place(0, 0, 0, 0, end_q, end_k, end_q, end_k, None, offset, 0, 0, 0, 0)
    span = share(reckoned(start, ROWS, here, N, SPEC), 0, N, 1)
    to = out + tl.program_id(0) * 4
    tl.store(to, span.begin)
    tl.store(to + 1, span.full)
    tl.store(to + 2, span.stop)
    tl.store(to + 3, span.end)


@pytest.mark.parametrize(("left", "right"), [(None, 0), (5, 0), (20, 3), (0, None), (None, None), (0, 0)])
def test_reckoned_spans_are_those_of_the_bounds(left, right):
    rng, rows, n = np.random.default_rng(3), 8, 16
    cases = np.stack([rng.integers(0, 20, 40), rng.integers(0, 25, 40), rng.integers(0, 70, 40),
                      rng.integers(-10, 60, 40)], 1).astype(np.int32)  # fmt: skip
    out = np.full((40, 4), -1, np.int32)
    spec = Spec(1, 1, 16, 16, Rules(left, right))
    reckon_kernel[(len(cases),)](interpret._Tensor(cases), interpret._Tensor(out), ROWS=rows, N=n, SPEC=spec)
    keys = np.arange(96)
    for (start, end_q, end_k, offset), (begin, full, stop, end) in zip(cases, out, strict=True):
        own = np.arange(start, min(start + rows, end_q))[:, None] + offset
        seen = (keys < end_k) & np.ones_like(own, bool)
        seen &= True if left is None else keys >= own - left
        seen &= True if right is None else keys <= own + right
        tiles, number = seen.reshape(len(own), 6, n), np.arange(6)
        some = tiles.any((0, 2)) if len(own) else np.zeros(6, bool)
        met = (number >= begin // n) & (number < -(-end // n))
        whole = (number >= full // n) & (number < stop // n)
        assert begin <= full <= stop <= end or not met.any()
        assert begin % n == 0
        assert full % n == 0 or full == end
        np.testing.assert_array_equal(met, some)  # as many as need be, and no more
        assert not (whole & ~tiles.all((0, 2))).any()
        if left is None and len(own):
            np.testing.assert_array_equal(whole, tiles.all((0, 2)))
