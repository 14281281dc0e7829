"""Eight devices: a sharded call gives what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_flash_attn2 import flash_attention


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "spec", [PartitionSpec("data"), PartitionSpec("data", None, "model")], ids=["batch", "batch_heads"]
)
def test_sharded(spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = [jax.random.normal(key, (4, 64, 4, 16)) for key in jax.random.split(jax.random.key(0), 3)]
    step = jax.jit(jax.value_and_grad(lambda q, k, v: (flash_attention(q, k, v, causal=True) ** 2).sum(), (0, 1, 2)))
    want = step(*x)
    got = step(*(jax.device_put(a, NamedSharding(mesh, spec)) for a in x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert got[1][0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    assert jnp.isfinite(got[0])
