"""Score functions under transforms, kept apart from each other, refused where they are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention
from score_functions import DRAWN, assert_drawn_agree

from jax_flash_attn2 import Config, flash_attention
from jax_flash_attn2.functions import mapped
from jax_flash_attn2.functions.trace import trace
from jax_flash_attn2.gpu import interpret
from jax_flash_attn2.primitives import define

B, S, H, D = 2, 24, 4, 16
RNG = np.random.default_rng(0)
TILES = Config(block_m=16, block_n=16)
HOW: dict = {"config": TILES} | ({"implementation": "triton"} if interpret.enabled() else {})
"""The XLA path, or the kernels where they are interpreted (TRITON_INTERPRET=1)."""

on_xla = pytest.mark.skipif(interpret.enabled(), reason="nothing that a kernel does")


@pytest.fixture(autouse=True)
def as_people_write():
    with jax.numpy_dtype_promotion("standard"):
        yield


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


Q, W = draw(B, S, H, D), draw(B, S, H, D)
READ = {"table": draw(H, 9), "rows": draw(B, S), "factor": draw()}


def biased(read):
    return lambda s, b, h, i, j: s * read["factor"] + read["table"][h, jnp.clip(i - j, -4, 4) + 4] * read["rows"][b, j]


def loss(q, read, function=flash_attention, options=None):
    """Of ours by default; `attention` is the definition."""
    o = function(q, q, q, score_mod=biased(read), **(options or HOW))
    return ((o if function is flash_attention else o[0]) * W).sum()


def of_definition(q, read):
    return loss(q, read, attention, {"compute": jnp.float32})


def assert_near(got, want, tolerance=2e-5):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    "over", [*(pytest.param(x, marks=on_xla) for x in ("q", "read")), "both", pytest.param("nested", marks=on_xla)]
)
def test_vmap(over):
    """Of several calls each has its own batches, and its own arrays or the same; so has each gradient."""
    many = 3
    q = draw(many, *Q.shape) if over != "read" else Q
    read = {n: draw(many, *x.shape) if over != "q" and n != "rows" else x for n, x in READ.items()}
    axes = (0 if over != "read" else None, {n: None if over == "q" or n == "rows" else 0 for n in READ})
    if over == "nested":
        q, axes = draw(2, many, *Q.shape), ((0, None), (0, axes[1]))
        read["factor"] = draw(2, many)
        axes = ((0, {n: 0 if n == "factor" else None for n in READ}), (0, axes[1][1]))

    def total(q, read, one):
        f = one
        for each in reversed(axes) if over == "nested" else [axes]:
            f = jax.vmap(f, each)
        return jnp.sin(f(q, read)).sum()

    got, want = (jax.jit(jax.grad(functools.partial(total, one=f), (0, 1)))(q, read) for f in (loss, of_definition))
    assert_near(got, want)


@on_xla
@pytest.mark.parametrize("how", ["remat", "scan", "higher_order", "export"])
def test_transforms(how):
    grad = jax.grad(loss, (0, 1))
    want = jax.grad(of_definition, (0, 1))(Q, READ)
    if how == "remat":
        got = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(Q, READ)
    elif how == "scan":
        step = lambda total, _: (jax.tree.map(jnp.add, total, grad(Q, READ)), None)
        zeros = jax.tree.map(jnp.zeros_like, (Q, READ))
        got = jax.tree.map(lambda x: x / 2, jax.jit(lambda: jax.lax.scan(step, zeros, None, 2)[0])())
    elif how == "higher_order":
        got = jax.grad(lambda q, read: loss(q, read, options={"higher_order": True}), (0, 1))(Q, READ)
        forward = jax.jvp(lambda q: loss(q, READ, options={"higher_order": True}), (Q,), (W,))[1]
        assert_near(forward, jax.jvp(lambda q: of_definition(q, READ), (Q,), (W,))[1])
    else:
        got = jax.export.export(jax.jit(grad))(Q, READ).call(Q, READ)
    assert_near(got, want)


@on_xla
@pytest.mark.parametrize("numbers", DRAWN)
def test_drawn_functions(numbers):
    """Values and all gradients, over several tiles; the kernels' are in `test_translate`."""
    ours = lambda *args: flash_attention(*args[:3], score_mod=args[3], config=TILES)
    assert_drawn_agree(numbers, ours, lambda *args: attention(*args[:3], score_mod=args[3], compute=jnp.float32)[0])


