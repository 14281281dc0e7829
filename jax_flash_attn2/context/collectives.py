"""Gathering, scattering and exchanging by messages from device to device, as many bytes as XLA's own collectives send.

For meshes with other axes that XLA divides arrays by: its own collectives over one axis first bring together what the
others divide, but messages leave that as it is.
"""

import jax.numpy as jnp
from jax import Array, lax


def all_gather(x: Array, name: str, axis: int) -> Array:
    """`lax.all_gather(x, name, axis=axis, tiled=True)`."""
    return _joined(_by_source([sent(x, name, by) for by in range(lax.axis_size(name))], name), axis)


def psum_scatter(x: Array, name: str, axis: int) -> Array:
    """`lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)`, always summed in the same order."""
    pieces = _pieces(x, name, axis)
    parts = _by_source([sent(_for(pieces, name, by), name, by) for by in range(lax.axis_size(name))], name)
    return parts.sum(0)


def all_to_all(x: Array, name: str, split: int, concat: int) -> Array:
    """`lax.all_to_all(x, name, split_axis=split, concat_axis=concat, tiled=True)`."""
    pieces = _pieces(x, name, split)
    parts = [sent(_for(pieces, name, by), name, by) for by in range(lax.axis_size(name))]
    return _joined(_by_source(parts, name), concat)


def sent(x: Array, name: str, by: int) -> Array:
    """What the device that is `by` before has."""
    n = lax.axis_size(name)
    return x if by % n == 0 else lax.ppermute(x, name, [(a, (a + by) % n) for a in range(n)])


def _for(pieces: Array, name: str, by: int) -> Array:
    """The piece of the device that is `by` after."""
    to = lax.rem(lax.axis_index(name) + by, jnp.int32(lax.axis_size(name)))
    return lax.dynamic_index_in_dim(pieces, to, 0, keepdims=False)


def _by_source(parts: list[Array], name: str) -> Array:
    """`[devices, ...]`, of what has come from the devices so many before."""
    n = len(parts)
    here = lax.axis_index(name)
    return jnp.take(jnp.stack(parts), lax.rem(here + n - jnp.arange(n, dtype=jnp.int32), jnp.int32(n)), axis=0)


def _pieces(x: Array, name: str, axis: int) -> Array:
    """An axis cut among the devices, `[devices, ...]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], lax.axis_size(name), -1, *x.shape[axis + 1 :]), axis, 0)


def _joined(parts: Array, axis: int) -> Array:
    """`[devices, ...]`, one after the other along an axis."""
    x = jnp.moveaxis(parts, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
