"""The Equinox module beside `equinox.nn.MultiheadAttention`, from which it takes arguments, weights and numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2 import Config
from jax_flash_attn2.equinox import MultiheadAttention, use_flash_attention

HEADS, T, S = 4, 10, 13
SIZES = {"num_heads": HEADS, "query_size": 16, "key_size": 12, "value_size": 20, "qk_size": 8, "vo_size": 6}
SIZES |= {"output_size": 18, "use_query_bias": True, "use_output_bias": True}
RNG = np.random.default_rng(0)
OURS, THEIRS = (cls(**SIZES, key=jax.random.key(0)) for cls in (MultiheadAttention, eqx.nn.MultiheadAttention))


def draw(*shape):
    return jax.device_put(RNG.standard_normal(shape).astype(np.float32))


def inputs(*batch):
    return draw(*batch, T, 16), draw(*batch, S, 12), draw(*batch, S, 20)


X = inputs()


def some(*shape):
    return jax.device_put((RNG.random(shape) < 0.6) | (np.arange(shape[-1]) == 0))


MASKS = {
    "no_mask": None,
    "mask": some(T, S),
    "mask_of_heads": some(HEADS, T, S),
    "numbers": jax.device_put(np.asarray(some(T, S), np.float32)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_numbers_and_gradients(mask):
    x = inputs()

    @eqx.filter_jit
    def run(module):
        grads = eqx.filter_grad(lambda both: (both[0](*both[1], mask) ** 2).sum())((module, x))
        return module(*x, mask), jax.tree.leaves(grads)

    (ours, our_grads), (want, want_grads) = run(OURS), run(THEIRS)
    np.testing.assert_allclose(ours, want, atol=1e-5)
    for got, expected in zip(our_grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ((0, 0, 0, None), (0, 0, 0, None)),
        ((1, None, 0, 0), (0, 0, None, None)),
        ((None, 2, None, 1), (1, None, None, 0)),
        ((0, None, None, None), (None, 0, 1, 0)),
    ],
    ids=str,
)
def test_two_vmaps(outer, inner):
    """Batches of batches, of the weights' gradients too, some arguments mapped and others shared."""
    given = [*inputs(), some(HEADS, T, S)]
    for axes, n in ((inner, 3), (outer, 2)):
        given = [
            x if axis is None else jnp.stack([x] + [jnp.roll(x, i, -2) for i in range(1, n)], axis)
            for x, axis in zip(given, axes, strict=True)
        ]
    given[3] = given[3].at[..., 0].set(True)

    @eqx.filter_jit
    def run(module):
        return jax.vmap(jax.vmap(eqx.filter_grad(lambda x, *rest: (module(x, *rest) ** 2).sum()), inner), outer)(*given)

    np.testing.assert_allclose(run(OURS), run(THEIRS), rtol=1e-3, atol=1e-4)


def test_vmap_over_modules():
    """An ensemble: a batch axis on the weights."""
    ours, want = (
        eqx.filter_jit(eqx.filter_vmap(lambda module: module(*X)))(
            jax.tree.map(lambda w: jnp.stack([w, 2 * w]) if eqx.is_array(w) else w, module)
        )
        for module in (OURS, THEIRS)
    )
    np.testing.assert_allclose(ours, want, atol=1e-4)


def test_process_heads():
    rope = eqx.nn.RotaryPositionalEmbedding(8)
    heads = lambda q, k, v: (jax.vmap(rope, 1, 1)(q), jax.vmap(rope, 1, 1)(k), v)
    ours, want = (eqx.filter_jit(module)(*X, process_heads=heads) for module in (OURS, THEIRS))
    np.testing.assert_allclose(ours, want, atol=1e-5)
    with pytest.raises(ValueError, match="process_heads must not change the shape"):
        OURS(*X, process_heads=lambda q, k, v: (q[1:], k, v))


