"""What a call over several devices would do, and why, without doing it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..base import arguments, names
from ..call import api
from ..call import explain as one_device
from . import choosing
from .attention import Asked, checked, checked_mesh, facts_of, mask_for
from .choosing import Facts, Method
from .orders import Order, check_length, from_order, sequence_order
from .spread import Spread


@dataclasses.dataclass(frozen=True, repr=False)
class ContextExplanation:
    """What `context_parallel_attention` would do; its text says it."""

    method: str
    """"ring", "all_gather" or "ulysses"."""
    order: str
    reasons: tuple[str, ...]
    """Why it is that method."""
    hops: tuple[int, ...]
    """Of a ring: how many devices before its own those are whose keys a device meets; else ()."""
    groups: int
    """Of all_gather: of key heads; else 1."""
    sent: int
    """Bytes that a device sends, forward and backward, at least."""
    visited: tuple[int | None, ...]
    """Tiles that each device computes in a forward pass. None: that depends on data that is not known yet (traced)."""
    backward: tuple[int | None, ...]
    """The same of a backward pass, all its kernels together."""
    device: one_device.Explanation
    """What the first device's first call runs."""

    @property
    def balance(self) -> float | None:
        """Tiles of the busiest device over those of the mean one."""
        known = [x for x in self.visited if x is not None]
        return max(known) / (sum(known) / len(known)) if len(known) == len(self.visited) and sum(known) else None

    def __str__(self) -> str:
        lines = [f"{self.method}, {self.order} order, {len(self.visited)} devices", *(f"  {x}" for x in self.reasons)]
        if self.hops:
            lines.append(f"  {len(self.hops)} of {len(self.visited)} hops are met")
        if self.groups > 1:
            lines.append(f"  in {self.groups} groups of key heads")
        lines.append(f"  a device sends {self.sent / 2**20:.3g} MiB, forward and backward")
        if self.balance is None:
            lines.append("  how many tiles a device visits depends on the data")
        else:
            busiest, mean = max(x for x in self.visited if x is not None), f"{self.balance:.2f} times the mean"
            lines.append(f"  the busiest device visits {busiest} tiles forward, {mean}")
        return "\n".join([*lines, "  device 0, first call:", *(f"    {x}" for x in str(self.device).splitlines())])

    __repr__ = __str__


def explain(
    q, k, v, bias=None, *, axis: str | None = None, mesh: Any = None, method: Method = "auto", order: Order = "zigzag",
    head_groups: int | None = None, **options: Any,
) -> one_device.Explanation | ContextExplanation:  # fmt: skip
    """Which implementation and configuration a call would run, on what, over how many tiles, and why.

    Args:
      q, k, v, bias, **options: as for `flash_attention`. Tiles are counted for every pass of a forward and backward
        run, from the data where segments, lengths or masks decide. Of arrays on several devices (outside jit, where
        that is known) it says what becomes of keys that are sharded along the sequence. A `jax.ShapeDtypeStruct`
        stands for any array.
      axis, mesh, method, order, head_groups: as for `context_parallel_attention` with a mesh, on whole arrays: by which
        method a call of it would run, and the tiles of each device.

    Returns:
      An `Explanation`, or, with an axis, a `ContextExplanation`: `print` it.

    Raises:
      TypeError, ValueError, ImportError: what `flash_attention` or `context_parallel_attention` would raise, for these
        arguments and on this machine.

    Examples:
      >>> x = jnp.zeros((1, 1024, 8, 64))
      >>> made = explain(x, x, x, causal=True, window_size=(255, 0))
      >>> made
      xla on cpu
        the Triton kernels need a GPU, and JAX's default backend is cpu
        fwd ... tiles visited (...), ... through the mask, ...
        bwd ...
      >>> made.implementation
      'xla'
    """
    asked_for = {"mesh": mesh, "method": method, "order": order, "head_groups": head_groups}
    said = [name for name, x in asked_for.items() if x not in (None, "auto", "zigzag")]
    if axis is None and said:
        raise ValueError(f"axis must be given with {said[0]}: the mesh axis along which the sequences lie")
    if axis is None:
        return one_device.explain(q, k, v, bias, **options)
    asked = Asked(*checked(axis, method, head_groups), order)
    if mesh is None:
        raise ValueError(f"mesh must be given with axis={axis!r}, as explain takes whole arrays, got None")
    mesh = checked_mesh(mesh, axis)
    names.check("explain", options, api.defaults())
    every = {"q": q, "k": k, "v": v, "bias": bias, **api.defaults(), **options}
    made = functools.partial(_explained, asked, int(mesh.shape[axis]), mesh.size == mesh.shape[axis])
    return one_device.with_shapes(made, every)


