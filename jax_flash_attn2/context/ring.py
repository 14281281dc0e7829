"""Keys that go round: each device meets those of all others in turn (ring attention, Liu et al. 2023,
arXiv:2310.01889).

A step computes with the keys that are here, while these travel on in one message. The derivative is that of the whole
ring, with the statistics of all keys: one call of the backward pass a step, and what it gives for keys goes after them,
in the message that sends the next ones on.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from .. import primitives
from ..base import axes
from ..base.operands import summed_to
from ..base.rounding import joined, loses, split
from ..call import api, kept
from ..primitives import share
from ..primitives.call import Call
from . import collectives, parts
from .hops import UNROLLED, Way
from .messages import packed, unpacked
from .spread import Spread, cleared


@dataclasses.dataclass(frozen=True)
class Ring:
    """All that is static about one call."""

    call: Call
    spread: Spread
    ways: tuple[Way, ...]
    moving: tuple[str, ...]
    """The operands that go round with the keys."""
    implied: tuple[str, ...]
    """Those that follow from whose keys they are."""
    native: bool
    """Whether JAX differentiates it by itself."""

    def of_hop(self, operands: Mapping[str, Array], moving: Mapping[str, Array], hop: Any) -> dict[str, Array]:
        """The operands of this device's rows and the keys from so many devices before."""
        spread = self.spread
        device = self.device(hop)
        made = {name: x for name, x in operands.items() if name != "sinks"} | dict(moving)
        for name, x in operands.items():
            if spread.has_all_keys(name, x):
                made[name] = lax.dynamic_slice_in_dim(x, device * spread.keys, spread.keys, 3)
        tokens = spread.key_tokens(device).reshape(1, 1, 1, -1)
        return made | dict.fromkeys(self.implied, tokens)

    def device(self, hop: Any) -> Array:
        """Whose keys they are."""
        return lax.rem(self.spread.here - hop + self.spread.devices, jnp.int32(self.spread.devices))


def attention(ring: Ring, q: Array, k: Array, v: Array, operands: Mapping[str, Array], within: Array | None):
    """o, lse and, if wanted, each row's largest logit.

    Args:
      ring: what is computed, and how.
      q: `[B, Sq, H, D]`, of this device, as are all others.
      k: `[B, Sk, Hkv, D]`.
      v: `[B, Sk, Hkv, Dv]`.
      operands: as `spread.numbered` makes them.
      within: `[n, 1, Sq, 1]`, the rows that are within their sequence; None: all.
    """
    if ring.native:
        return _finished(ring, q, _forward(ring, q, k, v, operands, within), operands)
    return _everywhere(ring, q, k, v, operands, within)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: Ring, q, k, v, operands, within):
    return _finished(ring, q, _forward(ring, q, k, v, operands, within), operands)


def _forward(ring: Ring, q, k, v, operands, within) -> parts.Part:
    call, unit = ring.call, parts.unit(ring.call, q, operands, ring.native)
    run = api.natively if ring.native else primitives.forward
    wide = share.wide(call)

    def step(part: parts.Part, keys: "_Keys", hop: Any) -> tuple[parts.Part, None]:
        own = ring.of_hop(operands, keys.moving, hop)
        return parts.both(part, parts.of_keys(run, wide, q, keys.k, keys.v, own), unit), None

    part = parts.nothing(call, q, v)
    for one in ring.ways:
        part, _ = _over(ring, one, _Keys.of(ring, k, v, operands), None, part, step)
    return parts.with_sinks(part, operands.get("sinks"), within, unit)


def _finished(ring: Ring, q: Array, part: parts.Part, operands: Mapping[str, Array]):
    lse = parts.lse_of(part, parts.unit(ring.call, q, operands, ring.native))
    return part.o.astype(q.dtype), lse, part.largest