def test_dtypes():
    """Half precision, and arguments of several dtypes."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, (OURS, THEIRS, X))
    ours, want = (eqx.filter_jit(module)(*half[2]) for module in half[:2])
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), want.astype(jnp.float32), atol=3e-2)
    with jax.numpy_dtype_promotion("standard"):
        mixed = [module(half[2][0], *X[1:]) for module in (OURS, THEIRS)]
    np.testing.assert_allclose(*mixed, atol=1e-5)


# Dropout.


def uniform(rate, **options):
    """A module that attends alike to all, and returns which of T keys each head dropped: its values are an identity."""
    module = MultiheadAttention(2, 16, vo_size=16, output_size=32, dropout_p=rate, key=jax.random.key(0), **options)
    zero, eye = jnp.zeros_like(module.query_proj.weight), jnp.tile(jnp.eye(16), (2, 1))
    where = lambda m: (m.query_proj.weight, m.value_proj.weight, m.output_proj.weight)
    return eqx.tree_at(where, module, (zero, eye, jnp.eye(32)))


def test_dropout():
    module, x = uniform(0.25), jnp.eye(16)
    attend = jax.jit(lambda key: module(x, x, x, key=key))
    one = attend(jax.random.key(1)).reshape(16, 2, 16)
    np.testing.assert_allclose(one[one != 0], 1 / 16 / 0.75, rtol=1e-5)
    assert 0.15 < (one == 0).mean() < 0.35
    assert (one[:, 0] != one[:, 1]).any()  # each head for itself
    keys = jax.random.split(jax.random.key(1), 3)
    many = jax.vmap(attend)(keys)
    np.testing.assert_array_equal(many[1], attend(keys[1]))
    assert (many[0] != many[1]).any()
    np.testing.assert_array_equal(attend(jax.random.PRNGKey(1)), one.reshape(16, 32))


def test_inference():
    module, x = uniform(0.25), jnp.eye(16)
    still = module(x, x, x, inference=True)
    np.testing.assert_allclose(still, 1 / 16, rtol=1e-5)
    np.testing.assert_array_equal(eqx.nn.inference_mode(module)(x, x, x), still)
    np.testing.assert_array_equal(uniform(0.25, inference=True)(x, x, x), still)
    np.testing.assert_array_equal(uniform(0.0)(x, x, x), still)
    with pytest.warns(UserWarning, match="inference"):
        np.testing.assert_array_equal(module(x, x, x, deterministic=True), still)
    with pytest.raises(RuntimeError, match="Dropout requires a key"):
        module(x, x, x)


# Options, and taking the place of what is there.


def test_options():
    causal = MultiheadAttention(**SIZES, causal=True, window_size=(4, 0), key=jax.random.key(0))
    band = jnp.tri(T, S, dtype=bool) & ~jnp.tri(T, S, -5, dtype=bool)
    want = THEIRS(*X, band)
    np.testing.assert_allclose(causal(*X), want, atol=1e-5)
    np.testing.assert_allclose(OURS(*X, causal=True, window_size=(4, 0)), want, atol=1e-5)
    np.testing.assert_allclose(causal(*X, causal=False, window_size=None), THEIRS(*X), atol=1e-5)
    ids = jnp.arange(T) // 4, jnp.arange(S) // 4
    want = THEIRS(*X, ids[0][:, None] == ids[1])
    np.testing.assert_allclose(OURS(*X, q_segment_ids=ids[0], kv_segment_ids=ids[1]), want, atol=1e-5)


def test_use_flash_attention():
    """Other modules, weights, and what is derived from Equinox's attention stay as they were."""

    class Derived(eqx.nn.MultiheadAttention):
        pass

    derived, linear = Derived(2, 8, key=jax.random.key(0)), eqx.nn.Linear(2, 2, key=jax.random.key(0))
    model = {"a": [THEIRS, linear], "b": derived}
    turned = use_flash_attention(model, config=Config(block_m=16), causal=True)
    assert type(turned["a"][0]) is MultiheadAttention
    assert type(turned["b"]) is Derived
    assert jax.tree.leaves(turned) == jax.tree.leaves(model)
    mask = jnp.tri(T, S, dtype=bool)
    np.testing.assert_allclose(turned["a"][0](*X), THEIRS(*X, mask), atol=1e-5)
    same = use_flash_attention(model, causal=True, config=Config(block_m=16))
    assert jax.tree.structure(same) == jax.tree.structure(turned)
    assert jax.tree.structure(use_flash_attention(model)) != jax.tree.structure(turned)


