"""Results are no further from fp64 than those of the plain implementation; in half precision whatever the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import numerics
from jax_flash_attn2.base import rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", numerics.KINDS)
def test_no_further_than_plain(kind, dtype):
    errors = numerics.compare(kind, dtype, 256, "xla")["errors"]
    for name, error in errors["ours"].items():
        assert error <= 1.05 * errors["plain"][name], (name, error, errors["plain"][name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_loses(dtype):
    """What becomes infinite, or is no number, stays so. Subnormal numbers lose no more."""
    exponents = np.linspace(-18 if dtype == "float16" else -130, 15.9, 2000)
    x = jnp.asarray(np.outer([-1, 1], 2.0**exponents), jnp.float32)
    rounded, lost = jax.jit(rounding.split, static_argnums=1)(x, dtype)
    np.testing.assert_array_equal(rounded, x.astype(dtype))
    near, subnormal = (2.0**-15, 2.0**-142) if dtype == "bfloat16" else (2.0**-19, 2.0**-33)
    np.testing.assert_allclose(rounding.joined(rounded, lost), x, rtol=near, atol=subnormal)
    odd = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0, 3.4e38], jnp.float32)
    np.testing.assert_array_equal(rounding.joined(*rounding.split(odd, dtype)), odd.astype(dtype).astype(jnp.float32))


def test_long_sums_in_float32():
    """Sums over as many rows as one tile may have are as exact as the plain implementation's."""
    errors = numerics.compare("normal", "float32", 1024, "xla")["errors"]
    for name, error in errors["ours"].items():
        assert error <= 1.1 * errors["plain"][name], (name, error, errors["plain"][name])


def test_tables():
    record = numerics.compare("normal", "float32", 64, "xla")
    trained = {"what": "training", "seed": 1, "steps": 9, "held_out": {"flash": 1.25, "flax": 1.5}}
    text = numerics.tables([record, trained])
    assert "xla      float32  64  normal" in text
    assert "Held-out loss after 9 steps, nats per character\nseed    flash     flax\n" in text
    assert "1     1.25000  1.50000" in text
