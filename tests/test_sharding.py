"""Eight devices: a sharded call gives what one device gives, divided as asked, with no needless collective."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash_attn2 import Config, explain, flash_attention, gpu_target
from jax_flash_attn2.masks import BlockMask
from jax_flash_attn2.primitives import sharding

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")

BATCH, HEADS, ROWS = P("data"), P("data", None, "model"), P("data", "model")
KEYS, ALL_KEYS = ROWS, P(None, ("data", "model"))
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def drawn_alike(monkeypatch):
    """Whatever ran before, and in which process, a test draws the same."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


def draw(*shape):
    return jax.device_put(RNG.standard_normal(shape).astype(np.float32))


def ids(length):
    return jax.device_put(np.sort(RNG.integers(0, 3, (4, length)), 1).astype(np.int32))


def blocks(batch, heads):
    return BlockMask.from_mask(RNG.random((batch, heads, 64, 48)) < 0.02, block_m=16, block_n=32)


# name: how q lies, how k and v do, key heads, operands with how they lie, options.
CASES = {
    "batch": (BATCH, BATCH, 8, {}, {"causal": True}),
    "heads": (HEADS, HEADS, 8, {}, {"causal": True}),
    "both_on_batch": (P(("data", "model")), P(("data", "model")), 8, {}, {"causal": True, "batch": 8}),
    "gqa": (HEADS, HEADS, 4, {}, {"causal": True}),
    "gqa_replicated": (HEADS, BATCH, 2, {}, {"causal": True}),
    "mqa": (HEADS, BATCH, 1, {}, {}),
    "rows": (ROWS, BATCH, 8, {}, {"causal": True}),
    "rows_window": (ROWS, BATCH, 2, {"alibi_slopes": (np.abs(draw(8)), P())}, {"window_size": (7, 3)}),
    "rows_bottom_right": (ROWS, BATCH, 8, {}, {"causal": True, "causal_alignment": "bottom_right"}),
    "rows_lengths": (
        ROWS, BATCH, 8,
        {
            "q_lengths": (np.int32([64, 20, 0, 33]), P()), "kv_lengths": (np.int32([48, 5, 17, 1]), BATCH),
            "sinks": (draw(8), P()), "bias": (draw(4, 1, 64, 1), BATCH),
        },
        {},
    ),
    "rows_dropout": (ROWS, BATCH, 8, {}, {"dropout_rate": 0.3, "dropout_seed": 5}),
    "rows_positions": (
        ROWS, BATCH, 2,
        {
            "q_positions": (np.arange(64, dtype=np.int32)[None, ::-1], P()),
            "kv_positions": (np.arange(192, dtype=np.int32).reshape(4, 48) % 48, BATCH),
        },
        {"causal": True, "dropout_rate": 0.2, "dropout_seed": 3},
    ),
    "only_q": (HEADS, P(), 8, {}, {"causal": True}),
    "only_k": (P(), HEADS, 8, {}, {"causal": True}),
    "operands": (
        HEADS, HEADS, 8,
        {
            "bias": (draw(1, 8, 64, 48), P(None, "model")),
            "mask": (jax.device_put(RNG.random((4, 1, 64, 48)) < 0.7), BATCH),
            "sinks": (draw(8), P("model")),
            "q_segment_ids": (ids(64), BATCH), "kv_segment_ids": (ids(48), P()),
        },
        {"logits_soft_cap": 5.0, "dropout_rate": 0.2, "dropout_seed": 1},
    ),
    "block_mask": (HEADS, HEADS, 8, {"mask": (blocks(1, 8), P())}, {"causal": True}),
    "block_mask_rows": (ROWS, BATCH, 8, {"mask": (blocks(4, 1), P())}, {}),
    "score": (HEADS, HEADS, 4, {"table": (draw(8, 19), P("model")), "rows": (draw(4, 64), BATCH)}, {}),
    "score_rows": (ROWS, BATCH, 8, {"table": (draw(8, 19), P()), "rows": (draw(4, 64), P())}, {"causal": True}),
    "indivisible": (HEADS, HEADS, 8, {}, {"heads": 8, "batch": 3}),
    "rows_and_keys": (ROWS, KEYS, 8, {}, {"causal": True}),
    "keys_gathered": (BATCH, KEYS, 8, {}, {"causal": True}),
    "keys": (BATCH, KEYS, 8, {}, {"rows": 1, "return_max_logits": True}),
    "keys_bottom_right": (BATCH, KEYS, 8, {}, {"rows": 4, "causal": True, "causal_alignment": "bottom_right"}),
    "keys_window": (
        P(), ALL_KEYS, 2, {"alibi_slopes": (np.abs(draw(8)), P())},
        {"rows": 4, "window_size": (13, 3), "causal_alignment": "bottom_right", "return_max_logits": True},
    ),
    "keys_lengths": (
        BATCH, KEYS, 8,
        {
            "q_lengths": (np.int32([4, 4, 4, 2]), P()), "kv_lengths": (np.int32([64, 5, 0, 33]), BATCH),
            "sinks": (draw(8), P()), "bias": (draw(4, 1, 4, 64), BATCH),
        },
        {"rows": 4, "return_max_logits": True},
    ),
    "keys_sinks": (BATCH, KEYS, 4, {"sinks": (draw(8), P())}, {"rows": 4, "causal": True}),
    "keys_dropout": (
        BATCH, KEYS, 8, {},
        {"rows": 4, "causal": True, "causal_alignment": "bottom_right", "dropout_rate": 0.3, "dropout_seed": 5},
    ),
    "keys_positions": (
        P(), ALL_KEYS, 2,
        {
            "q_positions": (np.int32([[9, 60, 3, 33]]), P()),
            "kv_positions": (np.arange(256, dtype=np.int32).reshape(4, 64)[:, ::-1] % 64, ALL_KEYS),
            "q_segment_ids": (ids(4), P()), "kv_segment_ids": (ids(64), P()),
        },
        {"rows": 4, "causal": True, "dropout_rate": 0.2, "dropout_seed": 3},
    ),
    "keys_operands": (
        BATCH, KEYS, 8,
        {
            "bias": (draw(1, 8, 1, 64), P()),
            "mask": (jax.device_put(RNG.random((4, 1, 4, 64)) < 0.2), BATCH),
        },
        {"rows": 4, "logits_soft_cap": 5.0, "dropout_rate": 0.2, "dropout_seed": 1},
    ),
    "keys_far_down": (BATCH, KEYS, 8, {"bias": (np.full((1, 1, 1, 64), -1e9, np.float32), P())}, {"rows": 4}),
    "keys_score": (
        BATCH, KEYS, 4, {"table": (draw(8, 19), P()), "rows": (draw(4, 64), P())},
        {"rows": 4, "causal": True, "causal_alignment": "bottom_right", "dropout_rate": 0.2, "dropout_seed": 1},
    ),
    "keys_of_heads": (HEADS, KEYS, 1, {}, {"rows": 4, "causal": True}),
    "keys_of_rest": (P(None, "model"), ALL_KEYS, 8, {"sinks": (draw(8), P())}, {"rows": 4}),
    "keys_block_mask": (BATCH, KEYS, 8, {"mask": (blocks(1, 8), P())}, {}),
}  # fmt: skip


def mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


TILES = Config(block_m=16, block_n=16)
"""Several of them in each sequence: what one tile needs nothing for, others look up."""


def step(options):
    def score_mod(table, rows):
        return lambda score, b, h, i, j: score * rows[b, i] + table[h, jnp.clip(i - j, -9, 9) + 9]

    def loss(q, k, v, w, floats, others):
        read = [floats[name] for name in ("table", "rows") if name in floats]
        floats = {name: x for name, x in floats.items() if name not in ("table", "rows")}
        floats |= {"score_mod": score_mod(*read)} if read else {}
        o, lse, *largest = flash_attention(q, k, v, return_lse=True, config=TILES, **floats, **others, **options)
        lse, *largest = (jnp.where(x > -jnp.inf, x, 0) for x in (lse, *largest))
        return (o * w).sum() + jnp.sin(lse).sum() + sum(x.sum() for x in largest)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 4)))


def collectives(text, kinds="all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"):
    """What a device gets of each collective of a compiled program: [(type, bytes)]."""
    made = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    types = (x for result in made for x in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", result))
    return [
        (f"{t}[{shape}]", int(t.strip("bfsu")) // 8 * math.prod(int(n) for n in shape.split(",") if n))
        for t, shape in types
    ]


def moved(text, kinds):
    return sum(n for _, n in collectives(text, kinds))


@pytest.mark.parametrize("name", CASES)
def test_sharded(name):
    spec_q, spec_k, kv_heads, operands, options = CASES[name]
    options = dict(options)
    batch = options.pop("batch", 4)
    heads, rows = options.pop("heads", 8), options.pop("rows", 64)
    keys = 48 if rows == 64 else 64
    q, k, v, w = (draw(batch, s, h, 16) for s, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads), (rows, heads)))
    floats = {n: x for n, x in operands.items() if getattr(x[0], "dtype", None) == jnp.float32}
    others = {n: x for n, x in operands.items() if n not in floats}
    want = step(options)(q, k, v, w, *({n: x for n, (x, _) in d.items()} for d in (floats, others)))
    grid = mesh(AxisType.Auto)
    if name == "indivisible":  # three batches on two devices: JAX itself refuses to place them so
        spec_q = spec_k = P(None, None, "model")

    def put(x, spec):
        return jax.device_put(x, NamedSharding(grid, spec))

    args = (
        *(put(x, spec) for x, spec in zip((q, k, v, w), (spec_q, spec_k, spec_k, spec_q), strict=True)),
        *({n: put(*x) for n, x in d.items()} for d in (floats, others)),
    )
    compiled = step(options).lower(*args).compile()
    got = compiled(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    wanted = spec_k if name == "only_k" else spec_q
    assert got[1][0].sharding.is_equivalent_to(NamedSharding(grid, wanted), 4)
    text = compiled.as_text()
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", text)
    if name not in (
        "only_q",
        "only_k",
        "operands",
        "block_mask_rows",
        "score",
        "indivisible",
        "rows_and_keys",
        "keys_gathered",
        "keys_of_heads",
        "keys_of_rest",
        "keys_block_mask",
    ):  # there, gathering is asked for by how they lie
        assert not re.search(r" all-gather(-start)?\(", text)
    if name == "rows_and_keys":
        assert len(re.findall(r" reduce-scatter(-start)?\(", text)) == 2
        assert moved(text, "all-reduce") < k.nbytes // 8
    if name.startswith("keys") and rows < 64:
        assert not any(x.endswith("64,8,16]") for x, _ in collectives(text))


@pytest.mark.parametrize(("spec", "named"), [(BATCH, True), (HEADS, False), (ROWS, True)], ids=str)
def test_explicit_axes(spec, named):
    """On a mesh with explicit axes, named by `jax.set_mesh` or not, results are typed as q is, and so are gradients."""
    grid = mesh(AxisType.Explicit)
    x = draw(4, 64, 8, 16)
    want = jax.grad(lambda x: (flash_attention(x, x, x, causal=True) ** 2).sum())(x)
    with jax.set_mesh(grid) if named else contextlib.nullcontext():
        x = jax.device_put(x, NamedSharding(grid, spec))
        o, lse, largest = jax.jit(
            lambda x: flash_attention(x, x, x, causal=True, return_lse=True, return_max_logits=True)
        )(x)
        full = (*spec, None, None, None)[:4]
        assert tuple(jax.typeof(o).sharding.spec) == full
        assert tuple(jax.typeof(lse).sharding.spec) == (full[0], full[2], full[1])
        assert tuple(jax.typeof(largest).sharding.spec) == (full[0], full[2])
        got = jax.jit(jax.grad(lambda x: (flash_attention(x, x, x, causal=True) ** 2).sum()))(x)
        assert jax.typeof(got).sharding.spec == jax.typeof(x).sharding.spec
        assert jax.typeof(flash_attention(x, x, x)).sharding.spec == jax.typeof(x).sharding.spec  # outside jit
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


OWN = {
    "q_segment_ids": (ids(64), P("data")), "kv_lengths": (jnp.array([64, 5, 40, 33]), P("data")),
    "bias": (draw(1, 8, 64, 64), P(None, "model")), "alibi_slopes": (np.abs(draw(8)), P("model")),
    "sinks": (draw(8), P("model")),
}  # fmt: skip
"""Operands for within `shard_map`, over batch and heads; the bias is the same for all batches."""


def own_loss(q, k, v, floats, others):
    o, lse, largest = flash_attention(
        q, k, v, window_size=(20, 3), dropout_rate=0.2, dropout_seed=jnp.arange(8)[None, : q.shape[2]] * 0,
        return_lse=True, return_max_logits=True, config=TILES, **floats, **others,
    )  # fmt: skip
    return (o**2).sum() + jnp.where(lse > -jnp.inf, jnp.sin(lse), 0).sum() + 0 * largest.sum()


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("axes", [("data", "model"), ("model",)], ids=str)
def test_shard_map(checked, axes):
    """Each device's call is on its own, over the axes that `shard_map` takes; XLA divides it along the others. What is
    the same on several devices gets the sum of their gradients, whether JAX checks for such things or not."""
    grid, x = mesh(AxisType.Auto), draw(4, 64, 8, 16)
    floats = {n: x for n, (x, _) in OWN.items() if x.dtype == jnp.float32}
    others = {n: x for n, (x, _) in OWN.items() if n not in floats}
    grad = jax.grad(own_loss, (0, 1, 2, 3))
    want = jax.jit(grad)(x, x, x, floats, others)

    def within(spec):
        return P(*(a if a in axes else None for a in spec))

    specs = {name: within(spec) for name, (_, spec) in OWN.items()}
    into = (within(HEADS),) * 3 + tuple({n: specs[n] for n in names} for names in (floats, others))

    def total(q, k, v, floats, others):
        return jax.lax.psum(own_loss(q, k, v, floats, others), axes)

    f = jax.shard_map(total, mesh=grid, in_specs=into, out_specs=P(), axis_names=set(axes), check_vma=checked)
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(grid, spec)),
        (x, x, x, floats, others), ((HEADS,) * 3 + tuple({n: OWN[n][1] for n in names} for names in (floats, others))),
    )  # fmt: skip
    compiled = jax.jit(jax.grad(f, (0, 1, 2, 3))).lower(*placed).compile()
    for a, b in zip(*map(jax.tree.leaves, (compiled(*placed), want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=4e-6 * np.abs(b).max())
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", compiled.as_text())


def test_functions_of_the_callers_arrays():
    """A score function and a mask function read arrays that are divided by their types, or within `shard_map`."""
    x, table, ids_of = draw(4, 64, 8, 16), draw(8, 9), ids(64)

    def loss(x, table, ids_of):
        score_mod = lambda s, b, h, i, j: s + table[h, jnp.clip(i - j, -4, 4) + 4]
        mask = lambda b, h, i, j: ids_of[b, i] == ids_of[b, j]
        return (flash_attention(x, x, x, score_mod=score_mod, mask=mask) ** 2).sum()

    grad = jax.grad(loss, (0, 1))
    want = grad(x, table, ids_of)
    specs = ROWS, P("model"), BATCH
    grid = mesh(AxisType.Explicit)
    with jax.set_mesh(grid):
        placed = (jax.device_put(a, NamedSharding(grid, s)) for a, s in zip((x, table, ids_of), specs, strict=True))
        typed = jax.jit(grad)(*placed)
    total = lambda *args: jax.lax.psum(loss(*args), "data")
    within = jax.shard_map(total, mesh=mesh(AxisType.Auto), in_specs=(BATCH, P(), BATCH), out_specs=P())
    for got in (typed, jax.jit(jax.grad(within, (0, 1)))(x, table, ids_of)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), got, want)


def test_functions_within_shard_map_to_any_order():
    """What is the same on all devices, and what is not, meet in a function's equations."""
    x, table = draw(4, 16, 2, 16), draw(2, 40)

    def loss(x, table):
        score_mod = lambda s, b, h, i, j: s + table[h, i - j + 20] * 2.0
        mask = lambda b, h, i, j: (i - j) % 3 != 1
        return (flash_attention(x, x, x, score_mod=score_mod, mask=mask, higher_order=True) ** 2).sum()

    own = lambda *args: jax.lax.psum(loss(*args), "data")
    f = jax.shard_map(own, mesh=mesh(AxisType.Auto), in_specs=(BATCH, P()), out_specs=P())
    got, want = (jax.jit(jax.grad(f, (0, 1)))(x, table) for f in (f, loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), got, want)


def test_shard_map_is_told_what_varies():
    """A result that differs from device to device is not taken for one that does not."""
    grid, x = mesh(AxisType.Auto), draw(4, 16, 1, 16)
    for options in ({}, {"higher_order": True}):
        f = jax.shard_map(
            lambda x, options=options: flash_attention(x, x, x, **options), mesh=grid, in_specs=BATCH, out_specs=P()
        )
        with pytest.raises(ValueError, match="replicat"):
            jax.jit(f).trace(x)


def test_vmapped():
    """A mapped call, whose bias is shared by the examples, divided over the batch it was folded into."""
    q, bias = draw(4, 2, 32, 4, 16), draw(2, 4, 32, 32)

    def loss(q, bias):
        one = lambda q: (flash_attention(q, q, q, bias) ** 2).sum()
        return jax.vmap(one)(q).sum()

    want = jax.grad(loss, (0, 1))(q, bias)
    q = jax.device_put(q, NamedSharding(mesh(AxisType.Auto), BATCH))
    got = jax.jit(jax.grad(loss, (0, 1)))(q, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_vmapped_keys():
    """A mapped call whose keys are divided: its examples are batches, and its bias is shared by them."""
    q, k, bias = draw(4, 2, 4, 4, 16), draw(4, 2, 64, 4, 16), draw(2, 4, 1, 64)

    def loss(q, k, bias):
        one = lambda q, k: (flash_attention(q, k, k, bias, logits_soft_cap=3.0) ** 2).sum()
        return jax.vmap(one)(q, k).sum()

    want = jax.grad(loss, (0, 1, 2))(q, k, bias)
    k = jax.device_put(k, NamedSharding(mesh(AxisType.Auto), P(None, None, ("data", "model"))))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, bias).compile()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), compiled(q, k, bias), want)
    assert not re.search(r" all-gather(-start)?\(", compiled.as_text())


