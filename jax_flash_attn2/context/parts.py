"""Attention over some of the keys, and what several such parts come to: the online softmax, between calls."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .. import primitives
from ..base import axes
from ..base.arguments import accumulator
from ..base.operands import for_every_batch
from ..primitives import share
from ..primitives.call import Call
from ..primitives.share import sum_beside


class Part(NamedTuple):
    """What some of the keys are to each row."""

    o: Array
    """`[B, Sq, H, Dv]`, normalised, fp32 (fp64)."""
    m: Array
    """`[B, H, Sq]`: the largest logit, in units of `primitives.unit`; or lse, where that is enough."""
    l: Array
    """`[B, H, Sq]`: the sum of exp(s - m); 0 where nothing is seen."""
    largest: Array | None
    """`[B, H, Sq]`: the largest logit, if the rules want it."""


def unit(call: Call, q: Array, operands: Mapping[str, Array], native: bool) -> Array:
    """How many nats there are to the unit of `Part.m`."""
    if native or call.row_stats(operands) == 1:
        return jnp.ones((), accumulator(q.dtype))
    return primitives.unit(call, q.dtype)


def nothing(call: Call, q: Array, v: Array) -> Part:
    """No keys."""
    batch, rows, heads, _ = q.shape
    dtype = accumulator(q.dtype)
    row = jnp.zeros((batch, heads, rows), dtype)
    part = Part(
        jnp.zeros((batch, rows, heads, v.shape[3]), dtype), row - jnp.inf, row,
        row - jnp.inf if call.rules.max_logits else None,
    )  # fmt: skip
    return axes.vary_alike((part, q))[0]


def of_keys(
    forward: Callable[..., list[Array]], call: Call, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> Part:
    """The `Part` of these keys, by one call of `forward`: `primitives.forward`, or what returns the same."""
    o, lse, *rest = forward(call, q, k, v, operands)
    largest = rest.pop() if call.rules.max_logits else None
    m, l = rest or (lse, sum_beside(lse))
    return Part(o, m, l, largest)


def both(x: Part, y: Part, unit: Array) -> Part:
    """The keys of x and those of y."""
    m = jax.lax.stop_gradient(jnp.maximum(x.m, y.m))
    finite = jnp.where(m == -jnp.inf, 0, m)
    parts = [part.l * jnp.exp((part.m - finite) * unit) for part in (x, y)]
    l = parts[0] + parts[1]
    by_row = lambda x: jnp.moveaxis(x / jnp.where(l == 0, 1, l), -2, -1)[..., None]
    o = x.o * by_row(parts[0]) + y.o * by_row(parts[1])
    return Part(o, m, l, None if x.largest is None or y.largest is None else jnp.maximum(x.largest, y.largest))


def with_sinks(part: Part, sinks: Array | None, within: Array | None, unit: Array) -> Part:
    """With one more logit `[n, H, 1, 1]` in each row that is within its sequence (`[n, 1, Sq, 1]`), which adds nothing
    to o."""
    if sinks is None:
        return part
    m = _broadcast(sinks[..., 0].astype(part.m.dtype), part.m.shape) / unit
    l = jnp.ones_like(m) if within is None else _broadcast(within[..., 0].astype(m.dtype), m.shape)
    return both(part, Part(jnp.zeros_like(part.o), m, l, part.largest), unit)


def lse_of(part: Part, unit: Array) -> Array:
    """The logarithm of each row's sum, in nats."""
    return share.lse_of(part.m, part.l, unit)


def gradient_of_sinks(part: Part, sinks: Array, within: Array | None, unit: Array, do: Array, dlse: Any) -> Array:
    """`[B, H, 1, 1]`: of sinks, of each batch. part: all keys, sinks among them."""
    delta = jnp.moveaxis((part.o.astype(part.m.dtype) * do.astype(part.m.dtype)).sum(-1), 2, 1)
    delta = delta if dlse is None else delta - dlse
    seen = part.l != 0 if within is None else (part.l != 0) & within[..., 0]
    m = jnp.where(seen, part.m, 0)
    p = jnp.where(seen, jnp.exp(sinks[..., 0].astype(m.dtype) - m * unit) / jnp.where(seen, part.l, 1), 0)
    return -jnp.where(seen, p * delta, 0).sum(-1)[..., None, None]  # of nothing seen the gradient may be anything


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    """`[n, 1|H, 1|S]` -> `[B, H, S]`: batch b reads b % n."""
    return jnp.broadcast_to(for_every_batch(x, shape[0]), shape)
