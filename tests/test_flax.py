"""The `attention_fn` inside Flax's own modules, NNX and Linen, beside Flax's own attention."""

import functools
import inspect

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.lax import DotAlgorithmPreset, Precision

import jax_flash_attn2.flax as adapter
from jax_flash_attn2 import Config, flash_attention, masks
from jax_flash_attn2.flax import attention_fn, make_attention_fn

HEADS, WIDTH, T = 4, 32, 12
RNG = np.random.default_rng(0)


def draw(*shape):
    return jax.device_put(RNG.standard_normal(shape).astype(np.float32))


Q, K, V = draw(2, T, HEADS, 8), draw(2, T + 3, 2, 8), draw(2, T + 3, 2, 8)
TOKENS = np.maximum(RNG.integers(0, 2, (2, T)), np.arange(T) == 0).astype(np.float32)  # 0 is padding; row 0 sees itself
CAUSAL = np.asarray(nnx.make_causal_mask(jnp.ones((2, T))))
PADDING = nnx.make_attention_mask(jnp.ones((2, T)), TOKENS)
assert CAUSAL.dtype == jnp.float32
DROPPED_IN_DECODE_STEPS = tuple(int(x) for x in flax.__version__.split(".")) >= (0, 12, 12)
"""Whether Flax keeps is_causal to itself in a decode step, where the mask does the work; `test_causal_decoding`."""


def standard(attention):
    """Flax's own attention, which does not keep to strict promotion of dtypes."""

    @functools.wraps(attention)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return attention(*args, **kwargs)

    return wrapped


def nnx_module(attention=None, **options):
    """The same weights every time."""
    options = {"attention_fn": attention or standard(nnx.dot_product_attention), "decode": False} | options
    return nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(3), **options)


def applied(module, x, **call):
    return nnx.jit(lambda module: module(x, **call))(module)


def linen_module(attention=None, **options):
    attention = attention or standard(linen.dot_product_attention)
    return linen.MultiHeadDotProductAttention(HEADS, qkv_features=WIDTH, attention_fn=attention, **options)


CALLS = {
    "plain": ((2,), {}),
    "is_causal": ((2,), {"is_causal": True}),
    "causal_mask": ((2,), {"mask": CAUSAL}),
    "causal_and_padding": ((2,), {"mask": nnx.combine_masks(CAUSAL, PADDING)}),
    "is_causal_and_padding": ((2,), {"mask": PADDING, "is_causal": True}),
    "any_number": ((2,), {"mask": 3 * jnp.tri(T)}),
    "booleans": ((2,), {"mask": jnp.tri(T, dtype=bool)[None, None]}),
    "no_batch": ((), {"is_causal": True}),
    "no_batch_mask": ((), {"mask": nnx.make_causal_mask(jnp.ones((T,)))}),
    "no_batch_mask_with_one": ((), {"mask": nnx.make_causal_mask(jnp.ones((1, T)))}),
    "two_batch_axes": ((2, 3), {"is_causal": True}),
    "two_batch_axes_mask": ((2, 3), {"mask": nnx.make_causal_mask(jnp.ones((2, 3, T)))}),
}


@pytest.mark.parametrize("name", CALLS)
def test_nnx(name):
    batch, call = CALLS[name]
    x = draw(*batch, T, WIDTH)
    ours, want = (applied(nnx_module(f), x, **call) for f in (attention_fn, None))
    np.testing.assert_allclose(ours, want, rtol=1e-3, atol=1e-5)


