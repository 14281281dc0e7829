"""By which method, and why."""

import dataclasses
from typing import Literal

import numpy as np

from ..base.spec import Rules
from .hops import Run, needed_hops, runs
from .spread import Spread
from .ulysses import copies_of_keys

Method = Literal["auto", "all_gather", "ring", "ulysses"]

_AT_ONCE = 32 * 2**20
"""Bytes of gathered keys and values that a group of heads has at most, if it has more than one head."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What of a call decides how it is divided."""

    spread: Spread
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    itemsize: int
    """Bytes of an element of q, k and v."""
    rules: Rules
    ahead: int
    """How many positions a row is ahead of its token."""
    implied: bool
    """Whether positions follow from the tokens."""
    segments: bool
    """Whether documents are packed."""
    lists: bool
    """Whether there is a mask of whose tiles there is a list."""
    functions: bool
    """Whether functions count heads."""
    alone: bool
    """Whether no other mesh axis may divide the heads."""

    @property
    def needed(self) -> np.ndarray:
        """bool `[devices]`: the hops at which somebody may see something."""
        every = np.ones(self.spread.devices, bool)
        return needed_hops(self.spread, self.rules, self.ahead) if self.implied else every

    @property
    def runs(self) -> tuple[Run, ...]:
        """The way round of a ring."""
        return runs(self.needed)

    @property
    def met(self) -> tuple[int, ...]:
        """The hops of a ring: how many devices before its own those are whose keys a device meets."""
        return tuple((run.first + run.step * k) % self.spread.devices for run in self.runs for k in range(run.count))

    @property
    def hops(self) -> int:
        """How often a ring sends keys on at least, forward."""
        return sum(run.count for run in self.runs) - 1

    def sent(self, method: str) -> int:
        """Bytes that a device sends in a forward and a backward pass."""
        keys = self.batch * self.spread.keys * self.kv_heads * (self.head_dim + self.v_dim)
        if method == "ulysses":
            rows = self.batch * self.spread.rows * self.heads * (self.head_dim + self.v_dim)
            keys *= copies_of_keys(self.kv_heads, self.spread.devices)
            return 2 * (rows + keys) * self.itemsize * (self.spread.devices - 1) // self.spread.devices
        hops = self.hops if method == "ring" else self.spread.devices - 1
        return hops * keys * (2 * self.itemsize + max(self.itemsize, 4))  # twice the keys, and their gradients in fp32


def choose(method: Method, head_groups: int | None, facts: Facts) -> tuple[str, tuple[str, ...]]:
    """The method, and why it is that."""
    if method != "auto":
        return method, (f"method={method!r} was asked for",)
    if head_groups is not None:
        return "all_gather", ("head_groups was given, which speaks to all_gather",)
    other, why = "ring", "a ring holds the keys of two devices at a time and sends them while it computes"
    if facts.lists:
        other, why = "all_gather", "a mask's tiles are known where the keys are all there"
    elif facts.segments:
        other, why = "all_gather", "of packed documents a ring would send keys that most rows do not see"
    if facts.heads % facts.spread.devices:
        return other, (f"{facts.heads} heads are no multiple of {facts.spread.devices} devices: no ulysses", why)
    own, others = (facts.sent(name) for name in ("ulysses", other))
    moved = f"a device sends {own / 2**20:.3g} MiB in ulysses, {others / 2**20:.3g} in {other}, both passes"
    if own <= others:
        return "ulysses", (moved, "each device has all rows and keys of its heads, so that work is equal")
    return other, (moved, why)


def groups_of(head_groups: int | None, facts: Facts) -> int:
    """In how many groups of key heads all_gather meets them."""
    if head_groups is not None:
        return head_groups
    if facts.functions or not facts.alone:
        return 1
    row = facts.batch * facts.spread.keys * facts.spread.devices * (facts.head_dim + facts.v_dim) * facts.itemsize
    most = max(_AT_ONCE // row, 1)
    return next(n for n in range(1, facts.kv_heads + 1) if facts.kv_heads % n == 0 and facts.kv_heads // n <= most)


def pieces(spread: Spread) -> int:
    """How many tokens that follow one another a device's rows have."""
    return {"contiguous": spread.rows, "zigzag": spread.rows // 2, "striped": 1}[spread.order]


def check_heads(facts: Facts) -> None:
    """Raises unless the devices divide the query heads."""
    if facts.heads % facts.spread.devices:
        raise ValueError(
            f'method="ulysses" needs query heads that {facts.spread.devices} devices divide, got {facts.heads}; use '
            '"ring" or "all_gather"'
        )