def test_keys_are_summed_before_they_are_rounded():
    """bf16: what devices make of their keys, and of rows for all keys, is added up in fp32."""
    grid, loss = mesh(AxisType.Auto), lambda q, k, v: (flash_attention(q, k, v).astype(jnp.float32) ** 2).sum()
    for rows, spec_q in ((4, P()), (64, ROWS)):
        q, k, v = (draw(4, s, 8, 16).astype(jnp.bfloat16) for s in (rows, 64, 64))
        want = flash_attention(q, k, v), *jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
        spec_k = KEYS if spec_q == ROWS else ALL_KEYS
        q, k, v = (jax.device_put(x, NamedSharding(grid, s)) for x, s in ((q, spec_q), (k, spec_k), (v, spec_k)))
        got = jax.jit(flash_attention)(q, k, v), *jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert np.mean(a != b) < 0.01


def test_keys_within_shard_map():
    """`shard_map` takes the batches, and XLA divides the keys, on an axis whose devices are not all there are."""
    q, k = draw(4, 4, 8, 16), draw(4, 64, 2, 16)
    options = {"causal": True, "causal_alignment": "bottom_right", "sinks": draw(8)}

    def loss(q, k):
        return (flash_attention(q, k, k, **options) ** 2).sum()

    want = jax.value_and_grad(loss, (0, 1))(q, k)
    grid = mesh(AxisType.Auto)
    own = jax.shard_map(
        lambda q, k: jax.lax.psum(loss(q, k), "data"), mesh=grid, in_specs=(BATCH, BATCH), out_specs=P(),
        axis_names={"data"},
    )  # fmt: skip
    args = (jax.device_put(x, NamedSharding(grid, spec)) for x, spec in ((q, BATCH), (k, KEYS)))
    got = jax.jit(jax.value_and_grad(own, (0, 1)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), got, want)


