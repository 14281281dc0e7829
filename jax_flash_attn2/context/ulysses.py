"""Heads for sequences: each device has all rows and keys of some heads (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509)."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from .. import primitives
from ..base import axes
from ..base.operands import BLOCK_LISTS, is_read
from ..call import api, kept
from ..primitives import share
from ..primitives.call import Call
from .spread import Spread


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """All that is static about one call."""

    call: Call
    spread: Spread
    """Its devices divide the query heads."""
    native: bool
    """Whether JAX differentiates it by itself."""

    def copies(self, k: Array) -> int:
        """How often each key head is repeated, so that there is one for each device."""
        return copies_of_keys(k.shape[2], self.spread.devices)

    def exchange(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """All rows and keys of this device's heads."""
        k, v = (jnp.repeat(x, self.copies(k), axis=2) for x in (k, v))
        q, k, v = (self.spread.exchanged(x, 2, 1) for x in (q, k, v))
        return q, k, v

    def back(self, o: Array, lse: Array, largest: Array | None) -> tuple[Array, Array, Array | None]:
        """What is known of this device's rows, of all heads."""
        of_rows = lambda x: self.spread.returned(x, 1, 2)
        return self.spread.returned(o, 2, 1), of_rows(lse), None if largest is None else of_rows(largest)


def copies_of_keys(kv_heads: int, devices: int) -> int:
    """How often each key head is repeated, so that there is one for each device."""
    return devices // math.gcd(kv_heads, devices)


def attention(ulysses: Ulysses, q: Array, k: Array, v: Array, operands: Mapping[str, Array]):
    """o, lse and, if wanted, each row's largest logit.

    Args:
      ulysses: what is computed, and how.
      q: `[B, Sq, H, D]`, of this device, as are all others.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      operands: as `inputs.prepare` makes them.
    """
    spread, rules, heads = ulysses.spread, ulysses.call.rules, q.shape[2]
    own = {name: _of_heads(spread, name, x, heads) for name, x in operands.items()}
    if rules.score is not None or rules.mask is not None:
        first = jnp.stack([jnp.int32(0), spread.here * (heads // spread.devices), jnp.int32(0)]).astype(jnp.int32)
        own["origin"] = first.reshape(1, 1, 1, 3)
    q, k, v, own = axes.vary_alike((q, k, v, own))
    if not ulysses.native:
        return _everywhere(ulysses, q, k, v, own)
    results = api.natively(ulysses.call, *ulysses.exchange(q, k, v), own)
    return ulysses.back(*api.results(ulysses.call, results)[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ulysses: Ulysses, q, k, v, operands):
    results = primitives.forward(ulysses.call, *ulysses.exchange(q, k, v), operands)
    return ulysses.back(*api.results(ulysses.call, results)[:3])


def _attention_fwd(ulysses: Ulysses, q, k, v, operands):
    wanted = api.wanted_of(operands)
    copies = ulysses.copies(k.value)
    q, k, v = ulysses.exchange(*api.values((q, k, v)))
    operands = api.values(operands)
    made, lost = primitives.forward_and_lost(ulysses.call, q, k, v, operands)
    o, lse, largest, stats = api.results(ulysses.call, made)
    o, lost, lse, stats = kept.named(o, lost, lse, stats)
    return ulysses.back(o, lse, largest), (q, k, v, operands, o, lost, stats, wanted, copies)


def _attention_bwd(ulysses: Ulysses, residuals, cotangents):
    q, k, v, operands, o, lost, stats, wanted, copies = residuals
    do, dlse, _ = cotangents
    spread, call = ulysses.spread, ulysses.call
    do = jnp.zeros_like(o) if isinstance(do, SymbolicZero) else spread.exchanged(do, 2, 1)
    dlse = None if isinstance(dlse, SymbolicZero) else spread.exchanged(dlse, 1, 2)
    if copies > 1:  # whose gradients are summed before they are rounded
        call = share.wide(call)
    args = q, k, v, operands, o, stats, do, dlse
    dq, dk, dv, grads = primitives.backward(call, *args, wanted=tuple(wanted), lost=lost)
    dq, dk, dv = (spread.returned(x, 2, 1) for x in (dq.astype(q.dtype), dk, dv))
    dk, dv = (x.reshape(*x.shape[:2], -1, copies, x.shape[3]).sum(3).astype(k.dtype) for x in (dk, dv))
    own = {name: grads[name].astype(x.dtype) if name in grads else None for name, x in operands.items()}
    return dq, dk, dv, own


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)
_everywhere = axes.outside_jit_too(_attention)


def _of_heads(spread: Spread, name: str, x: Array, heads: int) -> Array:
    """An operand of all rows and keys, in the order of the tokens, and this device's heads."""
    if is_read(name):
        return x
    own_keys, all_keys = spread.has_own_keys(name, x), spread.has_all_keys(name, x)
    by_rows = name in ("q_segments", "q_positions") or (name in ("bias", "mask") and x.shape[2] > 1)
    by_heads = x.shape[1] == heads > 1
    axis = 2 if by_rows else 3
    if (by_rows or own_keys) and by_heads:
        x = spread.exchanged(x, 1, axis)
    elif by_rows or own_keys:
        x = spread.gathered(x, axis)
    elif by_heads:
        own = heads // spread.devices
        x = lax.dynamic_slice_in_dim(x, spread.here * own, own, 1)
    return spread.plain(x, 3) if all_keys and name not in BLOCK_LISTS else x
