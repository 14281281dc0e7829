"""A few query rows over a long cache: every option, what is read, and what memory it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from checks import QUICK, ROUNDINGS, TIMES, definition, flash_function, in_float64, operands, run
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import attention

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.xla import cached, tiling

pytestmark = pytest.mark.usefixtures("compiled_quickly")
products = cached.products


def case(name, seqlen_q=1, seqlen_k=530, heads=8, kv_heads=2, **options):
    """One whose cache is read where it is, in tiles that do not divide it."""
    low = {} if "positions" in options else {"alignment": "bottom_right"}
    given = {"batch": (2,), "head_dim": 64, "block": (None, 128), "heads": heads, "kv_heads": kv_heads}
    return Case(name, seqlen_q, seqlen_k, **given | low | options)


CASES = [
    case("plain", lse=False),
    case("tuned_tiles", block=(None, None), lengths="k"),
    case("causal", 3, causal=True),
    case("no_groups", heads=2, lengths="k"),
    case("one_group", 3, heads=2, lengths="k"),
    case("group_of_7", heads=14, causal=True, lengths="k"),
    case("group_of_7_rows", 16, heads=14, causal=True, lengths="qk"),
    case("lengths_one_0", 3, batch=(3,), lengths="qk", causal=True),
    case("window", 3, window=(200, 0), causal=True, lengths="k"),
    case("window_bfloat16", window=(40, 5), dtype="bfloat16"),
    case("float16", 3, dtype="float16", lengths="k", v_dim=40),
    case("bfloat16", dtype="bfloat16", lengths="k"),
    case("odd_width", head_dim=70, v_dim=59),
    case("sinks", sinks=True, lengths="k", max_logits=True),
    case("soft_cap", soft_cap=2.0, dtype="bfloat16", lengths="k"),
    case("alibi", 2, alibi="bh", causal=True),
    case("bias", 2, bias="bhqk", lengths="k"),
    case("score", score="table"),
    case("score_rows", 3, score="rows", lengths="qk"),
    case("segments", 3, segments="mixed"),
    case("ring", positions="ring", causal=True, window=(300, 0)),
    case("dropout", 2, dropout=0.3, lengths="k"),
    case("mask", 3, mask="bhqk"),
    case("block_mask", 3, mask="block:hqk", lengths="k", block=(None, None)),
    case("mask_function", 2, mask="function:bk"),
    case(
        "together", 3, mask="qk", segments="packed", lengths="qk", soft_cap=3.0, sinks=True, alibi="h", dropout=0.2,
        bias="hk", window=(400, 5), max_logits=True,
    ),
]  # fmt: skip


@pytest.mark.in_thirds
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case, monkeypatch):
    """As near to the definition as `checks` has it, and by the products that leave the cache where it is."""
    inside = []
    monkeypatch.setattr(cached, "products", lambda *args: inside.append(args) or products(*args))
    inputs = case.inputs()
    inner, given, _ = operands(case, inputs)
    got = run(flash_function(case), inner, given)
    assert inside
    assert_forward_near(case, inputs, got)


def assert_forward_near(case, inputs, got):
    with jax.enable_x64(True):
        inner, given, _ = operands(case, in_float64(inputs))
        want = run(definition(case), inner, given)
    rough = None
    for name, x in got.items():
        exact = want[name]
        error, size = _error(x, exact), float(np.abs(exact[np.isfinite(exact)]).max(initial=0))
        band = (ROUNDINGS * float(jnp.finfo(x.dtype).eps) + 20 * float(jnp.finfo(jnp.float32).eps)) * size
        if error > band:
            plainly = definition(case, compute=jnp.float32, round_p=jnp.dtype(case.dtype))
            rough = rough or run(plainly, *operands(case, inputs)[:2])
            assert error <= TIMES * _error(rough[name], exact) + band, f"{name}: {error:.3g}, band {band:.3g}"


def _error(x, want):
    x = x.astype(np.float64)
    same = np.isneginf(x) & np.isneginf(want)
    return float(np.max(np.nan_to_num(np.abs(np.where(same, 0, x) - np.where(same, 0, want)), nan=np.inf), initial=0))


@pytest.mark.parametrize("window", [(7, 0), None])
def test_new_rows_of_a_cache_that_is_not_full(window):
    """Where they stand follows from the lengths: `q_positions`, as docs/recipes/decoding.md has it."""
    rows, lengths = 3, jnp.array([2, 10, 50, 64])  # of the first sequence, not all rows are there
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), (4, *shape))
    q, k, v = draw(0, rows, 4, 16), draw(1, 64, 2, 16), draw(2, 64, 2, 16)
    options = {"causal": True, "window_size": window, "kv_lengths": lengths, "kv_positions": jnp.arange(64)[None]}
    options["q_positions"] = lengths[:, None] - rows + jnp.arange(rows)
    got = flash_attention(q, k, v, return_lse=True, **options)
    want = attention(q, k, v, compute=jnp.float32, **options)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    assert (jnp.isneginf(got[1]).sum((1, 2)) == jnp.array([4, 0, 0, 0])).all()


def test_float64():
    small = case("float64", 2, dtype="float64", lengths="k", causal=True, window=(300, 0), soft_cap=3.0)
    with jax.enable_x64(True):
        inner, given, _ = operands(small, in_float64(small.inputs()))
        got, want = (run(f(small), inner, given) for f in (flash_function, definition))
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, atol=1e-12)


def test_keys_behind_the_longest_are_not_read(monkeypatch):
    """Tiles are counted as they are met; what lies in the others is NaN, and no key of the longest is missing."""
    met = []

    def counted(q, k, dot):
        jax.debug.callback(lambda x: met.append(np.isnan(x).all()), k[0, 0, 0, 0])
        return products(q, k, dot)

    monkeypatch.setattr(cached, "products", counted)
    long = case("long", seqlen_k=2048, lengths="k", kv_heads=1, heads=4, block=(None, 64))
    inputs = long.inputs()
    inputs["kv_lengths"] = np.array([0, 300], np.int32)
    clean = {name: x if x is None else x.copy() for name, x in inputs.items()}
    for b, n in enumerate(inputs["kv_lengths"]):
        inputs["k"][b, n:] = inputs["v"][b, n:] = np.nan
    inner, given, _ = operands(long, inputs)
    got = run(flash_function(long), inner, given)
    jax.effects_barrier()
    assert len(met) == -(-300 // 64)
    assert_forward_near(long, clean, got)


def test_windows_leave_tiles_out(monkeypatch):
    met = []

    def counted(q, k, dot):
        jax.debug.callback(lambda _: met.append(0), k[0, 0, 0, 0])
        return products(q, k, dot)

    monkeypatch.setattr(cached, "products", counted)
    near = case("near", seqlen_k=2048, window=(100, 0), kv_heads=1, heads=4, block=(None, 64))
    run(flash_function(near), *operands(near, near.inputs())[:2])
    jax.effects_barrier()
    assert len(met) == 2


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (1, "bfloat16"), (4, "bfloat16")])
def test_memory(rows, dtype):
    """The cache is not copied: temporary memory is at most a twentieth of it."""
    array = lambda n, heads: jax.ShapeDtypeStruct((8, n, heads, 128), dtype)
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    attend = jax.jit(lambda q, k, v, n: flash_attention(q, k, v, kv_lengths=n), compiler_options=QUICK)
    compiled = attend.lower(array(rows, 32), array(8192, 8), array(8192, 8), lengths).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 2 * 8 * 8192 * 8 * 128 * jnp.dtype(dtype).itemsize / 20


def test_on_several_devices():
    """Under plain jit, batches and heads divided; and along the keys, which are gathered or merged."""
    many = case("devices", batch=(4,), heads=8, kv_heads=4, lengths="k")
    x = many.inputs()
    attend = jax.jit(functools.partial(flash_attention, causal_alignment="bottom_right"))
    want = attend(x["q"], x["k"], x["v"], kv_lengths=x["kv_lengths"])
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("b", "h"))
    place = lambda a, *names: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*names)))
    for rows, keys in ((("b", None, "h"), ("b", None, "h")), (("b", None), ("b", "h"))):
        k, v = place(x["k"], *keys), place(x["v"], *keys)
        got = attend(place(x["q"], *rows), k, v, kv_lengths=x["kv_lengths"])
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_many_rows_and_short_caches_go_the_other_way():
    """Which is faster for them."""
    for rows, keys in ((17, 4096), (1, 64)):
        q, k = (jax.ShapeDtypeStruct((1, n, 8, 64), jnp.float32) for n in (rows, keys))
        assert not tiling.in_place(q, k)


def test_wide_heads_run_on_xla():
    """Latent attention as it is trained, whose heads are wider than the kernels'."""
    rng, shapes = np.random.default_rng(0), ((17, 4, 576), (30, 1, 576), (30, 1, 512))
    q, k, v = (jnp.asarray(rng.standard_normal((1, *shape)), jnp.float32) for shape in shapes)
    gradients = lambda f: jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(q, k, v)
    got = gradients(lambda *x: flash_attention(*x, causal=True))
    want = gradients(lambda *x: attention(*x, causal=True, compute=jnp.float32)[0])
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=4e-6 * float(abs(y).max()))
