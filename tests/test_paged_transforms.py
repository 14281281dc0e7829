"""A paged call under vmap, and on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flash_attn2 import paged_attention

RNG = np.random.default_rng(0)
B, H, HKV, D, SIZE, N = 4, 8, 4, 32, 16, 6
PAGES = B * N


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


Q, K, V = draw(B, 2, H, D), draw(PAGES, SIZE, HKV, D), draw(PAGES, SIZE, HKV, D)
TABLE = jnp.asarray(RNG.permutation(PAGES).reshape(B, N), jnp.int32)
LENGTHS = jnp.asarray([0, 96, 33, 5], jnp.int32)
SCALE = jnp.asarray(RNG.uniform(0.5, 2, (PAGES, HKV)), jnp.float32)
STARTS = jnp.asarray([0, 1, 4, 4, 7], jnp.int32)


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mapped", ["sequences", "pages", "ragged"])
def test_vmap_is_a_loop(mapped):
    attend = functools.partial(paged_attention, window_size=40, k_scale=SCALE, return_lse=True)
    if mapped == "sequences":  # each its own table; the lengths are everybody's
        args, axes = (jnp.stack([Q, 2 * Q]), K, V, jnp.stack([TABLE, TABLE[::-1]]), LENGTHS), (0, None, None, 0, None)
    elif mapped == "pages":
        args, axes = (Q, jnp.stack([K, V], 1), V, TABLE, LENGTHS), (None, 1, None, None, None)
    else:
        rows = draw(2, 8, H, D)
        args, axes = (
            (rows, K, V, TABLE, LENGTHS, jnp.stack([STARTS, STARTS + (STARTS > 0).astype(jnp.int32)])),
            (0, None, None, None, None, 0),
        )
        attend = lambda *x: paged_attention(*x[:5], cu_q_lens=x[5], return_lse=True)
    got = jax.jit(jax.vmap(attend, axes))(*args)
    one = jax.jit(attend)
    for n in range(2):
        own = [x if axis is None else jnp.take(x, n, axis) for x, axis in zip(args, axes, strict=True)]
        assert_same([x[n] for x in got], one(*own))


def test_types_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("b", "h"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    rows, pages = draw(7, H, D), [put(x, None, None, "h") for x in (K, V)]
    cases = {
        "few": (Q, ("b", None, "h"), ("b", "h", None)), "one": (Q[:, 0], ("b", "h"), ("b", "h")),
        "ragged": (rows, (None, "h"), ("h", None)),
    }  # fmt: skip
    with jax.set_mesh(mesh):
        for name, (q, spec, of_lse) in cases.items():
            starts = {"cu_q_lens": STARTS} if name == "ragged" else {}
            o, lse = jax.jit(lambda q, k, v, s: paged_attention(q, k, v, TABLE, LENGTHS, return_lse=True, **s))(
                put(q, *spec), *pages, starts
            )
            assert jax.typeof(o).sharding.spec == PartitionSpec(*spec, None), name
            assert jax.typeof(lse).sharding.spec == PartitionSpec(*of_lse), name


@pytest.mark.parametrize(
    ("q", "pages", "moved"),
    [
        ((("b",), None, ("h",)), (None, None, ("h",)), 0),  # sequences and heads: nobody needs anything of another
        ((("b", "h"),), (), 0),
        ((None, None, ("b", "h")), (None, None, ("h",)), None),  # more devices than key heads: these are gathered
    ],
    ids=["both", "sequences", "heads"],
)
def test_devices_share_sequences_and_heads(q, pages, moved):
    mesh = jax.make_mesh((2, 4), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    heads = pages[2:] or (None,)
    args = (put(jnp.tile(Q, (2, 1, 1, 1)), *q), put(K, *pages), put(V, *pages), put(jnp.tile(TABLE, (2, 1)), *q[:1]))
    args += (put(jnp.tile(LENGTHS, 2), *q[:1]), put(SCALE, None, *heads))
    attend = jax.jit(lambda q, k, v, t, n, s: paged_attention(q, k, v, t, n, k_scale=s, return_lse=True))
    assert_same(attend(*args), attend(*jax.device_get(args)))
    text = attend.lower(*args).compile().as_text()
    if moved == 0:
        assert "all-gather" not in text
        assert "all-reduce" not in text
    rows = put(draw(8, H, D), None, ("h",))
    ragged = jax.jit(lambda q, k, v, t, n, c: paged_attention(q, k, v, t, n, cu_q_lens=c, return_lse=True))
    args = (rows, *args[1:3], put(TABLE), put(LENGTHS), put(STARTS))
    assert_same(ragged(*args), ragged(*jax.device_get(args)))
