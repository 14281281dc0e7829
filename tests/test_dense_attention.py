"""Attention with all of its logits in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import run
from reference import attention

from jax_flash_attn2.masks import (
    BlockMask,
    Mask,
    MaskCache,
    causal_mask_cache,
    dense_attention,
    documents,
    evaluate,
    sinks,
    sliding_window,
)

RNG = np.random.default_rng(0)
SQ, SK = 7, 10
Q_IDS, KV_IDS = np.array([[0, 0, 1, 1, 1, -1, -1], [2, 2, 2, 0, 0, 0, -2]]), RNG.integers(-1, 3, (2, SK))

DENSE_CASES = {
    "causal window": {"causal": True, "window_size": 2, "causal_alignment": "bottom_right"},
    "bias and window": {"window_size": (1, 3), "bias": (1, 4, 7, 9)},
    "mask and causal": {"mask": (7, 9), "causal": True},
    "scale": {"scale": -0.7},
    "bfloat16": {"causal": True, "dtype": "bfloat16"},
    "float16, wider v": {"dtype": "float16", "v_dim": 24},
    "more rows than keys": {"causal": True, "causal_alignment": "bottom_right", "seqlen_q": 13},
    "two batch axes": {"causal": True, "batch": (2, 3), "mask": (2, 3, 1, 7, 9)},
    "no batch axis, one row": {"causal": True, "causal_alignment": "bottom_right", "batch": (), "seqlen_q": 1},
    "no keys": {"seqlen_k": 0},
}
DIFFERENTIATED = ("causal window", "bias and window", "mask and causal", "bfloat16")


@pytest.mark.parametrize("name", DENSE_CASES)
def test_dense_attention(name):
    """o and its gradients are the definition's."""
    rng, given = np.random.default_rng(2), dict(DENSE_CASES[name])
    dtype, batch, v_dim = given.pop("dtype", "float32"), given.pop("batch", (2,)), given.pop("v_dim", 16)
    seqlen_q, seqlen_k, scale = given.pop("seqlen_q", 7), given.pop("seqlen_k", 9), given.pop("scale", None)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal((*batch, n, heads, d)), dtype)
        for n, heads, d in ((seqlen_q, 4, 16), (seqlen_k, 2, 16), (seqlen_k, 2, v_dim), (seqlen_q, 4, v_dim))
    )
    if "bias" in given:
        given["bias"] = jnp.asarray(rng.standard_normal(given["bias"]), dtype)
    if "mask" in given:
        given["mask"] = rng.random(given["mask"]) < 0.4

    def defined(q, k, v):
        return attention(q, k, v, **given, scale=scale, compute=jnp.float32, round_p=jnp.dtype(dtype))[0].astype(dtype)

    def ours(q, k, v):
        return dense_attention(q, k, v, **given, softmax_scale=scale, return_weights=True)

    def both(q, k, v, do):
        if name not in DIFFERENTIATED:
            got, weights = ours(q, k, v)
            return (got,), (defined(q, k, v),), weights
        (got, pull, weights), (want, pull_wanted) = jax.vjp(ours, q, k, v, has_aux=True), jax.vjp(defined, q, k, v)
        return (got, *pull(do)), (want, *pull_wanted(do)), weights

    got, want, weights = run(both, q, k, v, do)
    tolerance = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 4e-3}[dtype]
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)
    assert (weights.dtype, weights.shape) == (np.float32, (*batch, 4, seqlen_q, seqlen_k))
    np.testing.assert_allclose(weights.sum(-1), (weights > 0).any(-1), atol=1e-6)


