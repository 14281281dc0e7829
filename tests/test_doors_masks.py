"""Every kind of mask through every door gives what `flash_attention` gives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_flash_attn2
from jax_flash_attn2 import dot_product_attention, explain, flash_attention, masks
from jax_flash_attn2.call import api, inputs
from jax_flash_attn2.equinox import MultiheadAttention, use_flash_attention

B, T, H, D = 2, 24, 4, 8
RNG = np.random.default_rng(5)
X = [jax.device_put(RNG.standard_normal((B, T, H, D)).astype(np.float32)) for _ in range(3)]
LOCAL = masks.causal() & masks.sliding_window(5)
IDS = np.sort(RNG.integers(0, 3, (B, T)), -1)
REAL = jax.device_put(np.arange(T) < np.array([T, 17])[:, None])
KINDS = {
    "function": lambda b, h, i, j: i - j < h + 2,
    "predicate": LOCAL,
    "of_arrays": LOCAL & masks.documents(IDS),
    "blocks": masks.BlockMask.from_predicate(LOCAL, (1, 1, T, T), block_m=16, block_n=32),
    "weights": masks.Mask.from_dense(jax.device_put(RNG.random((1, H, T, T)).astype(np.float32))),
    "array": jax.device_put(RNG.random((B, 1, T, T)) < 0.6),
}


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_door(kind):
    mask, (q, k, v) = KINDS[kind], X
    want = flash_attention(q, k, v, mask=mask)
    close(dot_product_attention(q, k, v, mask=mask), want)
    close(dot_product_attention(q, k, v, None, mask, key_value_seq_lengths=jnp.array([T, T])), want)
    for attend in (
        jax_flash_attn2.flax.make_attention_fn(mask=mask),
        lambda *x: jax_flash_attn2.flax.attention_fn(*x, mask=mask),
    ):
        close(attend(q, k, v), want)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_mask_of_flax(kind):
    """What both let through: padding as Flax makes it, and what was set beforehand."""
    mask, (q, k, v) = KINDS[kind], X
    padding = nnx.make_attention_mask(REAL, REAL)
    bias = jax.device_put(RNG.standard_normal((1, H, 1, T)).astype(np.float32))
    attend = jax_flash_attn2.flax.make_attention_fn(mask=mask)
    want = flash_attention(q, k, v, bias, mask=mask, q_segment_ids=jnp.where(REAL, 0, -1))
    close(attend(q, k, v, bias, padding), want)


def test_predicates_of_both_are_combined():
    q, k, v = X
    attend = jax_flash_attn2.flax.make_attention_fn(mask=LOCAL, causal=True)
    close(attend(q, k, v, mask=masks.documents(IDS)), flash_attention(q, k, v, mask=KINDS["of_arrays"]))
    once = attend(q, k, v, is_causal=True)  # which is what the option says
    close(once, flash_attention(q, k, v, mask=LOCAL))
    with pytest.raises(TypeError, match="mask must be an array or a predicate where another mask is set beforehand"):
        attend(q, k, v, mask=KINDS["blocks"])
    assert jax_flash_attn2.flax.make_attention_fn(mask=LOCAL) is jax_flash_attn2.flax.make_attention_fn(mask=LOCAL)
    for name, why in (("bias", "Flax gives it"), ("return_lse", "the output is all that Flax takes")):
        with pytest.raises(TypeError, match=f"no option '{name}': {why}"):
            jax_flash_attn2.flax.make_attention_fn(**{name: None})


ATTENTION = [cls(H, H * D, key=jax.random.key(0)) for cls in (MultiheadAttention, eqx.nn.MultiheadAttention)]
TOKENS = X[0][0].reshape(T, H * D)


def evaluated(mask):
    return masks.evaluate(mask, *(np.arange(n) for n in (1, H, T, T)))[0]


@pytest.mark.parametrize("kind", ["function", "predicate", "of_arrays", "blocks"])
def test_equinox(kind):
    """In a call, and as an option of the module, alone and beside an array."""
    ours, theirs = ATTENTION
    mask = LOCAL & masks.documents(IDS[0]) if kind == "of_arrays" else KINDS[kind]
    seen = evaluated(LOCAL if kind == "blocks" else mask)
    want = theirs(*[TOKENS] * 3, seen)
    close(ours(*[TOKENS] * 3, mask), want)
    if kind in ("of_arrays", "blocks"):
        with pytest.raises(TypeError, match="mask as an option is static, so it must be a predicate without arrays"):
            MultiheadAttention(H, H * D, key=jax.random.key(0), mask=mask)
        return
    fixed = MultiheadAttention(H, H * D, key=jax.random.key(0), mask=mask)
    close(fixed(*[TOKENS] * 3), want)
    close(use_flash_attention(theirs, mask=mask)(*[TOKENS] * 3), want)
    first = jnp.broadcast_to(np.arange(T) % 7 == 0, (T, T)) | jnp.eye(T, dtype=bool)
    close(fixed(*[TOKENS] * 3, first), theirs(*[TOKENS] * 3, seen & first))


def test_equinox_mapped_over_documents():
    x = jnp.stack([TOKENS, TOKENS[::-1]])
    run = jax.vmap(lambda module, x, ids: module(x, x, x, LOCAL & masks.documents(ids)), (None, 0, 0))
    want = [ATTENTION[1](*[y] * 3, evaluated(LOCAL & masks.documents(ids))) for y, ids in zip(x, IDS, strict=True)]
    close(run(ATTENTION[0], x, IDS), jnp.stack(want))


def test_traced_documents_are_segments():
    """Packed documents that come into a jitted function let tiles be skipped, as their ids do."""
    q, k, v = X
    run = jax.jit(lambda ids, *x: flash_attention(*x, mask=masks.documents(ids) & LOCAL))
    close(run(IDS, q, k, v), flash_attention(q, k, v, mask=LOCAL & masks.documents(IDS)))
    one = jax.jit(lambda ids, *x: flash_attention(*x, mask=masks.documents(ids)))
    close(one(IDS[0], q, k, v), flash_attention(q, k, v, q_segment_ids=IDS[0]))
    met = []

    def operands_of(ids):
        options = api.defaults() | {"mask": LOCAL & masks.documents(ids)}
        met.extend(inputs.prepare(q, k, v, None, **options)[1][3])
        return ids

    jax.eval_shape(operands_of, IDS)
    assert {"q_segments", "kv_segments", "row_tiles"} <= {*met}
    with pytest.raises(ValueError, match="q_ids of documents must have shape"):
        one(IDS[:, 1:], q, k, v)


def test_window_that_is_a_mask():
    q, k, v = X
    with pytest.raises(
        ValueError, match="local_window_size of negative or traced numbers is a mask by index, and cannot"
    ):
        dot_product_attention(q, k, v, mask=LOCAL, local_window_size=(-1, 3))


def test_adapters_need_no_import():
    assert {"flax", "equinox", "masks"} <= set(dir(jax_flash_attn2))
    with pytest.raises(AttributeError, match="has no attribute 'torch'"):
        jax_flash_attn2.torch  # noqa: B018


def test_explanations():
    """Printed once, wherever; of shapes alone."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 16), jnp.bfloat16)
    made = explain(x, x, x, mask=LOCAL)
    assert repr(made) == str(made)
    assert made.passes[0].visited == explain(*(jnp.zeros(x.shape, x.dtype),) * 3, mask=LOCAL).passes[0].visited
    assert jax_flash_attn2.supported(x, x, x, mask=LOCAL)
    assert not jax_flash_attn2.supported(x, x, jax.ShapeDtypeStruct((1, 256, 2, 16), jnp.float32))
