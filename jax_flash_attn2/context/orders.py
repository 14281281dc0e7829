"""Which tokens each device of a sequence axis holds. A data pipeline reorders once, on the host.

Under causality the last rows see most, so that equal shares of a sequence are unequal shares of work: in contiguous
order the last of n devices has nearly 2 - 1/n times its part, in zigzag each has its part.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base.arguments import describe, is_integer

Order = Literal["contiguous", "zigzag", "striped"]
"""contiguous: equal parts, one after the other. zigzag: of twice as many parts the first and the last, the second and
the last but one, ... (Llama 3's context parallelism). striped: device d has the tokens d, d + devices, ... (Brandon et
al. 2023, arXiv:2311.09431)."""


def sequence_order(length: int, devices: int, order: Order) -> np.ndarray:
    """Which token stands at each place of the reordered sequence, whose equal parts are the devices'.

    So these are the positions of the reordered tokens too: for rotary embeddings, and, along a batch axis of length 1,
    for `flash_attention`'s q_positions and kv_positions.

    Args:
      length: T, a multiple of devices; for zigzag of twice that.
      devices: along the sequence axis of the mesh.
      order: "contiguous", "zigzag" or "striped".

    Returns:
      int32 `[T]`.

    Raises:
      ValueError: there is no such order, or it does not divide the length.

    Examples:
      >>> sequence_order(8, 2, "zigzag")
      array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
      >>> sequence_order(8, 2, "striped")
      array([0, 2, 4, 6, 1, 3, 5, 7], dtype=int32)
    """
    check_length("length", length, devices, order)
    parts = 2 * devices if order == "zigzag" else devices
    tokens = np.arange(length, dtype=np.int32)
    if order == "striped":
        return tokens.reshape(-1, devices).T.ravel()
    if order == "zigzag":
        pieces = tokens.reshape(parts, -1)
        return np.stack([pieces[:devices], pieces[::-1][:devices]], 1).ravel()
    return tokens


def check_length(what: str, length: Any, devices: Any, order: Any) -> None:
    """Raises unless devices can have equal shares of as many tokens. what: the length, in a message."""
    _check_order(order)
    for name, n in ((what, length), ("devices", devices)):
        if not is_integer(n) or n < 1:
            raise ValueError(f"{name} must be a positive integer, got {describe(n)}")
    parts = 2 * devices if order == "zigzag" else devices
    if length % parts:
        raise ValueError(
            f"{what} must be a multiple of {parts} for {devices} devices in {order} order, got {length}; pad the "
            "sequence (padding has negative segment ids, or lies past the lengths)"
        )


def _check_order(order: Any) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")


def to_order(x: Any, devices: int, order: Order, axis: int | Sequence[int] = 1) -> Any:
    """x with its sequence reordered: tokens `[B, T]`, labels, segment ids, q `[B, T, H, D]`; with `axis=(-2, -1)` a
    mask or a bias `[..., T, T]`.

    Args:
      x: an array of NumPy, which gives one of NumPy, or of JAX.
      devices: see `sequence_order`, and so is order.
      order: "contiguous", "zigzag" or "striped".
      axis: that of the sequence, or several; one of length 1 stays as it is.

    Raises:
      ValueError: see `sequence_order`; x has no such axis.

    Examples:
      >>> tokens = np.arange(8)[None]
      >>> to_order(tokens, 2, "zigzag")
      array([[0, 1, 6, 7, 2, 3, 4, 5]])
    """
    return _reordered(x, devices, order, axis, back=False)


def from_order(x: Any, devices: int, order: Order, axis: int | Sequence[int] = 1) -> Any:
    """`to_order` undone.

    Examples:
      >>> from_order(to_order(np.arange(8)[None], 2, "zigzag"), 2, "zigzag")
      array([[0, 1, 2, 3, 4, 5, 6, 7]])
    """
    return _reordered(x, devices, order, axis, back=True)


def _reordered(x: Any, devices: int, order: Order, axis: int | Sequence[int], back: bool) -> Any:
    for one in (axis,) if isinstance(axis, int) else tuple(axis):
        if not -x.ndim <= one < x.ndim:
            raise ValueError(f"axis must be one of x, which has {x.ndim}, got {one}")
        _check_order(order)
        if x.shape[one] == 1:
            continue
        sequence_order(x.shape[one], devices, order)  # or what is wrong
        x = x if order == "contiguous" else _moved(x, devices, order, one % x.ndim, back)
    return x


def _moved(x: Any, devices: int, order: Order, axis: int, back: bool) -> Any:
    """By reshaping, whose derivative is reshaping: there is no index to gather or to scatter by."""
    lib = jnp if isinstance(x, jax.Array) else np
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    pieces = lambda x, *sizes: x.reshape(*before, *sizes, *after)
    if order == "striped":
        sizes = (devices, -1) if back else (-1, devices)
        return pieces(pieces(x, *sizes).swapaxes(axis, axis + 1), length)
    at = lambda x, index, axis: x[(*(slice(None),) * axis, index)]
    if back:  # each device has an early piece and a late one, the latest first
        x = pieces(x, devices, 2, -1)
        early, late = at(x, 0, axis + 1), at(at(x, 1, axis + 1), slice(None, None, -1), axis)
        return pieces(lib.concatenate([early, late], axis), length)
    x = pieces(x, 2, devices, -1)
    late = at(at(x, 1, axis), slice(None, None, -1), axis)
    return pieces(lib.stack([at(x, 0, axis), late], axis + 1), length)


def piece_length(share: int, order: Order) -> int:
    """How many tokens that follow one another a device has, of as many as its share."""
    return {"contiguous": share, "zigzag": share // 2, "striped": 1}[order]


def tokens_of(device: Any, share: int, devices: int, order: Order) -> Array:
    """Which tokens a device has, int32 `[share]`: its part of `sequence_order`, of a device whose number is traced."""
    place = jnp.arange(share, dtype=jnp.int32)
    device = jnp.asarray(device, jnp.int32)
    if order == "striped":
        return place * devices + device
    if order == "contiguous":
        return device * share + place
    half = share // 2
    return jnp.where(place < half, device * half + place, (2 * devices - 1 - device) * half + place - half)
