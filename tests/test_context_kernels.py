"""The kernels on a share of the sequences, in Triton's interpreter: in each method what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jax_flash_attn2 import Config, context_parallel_attention, flash_attention, from_order, to_order

RNG = np.random.default_rng(0)
B, T, H, HKV, D, N = 2, 32, 2, 1, 16, 2
TABLE = jnp.asarray(RNG.standard_normal((H, 2 * T)), jnp.float32)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


# Where rows and keys are numbered by data: causality, dropout, a score function and the gradient of what it reads.
NUMBERED = {"causal": True, "dropout_rate": 0.3, "dropout_seed": 7}
# Statistics in the kernels' own base, of which a bias of -1e9 leaves nothing to lse; lengths, slopes.
FAR = {"kv_lengths": jnp.int32([T, 11]), "q_lengths": jnp.int32([25, T])}
CASES = {
    "numbered": (NUMBERED, {"sinks": draw(H), "table": TABLE}),
    "far": (FAR, {"bias": draw(B, 1, 1, T) - 1e9, "alibi_slopes": jnp.abs(draw(H))}),
}


@pytest.mark.parametrize(
    ("method", "order", "name"),
    [
        ("ring", "zigzag", "numbered"), ("ring", "striped", "far"),
        *(pytest.param("all_gather", "zigzag", name, marks=pytest.mark.thorough) for name in CASES),
        pytest.param("ulysses", "zigzag", "numbered", marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_on_a_share(method, order, name):
    options, extra = CASES[name]
    floats = {"q": draw(B, T, H, D), "k": draw(B, T, HKV, D), "v": draw(B, T, HKV, D), **extra}
    w, u = draw(B, T, H, D), draw(B, H, T)
    mesh = jax.make_mesh((N,), ("s",), devices=jax.devices()[:N], axis_types=(AxisType.Auto,))
    there = functools.partial(context_parallel_attention, axis="s", mesh=mesh, method=method, order=order)
    axes = {"q": 1, "k": 1, "v": 1, "bias": 3}

    def gradients(attention, floats, w, u):
        def loss(floats):
            given = dict(floats)
            if "table" in given:
                table = given.pop("table")
                given["score_mod"] = lambda s, b, h, i, j: s + table[h, i - j + T]
            o, lse = attention(**given, **options, return_lse=True, config=Config(16, 16), implementation="triton")
            seen = lse > -jnp.inf
            return (o * w).sum() + jnp.where(seen, jnp.sin(jnp.where(seen, lse, 0) / 1e3) * u, 0).sum(), (o, lse)

        return jax.jit(jax.grad(loss, has_aux=True))(floats)

    want, (o, lse) = gradients(flash_attention, floats, w, u)
    turn = lambda move, x: {k: move(v, N, order, axes[k]) if k in axes else v for k, v in x.items()}
    moved = to_order(w, N, order), to_order(u, N, order, 2)
    got, (o_there, lse_there) = gradients(there, turn(to_order, floats), *moved)
    got |= {"o": from_order(o_there, N, order), "lse": from_order(lse_there, N, order, 2)}
    for key, x in (want | {"o": o, "lse": lse}).items():
        y = turn(from_order, got)[key] if key in floats else got[key]
        seen = np.isfinite(x)
        np.testing.assert_array_equal(np.isfinite(y), seen)
        largest = max(np.abs(x[seen]).max(), 1e-3)
        np.testing.assert_allclose(y[seen], x[seen], atol=4e-6 * largest, rtol=0, err_msg=key)
