"""The public functions beyond their numbers: caching, contexts, transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention

import jax_flash_attn2 as fa
from jax_flash_attn2 import primitives

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
        (equation,) = [e for e in jaxpr.eqns if e.primitive is primitives._backward_p]
        return equation.params["bias_grad"]

    assert not backward(0, 1, 2)
    assert backward(0, 3)


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


def test_vmap_of_a_scale():
    scales = jnp.array([0.1, -0.5, 1.0])
    f = lambda attend: lambda s: (attend(s) ** 2).sum()
    ours = f(lambda s: fa.flash_attention(Q, K, V, softmax_scale=s))
    for got, want in zip(
        (jax.vmap(ours)(scales), jax.vmap(jax.grad(ours))(scales)),
        (jax.vmap(g := f(lambda s: dense(Q, K, V, scale=s)))(scales), jax.vmap(jax.grad(g))(scales)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3)


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
    before = primitives._eager.cache_info().misses
    fa.flash_attention(Q + 1, K, V)
    assert primitives._eager.cache_info().misses == before