@on_xla
def test_results_repeat():
    grad = jax.jit(jax.grad(loss, (0, 1)))
    for a, b in zip(*(jax.tree.leaves(grad(Q, READ)) for _ in range(2)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


INDICES = {
    "of a difference": (lambda i, j: i - j, True),
    "of the other": (lambda i, j: jnp.abs(j - i) // 2, True),
    "of one that is moved": (lambda i, j: i + 3 - j, True),
    "of one that a number is moved by": (lambda i, j: 3 + i - j, True),
    "of a sum": (lambda i, j: i + j, False),
    "of a multiple": (lambda i, j: 2 * i - j, False),
    "of quotients": (lambda i, j: i // 2 - j // 2, False),
    "of a difference and a row": (lambda i, j: i - j + i, False),
    "of data": (lambda i, j: PLACES[i] - PLACES[j], False),
    "of products": (lambda i, j: (i - j) * (i - j), True),
    "of a reversed row": (lambda i, j: S - 1 - i - j, False),
}
PLACES = jnp.asarray(RNG.integers(0, S, S), jnp.int32)


@on_xla
@pytest.mark.parametrize("name", INDICES)
def test_what_decides_an_index(name):
    """A difference alone, or not: sums along diagonals are right for the first only."""
    index, relative = INDICES[name]
    table = draw(3 * S * S)
    make = lambda table: lambda s, b, h, i, j: s + table[index(i, j) + S]
    traced, _ = trace(make(table), "score_mod", jnp.float32)
    (read,) = traced.reads
    assert (read.varies, read.relative) == ({"i", "j"}, relative)
    ours = jax.grad(lambda table: (flash_attention(Q, Q, Q, score_mod=make(table), **HOW) * W).sum())(table)
    want = jax.grad(lambda t: (attention(Q, Q, Q, score_mod=make(t), compute=jnp.float32)[0] * W).sum())(table)
    assert_near(ours, want)


@on_xla
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_sorted_sums(shape):
    """What a GPU does in place of adding in any order: the sums, the same ones whatever came first."""
    at = [jnp.asarray(RNG.integers(0, n, 200), jnp.int32) for n in shape]
    grad, part = draw(*shape), draw(200)
    got = mapped.sorted_sum(grad, part, *at)
    assert_near(got, grad.at[tuple(at)].add(part), 1e-5)
    assert_near(mapped.sorted_sum(grad, part[:1], *(x[:1] for x in at)), grad.at[tuple(x[0] for x in at)].add(part[0]))


@on_xla
def test_equal_functions_are_compiled_once():
    """Outside jit: one that was written anew with other arrays in it, and one that differs by a number."""
    make = lambda x, c: lambda s, b, h, i, j: jax.nn.relu(s - x[h] * jnp.abs(i - j)) * c
    first, again, other = (trace(make(draw(H), c), "score_mod", jnp.float32)[0] for c in (2.0, 2.0, 3.0))
    assert first == again
    assert hash(first) == hash(again)
    assert first != other
    flash_attention(Q, Q, Q, score_mod=make(draw(H), 2.0))
    before = define._eager.cache_info().misses
    flash_attention(Q, Q, Q, score_mod=make(draw(H), 2.0))
    assert define._eager.cache_info().misses == before


@on_xla
def test_functions_with_rules_are_told_apart_by_them():
    """Two with the same value and different derivatives."""

    def ruled(slope):
        f = jax.custom_jvp(lambda s: s * 1.0)
        f.defjvp(lambda primals, tangents: (f(*primals), slope * tangents[0]))
        return lambda s, b, h, i, j: f(s)

    one, two = (
        jax.grad(lambda q, c=c: (flash_attention(q, Q, Q, score_mod=ruled(c)) * W).sum())(Q) for c in (1.0, 2.0)
    )
    assert_near(2 * one, two)


@on_xla
def test_rules_of_any_order():
    """Two whose values and first derivatives are the same, and whose second are not, in one process."""

    def ruled(second):
        slope = jax.custom_jvp(lambda s: 1.0 + 0.0 * s)
        slope.defjvp(lambda primals, tangents: (slope(*primals), second * tangents[0]))
        f = jax.custom_jvp(lambda s: s * 1.0)
        f.defjvp(lambda primals, tangents: (f(*primals), slope(primals[0]) * tangents[0]))
        return lambda s, b, h, i, j: f(s)

    def twice(second):
        loss = lambda q: (flash_attention(q, Q, Q, score_mod=ruled(second), higher_order=True) * W).sum()
        return jax.grad(lambda q: jnp.vdot(jax.grad(loss)(q), W))(Q)

    assert np.abs(twice(0.0) - twice(5.0)).max() > 0.1


@on_xla
def test_position_in_the_order():
    """Scaled products, the score function, the soft cap, the bias."""
    bias, options = draw(1, H, S, S), {"logits_soft_cap": 1.5, "softmax_scale": 0.7}
    s = 0.7 * jnp.einsum("bqhd,bkhd->bhqk", Q, Q)
    s = 1.5 * jnp.tanh((s + jnp.arange(S)[:, None] * 0.1) * 2 / 1.5) + bias
    want = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), Q)
    got = flash_attention(Q, Q, Q, bias, score_mod=lambda s, b, h, i, j: (s + i * 0.1) * 2, **options)
    assert_near(got, want)


def t5_bucket(distance):
    """As T5 (Raffel et al. 2020) has it, both ways: 32 buckets, half of them exact, the rest logarithmic up to 128."""
    side = jnp.where(distance > 0, 16, 0)
    distance = jnp.abs(distance)
    far = 8 + (jnp.log(distance.astype(jnp.float32) / 8 + 1e-6) / np.log(128 / 8) * 8).astype(jnp.int32)
    return side + jnp.where(distance < 8, distance, jnp.minimum(far, 15))


@on_xla
def test_t5_layer():
    """A table of 32 buckets by head, its gradient and those of the layer's projections, as a T5 layer computes them."""
    length, heads, width = 150, 4, 16
    x, table = draw(2, length, heads * width), draw(32, heads)
    weights = [draw(heads * width, heads * width) / 8 for _ in range(4)]

    def layer(x, table, weights, attend):
        q, k, v = ((x @ w).reshape(2, length, heads, width) for w in weights[:3])
        return attend(q, k, v, table).reshape(2, length, -1) @ weights[3]

    def plainly(q, k, v, table):
        places = jnp.arange(length)
        bias = table[t5_bucket(places[None, :] - places[:, None])].transpose(2, 0, 1)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias), v)

    def ours(q, k, v, table):
        score_mod = lambda s, b, h, i, j: s + table[t5_bucket(j - i), h]
        return flash_attention(q, k, v, score_mod=score_mod, softmax_scale=1.0, **(HOW | {"config": Config(64, 64)}))

    got, want = (
        jax.jit(jax.grad(lambda *a, f=f: (layer(*a, f) ** 2).sum(), (0, 1, 2)))(x, table, weights)
        for f in (ours, plainly)
    )
    assert_near(got, want, 1e-4)


