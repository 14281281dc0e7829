"""Sequences on several devices: what every method gives in every order is what one device gives, gradients too."""

import functools
import itertools
import os
import random
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash_attn2 import (
    Config,
    context_parallel_attention,
    explain,
    flash_attention,
    from_order,
    gpu_target,
    to_order,
)
from jax_flash_attn2.context import explaining
from jax_flash_attn2.context.hops import ways
from jax_flash_attn2.masks import BlockMask, Mask

pytestmark = [
    pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices"),
    pytest.mark.usefixtures("compiled_quickly"),
]

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
    "score_rows": lambda: {"rows": 1 + draw("score rows", B, T) / 8},
    "function": lambda: {"mask": near_or_first},
    "weights": lambda: {"mask": Mask.from_dense(np.where(rng("w").random((1, H, T, T)) < 0.5, np.float32(0.5), 0))},
    "block_mask": lambda: {"mask": BlockMask.from_predicate(near_or_first, (1, 1, T, T), block_m=16, block_n=32)},
    "max_logits": lambda: {"return_max_logits": True},
    "higher_order": lambda: {"higher_order": True},
}  # fmt: skip
"""Each option; arrays in the plain order."""

APART = [
    {"segments", "padding"}, {"lengths", "kv_lengths", "sinks_lengths"}, {"sinks", "sinks_lengths"},
    {"bias", "bias_columns", "bias_rows", "far_bias"}, {"score", "score_rows"},
    {"mask", "mask_columns", "function", "weights", "block_mask"},
    {"causal", "window", "both_sides", "positions"},
]  # fmt: skip
"""Of each of these, one at a time."""


def go_together(a, b):
    return not any({a, b} <= group for group in APART)


ALONE = [case for case in itertools.product(METHODS, ORDERS, DEVICES, OPTIONS) if case[0::3] != ("ring", "block_mask")]
PAIRS = [pair for pair in itertools.combinations(list(OPTIONS)[1:], 2) if go_together(*pair)]
EVERY = os.environ.get("EVERY") == "1"
"""Whether each option meets every method, order and number of devices, and not only every method; and all pairs, not
some of them."""


def drawn_alone():
    """Each option and method with one of the orders and numbers of devices, or with all."""
    places = {}
    for case in random.Random(1).sample(ALONE, len(ALONE)):
        places.setdefault(case[0::3], case)
    return [(*case[:3], case[3:]) for case in (ALONE if EVERY else sorted(places.values()))]


def drawn_pairs():
    """Pairs of options, with one of the methods, orders and numbers of devices."""
    draws, made = random.Random(5), []
    for pair in PAIRS:
        method = draws.choice(METHODS)
        if "block_mask" in pair and method == "ring":
            method = "all_gather"
        made.append((method, draws.choice(ORDERS), draws.choice(DEVICES), pair))
    return made if EVERY else draws.sample(made, 16)


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
        assert (y.shape, y.dtype) == (x.shape, x.dtype), name
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(x), err_msg=name)
        np.testing.assert_array_equal(y[~np.isfinite(x)], x[~np.isfinite(x)], err_msg=name)
        x, y = (np.where(np.isfinite(x), z, 0).astype(np.float64) for z in (x, y))
        largest = max(np.abs(x).max(), 1e-3)
        if name.endswith("['softmax_scale']"):  # the sum of all q * dq, of which most cancels
            largest = max(largest, np.linalg.norm(want[(*path[:-1], jax.tree_util.DictKey("q"))]))
        error = np.abs(x - y).max() / largest
        assert error <= tolerance, f"{name}: {error:.1e} of the largest element"


@pytest.mark.in_thirds
@pytest.mark.parametrize("case", drawn_alone(), ids=identify)
def test_each_option_alone(case):
    check(on_devices(*case), on_one_device(case[3]))


