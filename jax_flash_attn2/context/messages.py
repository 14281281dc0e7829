"""Several arrays of rows in one message: what travels at once costs one latency, and XLA hides it as one."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array, lax


def as_one(send: Callable[[Array], Array], rows: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays `[B, S, Hkv, ...]` as `send` returns them, sent as one, side by side in words of the smallest: so batches
    and heads may be divided further. It has no derivative."""
    size = min(x.dtype.itemsize for x in rows.values())
    words = [lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).reshape(*x.shape[:3], -1) for x in rows.values()]
    message, at, arrived = send(jnp.concatenate(words, -1)), 0, {}
    for (name, x), own in zip(rows.items(), words, strict=True):
        width = own.shape[-1]
        own = lax.slice_in_dim(message, at, at + width, axis=3)
        own = own.reshape(*own.shape[:3], x.shape[3], -1) if x.dtype.itemsize > size else own
        arrived[name], at = lax.bitcast_convert_type(own, x.dtype), at + width
    return arrived