def test_hidden_keys_reach_nothing():
    """NaN where the mask hides, in the value, its derivatives, and an array: as if it were not there."""
    clean, x = draw(S), {"softmax_scale": 0.5, "causal": True, **HOW}

    def grads(function, tables):
        return jax.value_and_grad(
            lambda q, t: (flash_attention(q, Q, Q, score_mod=function(t), **x) * W).sum(), (0, 1)
        )(Q, tables)

    dirty = jnp.where(jnp.arange(2 * S) < S, jnp.nan, jnp.concatenate([clean, clean]))  # by i - j + S; hidden below S
    seen = lambda t: lambda s, b, h, i, j: s * jnp.sqrt((i - j).astype(jnp.float32) + 1) + t[jnp.maximum(i - j + S, 0)]
    got = grads(seen, dirty)
    want = grads(seen, jnp.nan_to_num(dirty))
    assert not np.isnan(np.concatenate([np.ravel(a) for a in jax.tree.leaves(got)])).any()
    assert_near(got, want)


F = jnp.float32
REFUSED = {
    "no function": (3, "score_mod must be a function (score, b, h, i, j) -> score of scalars, got 3"),
    "four arguments": (lambda s, b, h, i: s, "score_mod must take five arguments, (score, b, h, i, j), got <lambda> ("),
    "two results": (lambda *x: (x[0], x[0]), "must return one scalar of float32, and <lambda> returned float32[], flo"),
    "an array": (lambda s, b, h, i, j: s + Q[0, 0, 0], "and <lambda> returned float32[16] ("),
    "an integer": (lambda s, b, h, i, j: i + j, "and <lambda> returned int32[] ("),
    "half": (lambda s, b, h, i, j: s.astype(jnp.bfloat16), "and <lambda> returned bfloat16[] ("),
    "if": (lambda s, b, h, i, j: s if s > 0 else -s, "a score and indices that are traced, got one whose value is "),
    "an array of NumPy": (lambda s, b, h, i, j: s + np.arange(S)[i], "make jnp.asarray of it, and use jnp's functions"),
    "prints": (lambda s, b, h, i, j: [jax.debug.print("{}", s), s][1], "score_mod has a side effect, debug_print ("),
}  # fmt: skip