def _explained(asked: Asked, n: int, alone: bool, **options: Any) -> ContextExplanation:
    arrays = {name: options.pop(name) for name in api.ARRAYS}
    arrays = arrays | {name: arguments.array(name, arrays[name]) for name in "qkv"}
    q, k, v = (arrays[name] for name in "qkv")
    arguments.check_shapes(q, k, v)
    for name, x in (("q", q), ("k", k)):
        check_length(f"the length of {name}", x.shape[-3], n, asked.order)
    spread = Spread(asked.axis, n, asked.order, q.shape[-3] // n, k.shape[-3] // n, alone)
    facts = facts_of(spread, arrays, options)
    method, reasons = choosing.choose(asked.method, asked.head_groups, facts)
    mask_for(method, spread, arrays["mask"])  # or what is wrong
    arrays = {name: _in_plain_order(name, x, spread) for name, x in arrays.items()}
    if method == "ulysses":
        choosing.check_heads(facts)
        first = one_device.explained(**arrays, **options)
        each = [_visited([first], of) for of in (_FORWARD, _BACKWARD)]
        visited, backward = ((None if x is None else x // n,) * n for x in each)
    else:
        first, visited, backward = _by_device(method, facts, arrays, options)
    groups = choosing.groups_of(asked.head_groups, facts) if method == "all_gather" else 1
    hops = facts.met if method == "ring" else ()
    return ContextExplanation(method, asked.order, reasons, hops, groups, facts.sent(method), visited, backward, first)


def _by_device(
    method: str, facts: Facts, arrays: dict[str, Any], options: dict[str, Any]
) -> tuple[one_device.Explanation, tuple[int | None, ...], tuple[int | None, ...]]:
    """What the first call of the first device runs, and the tiles of each device, by calls of one device that stand for
    its part: nothing is run."""
    spread, n = facts.spread, facts.spread.devices
    zeros = _zeros(spread, arrays, n if method == "all_gather" else 1)
    rows, keys = (sequence_order(n * share, n, spread.order).reshape(n, -1) for share in (spread.rows, spread.keys))
    first: one_device.Explanation | None = None
    visited: list[tuple[int | None, int | None]] = []
    for i in range(n):
        met = [np.arange(n * spread.keys)] if method == "all_gather" else [keys[(i - hop) % n] for hop in facts.met]
        made = [one_device.explained(**_part(facts, arrays, options, rows[i], own) | zeros) for own in met]
        first = first or made[0]
        is_array = arrays["mask"] is None or isinstance(arrays["mask"], jax.Array | np.ndarray)
        visited.append((_visited(made, _FORWARD), _visited(made, _BACKWARD)) if is_array else (None, None))
    assert first is not None  # of the first device
    forward, backward = zip(*visited, strict=True)
    return first, forward, backward


_FORWARD, _BACKWARD = slice(0, 1), slice(1, None)


def _visited(calls: list[one_device.Explanation], of: slice) -> int | None:
    """Tiles of these passes of all calls; None: not known."""
    counts = [x.visited for call in calls for x in call.passes[of]]
    known = [x for x in counts if x is not None]
    return sum(known) if len(known) == len(counts) else None


def _zeros(spread: Spread, arrays: dict[str, Any], shares: int) -> dict[str, jax.Array]:
    """q, k and v of one device's call, which meets as many shares of keys: nothing depends on what they hold."""
    made = {}
    for name, length in (("q", spread.rows), ("k", shares * spread.keys), ("v", shares * spread.keys)):
        *batch, _, heads, width = arrays[name].shape
        made[name] = jax.device_put(np.zeros((*batch, length, heads, width), arrays[name].dtype))
    return made


def _part(facts: Facts, arrays: dict[str, Any], options: dict[str, Any], rows: np.ndarray, keys: np.ndarray):
    """The call of one device that has these rows and keys, less q, k and v. Masks that are no arrays are left out."""
    taken: dict[str, Any] = {
        "causal_alignment": "top_left",
        "dropout_rate": 0.0,
        "dropout_seed": None,
        "score_mod": None,
    }
    lengths = {"q": facts.spread.rows * facts.spread.devices, "kv": facts.spread.keys * facts.spread.devices}
    for name in ("bias", "mask"):
        x = arrays[name]
        is_array = isinstance(x, jax.Array | np.ndarray)
        for axis, tokens, length in ((-2, rows, lengths["q"]), (-1, keys, lengths["kv"])):
            if is_array and x.ndim >= -axis and x.shape[axis] == length:
                x = jnp.take(x, tokens, axis=axis)
        taken[name] = x if is_array else None
    ids, other = arrays["q_segment_ids"], arrays["kv_segment_ids"]
    segments = {"q": ids, "kv": ids if other is None else other}
    bounded = ids is not None or any(arrays[f"{side}_lengths"] is not None for side in segments)
    for side, tokens in (("q", rows), ("kv", keys)):
        positions, end = arrays[f"{side}_positions"], arrays[f"{side}_lengths"]
        ahead = facts.ahead if side == "q" else 0
        taken[f"{side}_positions"] = tokens[None] + ahead if positions is None else np.asarray(positions)[..., tokens]
        own = np.zeros(len(tokens), np.int32) if segments[side] is None else segments[side][..., tokens]
        taken[f"{side}_segment_ids"] = own if end is None else jnp.where(tokens < jnp.asarray(end)[..., None], own, -1)
        taken[f"{side}_lengths"] = None
    if not bounded:
        taken |= {"q_segment_ids": None, "kv_segment_ids": None}
    return {**arrays, **options, **taken}


def _in_plain_order(name: str, x: Any, spread: Spread) -> Any:
    axes = {"q": (-3,), "k": (-3,), "v": (-3,), "bias": (-2, -1), "mask": (-2, -1)}
    axes |= dict.fromkeys(api.BY_TOKENS, (-1,))
    if name not in axes or not isinstance(x, jax.Array | np.ndarray):
        return x
    whole = {spread.rows * spread.devices, spread.keys * spread.devices}
    axes = tuple(axis for axis in axes[name] if x.ndim >= -axis and x.shape[axis] in whole)
    return from_order(x, spread.devices, spread.order, axes)