def _attention_fwd(ring: Ring, q, k, v, operands, within):
    wanted = api.wanted_of(operands)
    q, k, v, operands, within = api.values((q, k, v, operands, within))
    part = _forward(ring, q, k, v, operands, within)
    o, lse, largest = _finished(ring, q, part, operands)
    o, lost = split(part.o, q.dtype) if loses(q.dtype) else (o, None)
    stats = (jnp.where(part.l == 0, 0, part.m), part.l) if ring.call.row_stats(operands) == 2 else ()
    o, lost, lse, stats = kept.named(o, lost, lse, stats)
    return (o, lse, largest), (q, k, v, operands, within, o, lost, stats, wanted)


def _attention_bwd(ring: Ring, residuals, cotangents):
    q, k, v, operands, within, o, lost, stats, wanted = residuals
    do, dlse, _ = cotangents
    do = jnp.zeros_like(o) if isinstance(do, SymbolicZero) else cleared(do, within)
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    call, spread = share.wide(ring.call), ring.spread
    of_hops = tuple(name for name in wanted if name != "sinks")

    def step(sums: dict[str, Array], keys: "_Keys", hop: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        own = ring.of_hop(operands, keys.moving, hop)
        dq, dk, dv, grads = primitives.backward(
            call, q, keys.k, keys.v, own, o, stats, do, dlse, wanted=of_hops, lost=lost, before=sums["q"]
        )
        made = {"q": dq}
        for name in sums.keys() - {"q"}:
            if spread.has_all_keys(name, operands[name]):  # each of them once
                at = ring.device(hop) * spread.keys
                grad = grads[name].astype(sums[name].dtype)
                made[name] = lax.dynamic_update_slice_in_dim(sums[name], grad, at, 3)
            else:
                made[name] = sums[name] + grads[name]
        return made, {"k": dk, "v": dv, **{name: grads[name] for name in of_hops if name in ring.moving}}

    zeros = lambda x: _zeros(x, call.rules.result(x.dtype), o)
    sums = {"q": zeros(q)}
    for name in of_hops:
        x = operands[name]
        if name not in ring.moving:
            sums[name] = _zeros(x, x.dtype, o) if spread.has_all_keys(name, x) else zeros(x)
    nothing = {"k": zeros(k), "v": zeros(v), **{name: zeros(operands[name]) for name in of_hops if name in ring.moving}}
    of_keys: dict[str, Array] = {}
    for one in ring.ways:
        sums, home = _over(ring, one, _Keys.of(ring, k, v, operands), nothing, sums, step)
        of_keys = jax.tree.map(jnp.add, of_keys, home) if of_keys else home
    grads = {name: x for name, x in (sums | of_keys).items() if name not in ("q", "k", "v")}
    if "sinks" in wanted:
        grads["sinks"] = _of_sinks(ring, q, operands, within, joined(o, lost), stats, do, dlse)
    dq, dk, dv = (x.astype(like.dtype) for x, like in ((sums["q"], q), (of_keys["k"], k), (of_keys["v"], v)))
    own = {name: grads[name].astype(x.dtype) if name in grads else None for name, x in operands.items()}
    return dq, dk, dv, own, None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)
_everywhere = axes.outside_jit_too(_attention)


def _of_sinks(ring: Ring, q, operands, within, o, stats, do, dlse) -> Array:
    unit, sinks = parts.unit(ring.call, q, operands, ring.native), operands["sinks"]
    m, l = stats if len(stats) == 2 else (stats[0], parts.sum_beside(stats[0]))
    grad = parts.gradient_of_sinks(parts.Part(o, m, l, None), sinks, within, unit, do, dlse)
    return summed_to(grad, sinks.shape, 1)


def _zeros(x: Array, dtype: Any, like: Array) -> Array:
    """Where a gradient of x is summed. It waits for `like`: XLA would make all zeros of a program at once, and hold
    these through the forward pass."""
    zero, _ = axes.vary_alike(lax.optimization_barrier((jnp.zeros((), dtype), like)))
    return jnp.broadcast_to(zero, x.shape)


# What travels.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Keys:
    k: Array
    v: Array
    moving: dict[str, Array]

    @classmethod
    def of(cls, ring: Ring, k: Array, v: Array, operands: Mapping[str, Array]) -> "_Keys":
        return cls(k, v, {name: operands[name] for name in ring.moving})