def test_use_flash_attention_that_would_do_nothing():
    """It raises, rather than leave a model as it is that was to become causal. Twice the same is once."""

    class Derived(eqx.nn.MultiheadAttention):
        pass

    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"must have an equinox\.nn\.MultiheadAttention to turn, got none"):
        use_flash_attention({"a": eqx.nn.Linear(2, 2, key=key)}, causal=True)
    with pytest.raises(ValueError, match=r"got only what is derived from it \(Derived\)"):
        use_flash_attention([Derived(2, 8, key=key)], causal=True)
    causal = use_flash_attention(THEIRS, causal=True, window_size=[3, 0])
    assert causal.options == (("causal", True), ("window_size", (3, 0)))
    for options in ({}, {"causal": True}, {"window_size": [3, 0], "logits_soft_cap": None}):
        again = use_flash_attention([causal, THEIRS], **options)
        assert again[0].options == causal.options
        assert type(again[1]) is MultiheadAttention
    for model in (causal, [THEIRS, causal]):
        with pytest.raises(ValueError, match="jax_flash_attn2's already, with causal=True, got causal=False"):
            use_flash_attention(model, causal=False)


def test_errors():
    query, key, value = X
    with pytest.raises(ValueError, match="sequences of equal length, got 13 and 12"):
        OURS(query, key, value[1:])
    for shape in ((S, T), (1, T, S), (T, 1), (1, 1, T, S)):
        with pytest.raises(ValueError, match="mask must have shape"):
            OURS(query, key, value, jnp.ones(shape, bool))
    with pytest.raises(TypeError, match=r"mask must be an array, .* got list; make it jnp\.asarray"):
        OURS(query, key, value, [[True] * S] * T)
    with pytest.raises(TypeError, match="logits_soft_cap must be hashable, as it is static, got list"):
        MultiheadAttention(**SIZES, logits_soft_cap=[3.0], key=jax.random.key(0))
    make = lambda **options: MultiheadAttention(**SIZES, key=jax.random.key(0), **options)
    for wrong in (make, lambda **options: use_flash_attention(THEIRS, **options)):
        with pytest.raises(TypeError, match=r"no argument 'sinks': arrays are given when it is called, .*sinks=\.\.\."):
            wrong(sinks=jnp.zeros(HEADS))
        with pytest.raises(TypeError, match="MultiheadAttention has no argument 'is_causal'; here it is causal"):
            wrong(is_causal=True)
    with pytest.raises(TypeError, match="no argument 'dropout_rate'; here it is dropout_p"):
        make(dropout_rate=0.1)
    with pytest.raises(TypeError, match="no argument 'num_head'; did you mean num_heads"):
        make(num_head=2)
    with pytest.raises(TypeError, match="return_lse is not for this call"):
        OURS(query, key, value, return_lse=True)
    with pytest.raises(TypeError, match="dropout_rate must be a number"):
        eqx.tree_at(lambda m: m.dropout.p, OURS, jnp.float32(0.5))(query, key, value, key=jax.random.key(0))


def test_row_that_sees_nothing():
    """It gives the output projection's bias alone, where Equinox gives the mean of all values."""
    mask = jnp.ones((T, S), bool).at[3].set(False)
    ours = OURS(*X, mask)
    np.testing.assert_allclose(ours[3], OURS.output_proj.bias, atol=1e-6)
    np.testing.assert_allclose(jnp.delete(ours, 3, 0), jnp.delete(THEIRS(*X, mask), 3, 0), atol=1e-5)


def test_a_bias_of_integers():
    """As through the other doors."""
    x, bias = inputs(), np.arange(T * S, dtype=np.int32).reshape(T, S) % 3
    np.testing.assert_allclose(OURS(*x, bias=bias), OURS(*x, bias=bias.astype(np.float32)), atol=1e-6)