def test_nnx_gradients():
    """Of every weight."""
    x = draw(2, T, WIDTH)
    loss = lambda module: (module(x, mask=PADDING, is_causal=True) ** 2).sum()
    ours, want = (jax.tree.leaves(nnx.jit(nnx.grad(loss))(nnx_module(f))) for f in (attention_fn, None))
    assert len(ours) == len(want) == 8
    for got, expected in zip(ours, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_nnx_batch_axes_in_part():
    """A mask that has some of several batch axes, which Flax's own cannot take."""
    q, k, v = draw(3, 2, 5, 2, 8), draw(3, 2, 5, 2, 8), draw(3, 2, 5, 2, 8)
    mask = jax.device_put(RNG.random((2, 1, 5, 5)) < 0.6).at[..., 0].set(True)
    ours = attention_fn(q, k, v, mask=mask)
    want = nnx.dot_product_attention(q, k, v, mask=jnp.broadcast_to(mask, (3, 2, 1, 5, 5)))
    np.testing.assert_allclose(ours, want, atol=1e-5)


def test_nnx_grouped_query():
    x = draw(2, T, WIDTH)
    ours, want = (applied(nnx_module(f, num_kv_heads=2), x, mask=CAUSAL) for f in (attention_fn, None))
    np.testing.assert_allclose(ours, want, atol=1e-5)


@pytest.mark.parametrize("attention", [attention_fn, make_attention_fn(implementation="xla")])
def test_linen(attention):
    x = draw(2, T, WIDTH)
    variables = linen_module().init(jax.random.key(0), x)
    for mask in (None, CAUSAL, linen.combine_masks(CAUSAL, PADDING), CAUSAL.astype(bool)):
        ours, want = (jax.jit(linen_module(f).apply)(variables, x, mask=mask) for f in (attention, None))
        np.testing.assert_allclose(ours, want, atol=1e-5)


def test_dtype():
    """dtype casts what the projections made; without it the three are promoted."""
    x, dtype = draw(2, T, WIDTH), jnp.dtype("bfloat16")  # jax.nn's float16 does not compile for a CPU
    variables = linen_module().init(jax.random.key(0), x)
    for run in (
        lambda f: applied(nnx_module(f, dtype=dtype), x, mask=CAUSAL),
        lambda f: jax.jit(linen_module(f, dtype=dtype).apply)(variables, x),
    ):
        ours, want = run(attention_fn), run(None)
        assert ours.dtype == want.dtype == dtype
        np.testing.assert_allclose(ours.astype("float32"), want.astype("float32"), atol=3e-2)
    with jax.numpy_dtype_promotion("standard"):
        assert attention_fn(Q.astype(dtype), K, V.astype(dtype)).dtype == jnp.float32
    for dtype in ("bfloat16", "float16"):
        assert attention_fn(Q, K, V, dtype=dtype).dtype == dtype
    assert attention_fn(*(x.astype(jnp.int32) for x in (Q, K, V))).dtype == jnp.float32


# Decoding.


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_decode(kind):
    """Position by position with a cache, and all at once."""
    x = draw(2, T, WIDTH)
    if kind == "nnx":
        module = nnx_module(attention_fn, decode=True)
        module.init_cache(x.shape)
        steps = [module(x[:, i : i + 1], is_causal=DROPPED_IN_DECODE_STEPS) for i in range(T)]
        want = nnx_module()(x, mask=CAUSAL)
    else:
        variables = linen_module().init(jax.random.key(0), x)
        module = linen_module(attention_fn, decode=True)
        cache = module.init(jax.random.key(0), x)["cache"]
        step = jax.jit(lambda cache, x: module.apply({**variables, "cache": cache}, x, mutable=["cache"]))
        steps = []
        for i in range(T):
            y, changed = step(cache, x[:, i : i + 1])
            cache = changed["cache"]
            steps.append(y)
        want = linen_module().apply(variables, x, mask=CAUSAL)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), want, atol=1e-5)


def test_causal_decoding():
    """What Flax before 0.12.12 asks for in a decode step is not what anybody means by it."""
    q, mask = Q[:, :1], (jnp.arange(T + 3) < 5)[None, None, None]
    with pytest.raises(ValueError, match=r"this one query would see key 0 of 15 alone.*is_causal=False"):
        attention_fn(q, K, V, mask=mask, is_causal=True)
    want = flash_attention(q, K[:, :5], V[:, :5])
    bottom_right = make_attention_fn(causal_alignment="bottom_right")
    np.testing.assert_allclose(bottom_right(q, K, V, mask=mask, is_causal=True), want, atol=1e-5)
    np.testing.assert_allclose(attention_fn(q, K, V, mask=mask), want, atol=1e-5)
    top_left = attention_fn(q, K, V, is_causal=True)  # without a mask it is no decode step, and what it says
    np.testing.assert_allclose(top_left, nnx.dot_product_attention(q, K, V, is_causal=True), atol=1e-5)


