"""What a device computes of a call, from its share of the operands, and what becomes of all shares together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..base.rounding import split
from ..xla import online
from .call import Call
from .plan import Plan


def wide(call: Call) -> Call:
    """The call, its results in fp32 (fp64): they are summed before they are rounded."""
    return dataclasses.replace(call, rules=dataclasses.replace(call.rules, wide=True))


def own_operands(plan: Plan, call: Call, operands: Mapping[str, Array]) -> dict[str, Array]:
    """Operands as this device counts: its first row is not the first, nor its first key."""
    rules, own = call.rules, dict(operands)
    functions = rules.score is not None or rules.mask is not None
    if functions:
        origin = jnp.stack([plan.first(letter) for letter in "bhi"]).reshape(1, 1, 1, 3)
        own["origin"] = own.get("origin", 0) + origin
    row, key = plan.first("i"), plan.first("j")
    if plan.axes["j"] and (functions or rules.dropout_rate) and "kv_index" not in own:
        own["kv_index"] = _count(plan, "j").reshape(1, 1, 1, -1)
    for name, letter, start in (("q_lengths", "i", row), ("kv_lengths", "j", key)):
        if plan.axes[letter] and name in own:
            own[name] = jnp.maximum(own[name] - start, 0).astype(jnp.int32)
    return own | _places(plan, call, own)


def _places(plan: Plan, call: Call, own: Mapping[str, Array]) -> dict[str, Array]:
    """What says where rows are among the keys, where the places of both in the arrays of this device do not.

    Distances are from this device's first key, dropout counts from the first of all. One offset cannot say both, and
    then positions are data.
    """
    rules = call.rules
    compares = rules.left is not None or rules.right is not None or "slopes" in own
    compares, drops = compares and "q_positions" not in own, bool(rules.dropout_rate)
    if not (plan.axes["i"] or plan.axes["j"]) or not (compares or drops):
        return {}
    offset = own.get("offset", jnp.zeros((1, 1, 1, 1), jnp.int32))
    compared = offset + plan.first("i") - plan.first("j")
    counted = offset if "q_index" in own else offset + plan.first("i")
    if not (compares and drops and (plan.axes["j"] or "q_index" in own)):
        return {"offset": compared if compares else counted}
    rows, keys = _count(plan, "i").reshape(1, 1, -1, 1), _count(plan, "j").reshape(1, 1, 1, -1)
    return {"q_positions": offset + rows, "kv_positions": keys, "offset": counted}


def _count(plan: Plan, letter: str) -> Array:
    """The numbers of this device's rows or keys."""
    return plan.first(letter) + jnp.arange(plan.sizes[letter] // plan.parts(letter), dtype=jnp.int32)


def own_sinks(plan: Plan, operands: Mapping[str, Array]) -> dict[str, Array]:
    """Operands whose sinks count on one of the devices that share the keys."""
    if not plan.axes["j"] or "sinks" not in operands:
        return dict(operands)
    return {**operands, "sinks": jnp.where(plan.first("j") == 0, operands["sinks"], -jnp.inf)}


def merge(plan: Plan, call: Call, unit: Callable[..., Array], results: Sequence[Array], dtype: Any) -> list[Array]:
    """The forward pass over all keys, of what it gave for each device's (`define.forward`; o in fp32 or fp64).

    unit: `define.unit`. dtype: q's.
    """
    over = plan.axes["j"]
    o, lse, *rest = results
    largest = [rest.pop()] if call.rules.max_logits else []
    m, l, nats = (*rest, unit(call, dtype)) if rest else (lse, sum_beside(lse), 1)
    m = jnp.where(l == 0, -jnp.inf, m)
    top, *largest = lax.pmax((m, *largest), over)
    pivot = jnp.where(top == -jnp.inf, 0, top)
    weight = l * jnp.exp((m - pivot) * nats)
    o, l = lax.psum((o * _by_row(weight), weight), over)
    lse = lse_of(pivot, l, nats)
    o, lost = o / _by_row(jnp.where(l == 0, 1, l)), []
    if call.rules.gives_lost:
        o, *lost = split(o, dtype)
    return [o.astype(call.rules.result(dtype)), lse, *([pivot, l] if rest else []), *largest, *lost]


def sum_beside(lse: Array) -> Array:
    """The sum that m = lse goes with: 0 where nothing is seen, else 1."""
    return (lse != -jnp.inf).astype(lse.dtype)


def lse_of(m: Array, l: Array, unit: Any) -> Array:
    """The logarithm of each row's sum l of exp((s - m) * unit), in nats. unit: how many nats there are to that of m."""
    return online.lse(m * unit, l)


def _by_row(x: Array) -> Array:
    """`[B, H, Sq]` -> `[B, Sq, H, 1]`."""
    return x.swapaxes(1, 2)[..., None]


# Key heads, of which a device may have more than its query heads read.


def own_heads(plan: Plan, k: Array) -> Array:
    """The key heads that this device's query heads read, of `[B, Sk, Hkv, D]`."""
    slices, one = _slices(plan)
    if not slices:
        return k
    numbers = _head_numbers(plan)
    return jnp.take(k, numbers[:1] if one else numbers, axis=2)


def own_scales(plan: Plan, operands: Mapping[str, Array]) -> dict[str, Array]:
    """Operands whose scales of pages `[pages, Hkv, 1, 1]` are those of `own_heads`."""
    scales = [name for name in ("k_scale", "v_scale") if name in operands and operands[name].shape[1] > 1]
    return {**operands, **{name: own_heads(plan, operands[name].swapaxes(1, 2)).swapaxes(1, 2) for name in scales}}


def put_heads(plan: Plan, dk: Array, k: Array) -> Array:
    """`own_heads` undone, for what is to be summed over devices."""
    slices, one = _slices(plan)
    if not slices:
        return dk
    numbers = _head_numbers(plan)
    return jnp.zeros(k.shape, dk.dtype).at[:, :, numbers[:1] if one else numbers].add(dk)


def _head_numbers(plan: Plan) -> Array:
    """The key head of each of this device's query heads."""
    heads = plan.sizes["h"] // plan.parts("h")
    return (lax.axis_index(plan.axes["h"]) * heads + jnp.arange(heads)) // (plan.sizes["h"] // plan.sizes["x"])


def _slices(plan: Plan) -> tuple[bool, bool]:
    """Whether a device has more key heads than it needs, and whether one of them serves all its query heads."""
    group, heads = plan.sizes["h"] // plan.sizes["x"], plan.sizes["h"] // plan.parts("h")
    return plan.axes["x"] != plan.axes["h"] and plan.sizes["x"] > 1, group % heads == 0
