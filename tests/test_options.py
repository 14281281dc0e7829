"""The options in all the forms they may be given in, and what follows from one another; and the cases themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FACTORS, PAIRS, Case, possible
from reference import distance, visible

from jax_flash_attn2 import flash_attention

pytestmark = pytest.mark.usefixtures("compiled_fully")  # the options' numbers in the code that users get

CASE = Case("forms", 30, 30, (2, 3), 4, 2, 16)
X = {name: CASE.inputs()[name] for name in "qkv"}


def draw(*shape, dtype=np.float32):
    rng = np.random.default_rng(1)
    return rng.standard_normal(shape).astype(dtype) if dtype == np.float32 else rng.integers(0, 3, shape).astype(dtype)


def full(x, *axes):
    return np.broadcast_to(x, (2, 3, *axes))


ROW = np.arange(30, dtype=np.int32)


def places(dtype):
    """Of 30 rows and keys, in no order."""
    return {
        f"{name}_positions": np.random.default_rng(n).permutation(30).astype(dtype)
        for n, name in enumerate(("q", "kv"))
    }


IDS, MASK = draw(30, dtype=np.int32), draw(30, 30) > 0
SAME = {
    "window of one number": ({"window_size": 5}, {"window_size": (5, 5)}),
    "window as a list": ({"window_size": [5, None]}, {"window_size": (5, None)}),
    "window of NumPy's": ({"window_size": (np.int64(5), None)}, {"window_size": (5, None)}),
    "a window past the end": ({"window_size": (2**40, 2**31 - 1)}, {}),
    "no window": ({"window_size": (None, None)}, {}),
    "causal as a window": ({"window_size": (None, 0)}, {"causal": True}),
    "causal and a window": ({"causal": True, "window_size": (5, 9)}, {"window_size": (5, 0)}),
    "one length": ({"kv_lengths": 20, "q_lengths": np.int32(10)}, {"kv_lengths": full(20), "q_lengths": full(10)}),
    "lengths by axis": ({"kv_lengths": np.array([[9], [20]])}, {"kv_lengths": np.array([[9] * 3, [20] * 3])}),
    "lengths past the end": ({"kv_lengths": 1000, "q_lengths": full(31)}, {}),
    "negative lengths": ({"kv_lengths": full(-3)}, {"kv_lengths": full(0)}),
    "ids without a batch": ({"q_segment_ids": IDS}, {"q_segment_ids": full(IDS, 30)}),
    "ids of the keys": ({"q_segment_ids": IDS}, {"q_segment_ids": IDS, "kv_segment_ids": IDS}),
    "ids of 8 bits": ({"q_segment_ids": IDS.astype(np.int8)}, {"q_segment_ids": IDS}),
    "one segment": ({"q_segment_ids": np.zeros_like(IDS)}, {}),
    "any negative id": ({"q_segment_ids": np.where(IDS, IDS, -7)}, {"q_segment_ids": np.where(IDS, IDS, -1)}),
    "positions that are indices": ({"causal": True, "q_positions": ROW, "kv_positions": ROW}, {"causal": True}),
    "positions of 64 bits": ({"window_size": 4, **places(np.int64)}, {"window_size": 4, **places(np.int8)}),
    "positions nobody compares": (places(np.int32), {}),
    "positions of padded rows": (
        {"causal": True, "q_positions": full(ROW - 7, 30), "kv_positions": np.where(ROW < 7, 2**31 - 1, ROW - 7)},
        {"causal": True, "mask": ROW >= 7},
    ),
    "mask of two axes": ({"mask": MASK}, {"mask": full(MASK, 4, 30, 30)}),
    "mask of a row": ({"mask": MASK[:1]}, {"mask": full(MASK[:1], 1, 30, 30)}),
    "mask of nothing": ({"mask": np.ones((1, 1), bool)}, {}),
    "slopes without a batch": ({"alibi_slopes": draw(4)}, {"alibi_slopes": full(draw(4), 4)}),
    "one slope": ({"alibi_slopes": np.full(1, 0.5, np.float32)}, {"alibi_slopes": np.full(4, 0.5, np.float32)}),
    "half slopes": ({"alibi_slopes": np.full(4, 0.5, np.float16)}, {"alibi_slopes": np.full(4, 0.5, np.float32)}),
    "an alignment of equal lengths": ({"causal": True, "causal_alignment": "bottom_right"}, {"causal": True}),
    "a cap of NumPy's": ({"logits_soft_cap": np.float32(2)}, {"logits_soft_cap": 2}),
}


@pytest.mark.parametrize("name", SAME)
def test_forms(name):
    """Two ways to say the same."""
    one, other = (flash_attention(**X, **options, return_lse=True) for options in SAME[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


AHEAD = np.arange(30)[:, None] - np.arange(30)
MASKS = {
    "window": ({"window_size": (7, 3)}, (AHEAD <= 7) & (-AHEAD <= 3)),
    "segments": ({"q_segment_ids": IDS - 1}, (IDS[:, None] == IDS) & (IDS > 0)),
    "lengths": ({"kv_lengths": 17}, np.arange(30) < 17),
    "causal": ({"causal": True}, AHEAD >= 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_as_a_mask(name):
    """Whatever hides keys is a mask, with the same gradients."""
    options, mask = MASKS[name]
    mask = np.broadcast_to(mask, (30, 30))

    def both(**options):
        return jax.value_and_grad(lambda x: (flash_attention(**x, **options) ** 2).sum())(X)

    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(check, both(**options), both(mask=mask))
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    jax.tree.map(check, both(**options), both(bias=bias))


def test_a_sink_is_a_key():
    """One more key whose logit is the sink and whose value is 0."""
    sinks = draw(4)
    k, v = (np.pad(X[name], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0))) for name in "kv")
    bias = np.zeros((4, 1, 31), np.float32)
    bias[..., -1] = sinks[:, None]
    one = flash_attention(**X, sinks=sinks, return_lse=True)
    other = flash_attention(X["q"], k, v, bias, return_lse=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


@pytest.mark.parametrize("lengths", [{"q": 0}, {"k": 0}, {}], ids=["no_rows", "no_keys", "no_row_sees"])
def test_a_sink_alone(lengths):
    """Where nothing is seen, lse is the sink, and its gradient goes there."""
    q, k, v = (X[name][:, :, : lengths.get("q" if name == "q" else "k", 30)] for name in "qkv")
    sinks = draw(4)

    def f(sinks):
        o, lse = flash_attention(q, k, v, sinks=sinks, kv_lengths=0, q_lengths=29, return_lse=True)
        return jnp.where(lse == -jnp.inf, 0, lse).sum(), (o, lse)

    dsinks, (o, lse) = jax.grad(f, has_aux=True)(sinks)
    rows = min(q.shape[2], 29)
    assert not o.any()
    np.testing.assert_array_equal(lse[..., :29], np.broadcast_to(sinks[:, None], (2, 3, 4, rows)))
    assert (lse[..., 29:] == -np.inf).all()
    np.testing.assert_allclose(dsinks, 6.0 * rows, rtol=1e-6)


def test_order_of_results():
    lse, largest = {"return_lse": True}, {"return_max_logits": True}
    o, statistics, logits = flash_attention(**X, **lse, **largest)
    assert (o.shape, statistics.shape, logits.shape) == ((2, 3, 30, 4, 16), (2, 3, 4, 30), (2, 3, 4))
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(flash_attention(**X), o)
    for options, wanted in ((lse, statistics), (largest, logits)):
        got = flash_attention(**X, **options)
        np.testing.assert_array_equal(got[0], o)
        np.testing.assert_array_equal(got[1], wanted)


def test_max_logits_have_no_gradient():
    """Nor do they break one."""

    def f(q, times):
        o, largest = flash_attention(q, X["k"], X["v"], return_max_logits=True)
        return o.sum() + times * largest.sum()

    np.testing.assert_array_equal(jax.grad(f)(X["q"], 0.0), jax.grad(f)(X["q"], 5.0))


def test_every_pair_of_values_meets():
    """What `PAIRS` promise."""
    sizes = {"seqlens": ("seqlen_q", "seqlen_k"), "many_heads": ("heads", "kv_heads")}

    def value(case, factor):
        return tuple(getattr(case, n) for n in sizes[factor]) if factor in sizes else getattr(case, factor)

    for a, b in itertools.combinations(FACTORS, 2):
        met = {(value(case, a), value(case, b)) for case in PAIRS}
        assert met == {v for v in itertools.product(FACTORS[a], FACTORS[b]) if possible(zip((a, b), v, strict=True))}


@pytest.mark.thorough
def test_every_pair_sees_something():
    """So that it compares something."""
    sight = ("mask", "q_segment_ids", "kv_segment_ids", "kv_lengths")
    for case in PAIRS:
        x = case.inputs()
        given = {n: jnp.asarray(x[n]) for n in sight if x[n] is not None}
        ahead = distance(x["q"], x["k"], case.alignment, x["q_positions"], x["kv_positions"])
        seen = visible(jnp.asarray(ahead), causal=case.causal, window_size=case.window, **given)
        assert seen.any(), case