class _Load(NamedTuple):
    """What a device has to send: keys, or None, and what was summed for the keys that it had before, or None."""

    keys: _Keys | None
    sums: dict[str, Array] | None

    @property
    def rows(self) -> dict[str, Array]:
        """The arrays `[B, S, Hkv, ...]` of it, which go as one message."""
        keys = {} if self.keys is None else {"keys_k": self.keys.k, "keys_v": self.keys.v}
        return keys | ({} if self.sums is None else {"sums_k": self.sums["k"], "sums_v": self.sums["v"]})

    @property
    def others(self) -> tuple[Any, Any]:
        """The rest of it, which is small."""
        moving = None if self.keys is None else self.keys.moving
        sums = self.sums and {name: x for name, x in self.sums.items() if name not in ("k", "v")}
        return moving, sums

    @classmethod
    def of(cls, rows: Mapping[str, Array], others: tuple[Any, Any]) -> "_Load":
        moving, sums = others
        keys = None if moving is None else _Keys(rows["keys_k"], rows["keys_v"], moving)
        return cls(keys, None if sums is None else {"k": rows["sums_k"], "v": rows["sums_v"], **sums})


def _over(
    ring: Ring, way: Way, keys: _Keys, zeros: dict[str, Array] | None, state: Any, step: Callable[..., Any]
) -> tuple[Any, Any]:
    """`state, added = step(state, keys, hop)` with the keys of each hop of a way, and the sums of what was added for
    them. zeros: what a loop sums from; None: nothing is added.

    Returns:
      The last state, and the sums for this device's own keys.
    """
    here: Any = _sent(ring, _Load(keys, None), way.first).keys
    sums: Any = None
    if way.count > UNROLLED:
        state, sums = _in_a_loop(ring, way, here, zeros, state, step)
    else:
        for n in range(way.count):
            last = n + 1 == way.count
            arrived = _sent(ring, _Load(None if last else here, sums), way.step)
            state, added = step(state, here, way.first + way.step * n)
            here, sums = arrived.keys, _added(arrived.sums, added)
    return state, _sent(ring, _Load(None, sums), -way.last).sums


def _in_a_loop(ring: Ring, way: Way, keys: _Keys, zeros: Any, state: Any, step: Callable[..., Any]) -> tuple[Any, Any]:
    """Each step sends what the one before has packed: it need not be packed again, nor held twice."""
    pack, unpack = (lambda rows: rows, lambda message, _: message) if ring.native else (packed, unpacked)
    load = _Load(keys, zeros)
    like = load.rows

    def body(carry: Any, n: Array) -> tuple[Any, None]:
        state, message, others = carry
        here = _Load.of(unpack(message, like), others)
        message, others = _turned(ring, (message, others), way.step)  # waits for no result of this step
        state, added = step(state, here.keys, way.first + way.step * n)
        if added is not None:
            there = _Load.of(unpack(message, like), others)
            there = _Load(there.keys, _added(there.sums, added))
            message, others = pack(there.rows), there.others
        return (state, message, others), None

    numbers = jnp.arange(way.count, dtype=jnp.int32)
    (state, message, others), _ = lax.scan(body, (state, pack(load.rows), load.others), numbers)
    return state, _Load.of(unpack(message, like), others).sums


def _added(sums: Any, added: Any) -> Any:
    return added if sums is None else jax.tree.map(jnp.add, sums, added)


def _sent(ring: Ring, load: _Load, by: int) -> _Load:
    """What arrives from the device that is `by` before."""
    if by % ring.spread.devices == 0 or load == (None, None):
        return load
    if ring.native:  # a message has no derivative
        return _turned(ring, load, by)
    rows, others = _turned(ring, (packed(load.rows), load.others), by)
    return _Load.of(unpacked(rows, load.rows), others)


def _turned(ring: Ring, x: Any, by: int) -> Any:
    return jax.tree.map(lambda x: collectives.sent(x, ring.spread.axis, by), x)