@pytest.mark.parametrize("spec_q", [P(), P(None, None, ("data", "model"))], ids=str)
def test_decoding_moves_what_it_makes(spec_q):
    """A step over 8 x 32k keys of bf16 on eight devices: o and two numbers of each row, not 1 GiB of keys and values;
    and heads of q, if they lie apart, but not those of keys."""
    grid = mesh(AxisType.Auto)

    def struct(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(grid, spec))

    q, k = struct((8, 1, 16, 128), spec_q), struct((8, 32768, 4, 128), ALL_KEYS)
    text = jax.jit(flash_attention).lower(q, k, k).compile().as_text()
    merged = 4 * 8 * 16 * (128 + 1 + 1)
    assert moved(text, "all-reduce") == merged
    assert sum(n for _, n in collectives(text)) <= merged + 4 * math.prod(q.shape)


def test_explain_says_what_becomes_of_keys():
    grid = mesh(AxisType.Auto)

    def said(rows, spec_q, spec_k, **options):
        q, k = jnp.zeros((4, rows, 8, 16)), jnp.zeros((4, 64, 8, 16))
        q, k = (jax.device_put(x, NamedSharding(grid, spec)) for x, spec in ((q, spec_q), (k, spec_k)))
        return [r for r in explain(q, k, k, **options).reasons if "keys are sharded" in r]

    assert said(4, BATCH, BATCH) == []
    split = said(1, BATCH, KEYS)
    ring = 3 / 4 / 2**20  # of an axis of four devices
    o, stats, keys = 4 * 4 * 8 * 16 / 2, 4 * 4 * 8 / 2, 4 * 4 * 64 * 8 * 16 / 2
    assert split == [
        "forward: keys are sharded over 'model' (4 devices): split and merged by lse, "
        f"{2 * (o + 2 * stats) * ring:.3g} MiB a device instead of {2 * keys * ring:.3g} MiB to gather them",
        "backward: keys are sharded over 'model' (4 devices): split and dq summed, "
        f"{2 * o * ring:.3g} MiB a device instead of {2 * keys * ring:.3g} MiB to gather them",
    ]
    assert all("over 'model' and" in r for r in said(1, BATCH, ALL_KEYS))
    assert all("gathered" in r and "to split and merge" in r for r in said(128, BATCH, KEYS))
    assert all("which divides rows" in r for r in said(64, ROWS, KEYS))
    mask = BlockMask.from_mask(np.ones((1, 1, 64, 64), bool))
    assert all("block mask" in r for r in said(64, BATCH, KEYS, mask=mask))
    q = jnp.zeros((4, 4, 8, 16))
    k = jax.device_put(jnp.zeros((4, 64, 8, 16)), NamedSharding(grid, KEYS))
    jitted = jax.jit(lambda q, k: len([r for r in explain(q, k, k).reasons if "sharded" in r]))
    assert jitted(q, k) == 0


