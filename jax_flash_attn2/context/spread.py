"""How the sequences of a call lie along a mesh axis, and what that makes of its operands."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..call.share import Share
from ..primitives.call import Call
from . import collectives
from .orders import Order, from_order, sequence_order, to_order, tokens_of


@dataclasses.dataclass(frozen=True)
class Spread:
    """Equal shares of rows and of keys, in some order, on the devices of one mesh axis."""

    axis: str
    devices: int
    order: Order
    rows: int
    """Of one device."""
    keys: int
    """Of one device."""
    alone: bool = True
    """Whether no other mesh axis may divide arrays: else XLA's own collectives would bring them together first."""

    @property
    def here(self) -> Array:
        """The number of this device."""
        return lax.axis_index(self.axis)

    def row_tokens(self, device: Any) -> Array:
        """Which tokens the rows of a device are."""
        return tokens_of(device, self.rows, self.devices, self.order)

    def key_tokens(self, device: Any) -> Array:
        """Which tokens the keys of a device are."""
        return tokens_of(device, self.keys, self.devices, self.order)

    def share(self, device: Any, lists: bool) -> Share:
        """What a device has, for `inputs.prepare`. lists: see there."""
        keys = sequence_order(self.devices * self.keys, self.devices, self.order)
        whole = self.devices * self.rows, self.devices * self.keys
        return Share(*whole, self.row_tokens(device), keys, lists)

    def plain(self, x: Array, axis: int) -> Array:
        """What has come together of all devices, in the order of the tokens."""
        return from_order(x, self.devices, self.order, axis)

    def gathered(self, x: Array, axis: int) -> Array:
        """What each device has a share of, whole and in the order of the tokens."""
        if not self.alone:
            return self.plain(collectives.all_gather(x, self.axis, axis), axis)
        return self.plain(lax.all_gather(x, self.axis, axis=axis, tiled=True), axis)

    def scattered(self, x: Array, axis: int) -> Array:
        """The sum over all devices of what is whole and in the order of the tokens, this device's share of it."""
        x = to_order(x, self.devices, self.order, axis)
        if not self.alone:
            return collectives.psum_scatter(x, self.axis, axis)
        return lax.psum_scatter(x, self.axis, scatter_dimension=axis, tiled=True)

    def exchanged(self, x: Array, heads: int, axis: int) -> Array:
        """Of this device's share along an axis all heads -> all of the axis, in the order of the tokens, and this
        device's heads."""
        return self.plain(self._all_to_all(x, heads, axis), axis)

    def returned(self, x: Array, heads: int, axis: int) -> Array:
        """`exchanged` undone."""
        return self._all_to_all(to_order(x, self.devices, self.order, axis), axis, heads)

    def _all_to_all(self, x: Array, split: int, concat: int) -> Array:
        if not self.alone:
            return collectives.all_to_all(x, self.axis, split, concat)
        return lax.all_to_all(x, self.axis, split_axis=split, concat_axis=concat, tiled=True)

    def has_own_keys(self, name: str, operand: Any) -> bool:
        """Whether the last axis of an operand is that of this device's keys, not of all."""
        if name in ("kv_segments", "kv_positions", "kv_index"):
            return True
        return name in ("bias", "mask") and operand.shape[2] == 1 and operand.shape[3] == self.keys

    def has_all_keys(self, name: str, operand: Any) -> bool:
        """Whether the last axis of a bias or mask is that of all keys."""
        whole = name in ("bias", "mask") and operand.shape[3] == self.devices * self.keys
        return whole and not self.has_own_keys(name, operand)


def numbered(
    call: Call, operands: Mapping[str, Array], rows: Array, keys: Array, in_order: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Operands of rows and keys that are tokens of these numbers.

    Lengths are of the tokens in their order, and become padding of the segments.

    Args:
      call: what is computed.
      operands: those of `inputs.prepare`.
      rows: int32 `[Sq]`.
      keys: int32 `[Sk]`.
      in_order: whether the keys are all there are, in their order: then they need no numbers.

    Returns:
      The operands; and under "q" and "kv", where there were such lengths, what is within: `[n, 1, Sq, 1]` and
      `[n, 1, 1, Sk]`.
    """
    rules, made = call.rules, dict(operands)
    rows, keys = rows.reshape(1, 1, -1, 1), keys.reshape(1, 1, 1, -1)
    compared = rules.left is not None or rules.right is not None or "slopes" in made
    if compared and "q_positions" not in made:
        made["q_positions"], made["kv_positions"] = rows + made.get("offset", jnp.int32(0)), keys
    if not rules.dropout_rate:
        made.pop("offset", None)
    if rules.dropout_rate or rules.score is not None or rules.mask is not None:
        made |= {"q_index": rows} if in_order else {"q_index": rows, "kv_index": keys}
    within = {}
    for side, tokens in (("q", rows), ("kv", keys)):
        if f"{side}_lengths" in made and not (in_order and side == "kv"):
            within[side] = tokens < made.pop(f"{side}_lengths")
    for side, tokens in (("q", rows), ("kv", keys)) if within else ():
        ids = made.get(f"{side}_segments", jnp.zeros_like(tokens))
        made[f"{side}_segments"] = jnp.where(within.get(side, jnp.bool_(True)), ids, -1)
    return made, within


def cleared(x: Array, within: Array | None) -> Array:
    """x `[B, S, ...]` with zeros past the length, of `[n, 1, S, 1]` or `[n, 1, 1, S]`: not even a NaN there is seen."""
    if within is None:
        return x
    return jnp.where(within.reshape(within.shape[0], -1, *(1,) * (x.ndim - 2)), x, 0)
