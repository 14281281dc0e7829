"""The public functions beyond their numbers: caching, contexts, transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention

import jax_flash_attn2 as fa
from jax_flash_attn2.base.spec import Rules
from jax_flash_attn2.primitives import define
from jax_flash_attn2.primitives.call import Call

Q, K, V = (jax.random.normal(key, (2, 40, 4, 16)) for key in jax.random.split(jax.random.key(0), 3))
BIAS = jax.random.normal(jax.random.key(1), (4, 40, 40))


def dense(q, k, v, bias=None, **options):
    return attention(q, k, v, bias, compute=jnp.float32, **options)[0]


def test_cached_is_one_object(monkeypatch):
    monkeypatch.delenv("FLASH_ATTN_BLOCK_PTR", raising=False)
    one = fa.get_cached_flash_attention(64, 32)
    assert fa.get_cached_flash_attention(blocksize_q=64, blocksize_k=32) is one
    assert fa.get_cached_flash_attention(64, 64) is not one
    assert fa.get_cached_flash_attention() is fa.get_cached_flash_attention(None, None)
    assert fa.get_cached_flash_attention(64, 32, softmax_scale=1) is fa.get_cached_flash_attention(
        64, 32, softmax_scale=1.0
    )
    monkeypatch.setenv("FLASH_ATTN_BLOCK_PTR", "1")
    block = fa.get_cached_flash_attention(64, 32)
    assert block is not one
    monkeypatch.setenv("FLASH_ATTN_BLOCK_PTR", "0")
    assert fa.get_cached_flash_attention(64, 32) not in (one, block)
    monkeypatch.setenv("FLASH_ATTN_BLOCK_PTR", "1")
    assert fa.get_cached_flash_attention(64, 32) is block


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no_bias", "bias"])
def test_cached_computes(bias):
    attend = fa.get_cached_flash_attention(16, 32, softmax_scale=0.3)
    np.testing.assert_allclose(attend(Q, K, V, bias), dense(Q, K, V, bias, scale=0.3), atol=2e-6)
    grads = jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))(Q, K, V)
    assert [g.shape for g in grads] == [x.shape for x in (Q, K, V)]


def test_return_lse():
    o, lse = fa.flash_attention(Q, K, V, return_lse=True)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (Q.shape, Q.dtype, (2, 4, 40), jnp.float32)
    _, lse = fa.flash_attention(*(x.astype(jnp.bfloat16) for x in (Q, K, V)), return_lse=True)
    assert lse.dtype == jnp.float32


def test_only_lse_is_differentiated():
    got = jax.grad(lambda q: fa.flash_attention(q, K, V, return_lse=True)[1].sum())(Q)
    want = jax.grad(lambda q: attention(q, K, V, compute=jnp.float32)[1].sum())(Q)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_target_is_part_of_jits_key():
    """A function jitted for one GPU is traced anew for another."""
    traces = []

    @jax.jit
    def f(q):
        traces.append(1)
        return fa.flash_attention(q, K, V)

    for capability in (80, 90, 80):
        with fa.gpu_target(compute_capability=capability):
            f(Q)
    f(Q)
    assert len(traces) == 3


def test_bias_gradient_only_when_wanted():
    """Nobody who trains q, k and v pays for the gradient of a constant bias."""

    def backward(*wanted):
        jaxpr = jax.make_jaxpr(jax.grad(lambda *x: fa.flash_attention(*x).sum(), wanted))(Q, K, V, BIAS)
        (equation,) = [e for e in jaxpr.eqns if e.primitive is define.backward_p]
        return equation.params["wanted"]

    assert backward(0, 1, 2) == ()
    assert backward(0, 3) == ("bias",)


@pytest.mark.parametrize("in_axes", [(0, 0, 0, 0), (1, None, 2, None), (None, 0, None, 0)], ids=str)
def test_vmap(in_axes):
    """Any axis, mapped or not, of any operand: values and gradients, per example and summed."""
    operands = [
        jnp.stack([x, x + 1, x - 1], a) if a is not None else x for x, a in zip((Q, K, V, BIAS), in_axes, strict=True)
    ]

    def loss(attend):
        return lambda *x: (attend(*x, causal=True) ** 2).sum()

    for transform in (
        lambda f: jax.vmap(jax.grad(f, (0, 1, 2, 3)), in_axes),
        lambda f: jax.grad(lambda *x: jax.vmap(f, in_axes)(*x).sum(), (0, 1, 2, 3)),
    ):
        for got, want in zip(
            transform(loss(fa.flash_attention))(*operands), transform(loss(dense))(*operands), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)])
def test_vmap_of_no_rows_or_keys(shape):
    """There is a gradient of a bias that has no elements, for each example."""
    rows, keys = shape
    q, k, bias = jnp.ones((3, 2, rows, 2, 8)), jnp.ones((3, 2, keys, 2, 8)), jnp.ones((3, 2, rows, keys))
    loss = lambda q, k, bias: fa.flash_attention(q, k, k, bias).sum()
    for axes in ((0, 0, 0), (0, None, 0), (0, 0, None)):
        own = [x if axis == 0 else x[0] for x, axis in zip((q, k, bias), axes, strict=True)]
        grads = jax.vmap(jax.grad(loss, (0, 1, 2)), axes)(*own)
        assert [g.shape for g in grads] == [q.shape, k.shape, bias.shape]


def test_vmap_over_nothing():
    """An axis of length 0 gives nothing, and sums of nothing are 0."""
    q, k, bias, sinks = jnp.ones((0, 2, 7, 4, 8)), jnp.ones((2, 7, 2, 8)), jnp.ones((0, 4, 7, 7)), jnp.ones(4)

    def loss(q, k, bias, sinks):
        o, lse = fa.flash_attention(q, k, k, bias, sinks=sinks, return_lse=True)
        return o.sum() + lse.sum()

    axes = (0, None, 0, None)
    grads = jax.vmap(jax.grad(loss, (0, 1, 2, 3)), axes)(q, k, bias, sinks)
    assert [g.shape for g in grads] == [q.shape, (0, *k.shape), bias.shape, (0, 4)]
    grads = jax.grad(lambda *x: jax.vmap(loss, axes)(*x).sum(), (1, 3))(q, k, bias, sinks)
    assert [g.shape for g in grads] == [k.shape, sinks.shape]
    assert not any(map(np.any, grads))


def test_vmap_of_a_scale():
    """Folded into the batch like all else: one call, no loop."""
    scales = jnp.array([0.1, -0.5, 1.0])
    f = lambda attend: lambda s: (attend(s) ** 2).sum()
    ours = f(lambda s: fa.flash_attention(Q, K, V, softmax_scale=s))
    for got, want in zip(
        (jax.vmap(ours)(scales), jax.vmap(jax.grad(ours))(scales)),
        (jax.vmap(g := f(lambda s: dense(Q, K, V, scale=s)))(scales), jax.vmap(jax.grad(g))(scales)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3)
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(ours)))(scales))
    assert text.count("flash_attention_fwd[") == text.count("flash_attention_bwd[") == 1
    assert "scan[" not in text
    assert "while[" not in text


def options(key, batch=()):
    """One of each operand that a call may carry, for Q, K and V with more batch axes."""
    keys = iter(jax.random.split(key, 8))
    full = (*batch, 2)
    return {
        "bias": jax.random.normal(next(keys), (*full, 4, 40, 40)),
        "mask": jax.random.bernoulli(next(keys), 0.8, (*full, 1, 40, 40)),
        "q_segment_ids": jax.random.randint(next(keys), (*full, 40), 0, 2),
        "q_positions": jax.random.randint(next(keys), (*full, 40), 20, 60),
        "kv_positions": jax.random.randint(next(keys), (*full, 40), 0, 40),
        "kv_lengths": jax.random.randint(next(keys), full, 20, 40),
        "sinks": jax.random.normal(next(keys), (*batch, 4)),
        "alibi_slopes": jax.random.uniform(next(keys), (*batch, 4)),
    }


@pytest.mark.parametrize("mapped", ["q", "operands", "all", "sinks"])
def test_vmap_of_operands(mapped):
    """Mapped or shared, and mapped twice: each example has the values and gradients that it has by itself."""
    q, own = Q, options(jax.random.key(2))
    axes = {name: None for name in own}
    if mapped in ("q", "all"):
        q = jnp.stack([Q, Q + 1, Q - 1])
    if mapped in ("operands", "all"):
        own, axes = options(jax.random.key(2), (3,)), dict.fromkeys(own, 0)
    if mapped == "sinks":
        own["sinks"], axes["sinks"] = jax.random.normal(jax.random.key(3), (3, 4)), 0
    q_axis = 0 if mapped in ("q", "all") else None

    def loss(q, own):
        return (fa.flash_attention(q, K, V, causal=True, **own) ** 2).sum()

    floats = [name for name in own if jnp.issubdtype(own[name].dtype, jnp.floating)]

    def grads(q, own):
        return jax.grad(lambda q, some: loss(q, own | some), (0, 1))(q, {name: own[name] for name in floats})

    got = jax.vmap(grads, (q_axis, axes))(q, own)
    for i in range(3):
        alone = grads(q[i] if q_axis == 0 else q, {n: x[i] if axes[n] == 0 else x for n, x in own.items()})
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-4)
    outer = jnp.stack([own["sinks"], own["sinks"] + 1])

    def over_sinks(sinks):
        return jax.vmap(loss, (q_axis, axes))(q, own | {"sinks": sinks})

    if mapped != "q":
        return
    got = jax.vmap(over_sinks)(outer)
    for i in range(2):
        np.testing.assert_allclose(got[i], over_sinks(outer[i]), rtol=1e-5)


def test_gradients_in_a_vmap_of_a_vmap():
    """Of a bias that the outer one maps and the inner one shares: each call's own, as by itself."""
    q, k = (jax.random.normal(key, (3, 2, 1, 5, 2, 4)) for key in jax.random.split(jax.random.key(5)))
    bias = jax.random.normal(jax.random.key(6), (3, 2, 5, 5))
    grads = jax.jit(jax.grad(lambda b, q, k: (fa.flash_attention(q, k, k, b) ** 2).sum(), (0, 1)))
    got = jax.vmap(jax.vmap(grads, (None, 0, 0)))(bias, q, k)
    for i, j in np.ndindex(3, 2):
        for g, want in zip(got, grads(bias[i], q[i, j], k[i, j]), strict=True):
            np.testing.assert_allclose(g[i, j], want, rtol=1e-5, atol=1e-6)