COUNTS_ROWS = {
    "window": ({"window_size": [4, 0]}, "window_size counts from the row's number.*over 15 keys.*jnp.arange"),
    "window_bottom_right": (
        {"window_size": (4, 0), "causal_alignment": "bottom_right"},
        "window_size .* the last key of a cache is not the newest until it is full",
    ),
    "right": ({"window_size": (None, 2)}, "window_size counts"),
    "alibi": ({"alibi_slopes": jnp.ones(HEADS)}, "alibi_slopes counts.*bottom_right.*shifts all logits"),
    "alibi_and_sinks": (
        {"alibi_slopes": jnp.ones(HEADS), "sinks": jnp.ones(HEADS), "causal_alignment": "bottom_right"},
        "alibi_slopes counts.*where it stands$",
    ),
    "mask": ({"mask": masks.sliding_window(4) | masks.sinks(2)}, "mask, an option that reads the row i, counts"),
    "score_mod": (
        {"score_mod": lambda s, b, h, i, j: jnp.where(i - j < 4, s, -jnp.inf)},
        "score_mod, which reads the row i, counts",
    ),
}


@pytest.mark.parametrize("name", COUNTS_ROWS)
def test_what_counts_rows_is_no_option_of_decoding(name):
    """The one query of a decode step is row 0, wherever it stands: each of these would give other numbers than the
    whole sequence does. Without a mask it is no decode step."""
    options, message = COUNTS_ROWS[name]
    mask = (jnp.arange(T + 3) < 9)[None, None, None]
    attend = make_attention_fn(**options)
    with pytest.raises(ValueError, match=message):
        attend(Q[:, :1], K, V, mask=mask)
    assert jax.eval_shape(attend, Q[:, :1], K, V).shape == (2, 1, HEADS, 8)


def test_options_of_decoding_that_are_right():
    """Positions say where the query stands; what does not read the row does not need them. Row 8 of a sequence, of
    which the cache has rows 0 to 8, and something else behind."""
    mask = (jnp.arange(T + 3) < 9)[None, None, None]
    at = {"q_positions": jnp.array([[8]]), "kv_positions": jnp.arange(15)[None]}
    slopes = jnp.array([0.5, 0.25, 0.1, 0.05])
    ahead = 8 - jnp.arange(15)
    whole = functools.partial(flash_attention, Q[:, :1], K, V)
    for options, call, want in (
        ({"window_size": (4, 0)} | at, {"is_causal": True}, whole(mask=mask & (ahead <= 4))),
        ({"alibi_slopes": slopes} | at, {}, whole(-slopes[:, None, None] * ahead.astype(jnp.float32), mask=mask)),
        (
            {"alibi_slopes": slopes, "causal_alignment": "bottom_right"},
            {"is_causal": True},
            whole(-slopes[:, None, None] * ahead.astype(jnp.float32), mask=mask),
        ),
        (
            {"mask": masks.sinks(6), "score_mod": lambda s, b, h, i, j: jnp.where(j < 3, s, s + 2)},
            {},
            whole(jnp.where(jnp.arange(15) < 3, 0.0, 2.0), mask=mask & (jnp.arange(15) < 6)),
        ),
    ):
        got = make_attention_fn(**options)(Q[:, :1], K, V, mask=mask, **call)
        np.testing.assert_allclose(got, want, atol=1e-5)


# Dropout.


def dropped(**options):
    """Which keys are dropped `[batch, row, head, key]`, read off uniform weights and an identity for values."""
    n = 16
    q, v = jnp.zeros((3, n, 2, n)), jnp.broadcast_to(jnp.eye(n)[:, None], (3, n, 2, n))
    o = attention_fn(q, q, v, **{"dropout_rate": 0.25, "dropout_rng": jax.random.key(1)} | options)
    np.testing.assert_allclose(o[o != 0], 1 / n / (1 - 0.25), rtol=1e-5)
    return np.asarray(o == 0)


def test_broadcast_dropout():
    one = dropped(broadcast_dropout=True)
    assert (one == one[:1, :, :1]).all()
    assert 0.15 < one[0, :, 0].mean() < 0.35
    assert (one == dropped()).all()  # Flax's default
    assert (one != dropped(dropout_rng=jax.random.key(2))).any()


def test_own_dropout_of_each_head():
    each = dropped(broadcast_dropout=False)
    assert 0.2 < each.mean() < 0.3
    patterns = {each[b, :, h].tobytes() for b in range(3) for h in range(2)}
    assert len(patterns) == 6


def test_old_style_keys():
    for broadcast in (True, False):
        old = dropped(dropout_rng=jax.random.PRNGKey(1), broadcast_dropout=broadcast)
        assert (old == dropped(broadcast_dropout=broadcast)).all()


