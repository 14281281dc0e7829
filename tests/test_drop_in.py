"""`dot_product_attention` beside `jax.nn.dot_product_attention`: numbers, gradients, shapes, transforms and errors."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn2 as fa
from jax_flash_attn2.drop_in import dot_product_attention

B, T, S, N, H = 2, 24, 33, 4, 8
RNG = np.random.default_rng(0)
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}


@pytest.fixture(autouse=True)
def strict_ranks():
    """As in JAX's own tests."""
    with jax.numpy_rank_promotion("raise"):
        yield


def draw(*shape, dtype="float32"):
    return jax.device_put(RNG.standard_normal(shape).astype(jnp.dtype(dtype)))


def booleans(*shape):
    return jax.device_put(RNG.random(shape) < 0.6)


def arrays(dtype="float32", heads=N, seqlen_q=T, seqlen_k=S, batch=(B,)):
    return (
        draw(*batch, seqlen_q, N, H, dtype=dtype),
        draw(*batch, seqlen_k, heads, H, dtype=dtype),
        draw(*batch, seqlen_k, heads, H, dtype=dtype),
    )


@functools.wraps(jax.nn.dot_product_attention)
def theirs(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn itself does not keep to the strict rules
        return jax.nn.dot_product_attention(*args, **kwargs)


def integers(*values):
    return jax.device_put(np.array(values, np.int32))


FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative_scale": {"scale": -1},
    "scale_of_numpy": {"scale": np.float32(0.5)},
    "mask_keys": {"mask": booleans(S)},
    "mask_rows_keys": {"mask": booleans(T, S)},
    "mask_heads": {"mask": booleans(N, T, S)},
    "mask_batch_keys": {"mask": booleans(B, 1, 1, S)},
    "mask_rows": {"mask": booleans(1, 1, T, 1)},
    "mask_full_causal": {"mask": booleans(B, N, T, S), "is_causal": True},
    "bias": {"bias": draw(N, T, S)},
    "bias_one_head": {"bias": draw(B, 1, T, S)},
    "bias_keys": {"bias": draw(S)},
    "bias_integers": {"bias": jax.device_put(RNG.integers(-3, 3, (T, S)).astype(np.int32))},
    "bias_and_mask": {"bias": draw(1, N, 1, S), "mask": booleans(B, 1, T, S)},
    "window": {"local_window_size": 3},
    "window_pair": {"local_window_size": (3, 2)},
    "window_list_causal": {"local_window_size": [2, 5], "is_causal": True},
    "window_of_one": {"local_window_size": 0},
    "window_hides_all": {"local_window_size": (-1, -1)},
    "window_to_the_right": {"local_window_size": (-2, 4)},
    "window_to_the_left": {"local_window_size": (5, -1), "is_causal": True},
    "window_past_the_end": {"local_window_size": (1000, 1000)},
    "lengths": {"query_seq_lengths": integers(10, T), "key_value_seq_lengths": integers(S, 7)},
    "key_lengths_causal": {"key_value_seq_lengths": integers(0, 20), "is_causal": True},
    "all": {
        "is_causal": True,
        "bias": draw(B, N, T, S),
        "mask": booleans(B, 1, 1, S),
        "query_seq_lengths": integers(20, 22),
        "key_value_seq_lengths": integers(30, 9),
        "local_window_size": (7, 1),
        "scale": 0.2,
    },
}


def split(options):
    """What jit traces, and what it must not."""
    traced = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    return traced, {k: v for k, v in options.items() if k not in traced}


def both(options, qkv):
    """(o, residual) of ours and of jax.nn; and which rows see a key.

    jax.nn computes in float32: its float16 does not compile for a CPU. And there a residual of -2.4e38 is finite.
    """
    traced, static = split(options)
    run = lambda f, qkv: jax.jit(lambda qkv, traced: f(*qkv, **traced, **static, return_residual=True))(qkv, traced)
    want = run(theirs, tuple(x.astype(jnp.float32) for x in qkv))
    sees = np.asarray(want[1] > -1e38)
    return run(dot_product_attention, qkv), tuple(x.astype(qkv[0].dtype) for x in want), sees