@pytest.mark.in_thirds
@pytest.mark.parametrize("case", drawn_pairs(), ids=identify)
def test_pairs_of_options(case):
    check(on_devices(*case), on_one_device(case[3]))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method):
    """bf16: no further from fp32 than one device is, in the mean."""
    names = ("causal", "segments")
    exact = jax.tree.leaves(on_one_device(names))
    own = jax.tree.leaves(on_one_device(names, jnp.bfloat16))
    got = jax.tree.leaves(on_devices(method, "zigzag", 8, names, jnp.bfloat16))
    off = lambda a, b: np.sqrt(np.mean((np.float64(a) - np.float64(b)) ** 2)) / np.sqrt(np.mean(np.float64(b) ** 2))
    for x, one, several in zip(exact, own, got, strict=True):
        assert off(several, x) <= 1.02 * off(one, x)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_heads(groups):
    """all_gather in groups: operands with heads, functions that count them, sinks, dropout."""
    more = ("causal", "alibi", "sinks_lengths", "max_logits", "higher_order")
    for names in (("causal", "bias", "score", "sinks"), ("alibi", "dropout", "far_bias", "lengths"), more):
        check(on_devices("all_gather", "zigzag", 4, names, head_groups=groups), on_one_device(names))


@pytest.mark.in_thirds
@pytest.mark.parametrize("kind", ["heads", "weights", "list"])
def test_masks_with_lists(kind):
    """Block masks with heads, in every order, where their tiles are those of a device's rows and where they are not; a
    function whose tiles are known."""
    length = 1024 if kind == "list" else 128
    seen = rng(kind).random((2 if kind == "weights" else 1, 4, length, length)) < 0.3
    tiles = {"block_m": 16, "block_n": 32}
    mask = {
        "heads": lambda: BlockMask.from_mask(seen, **tiles),
        "weights": lambda: BlockMask.from_mask(Mask.from_dense(np.where(seen, np.float32(0.5), 0)), **tiles),
        "list": lambda: lambda b, h, i, j: (j <= i) & ((i - j) % (h + 3) == 0) & (i - j < 300),
    }[kind]()
    q, w = jnp.asarray(draw("q", 2, length, 4, 16)), jnp.asarray(draw("w", 2, length, 4, 16))
    loss = lambda f: jax.jit(jax.grad(lambda q: (f(q, q, q, mask=mask) * w).sum()))
    want = loss(flash_attention)(q)
    ways = [("ulysses", "zigzag", {}), ("all_gather", "contiguous", {"head_groups": 2}), ("all_gather", "striped", {})]
    for method, order, more in ways[: 2 if kind == "list" else 3]:
        turn = lambda move, x, order=order: move(x, 4, order)
        q_there, w_there = turn(to_order, q), turn(to_order, w)
        options = {"axis": "sequence", "mesh": mesh_of(4), "method": method, "order": order, **more}
        f = functools.partial(context_parallel_attention, **options)
        got = jax.jit(jax.grad(lambda q, f=f, w=w_there: (f(q, q, q, mask=mask) * w).sum()))(q_there)
        check({"q": np.asarray(turn(from_order, got))}, {"q": np.asarray(want)}, 4e-6)


