"""Keys that are gathered: each device's rows meet all of them, some heads at a time.

While the keys of one group of heads are computed with, those of the next come: what is held is two groups' keys, not
all. The derivative gathers them anew, and scatters what it gives for keys as it is summed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from .. import primitives
from ..base.operands import is_read
from ..call import api
from ..primitives.call import Call
from .messages import as_one
from .orders import to_order
from .spread import Spread, cleared


@dataclasses.dataclass(frozen=True)
class Gathering:
    """All that is static about one call."""

    call: Call
    spread: Spread
    groups: int
    """Of key heads, met one after the other."""
    native: bool
    """Whether JAX differentiates it by itself."""


def attention(gathering: Gathering, q: Array, k: Array, v: Array, operands: Mapping[str, Array], within: Array | None):
    """o, lse and, if wanted, each row's largest logit.

    Args:
      gathering: what is computed, and how.
      q: `[B, Sq, H, D]`, of this device.
      k: `[B, Sk, Hkv, D]`, likewise.
      v: `[B, Sk, Hkv, Dv]`, likewise.
      operands: of this device's rows and all keys, these in the order of the tokens.
      within: `[n, 1, Sq, 1]`, the rows that are within their sequence; None: all.
    """
    if not gathering.native:
        return _attention(gathering, q, k, v, operands, within)
    k, v = (gathering.spread.gathered(x, 1) for x in (k, v))
    results = api.natively(gathering.call, q, k, v, operands)
    return api.results(gathering.call, [results[0], *_within(results[1:], within)])[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(gathering: Gathering, q, k, v, operands, within):
    return _forward(gathering, q, k, v, operands, within)[:3]


def _forward(gathering: Gathering, q, k, v, operands, within):
    """o, lse, the largest logits, and what else the backward pass reads of each row."""
    made, fetched, before = [], _fetch(gathering, k, v, 0, None), None
    for group in range(gathering.groups):
        coming = _fetch(gathering, k, v, group + 1, before)
        own = _of_group(gathering, q, operands, group)
        before, *rows = primitives.forward(gathering.call, own[0], *fetched, own[1])
        made.append((before, rows))
        fetched = coming
    o = _together([o for o, _ in made], 2)
    rows = [_together(x, 1) for x in zip(*(rows for _, rows in made), strict=True)]
    return api.results(gathering.call, [o, *_within(rows, within)])


def _attention_fwd(gathering: Gathering, q, k, v, operands, within):
    wanted = api.wanted_of(operands)
    is_given = lambda x: hasattr(x, "perturbed")
    q, k, v, operands, within = jax.tree.map(lambda x: x.value, (q, k, v, operands, within), is_leaf=is_given)
    o, lse, largest, stats = _forward(gathering, q, k, v, operands, within)
    o_name, lse_name = api.CHECKPOINT_NAMES
    o, lse = checkpoint_name(o, o_name), checkpoint_name(lse, lse_name)
    stats = tuple(checkpoint_name(x, lse_name) for x in stats) or (lse,)
    return (o, lse, largest), (q, k, v, operands, within, o, stats, wanted)


def _attention_bwd(gathering: Gathering, residuals, cotangents):
    q, k, v, operands, within, o, stats, wanted = residuals
    do, dlse, _ = cotangents
    do = jnp.zeros_like(o) if isinstance(do, SymbolicZero) else cleared(do, within)
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    call = dataclasses.replace(gathering.call, rules=dataclasses.replace(gathering.call.rules, wide=True))
    made, fetched, before = [], _fetch(gathering, k, v, 0, None), None
    for group in range(gathering.groups):
        coming = _fetch(gathering, k, v, group + 1, before)
        own_q, own = _of_group(gathering, q, operands, group)
        heads = functools.partial(_heads, gathering, group=group, of=q.shape[2])
        rows = [None if x is None else heads(x, 1) for x in (*stats, dlse)]
        dq, dk, dv, grads = primitives.backward(
            call, own_q, *fetched, own, heads(o, 2), rows[:-1], heads(do, 2), rows[-1], wanted=tuple(wanted)
        )
        before = dq.astype(q.dtype)
        made.append((before, _scattered(gathering, dk, dv), grads))
        fetched = coming
    dq, dk, dv = (_together(x, 2) for x in zip(*((dq, *dkv) for dq, dkv, _ in made), strict=True))
    grads = {name: None for name in operands}
    for name in wanted:
        x = operands[name]
        own = [grads[name] for _, _, grads in made]
        own = sum(own[1:], own[0]) if is_read(name) or x.shape[1] == 1 else _together(own, 1)
        grads[name] = own.astype(x.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), grads, None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _within(rows: list[Array], within: Array | None) -> list[Array]:
    """What is known of each row, lse or the sum last of it, where sinks must not be seen past the length."""
    if within is None:
        return rows
    inside = within[..., 0]
    lse, *rest = rows
    lse = jnp.where(inside, lse, -jnp.inf)
    if len(rest) >= 2:
        rest[1] = jnp.where(inside, rest[1], 0)
    return [lse, *rest]


def _together(x: Any, axis: int) -> Array:
    return x[0] if len(x) == 1 else jnp.concatenate([*x], axis)


def _heads(gathering: Gathering, x: Array, axis: int, *, group: int, of: int) -> Array:
    """The heads of one group, of an axis of that many; one that does not vary stays."""
    if gathering.groups == 1 or x.shape[axis] != of:
        return x
    size = of // gathering.groups
    return lax.slice_in_dim(x, group * size, (group + 1) * size, axis=axis)


def _of_group(gathering: Gathering, q: Array, operands: Mapping[str, Array], group: int):
    """The query heads of a group of key heads, and the operands of these."""
    if gathering.groups == 1:
        return q, dict(operands)
    heads = functools.partial(_heads, gathering, group=group, of=q.shape[2])
    own = {name: x if is_read(name) else heads(x, 1) for name, x in operands.items()}
    rules = gathering.call.rules
    if rules.score is not None or rules.mask is not None:
        first = jnp.array([0, group * q.shape[2] // gathering.groups, 0], jnp.int32).reshape(1, 1, 1, 3)
        own["origin"] = own.get("origin", jnp.int32(0)) + first
    return heads(q, 2), own


def _fetch(gathering: Gathering, k: Array, v: Array, group: int, after: Array | None) -> tuple[Array, Array] | None:
    """The keys and values of a group of heads, of all devices, in the order of the tokens. after: what is to be there
    first, so that no more than one group is on its way."""
    if group >= gathering.groups:
        return None
    k, v = (_heads(gathering, x, 2, group=group, of=k.shape[2]) for x in (k, v))
    if after is not None:
        k, v, _ = lax.optimization_barrier((k, v, after))
    spread = gathering.spread
    rows = as_one(lambda x: lax.all_gather(x, spread.axis, axis=1, tiled=True), {"k": k, "v": v})
    return spread.plain(rows["k"], 1), spread.plain(rows["v"], 1)


def _scattered(gathering: Gathering, dk: Array, dv: Array) -> list[Array]:
    """Of what each device gives for all keys, the sum over all devices for this one's."""
    spread = gathering.spread
    both = to_order(jnp.concatenate([dk, dv], -1), spread.devices, spread.order)
    both = lax.psum_scatter(both, spread.axis, scatter_dimension=1, tiled=True)
    return jnp.split(both, [dk.shape[-1]], -1)