def test_vmap_does_not_copy_what_is_shared():
    """A bias and a mask that are not mapped reach the call as they are."""
    mask = jnp.ones((2, 4, 40, 40), bool)
    f = jax.vmap(lambda q: fa.flash_attention(q, K, V, BIAS[None] * jnp.ones((2, 1, 1, 1)), mask=mask))
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: f(q).sum()))(jnp.stack([Q] * 5))
    (equation,) = [e for e in jaxpr.eqns if e.primitive is define.forward_p]
    shapes = dict(zip(equation.params["names"], (x.aval.shape for x in equation.invars[3:]), strict=True))
    assert equation.invars[0].aval.shape[0] == 10
    assert shapes["bias"] == shapes["mask"] == (2, 4, 40, 40)


def test_dropout_in_a_vmap_is_each_examples_own():
    """The batch that an example is folded into does not show in its mask."""
    x = jnp.stack([Q, Q + 1])
    f = lambda q: fa.flash_attention(q, K, V, dropout_rate=0.4, dropout_seed=3)
    np.testing.assert_allclose(jax.vmap(f)(x), jnp.stack([f(x[0]), f(x[1])]), atol=1e-6)


HIGHER = {
    "plain": {},
    "masked": {"causal": True, "window_size": (5, 2), "sinks": jnp.array([0.3, -jnp.inf]), "logits_soft_cap": 2.0},
    "empty_rows": {"kv_lengths": jnp.array([0]), "q_lengths": jnp.array([3])},
}