@pytest.mark.parametrize(("devices", "batch"), [(1, (2,)), (2, ()), (2, (2, 2))], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_any_batch(method, devices, batch):
    """No batch axis; several. A mesh of one device."""
    q, k = (jnp.asarray(draw("q", *batch, 64, heads, 16)) for heads in (4, 2))
    options = {"causal": True, "dropout_rate": 0.2, "dropout_seed": 3}
    loss = lambda f: jax.jit(jax.grad(lambda q, k: (f(q, k, k, **options) ** 2).sum(), (0, 1)))
    f = functools.partial(context_parallel_attention, axis="sequence", mesh=mesh_of(devices), method=method)
    got = loss(f)(*(to_order(x, devices, "zigzag", -3) for x in (q, k)))
    got = [np.asarray(from_order(x, devices, "zigzag", -3)) for x in got]
    check(dict(enumerate(got)), dict(enumerate(map(np.asarray, loss(flash_attention)(q, k)))), 4e-6)


def test_more_devices_than_key_heads_and_other_lengths():
    """Cross attention: rows and keys of other lengths, the last row at the last key; one key head for all."""
    q, k, w = (jnp.asarray(draw(name, 2, *s, 16)) for name, s in (("q", (64, 8)), ("k", (128, 1)), ("w", (64, 8))))
    options = {"causal": True, "causal_alignment": "bottom_right", "dropout_rate": 0.2, "dropout_seed": 1}
    options |= {"alibi_slopes": jnp.abs(jnp.asarray(draw("slopes", H)))}
    loss = lambda f: jax.jit(jax.value_and_grad(lambda q, k, w: (f(q, k, k, **options) * w).sum(), (0, 1)))
    want = loss(flash_attention)(q, k, w)
    for method, order in zip(METHODS, ORDERS, strict=True):
        f = functools.partial(context_parallel_attention, axis="sequence", mesh=mesh_of(8), method=method, order=order)
        value, grads = loss(f)(*(to_order(x, 8, order) for x in (q, k, w)))
        grads = tuple(from_order(x, 8, order) for x in grads)
        check(jax.tree.map(np.asarray, (value, grads)), jax.tree.map(np.asarray, want), 4e-6)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_within_shard_map(method, checked):
    """On a mesh of data and sequence, by hand. What all devices share gets the sum of their gradients."""
    names = ("causal", "segments", "bias_columns", "sinks", "max_logits")
    floats, w, u, others = arguments(names)
    (o, lse, largest), grads = on_one_device(names)
    grid = mesh_of(8, ("data", "sequence"), (2, 4))
    move = lambda x, axes: to_order(x, 4, "zigzag", axes)
    floats, others = ({name: in_order(name, x, move) for name, x in each.items()} for each in (floats, others))
    ids = others.pop("q_segment_ids")
    rows, columns = P("data", "sequence"), P("data", None, None, "sequence")
    specs = {"q": rows, "k": rows, "v": rows, "bias": columns, "sinks": P()}

    def own(floats, w, u, ids):
        attention = functools.partial(context_parallel_attention, axis="sequence", method=method, q_segment_ids=ids)

        def loss(floats):
            o, lse, largest = attention(**floats, **others, return_lse=True)
            seen = jnp.where(lse > -jnp.inf, jnp.sin(lse), 0)
            return jax.lax.psum((o * w).sum() + (seen * u).sum(), ("data", "sequence")), (o, lse, largest)

        return loss(floats)

    into = (specs, rows, P("data", None, "sequence"), rows)
    out = (P(), (rows, P("data", None, "sequence"), P("data")))
    f = jax.shard_map(own, mesh=grid, in_specs=into, out_specs=out, check_vma=checked)
    got, (o_there, lse_there, largest_there) = jax.jit(jax.grad(f, has_aux=True))(floats, move(w, 1), move(u, 2), ids)
    back = lambda x, axes: from_order(x, 4, "zigzag", axes)
    got = {name: in_order(name, x, back) for name, x in got.items()}
    there = (back(o_there, 1), back(lse_there, 2), [largest_there])
    check(jax.tree.map(np.asarray, (there, got)), ((o, lse, largest), grads))


@pytest.mark.parametrize("method", [None, *METHODS])
def test_within_shard_map_outside_jit(method):
    """Where JAX has no symbolic zeros; None: sequences are not divided."""
    x = draw("outside jit", 2, 32, 2, 16)
    rows = P(None, "sequence") if method else P("sequence")
    attend = functools.partial(context_parallel_attention, axis="sequence", order="contiguous", method=method)
    f = lambda x: (attend if method else flash_attention)(x, x, x, causal=True)
    got = jax.shard_map(f, mesh=mesh_of(2), in_specs=rows, out_specs=rows)(x)
    np.testing.assert_allclose(got, flash_attention(x, x, x, causal=True), atol=2e-6)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_with_a_mesh_of_several_axes(shape):
    """Batches and heads are divided as they lie, without a collective of theirs."""
    floats, *_ = arguments(("causal",))
    grid = jax.make_mesh(shape, ("data", "model", "sequence"), axis_types=(AxisType.Auto,) * 3)
    spec = P("data", "sequence", "model")
    placed = {
        name: jax.device_put(to_order(x, shape[2], "zigzag"), NamedSharding(grid, spec)) for name, x in floats.items()
    }
    attention = functools.partial(context_parallel_attention, axis="sequence", mesh=grid, causal=True)
    for method in ("ring", "all_gather", "ulysses"):
        loss = lambda x, method=method: (attention(**x, method=method) ** 2).sum()
        compiled = jax.jit(jax.grad(loss)).lower(placed).compile()
        got = {name: from_order(x, shape[2], "zigzag") for name, x in jax.device_get(compiled(placed)).items()}
        want = jax.jit(jax.grad(lambda x: (flash_attention(**x, causal=True) ** 2).sum()))(floats)
        check(got, jax.tree.map(np.asarray, want), 4e-6)
        if method == "ulysses":  # heads are what it moves
            continue
        text = compiled.as_text()
        assert not re.search(r" (all-gather|all-to-all|all-reduce|reduce-scatter)(-start)?\(", text)


def test_explicit_axes():
    """Results are typed as q is; of several explicit axes it says what to do."""
    x = draw("x", 2, 64, 4, 16)
    grids = [
        jax.make_mesh((n, 4), ("data", "sequence"), devices=jax.devices()[: 4 * n], axis_types=(AxisType.Explicit,) * 2)
        for n in (1, 2)
    ]
    want = flash_attention(x, x, x, causal=True)
    for grid in grids:
        placed = jax.device_put(to_order(x, 4, "zigzag"), NamedSharding(grid, P(None, "sequence")))
        f = jax.jit(lambda x, grid=grid: context_parallel_attention(x, x, x, axis="sequence", mesh=grid, causal=True))
        if grid.size == 4:
            got = f(placed)
            assert jax.typeof(got).sharding.spec == P(None, "sequence", None, None)
            check({"o": np.asarray(from_order(jax.device_get(got), 4, "zigzag"))}, {"o": np.asarray(want)})
        else:
            with pytest.raises(ValueError, match="no explicit axes of several devices but 'sequence', got"):
                f(placed)


@pytest.mark.parametrize("method", METHODS)
def test_vmapped_and_in_a_scan(method):
    """Mapped examples with a shared bias; a scan with remat around it, as layers are."""
    x, bias = jnp.asarray(draw("x", 3, 1, 64, 4, 16)), jnp.asarray(draw("b", 4, 1, 64))
    attention = functools.partial(
        context_parallel_attention, axis="sequence", mesh=mesh_of(4), method=method, causal=True
    )

    def loss(attention):
        def layer(x, bias):
            return jax.vmap(lambda x: x + attention(x, x, x, bias))(x), None

        run = lambda x, bias: jax.lax.scan(jax.checkpoint(layer), x, jnp.stack([bias, 2 * bias]))[0]
        return jax.jit(jax.value_and_grad(lambda x, bias: (run(x, bias) ** 2).sum(), (0, 1)))

    want = loss(lambda *args: flash_attention(*args, causal=True))(x, bias)
    value, grads = loss(attention)(to_order(x, 4, "zigzag", 2), to_order(bias, 4, "zigzag", 2))
    got = value, tuple(from_order(grad, 4, "zigzag", 2) for grad in grads)
    check(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want), 1e-5)


