"""Heads for sequences: each device has all rows and keys of some heads (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509)."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from ..base.operands import BLOCK_LISTS, is_read
from ..call import api
from ..primitives import sharding
from ..primitives.call import Call
from .orders import to_order
from .spread import Spread


def attention(call: Call, spread: Spread, q: Array, k: Array, v: Array, operands: Mapping[str, Array], native: bool):
    """o, lse and, if wanted, each row's largest logit.

    Args:
      call: what is computed.
      spread: how the sequences lie; its devices divide the query heads.
      q: `[B, Sq, H, D]`, of this device, as are all others.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      operands: as `inputs.prepare` makes them.
      native: whether JAX differentiates it by itself.
    """
    n, heads = spread.devices, q.shape[2]
    copies = copies_of_keys(k.shape[2], n)
    if copies > 1:  # each key head goes to as many devices as read it, and their gradients are summed
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    exchange = lambda x: lax.all_to_all(x, spread.axis, split_axis=2, concat_axis=1, tiled=True)
    q, k, v = (spread.plain(exchange(x), 1) for x in (q, k, v))
    own = {name: _of_heads(spread, name, x, heads) for name, x in operands.items()}
    if call.rules.score is not None or call.rules.mask is not None:
        first = jnp.stack([jnp.int32(0), spread.here * (heads // n), jnp.int32(0)]).astype(jnp.int32)
        own["origin"] = first.reshape(1, 1, 1, 3)
    o, lse, largest = api.attend(call, sharding.vary_alike((q, k, v, own)), native)
    back = lambda x, rows, heads: lax.all_to_all(
        to_order(x, n, spread.order, rows), spread.axis, split_axis=rows, concat_axis=heads, tiled=True
    )
    return back(o, 1, 2), back(lse, 2, 1), None if largest is None else back(largest, 2, 1)


def copies_of_keys(kv_heads: int, devices: int) -> int:
    """How often each key head is repeated, so that there is one for each device."""
    return devices // math.gcd(kv_heads, devices)


def _of_heads(spread: Spread, name: str, x: Array, heads: int) -> Array:
    """An operand of all rows and keys, in the order of the tokens, and this device's heads."""
    if is_read(name):
        return x
    own_keys, all_keys = spread.has_own_keys(name, x), spread.has_all_keys(name, x)
    by_rows = name in ("q_segments", "q_positions") or (name in ("bias", "mask") and x.shape[2] > 1)
    by_heads = x.shape[1] == heads > 1
    axis = 2 if by_rows else 3
    if (by_rows or own_keys) and by_heads:
        x = spread.plain(lax.all_to_all(x, spread.axis, split_axis=1, concat_axis=axis, tiled=True), axis)
    elif by_rows or own_keys:
        x = spread.gathered(x, axis)
    elif by_heads:
        own = heads // spread.devices
        x = lax.dynamic_slice_in_dim(x, spread.here * own, own, 1)
    return spread.plain(x, 3) if all_keys and name not in BLOCK_LISTS else x
