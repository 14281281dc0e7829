"""Sequences on several devices: what every method gives in every order is what one device gives, gradients too."""

import functools
import itertools
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jax_flash_attn2 import Config, context_parallel_attention, flash_attention, from_order, to_order
from jax_flash_attn2.masks import BlockMask, Mask

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")

B, T, H, HKV, D = 2, 256, 8, 4, 16
TILES = Config(block_m=16, block_n=16)
METHODS, ORDERS, DEVICES = ("ring", "all_gather", "ulysses"), ("contiguous", "zigzag", "striped"), (2, 4, 8)
TOLERANCE = 2e-6
"""Of the largest element: where sums come together in another order."""

BY_TOKENS = ("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions")


def rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def draw(name, *shape, dtype=np.float32):
    return rng(name).standard_normal(shape).astype(dtype)


def packed(padding=False):
    """Documents in order; with padding, the last three eighths are nobody's, so that some device has nothing else."""
    ids = np.sort(rng("ids").integers(0, 6, (B, T)), 1).astype(np.int32)
    return np.where(np.arange(T) < T * 5 // 8, ids, -1).astype(np.int32) if padding else ids


def near_or_first(b, h, i, j):
    return (abs(i - j) % 7 < 3) & (j <= i + 40) | (j < 5)


def table_score(table):
    return lambda s, b, h, i, j: s + table[h, i - j + T]


def rows_score(x):
    return lambda s, b, h, i, j: s * x[b, i] + x[0, j]


OPTIONS = {
    "plain": lambda: {},
    "causal": lambda: {"causal": True},
    "window": lambda: {"causal": True, "window_size": 40},
    "both_sides": lambda: {"window_size": (30, 9)},
    "segments": lambda: {"q_segment_ids": packed()},
    "padding": lambda: {"q_segment_ids": packed(True), "kv_segment_ids": packed(True)},
    "lengths": lambda: {"q_lengths": np.int32([T, 77]), "kv_lengths": np.int32([60, T])},
    "kv_lengths": lambda: {"kv_lengths": np.int32([0, 100])},
    "positions": lambda: {
        "causal": True, "q_positions": np.arange(T, dtype=np.int32)[None] // 2,
        "kv_positions": rng("positions").permutation(T).astype(np.int32)[None],
    },
    "bias": lambda: {"bias": draw("bias", 1, H, T, T)},
    "bias_columns": lambda: {"bias": draw("columns", B, 1, 1, T)},
    "bias_rows": lambda: {"bias": draw("rows", H, T, 1)},
    "far_bias": lambda: {"bias": draw("far", B, 1, 1, T) * 0 - 1e9},
    "mask": lambda: {"mask": rng("mask").random((B, 1, T, T)) < 0.7},
    "mask_columns": lambda: {"mask": rng("mask").random((B, 1, 1, T)) < 0.7},
    "sinks": lambda: {"sinks": draw("sinks", H)},
    "sinks_lengths": lambda: {"sinks": draw("sinks", H), "q_lengths": np.int32([77, 0])},
    "soft_cap": lambda: {"logits_soft_cap": 1.5},
    "alibi": lambda: {"alibi_slopes": np.abs(draw("slopes", H))},
    "dropout": lambda: {"dropout_rate": 0.3, "dropout_seed": 7},
    "scale": lambda: {"softmax_scale": np.float32(-0.3)},
    "score": lambda: {"table": draw("table", H, 2 * T)},
    "score_rows": lambda: {"rows": draw("score rows", B, T)},
    "function": lambda: {"mask": near_or_first},
    "weights": lambda: {"mask": Mask.from_dense(np.where(rng("w").random((1, H, T, T)) < 0.5, np.float32(0.5), 0))},
    "block_mask": lambda: {"mask": BlockMask.from_predicate(near_or_first, (1, 1, T, T), block_m=16, block_n=32)},
    "max_logits": lambda: {"return_max_logits": True},
    "higher_order": lambda: {"higher_order": True},
}  # fmt: skip
"""Each option; arrays in the plain order."""

APART = [
    {"segments", "padding"}, {"lengths", "kv_lengths", "sinks_lengths"}, {"bias", "bias_columns", "bias_rows", "far_bias"},
    {"mask", "mask_columns", "function", "weights", "block_mask"}, {"sinks", "sinks_lengths"}, {"score", "score_rows"},
    {"causal", "window", "both_sides", "positions"},
]  # fmt: skip
"""Of each of these, one at a time."""


def go_together(a, b):
    return not any({a, b} <= group for group in APART)


PAIRS = [pair for pair in itertools.combinations(list(OPTIONS)[1:], 2) if go_together(*pair)]


def drawn_pairs():
    """Every pair of options with one of the methods, orders and numbers of devices."""
    draws = random.Random(5)
    for pair in PAIRS:
        method = draws.choice(METHODS)
        if "block_mask" in pair and method == "ring":
            method = "all_gather"
        yield method, draws.choice(ORDERS), draws.choice(DEVICES), pair


ALONE = [
    (method, order, devices, (name,))
    for method, order, devices, name in itertools.product(METHODS, ORDERS, DEVICES, OPTIONS)
    if (method, name) != ("ring", "block_mask")
]


def identify(case):
    method, order, devices, names = case
    return f"{method}-{order}-{devices}-{'+'.join(names)}"


def arguments(names, dtype=np.float32):
    """q, k, v and what else is differentiated; w and u, the gradients of o and lse; the rest."""
    floats = {
        "q": draw("q", B, T, H, D), "k": draw("k", B, T, HKV, D), "v": draw("v", B, T, HKV, D),
    }  # fmt: skip
    floats = {name: jnp.asarray(x, dtype) for name, x in floats.items()}
    others = {}
    for name in names:
        for argument, x in OPTIONS[name]().items():
            is_float = isinstance(x, np.ndarray | np.float32) and x.dtype == np.float32
            (floats if is_float else others)[argument] = jnp.asarray(x) if isinstance(x, np.ndarray | np.float32) else x
    return floats, draw("w", B, T, H, D), draw("u", B, H, T), others


def in_order(name, x, move):
    """An argument as it lies on the devices. move: (x, axes) -> x."""
    if name in ("q", "k", "v"):
        return move(x, 1)
    if name in BY_TOKENS:
        return move(x, x.ndim - 1) if x.shape[-1] == T else x
    if name in ("bias", "mask") and isinstance(x, jax.Array):
        return move(x, tuple(axis - 2 for axis, n in enumerate(x.shape[-2:]) if n == T))
    return x


def value_and_grads(attention, floats, w, u, others):
    """o, lse, largest logits or None, and the gradients of all floats."""

    def loss(floats):
        given = {**others, **floats}
        if "table" in given:
            given["score_mod"] = table_score(given.pop("table"))
        if "rows" in given:
            given["score_mod"] = rows_score(given.pop("rows"))
        o, lse, *largest = attention(**given, return_lse=True, config=TILES)
        seen = jnp.where(lse > -jnp.inf, jnp.sin(jnp.maximum(lse, -1e3)), 0)
        return (o.astype(jnp.float32) * w).sum() + (seen * u).sum(), (o, lse, largest)

    grads, results = jax.grad(loss, has_aux=True)(floats)
    return results, grads


@functools.cache
def on_one_device(names, dtype=np.float32):
    floats, w, u, others = arguments(names, dtype)
    arrays = {name: x for name, x in others.items() if isinstance(x, jax.Array)}
    rest = {name: x for name, x in others.items() if name not in arrays}
    f = jax.jit(lambda floats, arrays: value_and_grads(flash_attention, floats, w, u, arrays | rest))
    return jax.tree.map(np.asarray, f(floats, arrays))


def mesh_of(devices, axes=("sequence",), shape=None):
    shape = shape or (devices,)
    return jax.make_mesh(shape, axes, devices=jax.devices()[:devices], axis_types=(AxisType.Auto,) * len(axes))


def on_devices(method, order, devices, names, dtype=np.float32, **more):
    floats, w, u, others = arguments(names, dtype)
    move = lambda x, axes: to_order(x, devices, order, axes)
    back = lambda x, axes: from_order(x, devices, order, axes)
    floats = {name: in_order(name, x, move) for name, x in floats.items()}
    others = {name: in_order(name, x, move) for name, x in others.items()}
    attention = functools.partial(
        context_parallel_attention, axis="sequence", mesh=mesh_of(devices), method=method, order=order, **more
    )
    arrays = {name: x for name, x in others.items() if isinstance(x, jax.Array)}
    rest = {name: x for name, x in others.items() if name not in arrays}
    f = jax.jit(lambda *args: value_and_grads(attention, *args[:3], args[3] | rest))
    (o, lse, largest), grads = f(floats, move(w, 1), move(u, 2), arrays)
    grads = {name: in_order(name, x, back) for name, x in grads.items()}
    return jax.tree.map(np.asarray, ((back(o, 1), back(lse, 2), largest), grads))


def check(got, want, tolerance=TOLERANCE):
    got, want = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (got, want))
    assert got.keys() == want.keys()
    for path, x in want.items():
        y = got[path]
        name = jax.tree_util.keystr(path)
        assert y.shape == x.shape and y.dtype == x.dtype, name
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(x), err_msg=name)
        np.testing.assert_array_equal(y[~np.isfinite(x)], x[~np.isfinite(x)], err_msg=name)
        x, y = (np.where(np.isfinite(x), z, 0).astype(np.float64) for z in (x, y))
        error = np.abs(x - y).max() / max(np.abs(x).max(), 1e-3)
        assert error <= tolerance, f"{name}: {error:.1e} of the largest element"


@pytest.mark.parametrize("case", ALONE, ids=identify)
def test_each_option_alone(case):
    check(on_devices(*case), on_one_device(case[3]))


@pytest.mark.parametrize("case", [*drawn_pairs()], ids=identify)
def test_pairs_of_options(case):
    check(on_devices(*case), on_one_device(case[3]))