def test_gradients_of_nothing():
    """lse of rows that there are not is -inf, whose square's gradient is too: sinks hear nothing of it."""
    floats, *_ = arguments(("sinks_lengths",))
    lengths = OPTIONS["sinks_lengths"]()["q_lengths"]

    def loss(attention):
        return jax.jit(jax.grad(lambda x: (attention(**x, q_lengths=lengths, return_lse=True)[1] ** 2).sum()))

    want = jax.tree.map(np.asarray, loss(flash_attention)(floats))
    for method in METHODS:
        f = functools.partial(
            context_parallel_attention, axis="sequence", mesh=mesh_of(4), method=method, order="contiguous"
        )
        check(jax.tree.map(np.asarray, loss(f)(floats)), want)


def test_what_is_hidden_may_be_anything():
    """NaN past the lengths reaches nothing; a device that has only padding gives 0 and -inf."""
    floats, *_ = arguments(())
    lengths = {"q_lengths": jnp.int32([40, 200]), "kv_lengths": jnp.int32([40, 200])}
    bad = {name: x.at[0, 40:].set(jnp.nan).at[1, 200:].set(jnp.nan) for name, x in floats.items()}
    loss = lambda attention: jax.jit(jax.grad(lambda x: (attention(**x, **lengths)[0] ** 2).sum()))
    want = loss(functools.partial(flash_attention, return_lse=True))(bad)
    for method in METHODS:
        f = functools.partial(
            context_parallel_attention,
            axis="sequence",
            mesh=mesh_of(8),
            method=method,
            order="contiguous",
            return_lse=True,
        )
        check(jax.tree.map(np.asarray, loss(f)(bad)), jax.tree.map(np.asarray, want))
        o, lse = jax.jit(lambda x, f=f: f(**x, **lengths))(bad)
        assert (o[0, 40:] == 0).all()
        assert (lse[0, :, 40:] == -jnp.inf).all()