@pytest.mark.in_thirds
@pytest.mark.parametrize(
    ("spec", "spec_k", "rows"), [(HEADS, P(), 512), (ROWS, P(), 512), (BATCH, KEYS, 16)], ids=["heads", "rows", "keys"]
)
def test_lowers_for_cuda(spec, spec_k, rows, monkeypatch):
    """What one of eight GPUs would run, divided by the same plan: the Triton kernels, on its share."""
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    recorded = []

    class Recorder(sharding.custom_partitioning):
        def def_partition(self, partition, **options):
            recorded.append(partition)
            return super().def_partition(partition, **options)

    monkeypatch.setattr(sharding, "custom_partitioning", Recorder)
    grid = mesh(AxisType.Auto)

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(grid, spec))

    q = struct((4, rows, 8, 64), jnp.bfloat16, spec)
    k = struct((4, 512, 8, 64), jnp.bfloat16, spec if spec_k == P() else spec_k)
    loss = lambda q, k: flash_attention(q, k, k, causal=True).astype(jnp.float32).sum()
    with gpu_target(compute_capability=90):
        text = jax.jit(jax.grad(loss, (0, 1))).trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("CustomSPMDPartitioning") == 2
    forward, backward = recorded

    whole, lost = struct(q.shape, jnp.bfloat16, P()), struct(q.shape, jnp.int8, P())
    k = struct(k.shape, jnp.bfloat16, spec_k)
    row, scale = struct((4, 8, rows), jnp.float32, P()), struct((1, 1, 1, 1), jnp.float32, P())
    for partition, args, results, calls in (
        (forward, (q, k, k, scale), [whole, row, lost], 1),
        (backward, (q, k, k, whole, whole, lost, row, scale), [whole, k, k], 2),
    ):
        _, share, out, into = partition(grid, args, results)
        own = jax.shard_map(
            lambda *a, share=share: tuple(share(*a)), mesh=grid, check_vma=False,
            in_specs=tuple(s.spec for s in into), out_specs=tuple(s.spec for s in out),
        )  # fmt: skip
        with gpu_target(compute_capability=90):
            text = jax.jit(own).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@triton_kernel_call_ffi") == calls
        assert tuple(into[0].spec) == tuple(spec) + (None,) * (4 - len(spec))
        assert into[1].spec[1] == (spec_k[1:2] or (None,))[0]


