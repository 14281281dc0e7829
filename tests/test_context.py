"""Sequences in the orders of several devices, and parts of the keys brought together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2 import Config, flash_attention, from_order, merge, sequence_order, to_order

B, S, H, D = 2, 48, 4, 16
RNG = np.random.default_rng(0)
TILES = Config(block_m=16, block_n=16)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def near(got, want, tolerance=2e-6):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * max(1, float(np.abs(b[np.isfinite(b)]).max()))
        )


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_orders(order, devices):
    """A permutation, undone; and what a device holds."""
    places = sequence_order(S, devices, order)
    assert places.dtype == np.int32
    assert sorted(places) == [*range(S)]
    parts = places.reshape(devices, -1)
    if order == "zigzag":
        assert (parts.sum(1) == parts[0].sum()).all()  # as early as late
    if order == "striped":
        assert (parts % devices == np.arange(devices)[:, None]).all()
    tokens = RNG.integers(0, 9, (B, S))
    there = to_order(tokens, devices, order)
    assert isinstance(there, np.ndarray)
    np.testing.assert_array_equal(there, tokens[:, places])
    np.testing.assert_array_equal(from_order(there, devices, order), tokens)
    mask = RNG.random((1, 1, S, S)) < 0.5
    np.testing.assert_array_equal(
        to_order(jnp.asarray(mask), devices, order, (-2, -1)), mask[:, :, places][..., places]
    )
    np.testing.assert_array_equal(to_order(mask[..., :1], devices, order, (-2, -1)), mask[:, :, places][..., :1])


@pytest.mark.parametrize("order", ["zigzag", "striped"])
def test_attention_in_order(order):
    """The same call on reordered arrays, told their positions: values and gradients of the plain order."""
    q, k, v, w = (draw(B, S, H, D) for _ in range(4))
    ids = np.sort(RNG.integers(0, 3, (B, S)), 1).astype(np.int32)
    turn = lambda x: to_order(x, 4, order)
    where = sequence_order(S, 4, order)[None]

    def loss(q, k, v, w, ids, **options):
        o = flash_attention(q, k, v, causal=True, window_size=20, q_segment_ids=ids, config=TILES, **options)
        return (o * w).sum(), o

    grad = jax.grad(loss, (0, 1, 2), has_aux=True)
    want, o = grad(q, k, v, w, ids)
    got, o_there = grad(*map(turn, (q, k, v, w, ids)), q_positions=where, kv_positions=where)
    near(jax.tree.map(lambda x: from_order(x, 4, order), (got, o_there)), (want, o))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "sinks": True}], ids=str)
def test_merge(options):
    """Keys in two parts, of which some rows see one only, or none: o, lse and all gradients of both at once."""
    q, k, v, w = (draw(B, S, H, D) for _ in range(4))
    u, cut, options = draw(B, H, S), 30, dict(options)
    sinks = draw(H) if options.pop("sinks", False) else None
    seen = jnp.asarray(RNG.random((1, 1, S, 1)) < 0.9)

    def summed(o, lse):
        return (o * w).sum() + jnp.where(lse == -jnp.inf, 0, lse * u).sum(), (o, lse)

    def part(q, k, v, begin, end, sinks=None):
        where = {"q_positions": jnp.arange(S)[None], "kv_positions": jnp.arange(begin, end)[None]}
        return flash_attention(
            q, k[:, begin:end], v[:, begin:end], mask=seen, sinks=sinks, return_lse=True, **where, **options
        )

    def together(q, k, v):
        return summed(*part(q, k, v, 0, S, sinks))

    def apart(q, k, v):
        return summed(*merge(*part(q, k, v, 0, cut), *part(q, k, v, cut, S, sinks)))

    got, want = (jax.grad(f, (0, 1, 2), has_aux=True)(q, k, v) for f in (apart, together))
    assert not np.isnan(np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])).any()
    near(got[0], want[0], 1e-5)
    near(got[1][0], want[1][0], 1e-5)
    assert ((got[1][1] == -jnp.inf) == (want[1][1] == -jnp.inf)).all()
    near(*(jnp.where(x[1][1] == -jnp.inf, 0, x[1][1]) for x in (got, want)), 1e-5)


def test_merge_is_exact_where_a_part_saw_nothing():
    o, lse = draw(B, S, H, D).astype(jnp.bfloat16), draw(B, H, S) * 50
    nothing = jnp.zeros_like(o), jnp.full_like(lse, -jnp.inf)
    for made in (merge(o, lse, *nothing), merge(*nothing, o, lse)):
        for got, want in zip(made, (o, lse), strict=True):
            np.testing.assert_array_equal(got, want)
    for got, want in zip(merge(*nothing, *nothing), nothing, strict=True):
        np.testing.assert_array_equal(got, want)


WRONG = {
    "order": (lambda: sequence_order(8, 2, "zig"), ValueError, "order must be one of ('contiguous', 'zigzag', 'striped'), got 'zig'"),
    "length": (lambda: sequence_order(10, 2, "zigzag"), ValueError, "length must be a multiple of 4 for 2 devices in zigzag order, got 10; pad the sequence"),
    "devices": (lambda: sequence_order(10, 0, "striped"), ValueError, "devices must be a positive integer, got 0"),
    "contiguous": (lambda: to_order(np.zeros((2, 10)), 4, "contiguous"), ValueError, "length must be a multiple of 4 for 4 devices in contiguous order, got 10"),
    "one_token": (lambda: from_order(np.zeros((2, 1)), 2, "zig"), ValueError, "order must be one of ('contiguous', 'zigzag', 'striped'), got 'zig'"),
    "axis": (lambda: to_order(np.zeros((2, 8)), 2, "striped", axis=2), ValueError, "axis must be one of x, which has 2, got 2"),
    "merge_shape": (lambda: merge(jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 3, 4))), ValueError, "lse1 must be [*batch, H, Sq] for o1 [*batch, Sq, H, Dv] (2, 3, 4, 8), that is (2, 4, 3), got (2, 3, 4)"),
    "merge_lse": (lambda: merge(*[jnp.zeros((3, 4, 8), jnp.bfloat16), jnp.zeros((4, 3), jnp.bfloat16)] * 2), TypeError, "lse1 must be float32 beside o1 in bfloat16, got bfloat16; cast it"),
    "merge_dtype": (lambda: merge(jnp.zeros((3, 4, 8)), jnp.zeros((4, 3)), jnp.zeros((3, 4, 8), jnp.bfloat16), jnp.zeros((4, 3))), ValueError, "o2 must have o1's shape and dtype, (3, 4, 8) float32, got (3, 4, 8) bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    function, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        function()
    assert message in str(caught.value)