def test_bounds_leave_out_devices():
    """A window in contiguous order meets the device before; keys that nobody sees are not sent."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.float32)
    for order, sends in (("contiguous", 1), ("zigzag", 2), ("striped", 1)):
        f = functools.partial(context_parallel_attention, axis="sequence", mesh=mesh_of(8), method="ring", order=order)
        text = jax.jit(lambda x, f=f: f(x, x, x, causal=True, window_size=60)).lower(x).compile().as_text()
        assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == sends
        assert not re.search(r" all-gather(-start)?\(", text)
        assert (" while(" in text) == (order == "striped") or "known_trip_count" in text


def test_runs():
    """The way round leaves out the longest stretch of hops that nobody needs, and meets all others once."""
    for bits in itertools.product([False, True], repeat=5):
        needed = np.array([True, *bits])
        met = [(run.first + run.step * n) % 6 for run in ways(needed) for n in range(run.count)]
        assert len(met) == len(set(met))
        assert {*np.flatnonzero(needed)} <= {*met}
        gaps = "".join("x" if x else "-" for x in bits)
        assert len(met) == 6 - max(map(len, gaps.split("x")))


def test_balance():
    """Causal tiles of eight devices: equal in zigzag, nearly twice the mean on one in contiguous order."""
    x = jnp.zeros((1, 4096, 8, 16))
    balance = {}
    for method, order in itertools.product(("ring", "all_gather"), ORDERS):
        options = {"axis": "sequence", "mesh": mesh_of(8), "method": method, "order": order, "config": Config(64, 64)}
        made = explain(x, x, x, causal=True, **options)
        balance[method, order] = made.balance
        assert method in str(made)
        if order == "zigzag":  # as many as one device would visit
            one = explain(x, x, x, causal=True, config=Config(64, 64)).passes[0].visited
            assert sum(made.visited) == one
    with gpu_target(compute_capability=90):  # neither do the kernels more than their share, forward or backward
        one = explain(x, x, x, causal=True, config=Config(64, 64))
        for method in ("ring", "all_gather"):
            options = {"axis": "sequence", "mesh": mesh_of(8), "method": method, "config": Config(64, 64)}
            made = explain(x, x, x, causal=True, **options)
            assert sum(made.visited) == one.passes[0].visited
            assert sum(made.backward) == sum(each.visited for each in one.passes[1:])
            assert max(made.backward) <= 1.05 * min(made.backward)
    for method in ("ring", "all_gather"):
        assert balance[method, "zigzag"] <= 1.05
        assert balance[method, "contiguous"] > 1.7
        assert balance[method, "striped"] <= 1.2


AUTO = {
    "heads": ((8, 4), {"causal": True}, "ulysses"),
    "no_heads": ((6, 2), {"causal": True}, "all_gather"),
    "documents": ((6, 2), {"q_segment_ids": packed()}, "all_gather"),
    "window": ((8, 1), {"causal": True, "window_size": 10, "order": "contiguous"}, "ring"),
    "block_mask": ((6, 2), {"mask": near_or_first}, "all_gather"),
    "head_groups": ((8, 2), {"head_groups": 2}, "all_gather"),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto(name):
    (heads, kv_heads), options, method = AUTO[name]
    q, k = jnp.zeros((B, T, heads, D)), jnp.zeros((B, T, kv_heads, D))
    made = explain(q, k, k, axis="sequence", mesh=mesh_of(4), **options)
    assert made.method == method, made
    assert made.reasons


X = np.zeros((2, 64, 6, 16), np.float32)
HERE = {"axis": "sequence", "mesh": "four"}
WRONG = {
    "axis": ({"axis": "time", "mesh": "four"}, ValueError, "axis must be one of the mesh's, ('sequence',), got 'time'"),
    "axis_type": ({"axis": 0, "mesh": "four"}, TypeError, "axis must be the name of a mesh axis, got 0"),
    "no_mesh": ({"axis": "sequence"}, ValueError, "axis='sequence' is no axis of an enclosing jax.shard_map; call it within one, or give the mesh"),
    "mesh": ({"axis": "sequence", "mesh": "none"}, TypeError, "mesh must be a jax.sharding.Mesh, or None within jax.shard_map, got 'none'"),
    "method": (HERE | {"method": "rings"}, ValueError, "method must be one of ('auto', 'all_gather', 'ring', 'ulysses'), got 'rings'"),
    "order": (HERE | {"order": "zig"}, ValueError, "order must be one of ('contiguous', 'zigzag', 'striped'), got 'zig'"),
    "groups": (HERE | {"head_groups": 0}, ValueError, "head_groups must be a positive integer or None, got 0"),
    "groups_of_ring": (HERE | {"head_groups": 2, "method": "ring"}, ValueError, 'head_groups speaks to method="all_gather", got method=\'ring\''),
    "groups_divide": (HERE | {"head_groups": 4}, ValueError, "head_groups must divide the 6 heads of k and v, got 4"),
    "option": (HERE | {"masks": 3}, TypeError, "context_parallel_attention has no argument 'masks'; did you mean mask?"),
    "heads": (HERE | {"method": "ulysses"}, ValueError, 'method="ulysses" needs query heads that 4 devices divide, got 6; use "ring" or "all_gather"'),
    "block_mask": (HERE | {"method": "ring", "mask": "block"}, ValueError, 'method="ring" takes no BlockMask'),
    "bias": (HERE | {"bias": np.zeros((64, 16), np.float32)}, ValueError, "bias must broadcast to"),
    "mask": (HERE | {"mask": np.zeros((1, 1, 32, 64), bool)}, ValueError, "mask must broadcast to"),
    "segments": (HERE | {"q_segment_ids": np.zeros((2, 32), np.int32)}, ValueError, "q_segment_ids must broadcast to [*batch, seqlen_q], whose last axis is 64 (or 1), got shape (2, 32)"),
    "low": (HERE | {"causal": True, "causal_alignment": "bottom_right", "q_positions": np.arange(64), "kv_positions": np.arange(64)}, ValueError, "leave one of them out"),
    "higher": (HERE | {"higher_order": True, "implementation": "triton"}, ValueError, "higher_order=True runs on XLA"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    options, error, message = WRONG[name]
    options = dict(options)
    if options.get("mesh") == "four":
        options["mesh"] = mesh_of(4)
    if isinstance(options.get("mask"), str):
        options["mask"] = BlockMask.from_predicate(near_or_first, (1, 1, 64, 64), block_m=16, block_n=32)
    with pytest.raises(error) as caught:
        context_parallel_attention(X, X, X, **options)
    assert message in str(caught.value)


def test_explain_refuses_what_the_call_does():
    x, explicit = jnp.zeros((1, 64, 6, 16)), (jax.sharding.AxisType.Explicit,) * 2
    both = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("batch", "sequence"), axis_types=explicit)
    for options, message in (
        ({"method": "ring"}, "axis must be given with method"),
        ({"axis": "sequence"}, "mesh must be given with axis='sequence'"),
        ({"axis": "sequence", "mesh": both}, "mesh must have no explicit axes of several devices but 'sequence'"),
        ({"axis": "time", "mesh": mesh_of(4)}, "axis must be one of the mesh's"),
        ({"axis": "sequence", "mesh": mesh_of(4), "head_groups": 4}, "head_groups must divide the 6 heads"),
        ({"axis": "sequence", "mesh": mesh_of(4), "method": "ulysses"}, "needs query heads that 4 devices divide"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(x, x, x, **options)
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        explain(x, x, x, axis="sequence", mesh=mesh_of(4).abstract_mesh)


def test_explain_holds_no_more_than_one_device_does(monkeypatch):
    """Zeros stand for q, k and v, the same for each device and hop."""
    seen, one = [], explaining.one_device.explained
    monkeypatch.setattr(explaining.one_device, "explained", lambda **x: seen.append(x) or one(**x))
    x = jnp.zeros((1, 64, 4, 16))
    explain(x, x, x, axis="sequence", mesh=mesh_of(4), method="ring")
    assert len(seen) == 16
    assert all(len({id(x[name]) for x in seen}) == 1 for name in "qkv")


def test_length():
    for length in (12, 62):  # the second of which four devices do not divide at all
        x = jnp.zeros((1, length, 4, 16))
        with pytest.raises(ValueError, match=f"the length of q must be a multiple of 8 for 4 .* got {length}; pad"):
            context_parallel_attention(x, x, x, axis="sequence", mesh=mesh_of(4))