def test_what_is_looked_up_lowers_for_cuda():
    """Which tiles are met is looked up, by the launch of a kernel too, without constants, which cannot be divided."""
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    placed = NamedSharding(mesh(AxisType.Auto), BATCH)
    q = jax.ShapeDtypeStruct((4, 64, 8, 64), jnp.bfloat16, sharding=placed)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=placed)
    f = jax.jit(lambda q, n: flash_attention(q, q, q, window_size=(20, 3), kv_lengths=n))
    with gpu_target(compute_capability=90):
        text = f.trace(q, lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("CustomSPMDPartitioning") == 1


def test_programs_are_told_apart():
    """By their texts, pointers left out, as JAX's cache on disk does; also functions that were traced twice alike."""
    q, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 64, 8, 16), (64,)))
    q = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=NamedSharding(mesh(AxisType.Auto), BATCH))
    biased = lambda by: {"score_mod": lambda table: lambda s, b, h, i, j: s + by * table[i]}
    every = [{}, {"causal": True}, {"logits_soft_cap": 3.0}, {"logits_soft_cap": 9.0}, biased(1), biased(2)]
    every += [{"config": Config(block_m=16)}, {"dropout_rate": 0.1, "dropout_seed": 1}]

    def text(options):
        def gradient(q, table):
            own = options | ({"score_mod": options["score_mod"](table)} if "score_mod" in options else {})
            return jax.grad(lambda q: flash_attention(q, q, q, **own).sum())(q)

        lowered = jax.jit(gradient).lower(q, table).as_text()
        return re.sub(r'backend_config = "\d+"', "", lowered)

    texts = [text(options) for options in every]
    assert len(set(texts)) == len(every)
    assert text(biased(1)) == texts[4]