def assert_same(options, qkv, tolerance):
    (o, residual), (want_o, want_residual), sees = both(options, qkv)
    for ours, want in ((o, want_o), (residual, want_residual)):
        assert (ours.shape, ours.dtype) == (want.shape, want.dtype)
        ours, want = (np.asarray(x, np.float64) for x in (ours, want))
        np.testing.assert_allclose(ours[sees], want[sees], rtol=tolerance, atol=tolerance)
    assert not np.asarray(o, np.float64)[~sees].any()
    assert np.isneginf(np.asarray(residual, np.float64)[~sees]).all()


@pytest.mark.parametrize("name", FEATURES)
def test_numbers(name):
    assert_same(FEATURES[name], arrays(heads=(4, 2, 1)[len(name) % 3]), TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["bias", "bias_integers", "lengths", "all"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(name, dtype):
    """The result has the dtype of the arguments, whatever the bias has; so has the residual."""
    assert_same(FEATURES[name], arrays(dtype, heads=2), TOLERANCE[dtype])


def test_float64():
    with jax.enable_x64(True):
        qkv = tuple(RNG.standard_normal((B, n, h, H)) for n, h in ((T, 4), (S, 2), (S, 2)))
        options = {"bias": jax.device_put(RNG.standard_normal((N, 1, S))), "is_causal": True}
        want = dense64(*qkv, options["bias"])
        ours = dot_product_attention(*qkv, **options)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, want, atol=TOLERANCE["float64"])


def dense64(q, k, v, bias):
    """jax.nn rounds its softmax to float32 even here, so it cannot be the measure."""
    k, v = (np.repeat(x, N // x.shape[2], 2) for x in (k, v))
    s = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H) + np.asarray(bias)
    s = np.where(np.tri(T, S, dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("name", ["bias", "bias_one_head", "bias_and_mask", "lengths", "window_to_the_right", "all"])
def test_gradients(name):
    """Of query, key, value, bias and a traced scale; rows that see nothing are left out of the loss."""
    options, qkv = FEATURES[name], arrays(heads=2)
    *_, sees = both(options, qkv)
    weights = jnp.where(sees[..., None], draw(B, T, N, H), 0)
    rest = {k: v for k, v in options.items() if k not in ("bias", "scale")}
    bias = options.get("bias", draw(1, N, T, 1))

    def gradients(f):
        loss = lambda q, k, v, bias, scale: (f(q, k, v, bias, scale=scale, **rest) * weights).sum()
        return jax.jit(jax.grad(loss, range(5)))(*qkv, bias, jnp.float32(0.3))

    for ours, want in zip(gradients(dot_product_attention), gradients(theirs), strict=True):
        assert ours.shape == want.shape
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)


def test_residual_has_no_gradient():
    q, k, v = arrays()
    assert not jax.grad(lambda q: dot_product_attention(q, k, v, return_residual=True)[1].sum())(q).any()


SHAPES = {
    "no_batch": ((T, N, H), (S, 2, H), (S, 2, H)),
    "query_without_batch": ((T, N, H), (1, S, 2, H), (1, S, 2, H)),
    "query_with_batch": ((1, T, N, H), (S, 2, H), (1, S, 2, H)),
    "no_rows": ((B, 0, N, H), (B, S, N, H), (B, S, N, H)),
    "one_row": ((B, 1, N, H), (B, S, 1, H), (B, S, 1, H)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    assert_same({"is_causal": True}, tuple(draw(*shape) for shape in SHAPES[name]), TOLERANCE["float32"])


def test_no_keys():
    o, residual = dot_product_attention(draw(B, T, N, H), *(draw(B, 0, N, H),) * 2, return_residual=True)
    assert o.shape == (B, T, N, H)
    assert not o.any()
    assert jnp.isneginf(residual).all()


def test_array_likes():
    """NumPy arrays and lists, of lengths too."""
    qkv = tuple(np.asarray(x) for x in arrays())
    mask = np.asarray(booleans(T, S)).tolist()
    options = {"mask": mask, "query_seq_lengths": np.array([3, 4]), "key_value_seq_lengths": [30, 31]}
    qkv = (qkv[0].tolist(), *qkv[1:])
    np.testing.assert_allclose(dot_product_attention(*qkv, **options), theirs(*qkv, **options), atol=2e-5)


def test_traced_window():
    """As when layers of a scan have windows of their own."""
    qkv = arrays()
    for left in (2, 9):
        ours, want = (
            jax.jit(lambda n, f=f: f(*qkv, local_window_size=(n, 0)))(left) for f in (dot_product_attention, theirs)
        )
        np.testing.assert_allclose(ours, want, atol=2e-5)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_far_windows_are_no_bound(align):
    """Also beside what makes them a mask; nor do they wrap where they are arrays."""
    qkv, far = arrays(), 2**31 - 1
    want = dot_product_attention(*qkv, local_window_size=(None, -1), causal_alignment=align)
    for left in (far, 2**40, jnp.int32(far), np.array(far)):
        window = (left, -1)
        got = dot_product_attention(*qkv, local_window_size=window, causal_alignment=align)
        np.testing.assert_array_equal(got, want)


def test_one_array_is_both_sides():
    qkv = arrays()
    want = dot_product_attention(*qkv, local_window_size=3)
    for window in (jnp.int32(3), np.array(3), np.array([3, 3]), [np.int8(3), 3]):
        np.testing.assert_allclose(dot_product_attention(*qkv, local_window_size=window), want, atol=2e-5)
    with pytest.raises(TypeError, match="local_window_size must be an integer, a pair"):
        dot_product_attention(*qkv, local_window_size=(1, 2, 3))


# Transforms.


@pytest.mark.parametrize(
    "axes",
    [
        {"query": 0},
        {"key": 1, "value": None},
        {"bias": 2, "mask": 0},
        {"key_value_seq_lengths": 0, "query": 2},
        {"query_seq_lengths": 1, "scale": 0},
        {"query": 0, "key": 1, "value": 2, "bias": 3, "mask": 1, "query_seq_lengths": 0, "key_value_seq_lengths": 1},
    ],
    ids=lambda axes: "-".join(axes),
)
def test_vmap(axes):
    """Over any operand along any axis, values and gradients; a bias and a mask with one head among them."""
    q, k, v = arrays(heads=2, seqlen_q=6, seqlen_k=7)
    operands = {
        "query": q, "key": k, "value": v, "bias": draw(1, 1, 6, 7), "mask": booleans(B, 1, 6, 7).at[..., 0].set(True),
        "query_seq_lengths": integers(4, 6), "key_value_seq_lengths": integers(7, 3), "scale": jnp.float32(0.4),
    }  # fmt: skip

    def mapped(name):
        x = operands[name]
        variants = [jnp.roll(x, i, -1) if x.ndim else x + i for i in range(3)]
        if name == "mask":
            variants = [m.at[..., 0].set(True) for m in variants]
        return jnp.stack(variants, axes[name])

    given = {name: mapped(name) if axes.get(name) is not None else x for name, x in operands.items()}
    in_axes = ({name: axes.get(name) for name in given},)

    def run(f):
        def loss(given):
            return (f(**given) ** 2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, allow_int=True), in_axes))(given)

    (ours, our_grads), (want, want_grads) = run(dot_product_attention), run(theirs)
    np.testing.assert_allclose(ours, want, rtol=1e-4)
    for name in ("query", "key", "value", "bias", "scale"):
        np.testing.assert_allclose(our_grads[name], want_grads[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.in_thirds
@pytest.mark.parametrize("name", ["bias_and_mask", "all"])
def test_higher_order(name):
    """With higher_order=True: jvp, the Hessian, and the gradient of a gradient."""
    small = {k: v[..., :6, :5] if k in ("bias", "mask") and v.shape[-2] > 1 else v for k, v in FEATURES[name].items()}
    small = {k: v[..., :5] if k in ("bias", "mask") else v for k, v in small.items()}
    small["mask"] = small["mask"].at[..., :2].set(True)
    if "key_value_seq_lengths" in small:
        small |= {"query_seq_lengths": integers(4, 6), "key_value_seq_lengths": integers(5, 4)}
    bias = small.pop("bias")
    q, k, v = arrays(heads=2, seqlen_q=6, seqlen_k=5)
    ours = functools.partial(dot_product_attention, **small, higher_order=True)

    def run(f):
        tangents = tuple(x + 1 for x in (q, k, v, bias))
        loss = lambda t: (f(q * t, k, v + t, bias * t) ** 2).sum()
        along = lambda q: (jax.jvp(lambda *x: f(*x), (q, k, v, bias), tangents)[1] ** 2).sum()
        return jax.jit(
            lambda: (along(q), jax.grad(along)(q), jax.hessian(loss)(1.0), jax.jacfwd(jax.grad(loss))(0.5))
        )()

    rows = theirs(q, k, v, bias, **small, return_residual=True)[1] > -1e38
    assert rows.all() or "query_seq_lengths" in small  # jax.nn and we agree on rows past a length
    for got, want in zip(run(ours), run(functools.partial(theirs, **small)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_forward_mode_needs_higher_order():
    q, k, v = arrays()
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda q: dot_product_attention(q, k, v), (q,), (q,))


# Errors: the same type as jax.nn's, and words that match.

Q, K, V = map(np.asarray, arrays(heads=2))
ERRORS = {
    "query ndim should be 4, but got 5": (Q[None], K, V),
    "value ndim should be 4, but got 5": (Q, K, V[None]),
    r"value shape should be \[2, 33, 2, 8\]: but got \(2, 33, 2, 4\)": (Q, K, V[..., :4]),
    "value shape should be": (Q, K, V[:, :-1]),
    "query shape should be": (Q[:1], K, V),
    "query shape should be .*-1": (Q[..., :4], K, V),
    "query dtype should be float32, but got bfloat16": (Q.astype(jnp.bfloat16), K, V),
    "value dtype should be float32, but got float16": (Q, K, V.astype(jnp.float16)),
    "The number of query heads must be a multiple of key/value heads, but got 3 vs 2": (Q[:, :, :3], K, V),
    "bias ndim should be 4, but got 5": (Q, K, V, np.zeros((1, 1, 1, T, S), np.float32)),
    "mask ndim should be 4, but got 5": (Q, K, V, None, np.ones((1, 1, 1, T, S), bool)),
    "mask dtype should be bool, but got float32": (Q, K, V, None, np.ones((T, S), np.float32)),
    "mask dtype should be bool, but got int32": (Q, K, V, None, np.ones((T, S), np.int32)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    for f in (theirs, dot_product_attention):
        with pytest.raises(ValueError, match=message):
            f(*ERRORS[message])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_seq_lengths": integers(1, 2, 3)}, r"query_seq_lengths shape should be \[2\]: but got \(3,\)"),
        ({"query_seq_lengths": integers(1)[0]}, "query_seq_lengths ndim should be 1, but got 0"),
        ({"key_value_seq_lengths": np.float32([1, 1])}, "key_value_seq_lengths dtype should be int32, but got float32"),
        ({"implementation": "flash"}, "Unsupported implementation option: flash"),
    ],
)  # fmt: skip
def test_errors_of_options(options, message):
    for f in (theirs, dot_product_attention):
        with pytest.raises(ValueError, match=message):
            f(Q, K, V, **options)


def test_errors_of_our_own():
    with pytest.raises(ValueError, match='Unsupported implementation option: cudnn; it must be "triton", "xla"'):
        dot_product_attention(Q, K, V, implementation="cudnn")
    with pytest.raises(ValueError, match=r"bias must broadcast"):  # jax.nn raises AssertionError
        dot_product_attention(Q, K, V, jnp.zeros((2, T, S)))
    with pytest.raises(ValueError, match=r"mask must broadcast"):  # (B, S), which jax.nn takes for (T, S)
        dot_product_attention(Q, K, V, mask=jnp.ones((B, S), bool))
    with pytest.raises(TypeError, match="pass booleans as mask"):
        dot_product_attention(Q, K, V, jnp.ones((T, S), bool))
    with pytest.raises(TypeError, match="int32"):
        dot_product_attention(*(x.astype(jnp.int32) for x in (Q, K, V)))


def test_signature():
    """Every argument of jax.nn's, in its order and of its kind."""
    ours, want = (list(inspect.signature(f).parameters.values()) for f in (dot_product_attention, theirs))
    assert [(p.name, p.kind, p.default) for p in ours[: len(want)]] == [(p.name, p.kind, p.default) for p in want]
    with pytest.raises(TypeError, match="takes 5 positional arguments"):
        dot_product_attention(Q, K, V, None, None, 0.5)


# Beyond jax.nn.


@pytest.mark.parametrize(
    "options",
    [
        {"q_segment_ids": np.arange(T)[None] // 9, "kv_segment_ids": np.arange(S)[None] // 9},
        {"q_positions": np.arange(T)[::-1], "kv_positions": np.arange(S), "causal": True},
        {"logits_soft_cap": 2.0},
        {"sinks": draw(N)},
        {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32)},
        {"dropout_rate": 0.3, "dropout_seed": 7},
        {"causal": True, "causal_alignment": "bottom_right", "window_size": (4, 0)},
        {"config": fa.Config(block_m=16, block_n=16), "softmax_scale": 2.0},
        {"implementation": "xla"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_extras_are_flash_attentions(options):
    names = {"causal": "is_causal", "window_size": "local_window_size", "softmax_scale": "scale"}
    o, lse, largest = fa.flash_attention(Q, K, V, **options, return_lse=True, return_max_logits=True)
    options = {names.get(k, k): v for k, v in options.items()}
    ours = dot_product_attention(Q, K, V, **options, return_residual=True, return_max_logits=True)
    for got, want in zip(ours, (o, lse.swapaxes(1, 2), largest), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("scale", ["1", np.ones(2, np.float32), 1e300])
def test_scale_is_called_by_its_name(scale):
    with pytest.raises((TypeError, ValueError), match=r"^scale must be"):
        dot_product_attention(Q, K, V, scale=scale)


def test_bottom_right_window_mask():
    """A window that only a mask can express follows causal_alignment too."""
    align = {"causal_alignment": "bottom_right"}
    seen = dot_product_attention(Q, K, V, local_window_size=(jnp.int32(4), 2), **align)
    np.testing.assert_allclose(seen, dot_product_attention(Q, K, V, local_window_size=(4, 2), **align), atol=1e-6)


def test_window_mask_and_positions():
    """Such a mask counts by index: it would be something else."""
    given = {"q_positions": np.arange(T), "kv_positions": np.arange(S)}
    with pytest.raises(ValueError, match="local_window_size of negative or traced numbers is a mask by index"):
        dot_product_attention(Q, K, V, local_window_size=(-1, 5), **given)


def test_results_without_batch():
    o, residual, largest = dot_product_attention(Q[0], K[0], V[0], return_residual=True, return_max_logits=True)
    assert (o.shape, residual.shape, largest.shape) == ((T, N, H), (T, N), (N,))
    assert isinstance(dot_product_attention(Q[0], K[0], V[0]), jax.Array)
