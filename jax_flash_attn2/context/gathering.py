"""Keys that are gathered: each device's rows meet all of them, some heads at a time.

While the keys of one group of heads are computed with, those of the next come: what is held is two groups' keys, not
all. The derivative gathers them anew, and scatters what it gives for keys as it is summed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from .. import primitives
from ..base import axes
from ..base.arguments import accumulator
from ..base.operands import is_read
from ..base.rounding import loses, lost_dtype
from ..call import api, kept
from ..primitives import share
from ..primitives.call import Call
from .messages import packed, unpacked
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
    attend = _attend if gathering.native else _everywhere
    return attend(gathering, q, k, v, operands, within)


def _attend(gathering: Gathering, q, k, v, operands, within):
    return _forward(gathering, q, k, v, operands, within)[:3]


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))


def _forward(gathering: Gathering, q, k, v, operands, within):
    """o, lse, the largest logits, what else the backward pass reads of each row, and what o lost; None: not wanted."""
    run = api.natively if gathering.native else primitives.forward

    def step(made: list[Array], keys: tuple[Array, Array], group: Any) -> list[Array]:
        own_q, own = _of_group(gathering, q, operands, group)
        results = run(gathering.call, own_q, *keys, own)
        return [_put(gathering, x, y, x.ndim - 2, group) for x, y in zip(made, results, strict=True)]

    call = gathering.call
    row = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), accumulator(q.dtype))
    o = jnp.zeros((*q.shape[:3], v.shape[3]), call.rules.result(q.dtype))
    made = [o, *[row] * call.row_results(operands), *[o.astype(lost_dtype(o.dtype))] * call.rules.gives_lost]
    o, *rows = _over_groups(gathering, k, v, axes.vary_alike((made, q))[0], step)
    lost = rows.pop() if call.rules.gives_lost else None
    return *api.results(call, [o, *_within(rows, within)]), lost


def _over_groups(gathering: Gathering, k: Array, v: Array, state: Any, step: Callable[..., Any]) -> Any:
    """`state = step(state, keys, group)` with the keys and values of each group of heads, while the next ones come. The
    number of the first group is known, and so is that of the last."""
    last = gathering.groups - 1

    def turn(carry: Any, group: Any) -> tuple[Any, None]:
        state, keys = carry
        coming = _fetch(gathering, k, v, group + 1)  # waits for no result of this step
        return (step(state, keys, group), coming), None

    carry = state, _fetch(gathering, k, v, 0)
    if last > 0:
        carry, _ = turn(carry, 0)
    if last > 1:
        carry, _ = lax.scan(turn, carry, jnp.arange(1, last, dtype=jnp.int32))
    state, keys = carry
    return step(state, keys, last)


def _attention_fwd(gathering: Gathering, q, k, v, operands, within):
    wanted = api.wanted_of(operands)
    q, k, v, operands, within = api.values((q, k, v, operands, within))
    call = gathering.call.with_lost(loses(q.dtype))
    o, lse, largest, stats, lost = _forward(dataclasses.replace(gathering, call=call), q, k, v, operands, within)
    o, lost, lse, stats = kept.named(o, lost, lse, stats)
    return (o, lse, largest), (q, k, v, operands, within, o, lost, stats, wanted)


def _attention_bwd(gathering: Gathering, residuals, cotangents):
    q, k, v, operands, within, o, lost, stats, wanted = residuals
    do, dlse, _ = cotangents
    do = jnp.zeros_like(o) if isinstance(do, SymbolicZero) else cleared(do, within)
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    call = share.wide(gathering.call)

    def scattered(made: dict[str, Array], group: Any) -> dict[str, Array]:
        """With what the group before gave for keys."""
        sums = dict(zip("kv", _scattered(gathering, *made["given"]), strict=True))
        put = lambda name, x: _put(gathering, made[name], x.astype(made[name].dtype), 2, group)
        return {name: put(name, sums[name]) if name in sums else x for name, x in made.items()}

    def step(made: dict[str, Any], keys: tuple[Array, Array], group: Any) -> dict[str, Any]:
        if "given" in made:  # travels while this group is computed with
            made = scattered(made, group - 1)
        own_q, own = _of_group(gathering, q, operands, group)
        heads = functools.partial(_heads, gathering, group=group, of=q.shape[2])
        rows = [None if x is None else heads(x, 1) for x in (*stats, dlse)]
        args = own_q, *keys, own, heads(o, 2), rows[:-1], heads(do, 2), rows[-1]
        own_lost = None if lost is None else heads(lost, 2)
        dq, dk, dv, grads = primitives.backward(call, *args, wanted=tuple(wanted), lost=own_lost)
        put = lambda name, x, axis: _put(gathering, made[name], x.astype(made[name].dtype), axis, group)
        added = {**made, "q": put("q", dq, 2), "given": (dk, dv)}
        for name in wanted:
            is_cut = not is_read(name) and operands[name].shape[1] > 1
            added[name] = put(name, grads[name], 1) if is_cut else made[name] + grads[name]
        return added

    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    zeros |= {name: jnp.zeros(operands[name].shape, call.rules.result(operands[name].dtype)) for name in wanted}
    k, v, _ = lax.optimization_barrier((k, v, do))  # else XLA would keep what the forward pass gathered
    made = _over_groups(gathering, k, v, axes.vary_alike((zeros, q))[0], step)
    made = scattered(made, gathering.groups - 1)
    grads = {name: made[name].astype(x.dtype) if name in wanted else None for name, x in operands.items()}
    return made["q"], made["k"], made["v"], grads, None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)
_everywhere = axes.outside_jit_too(_attention)


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


def _heads(gathering: Gathering, x: Array, axis: int, *, group: Any, of: int) -> Array:
    """The heads of one group, of an axis of that many; one that does not vary stays."""
    if gathering.groups == 1 or x.shape[axis] != of:
        return x
    size = of // gathering.groups
    return lax.dynamic_slice_in_dim(x, group * size, size, axis)


def _put(gathering: Gathering, x: Array, own: Array, axis: int, group: Any) -> Array:
    """x with the heads of one group."""
    return own if gathering.groups == 1 else lax.dynamic_update_slice_in_dim(x, own, group * own.shape[axis], axis)


def _of_group(gathering: Gathering, q: Array, operands: Mapping[str, Array], group: Any):
    """The query heads of a group of key heads, and the operands of these."""
    if gathering.groups == 1:
        return q, dict(operands)
    heads = functools.partial(_heads, gathering, group=group, of=q.shape[2])
    own = {name: x if is_read(name) else heads(x, 1) for name, x in operands.items()}
    rules = gathering.call.rules
    if rules.score is not None or rules.mask is not None:
        first = jnp.zeros((1, 1, 1, 3), jnp.int32).at[..., 1].set(group * (q.shape[2] // gathering.groups))
        own["origin"] = own.get("origin", jnp.int32(0)) + first
    return heads(q, 2), own


def _fetch(gathering: Gathering, k: Array, v: Array, group: Any) -> tuple[Array, Array]:
    """The keys and values of a group of heads, of all devices, in the order of the tokens."""
    own = {name: _heads(gathering, x, 2, group=group, of=k.shape[2]) for name, x in (("k", k), ("v", v))}
    if gathering.native:  # a message has no derivative
        return gathering.spread.gathered(own["k"], 1), gathering.spread.gathered(own["v"], 1)
    rows = unpacked(gathering.spread.gathered(packed(own), 1), own)
    return rows["k"], rows["v"]


def _scattered(gathering: Gathering, dk: Array, dv: Array) -> list[Array]:
    """Of what each device gives for all keys, the sum over all devices for this one's."""
    return jnp.split(gathering.spread.scattered(jnp.concatenate([dk, dv], -1), 1), [dk.shape[-1]], -1)
