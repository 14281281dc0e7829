"""Calls whose block mask differs from head to head, one key head at a time: so each meets its own tiles.

All heads together meet a tile that any of them sees: of 8 heads that each see a tenth of the tiles, at random, that is
over half of them. Where the lists of all heads are equal this is slower: give the mask one head instead.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..base.config import Config
from ..base.operands import is_read
from ..base.spec import Spec
from . import layout
from .tiling import few_rows

_TILE = 2**12
"""With fewer logits than these a tile of one head is less work than calling what computes it."""


def pays(spec: Spec, q: Array, operands: Mapping[str, Array], wanted: tuple[str, ...] = ()) -> bool:
    """Whether a pass goes from key head to key head. wanted: the operands that a backward pass gives gradients of."""
    if not spec.listed or spec.kv_heads == 1 or spec.rules.score is not None or few_rows(q):
        return False
    if "bias" in wanted and operands["bias"].shape[1] == 1:  # of which there would be one for each head, to be summed
        return False
    return operands["row_ends"].shape[1] == spec.heads and spec.tile_rows * spec.group * spec.tile_keys >= _TILE


def forward(
    run: Callable, spec: Spec, config: Config, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> Any:
    """`forward.forward`, which is `run`."""

    def head(h: Array) -> Any:
        own = _of_head(spec, operands, h)
        args = _of_heads(q, h, spec.group), _of_heads(k, h, 1), _of_heads(v, h, 1)
        return run(Spec.of(spec.rules, *args, own), config, *args, own)

    results = lax.map(head, jnp.arange(spec.kv_heads, dtype=jnp.int32))
    return tuple(None if x is None else _join(x, 2 if x.ndim == 5 else 1) for x in results)


def backward(
    run: Callable, spec: Spec, config: Config, q: Array, k: Array, v: Array, operands: Mapping[str, Array], o: Array,
    stats: Any, do: Array, dlse: Array | None, *, wanted: tuple[str, ...], groups: tuple[int, ...],
    lost: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """`backward.backward`, which is `run`."""

    def head(h: Array) -> Any:
        own = _of_head(spec, operands, h)
        args = _of_heads(q, h, spec.group), _of_heads(k, h, 1), _of_heads(v, h, 1)
        here = [None if x is None else layout.take(x, h * spec.group, spec.group, 1) for x in (*stats, dlse)]
        given = own, _of_heads(o, h, spec.group), here[:-1], _of_heads(do, h, spec.group), here[-1]
        options = {"wanted": wanted, "groups": groups, "lost": None if lost is None else _of_heads(lost, h, spec.group)}
        return run(Spec.of(spec.rules, *args, own), config, *args, *given, **options)

    dq, dk, dv, *grads = lax.map(head, jnp.arange(spec.kv_heads, dtype=jnp.int32))
    grads = (_join(x, 1) if operands[name].shape[1] > 1 else x.sum(0) for name, x in zip(wanted, grads, strict=True))
    return *(_join(x, 2) for x in (dq, dk, dv)), *grads


def _of_head(spec: Spec, operands: Mapping[str, Array], h: Array) -> dict[str, Array]:
    """What the operands are to the query heads of key head h."""
    first = h * spec.group
    own = {
        name: x if is_read(name) or x.shape[1] == 1 else layout.take(x, first, spec.group, 1)
        for name, x in operands.items()
    }
    if spec.rules.mask is not None:  # which counts heads
        origin = own.get("origin", jnp.zeros((1, 1, 1, 3), jnp.int32))
        own["origin"] = origin.at[0, 0, 0, 1].add(first)
    return own


def _of_heads(x: Array, h: Array, count: int) -> Array:
    """`[B, S, heads, D]` -> `[B, S, count, D]`: those of key head h."""
    return layout.take(x, h * count, count, 2)


def _join(x: Array, axis: int) -> Array:
    """`[Hkv, ..., count, ...]` -> `[..., Hkv * count, ...]`: the heads, which are this axis of one of them."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