def test_dropout_is_off():
    want = attention_fn(Q, K, V)
    for options in ({"deterministic": True, "dropout_rate": 0.5}, {"dropout_rng": jax.random.key(0)}):
        np.testing.assert_array_equal(attention_fn(Q, K, V, **options), want)
    with pytest.raises(ValueError, match=r"dropout_rate=0.5 needs a dropout_rng"):
        attention_fn(Q, K, V, dropout_rate=0.5)


@pytest.mark.parametrize("broadcast", [True, False])
def test_modules_with_dropout(broadcast):
    x = draw(2, T, WIDTH)
    options = {"dropout_rate": 0.5, "broadcast_dropout": broadcast}
    module = nnx_module(attention_fn, **options)
    first, second = (module(x, deterministic=False) for _ in range(2))
    still = module(x, deterministic=True)
    assert jnp.isfinite(first).all()
    assert (first != second).any()
    np.testing.assert_allclose(still, nnx_module()(x), atol=1e-5)

    module = linen_module(attention_fn, **options)
    variables = module.init(jax.random.key(0), x, deterministic=True)
    first, same, second = (
        module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(i)}) for i in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != second).any()


# What Flax may pass, and what cannot be done.


def test_every_argument_is_named():
    """Linen drops what a signature does not name, a mask as well; NNX passes all it has."""
    names = inspect.signature(attention_fn).parameters
    assert not set(inspect.signature(linen.dot_product_attention).parameters) - set(names)
    assert set(inspect.signature(nnx.dot_product_attention).parameters) - set(names) == {"promote_dtype"}
    assert list(inspect.signature(make_attention_fn(window_size=(3, 0))).parameters)[:5] == list(names)[:5]
    with pytest.raises(TypeError, match="attention_fn has no argument 'promote_dtype'"):
        attention_fn(Q, K, V, promote_dtype=None)


@pytest.mark.parametrize("einsum", [None, "qk_attn_weights_einsum", "attn_weights_value_einsum", "einsum_dot_general"])
def test_what_needs_weights_raises(einsum):
    if einsum is not None:
        with pytest.raises(ValueError, match=f"{einsum} must be None: flash attention never holds"):
            attention_fn(Q, K, V, **{einsum: jnp.einsum})
        return
    x = draw(2, T, WIDTH)
    with pytest.raises(ValueError, match="sow_weights must be False"):
        nnx_module(attention_fn)(x, sow_weights=True)
    with pytest.raises(ValueError, match="sow_weights must be False"):
        linen_module(attention_fn).init(jax.random.key(0), x, sow_weights=True)


def config_for(monkeypatch, dtype="float32", **options):
    """The config that `flash_attention` is called with."""
    seen = []

    def spy(*args, config, **rest):
        seen.append(config)
        return flash_attention(*args, **rest)

    monkeypatch.setattr(adapter, "flash_attention", spy)
    attention_fn(*(x.astype(dtype) for x in (Q, K, V)), **options)
    return seen[0]


@pytest.mark.parametrize(
    ("precision", "want"),
    [
        (None, None),
        ("default", None),
        (Precision.DEFAULT, None),
        (Precision.HIGH, "tf32x3"),
        ("highest", "ieee"),
        ((Precision.HIGHEST, Precision.DEFAULT), "ieee"),
        (("high", "default"), "tf32x3"),
        (DotAlgorithmPreset.TF32_TF32_F32, "tf32"),
        ("F32_F32_F32", "ieee"),
    ],
    ids=str,
)
def test_precision(monkeypatch, precision, want):
    config = config_for(monkeypatch, precision=precision)
    assert config == (None if want is None else Config(precision=want))


def test_precision_beside_a_config(monkeypatch):
    config = Config(block_m=16, precision="tf32x3")
    assert config_for(monkeypatch, precision="high", config=config) is config
    assert config_for(monkeypatch, precision=None, config=config) is config
    for given in (config, {"fwd": Config(), "dq": config}):
        with pytest.raises(ValueError, match=r"precision=highest asks for 'ieee', got config.precision='tf32x3'"):
            attention_fn(Q, K, V, precision="highest", config=given)
    for given, what in ((64, "config must be a Config"), (Config(precision="fp8"), "config.precision must be one of")):
        with pytest.raises((TypeError, ValueError), match=what):
            attention_fn(Q, K, V, precision="highest", config=given)