@pytest.mark.in_thirds
@pytest.mark.parametrize("name", HIGHER)
def test_higher_order(name):
    """Forward mode, hessians both ways, gradients of gradients: as of the definition."""
    x = [jax.random.normal(key, (1, 6, 2, 4)) for key in jax.random.split(jax.random.key(4), 3)]

    def ours(q):
        return (fa.flash_attention(q, *x[1:], higher_order=True, **HIGHER[name]) ** 2).sum()

    given = dict(HIGHER[name])
    window, cap = given.pop("window_size", (None, None)), given.pop("logits_soft_cap", None)
    kv, rows = given.get("kv_lengths", jnp.array([6])), given.get("q_lengths", jnp.array([6]))

    def definition(q):
        s = jnp.einsum("bqhd,bkhd->bhqk", q, x[1]) / 2
        s = s if cap is None else cap * jnp.tanh(s / cap)
        i, j = jnp.arange(6)[:, None], jnp.arange(6)
        seen = (j < kv[:, None, None, None]) & (i < rows[:, None, None, None])
        if given.get("causal"):
            seen &= (j <= i) & (j >= i - window[0])
        e = jnp.where(seen, jnp.exp(s), 0)
        l = e.sum(-1, keepdims=True) + jnp.exp(given.get("sinks", jnp.full(2, -jnp.inf)))[None, :, None, None]
        return (jnp.einsum("bhqk,bkhd->bqhd", e / jnp.where(l > 0, l, 1), x[2]) ** 2).sum()

    tangent = x[1]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, jax.jvp(ours, (x[0],), (tangent,)), jax.jvp(definition, (x[0],), (tangent,)))
    want = jax.hessian(definition)(x[0])
    close(jax.hessian(ours)(x[0]), want)
    close(jax.jacrev(jax.jacrev(ours))(x[0]), want)
    close(jax.jacfwd(ours)(x[0]), jax.grad(definition)(x[0]))


