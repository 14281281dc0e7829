"""Masks of every usual kind, with what attention should make of them: for the XLA path and for the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from checks import QUICK
from reference import attention

from jax_flash_attn2 import flash_attention, masks
from jax_flash_attn2.masks import BlockMask

RNG = np.random.default_rng(0)
SQ, SK = 150, 210  # which no block divides
IDS = np.sort(RNG.integers(0, 4, (2, SK)), -1)


def draw(*shape):
    return jax.device_put(RNG.standard_normal(shape).astype(np.float32))


def random(share, *shape):
    return masks.from_dense(RNG.random(shape or (1, 1, SQ, SK)) < share)


# name: the predicate, and along which of batch and heads it varies.
PREDICATES = {
    "causal": (masks.causal(), ()),
    "causal_bottom_right": (masks.causal(SK - SQ), ()),
    "window": (masks.sliding_window(40, 7), ()),
    "documents": (masks.documents(IDS[:, :SQ], IDS), ("b",)),
    "prefix_lm": (masks.prefix_lm(np.array([70, 5])), ("b",)),
    "local_and_sinks": (masks.causal() & (masks.sliding_window(30) | masks.sinks(5)), ()),
    "dilated": (masks.dilated(9, 4), ()),
    "by_head": (lambda b, h, i, j: (i + j) % (h + 2) == 0, ("h",)),
    "all": (masks.all_of(), ()),
    "nothing": (masks.any_of(), ()),
    "outside": (~masks.sliding_window(20, 20), ()),
    **{f"random_{share}": (random(share / 100), ()) for share in (1, 10, 50, 90, 99)},
    "random_each": (random(0.3, 2, 2, SQ, SK), ("b", "h")),
}


def shape_of(axes):
    return (2 if "b" in axes else 1, 2 if "h" in axes else 1, SQ, SK)


@functools.cache
def made(name, block_m=32, block_n=32):
    predicate, axes = PREDICATES[name]
    tiles = -(-SQ // block_m) * -(-SK // block_n)  # all that there are: masks of one size share compiled functions
    most = {"max_tiles": tiles, "max_parts": tiles * 2 ** len(axes)}
    return BlockMask.from_predicate(predicate, shape_of(axes), block_m=block_m, block_n=block_n, **most)


@functools.cache
def dense(name):
    predicate, axes = PREDICATES[name]
    seen = jax.jit(lambda: masks.evaluate(predicate, *map(np.arange, shape_of(axes))))()
    return np.broadcast_to(seen, (2, 2, SQ, SK))


def statuses(seen, block_m, block_n):
    """What each tile of the elements is: 0 empty, 1 full, 2 partial. Rows past the end count for nothing, keys do."""
    seqlen_q, seqlen_k = seen.shape[2:]
    rows, cols = -(-seqlen_q // block_m), -(-seqlen_k // block_n)
    padded = np.pad(seen, [(0, 0), (0, 0), (0, rows * block_m - seqlen_q), (0, cols * block_n - seqlen_k)])
    tiles = padded.reshape(*seen.shape[:2], rows, block_m, cols, block_n)
    beyond = (np.arange(rows * block_m).reshape(rows, -1) >= seqlen_q)[:, :, None, None]
    return np.where((tiles | beyond).all((3, 5)), 1, np.where(tiles.any((3, 5)), 2, 0))


Q, K, V, DO = draw(2, SQ, 2, 16), draw(2, SK, 1, 16), draw(2, SK, 1, 16), draw(2, SQ, 2, 16)


BOUNDS = {"causal": True, "window_size": (60, 0), "kv_lengths": np.array([SK - 30, 70], np.int32)}
"""What cuts the full tiles of a mask."""


def results(attend):
    """Value and gradients of attention under a mask, compiled once for masks of one size."""

    def step(q, k, v, mask):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, *vjp(DO)

    return jax.jit(step, compiler_options=QUICK)


DEFINITION = results(lambda q, k, v, mask: attention(q, k, v, mask=mask, compute=jnp.float32)[0])


def assert_bounds_cut_full_tiles(**options):
    """Under a mask that shows all, other bounds are as they are without it."""
    cut = results(lambda q, k, v, mask: flash_attention(q, k, v, mask=mask, **BOUNDS, **options))
    want = results(lambda q, k, v, mask: flash_attention(q, k, v, **BOUNDS))(Q, K, V, None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), cut(Q, K, V, made("all")), want)