def test_precision_of_other_dtypes(monkeypatch):
    assert config_for(monkeypatch, "bfloat16", precision=Precision.HIGHEST) is None
    assert config_for(monkeypatch, "bfloat16", precision=lax.DotAlgorithmPreset.BF16_BF16_F32) is None
    with pytest.raises(ValueError, match=r"for bfloat16, got DotAlgorithmPreset\.BF16_BF16_F32_X3"):
        config_for(monkeypatch, "bfloat16", precision=lax.DotAlgorithmPreset.BF16_BF16_F32_X3)
    with pytest.raises(ValueError, match=r'"highest" or one of DEFAULT, F32_F32_F32, TF32_TF32_F32, .* for float32'):
        attention_fn(Q, K, V, precision=DotAlgorithmPreset.BF16_BF16_F32)
    with pytest.raises(ValueError, match=r"precision must be None, .* got 'finest'"):
        attention_fn(Q, K, V, precision="finest")


# Options.


def test_options():
    attend = make_attention_fn(window_size=(3, 0), logits_soft_cap=5.0, config=Config(block_m=16))
    want = flash_attention(Q, K, V, window_size=(3, 0), logits_soft_cap=5.0)
    np.testing.assert_allclose(attend(Q, K, V, mask=None, deterministic=True), want, atol=1e-5)
    sinks = draw(HEADS)
    np.testing.assert_array_equal(make_attention_fn(sinks=sinks)(Q, K, V), flash_attention(Q, K, V, sinks=sinks))
    integers = jnp.arange(T + 3)
    np.testing.assert_allclose(
        attention_fn(Q, K, V, integers), flash_attention(Q, K, V, integers.astype(jnp.float32)), atol=1e-6
    )


def test_the_same_options_are_one_object():
    one = make_attention_fn(window_size=(3, 0), logits_soft_cap=5)
    assert one is make_attention_fn(logits_soft_cap=5, window_size=(3, 0))
    assert one is not make_attention_fn(window_size=(4, 0), logits_soft_cap=5)
    first, second = (nnx.graphdef(nnx_module(make_attention_fn(window_size=(3, 0)))) for _ in range(2))
    assert first == second
    assert make_attention_fn(sinks=jnp.ones(4)) is not make_attention_fn(sinks=jnp.ones(4))
    for name, said in (("windowsize", "did you mean window_size"), ("promote_dtype", "it has rope, score_mod, causal")):
        with pytest.raises(TypeError, match=f"no argument '{name}'; {said}"):
            make_attention_fn(**{name: None})
    with pytest.raises(TypeError, match="no option 'deterministic': Flax's modules give theirs"):
        make_attention_fn(deterministic=True)


def test_what_may_hold_arrays_is_not_kept():
    ids = jax.device_put(np.zeros((2, T), np.int32))
    before = adapter._made.cache_info().currsize
    make_attention_fn(mask=masks.causal() & masks.documents(ids))
    make_attention_fn(mask=masks.from_dense(ids[:, :, None] == ids[:, None]))
    make_attention_fn(score_mod=lambda s, b, h, i, j: s + ids[b, j])
    assert adapter._made.cache_info().currsize == before
    assert make_attention_fn(mask=masks.causal()) is make_attention_fn(mask=masks.causal())


def test_rope():
    q, k, v = draw(2, T, HEADS, 8), draw(2, T, HEADS, 8), draw(2, T, HEADS, 8)
    rope = nnx.RoPE()
    attend = make_attention_fn(rope=rope)
    x = draw(2, T, WIDTH)
    theirs = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    ours, want = (applied(nnx_module(f), x, is_causal=True) for f in (attend, theirs))
    np.testing.assert_allclose(ours, want, atol=1e-5)

    # Only distances between positions matter, and so nothing changes if all move by 5.
    want = attend(q, k, v)
    for positions in (jnp.arange(5.0, T + 5), jnp.arange(0.0, T) + jnp.array([[0.0], [3.0]])):
        np.testing.assert_allclose(attend(q, k, v, input_positions=positions), want, atol=1e-4)
    assert not np.allclose(attend(q, k, v, input_positions=jnp.arange(0.0, 2 * T, 2)), want, atol=1e-2)

    with pytest.raises(ValueError, match="input_positions are for rope, which is None"):
        attention_fn(q, k, v, input_positions=jnp.arange(T))
    with pytest.raises(ValueError, match="as many queries as keys, got 1 and 12"):
        attend(q[:, :1], k, v)