def test_higher_order_is_linear_in_memory():
    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        f = jax.grad(lambda q, k, v: fa.flash_attention(q, k, v, causal=True, higher_order=True).sum(), (0, 1, 2))
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) <= 2.2 * temporary(4096)


def test_checkpoint_names():
    """With o and lse saved, the backward pass of a checkpointed layer does not run attention forward again."""

    def calls(policy):
        layer = jax.checkpoint(lambda q: fa.flash_attention(jnp.sin(q), K, V).sum(), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(layer))(Q))
        return text.count("flash_attention_fwd[")

    save = jax.checkpoint_policies.save_only_these_names(*fa.CHECKPOINT_NAMES)
    assert calls(None) == 2
    assert calls(save) == 1


def test_empty_rows_under_debug_nans():
    """Rows that see nothing upset neither jax.debug_nans nor, where lse is not asked for, jax.debug_infs."""
    lengths = jnp.array([0, 40])

    def loss(q, k, v):
        return (fa.flash_attention(q, k, v, causal=True, kv_lengths=lengths) ** 2).sum()

    with jax.debug_nans(True):
        jax.grad(loss, (0, 1, 2))(Q, K, V)
        o, lse = fa.flash_attention(Q, K, V, kv_lengths=lengths, return_lse=True)
    assert (o[0] == 0).all()
    assert (lse[0] == -jnp.inf).all()
    with jax.debug_infs(True):
        jax.jit(loss)(Q, K, V)
        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(Q, K, V)
    assert all(jnp.isfinite(g).all() for g in grads)


def test_remat_and_scan():
    """Under jax.checkpoint, over layers in a lax.scan."""

    def network(attend):
        layer = jax.checkpoint(lambda x, _: (x + 0.1 * attend(x, x, x, causal=True), None))
        return lambda x: jax.lax.scan(layer, x, None, length=3)[0].sum()

    got, want = jax.grad(network(fa.flash_attention))(Q), jax.grad(network(dense))(Q)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_export_for_cpu():
    f = jax.jit(lambda *x: fa.flash_attention(*x, causal=True))
    np.testing.assert_array_equal(jax.export.export(f)(Q, K, V).call(Q, K, V), f(Q, K, V))


def test_eager_calls_compile_once():
    fa.flash_attention(Q, K, V)
    before = define._eager.cache_info().misses
    fa.flash_attention(Q + 1, K, V)
    assert define._eager.cache_info().misses == before


X = jax.device_put(np.ones((1, 16, 2, 16), np.float32))
SENT = {
    "causal": {"causal": True, "return_max_logits": True},
    "offset": {"causal": True, "causal_alignment": "bottom_right", "softmax_scale": -0.3},
    "length": {"kv_lengths": 5, "q_lengths": 7},
    "seed": {"dropout_rate": 0.5, "dropout_seed": 3},
    "key": {"dropout_rate": 0.5, "dropout_seed": jax.random.key(0)},
    "traced_scale": {"softmax_scale": jnp.float32(0.3), "return_lse": True},
    "higher_order": {"higher_order": True, "window_size": (3, 2)},
}


@pytest.mark.parametrize("name", SENT)
def test_sends_no_constants(name):
    """Nothing goes to the device unasked for, outside of jit too, in either direction."""
    if name == "higher_order" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("the transpose of JAX's slice sent a 0 before 0.11.2")
    options, keys = SENT[name], X[:, :12] if name == "offset" else X
    bias = jnp.zeros((1, 2, 1, keys.shape[1]))

    def first(*x):
        return jax.tree.leaves(fa.flash_attention(x[0], keys, keys, x[1], **options))[0]

    with jax.transfer_guard("disallow"):
        o, pull = jax.vjp(first, X, bias)
        dq, dbias = pull(o)
    assert (dq.shape, dbias.shape) == (X.shape, bias.shape)


def test_without_jit():
    """`jax.disable_jit` is for stepping through a caller's code: ours gives the same."""
    loss = lambda x: (fa.flash_attention(x, x, x, causal=True) ** 2).sum()
    want = jax.grad(loss)(X)
    with jax.disable_jit():
        np.testing.assert_allclose(jax.grad(loss)(X), want, rtol=1e-6)


def test_unit_outside_jit():
    """It is compiled once, and there is one under `disable_jit` too."""
    call = Call(Rules(), (fa.Config(),) * 4, None, None)
    with jax.disable_jit():
        assert define.unit(call, jnp.float32) == 1
    before = define._eager.cache_info().misses
    assert define.unit(call, jnp.float32) == 1
    assert define._eager.cache_info().misses == before