def test_dense_attention_of_rows_that_see_nothing():
    """Output, weights and gradients are 0, whatever hides the keys."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 6, 2, 8)), jnp.float32) for _ in range(3))
    hidden = np.ones((6, 6), bool)
    hidden[2] = False
    for options in ({"mask": hidden}, {"bias": np.where(hidden, 0, -np.inf).astype(np.float32)}):

        def summed(q, k, v):
            o, weights = dense_attention(q, k, v, **options, return_weights=True)  # noqa: B023
            return o.sum(), (o, weights)

        (dq, dk, dv), (o, weights) = run(jax.grad(summed, (0, 1, 2), has_aux=True), q, k, v)
        assert not o[:, 2].any()
        assert not weights[:, :, 2].any()
        assert not dq[:, 2].any()
        assert all(np.isfinite(x).all() for x in (dq, dk, dv))


def test_dense_attention_uses_the_cache():
    q = jnp.ones((2, 6, 2, 8))
    cache = MaskCache()
    for _ in range(3):
        dense_attention(q, q, q, causal=True, cache=cache)
    jax.jit(lambda q: dense_attention(q, q, q, causal=True, cache=cache))(q)  # compares indices
    assert cache.info()[:2] == (2, 1)
    dense_attention(q, q, q, cache=cache)  # needs none
    assert cache.info()[:2] == (2, 1)
    dense_attention(q, q, q, window_size=2, cache=cache)
    assert cache.info()[:2] == (2, 2)
    before = causal_mask_cache.info()
    built = dense_attention(q, q, q, causal=True, cache=None)
    assert causal_mask_cache.info() == before
    np.testing.assert_array_equal(built, dense_attention(q, q, q, causal=True))


class Weights:
    """As much of a `Mask` as `dense_attention` looks at."""

    def __init__(self, weights):
        self.weights = weights

    def to_dense(self):
        return self.weights


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_dense_attention_under_weights(batch):
    """A weight w divides what its key counts: logits lose log(w), and no key of weight 0 is seen."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((*batch, 5, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    weights = rng.random((max(batch, default=1), 1, 5, 5)).astype(np.float32) * (rng.random((1, 1, 5, 5)) < 0.7)
    shown = weights.reshape(*batch, 1, 5, 5)
    bias = np.where(shown > 0, -np.log(np.where(shown > 0, shown, 1)), -np.inf).astype(np.float32)

    def pairs(q, k, v, weights):
        return (
            (
                dense_attention(q, k, v, mask=Mask.from_dense(weights), causal=True),
                dense_attention(q, k, v, bias, causal=True),
            ),
            (dense_attention(q, k, v, mask=Mask.from_dense(weights > 0)), dense_attention(q, k, v, mask=shown > 0)),
        )

    for got, want in run(pairs, q, k, v, jnp.asarray(weights)):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_dense_attention_under_a_predicate():
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 8)), jnp.float32) for n in (SQ, SK, SK))
    mask = sliding_window(2) & documents(Q_IDS, KV_IDS) | sinks(1)
    got = run(lambda mask: dense_attention(q, k, v, mask=mask), mask)
    want = run(lambda: dense_attention(q, k, v, mask=evaluate(mask, *map(np.arange, (2, 1, SQ, SK)))))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_dense_attention_under_a_block_mask():
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 8)), jnp.float32) for n in (SQ, SK, SK))
    weights = np.where(rng.random((2, 1, SQ, SK)) < 0.5, 0.5 * rng.integers(1, 3, (2, 1, SQ, SK)), 0)
    for dense in (weights.astype(np.float32), weights > 0):
        got = run(lambda mask: dense_attention(q, k, v, mask=mask), BlockMask.from_mask(dense))
        np.testing.assert_allclose(got, dense_attention(q, k, v, mask=Mask.from_dense(dense)), atol=2e-6)


def test_dense_attention_refuses():
    q = jnp.ones((2, 6, 2, 8))
    for options, error, message in [
        ({"cache": 3}, TypeError, "cache must be a MaskCache, or None"),
        ({"return_weights": 1}, TypeError, "return_weights must be True or False"),
        ({"mask": 3}, TypeError, "array of booleans, a Mask, a BlockMask or a predicate, got int"),
        ({"mask": jnp.ones((6, 6))}, TypeError, "mask must have dtype bool"),
        ({"mask": Weights(jnp.ones((2, 2, 6, 7)))}, ValueError, r"mask must have the axes \[B, H, Sq, Sk\]"),
        ({"mask": Weights(jnp.ones((6, 6)))}, ValueError, r"mask must have the axes \[B, H, Sq, Sk\]"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"causal_alignment": "x"}, ValueError, "causal_alignment must be one of"),
        ({"window_size": -1}, ValueError, "window_size must not be negative"),
        ({"softmax_scale": "x"}, TypeError, "softmax_scale must be"),
    ]:
        with pytest.raises(error, match=message):
            dense_attention(q, q, q, **options)


def test_dense_attention_holds_no_dense_constant_under_jit():
    """Indices are compared there: a constant of [Sq, Sk] is slow to compile, and each program keeps its own."""
    q = jax.ShapeDtypeStruct((1, 512, 1, 8), jnp.float32)
    for options in ({"causal": True}, {"window_size": (7, 3), "causal_alignment": "bottom_right"}, {"cache": None}):
        f = jax.jit(lambda q, k, options=options: dense_attention(q, k, k, **{"window_size": 9, **options}))
        assert len(f.lower(q, jax.ShapeDtypeStruct((1, 640, 1, 8), jnp.float32)).as_text()) < 2**15