@on_xla
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(TypeError) as caught:
        flash_attention(Q, Q, Q, score_mod=function)
    assert message in str(caught.value)
    assert "(" not in message[-1] or "test_score_mod.py:" in str(caught.value)


@on_xla
def test_arrays_that_lie_elsewhere():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two devices")
    q, there = jax.device_put(Q, devices[0]), jax.device_put(READ["table"], devices[1])
    with pytest.raises(
        ValueError, match=r"score_mod reads an array of shape \(4, 9\) on .*test_score_mod.py:.*device_put"
    ):
        flash_attention(q, q, q, score_mod=lambda s, b, h, i, j: s * there[h, 0])


@on_xla
def test_tracers_do_not_outlive_their_trace():
    """Of functions that read arrays: of scores and of masks."""
    table, ids = jnp.ones(2 * S), jnp.arange(S) // 4
    with jax.checking_leaks():
        flash_attention(Q, Q, Q, score_mod=lambda s, b, h, i, j: s + table[i - j + S])
        jax.jit(lambda ids: flash_attention(Q, Q, Q, mask=lambda b, h, i, j: ids[i] == ids[j]))(ids)


@on_xla
def test_integers_have_no_gradient():
    """A differentiated integer is JAX's own error; one that is only read changes nothing."""
    ids = jnp.arange(S, dtype=jnp.int32) // 5
    call = lambda ids: flash_attention(
        Q, Q, Q, score_mod=lambda s, b, h, i, j: jnp.where(ids[i] == ids[j], s, -jnp.inf)
    )
    with pytest.raises(TypeError, match="int32"):
        jax.grad(lambda ids: call(ids).sum())(ids)
    want = flash_attention(Q, Q, Q, q_segment_ids=jnp.broadcast_to(ids, (B, S)))
    assert_near(call(ids), want)


@pytest.mark.parametrize("higher_order", [False, True])
def test_gradients_by_half_arrays_are_rounded_once(higher_order):
    """What 40,000 pairs add to three numbers is summed in fp32, on the path that JAX differentiates by itself, too."""
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.standard_normal((1, 200, 1, 8)), jnp.float32) for _ in range(4))

    def loss(x, **options):
        scaled = lambda s, b, h, i, j: s * x[j % 3].astype(s.dtype)
        return (flash_attention(q, k, v, score_mod=scaled, **options) * w).sum()

    x = jnp.array([0.5, 1.0, 2.0])
    got = jax.grad(functools.partial(loss, higher_order=higher_order))(x.astype(jnp.bfloat16))
    np.testing.assert_allclose(got.astype(jnp.float32), jax.grad(loss)(x), rtol=2**-8)


@on_xla
def test_higher_derivatives_take_nothing_of_what_is_hidden():
    """Where a row does not see a key the function's slopes, by x and by the score, are NaN or infinite. One read varies
    with keys, the other, whose slope is 1, with nothing."""

    def loss(q, x, ago):
        score_mod = lambda s, b, h, i, j: s * jnp.sqrt(ago(i, j)) - jnp.log(ago(i, j) + s * 0) * x[j] ** 2 + x[0]
        return (flash_attention(q, q, q, score_mod=score_mod, causal=True, higher_order=True, config=TILES) * W).sum()

    def second(ago):
        slopes = jax.grad(lambda q, x: loss(q, x, ago), (0, 1))
        out, along = jax.jvp(slopes, (Q, READ["rows"][0]), (W, READ["rows"][1]))
        return out, along, jax.grad(lambda q: sum((x**2).sum() for x in slopes(q, READ["rows"][0])))(Q)

    got, want = second(lambda i, j: i - j + 1.0), second(lambda i, j: jnp.maximum(i - j, 0) + 1.0)
    assert_near(got, want)
