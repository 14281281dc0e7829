"""By which method, and why."""

import dataclasses
from typing import Literal

import numpy as np

from ..base.spec import Rules
from .hops import Way, messages, needed_hops, ways
from .spread import Spread
from .ulysses import copies_of_keys

Method = Literal["auto", "all_gather", "ring", "ulysses"]

_AT_ONCE = 32 * 2**20
"""Bytes of gathered keys and values that a group of heads has at most, if it has more than one head."""

_HELD = 16 * 2**30
"""Bytes that all_gather may hold before "auto" prefers a ring, whose memory shrinks with the number of devices."""

_BLOCKS = 132
"""Blocks of rows that the query heads of a group have at least: one for each multiprocessor of a large GPU."""


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

    @property
    def needed(self) -> np.ndarray:
        """bool `[devices]`: the hops at which somebody may see something."""
        every = np.ones(self.spread.devices, bool)
        return needed_hops(self.spread, self.rules, self.ahead) if self.implied else every

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways round of a ring."""
        return ways(self.needed)

    @property
    def held(self) -> int:
        """Bytes of keys, and of their gradients, that all_gather holds at least: of two groups of heads."""
        tokens, heads = self.spread.keys * self.spread.devices, self.kv_heads // groups_of(None, self)
        each = self.itemsize + max(self.itemsize, 4)
        return 2 * self.batch * tokens * heads * (self.head_dim + self.v_dim) * each

    @property
    def met(self) -> tuple[int, ...]:
        """The hops of a ring: how many devices before its own those are whose keys a device meets."""
        return tuple((way.first + way.step * k) % self.spread.devices for way in self.ways for k in range(way.count))

    def sent(self, method: str) -> int:
        """Bytes of rows, keys, values and their gradients that a device sends in a forward and a backward pass."""
        keys = self.batch * self.spread.keys * self.kv_heads * (self.head_dim + self.v_dim)
        if method == "ulysses":
            rows = self.batch * self.spread.rows * self.heads * (self.head_dim + self.v_dim)
            keys *= copies_of_keys(self.kv_heads, self.spread.devices)
            return 2 * (rows + keys) * self.itemsize * (self.spread.devices - 1) // self.spread.devices
        sums = max(self.itemsize, 4)  # gradients are in fp32
        if method == "all_gather":
            return (self.spread.devices - 1) * keys * (2 * self.itemsize + sums)
        sent = [
            message
            for way in self.ways
            for back in (False, True)
            for message in messages(way, self.spread.devices, back)
        ]
        return sum(keys * (self.itemsize * has_keys + sums * has_sums) for has_keys, has_sums in sent)


def choose(method: Method, head_groups: int | None, facts: Facts) -> tuple[str, tuple[str, ...]]:
    """The method, and why it is that."""
    if method != "auto":
        return method, (f"method={method!r} was asked for",)
    if head_groups is not None:
        return "all_gather", ("head_groups was given, which speaks to all_gather",)
    other, why = _without_ulysses(facts)
    if facts.heads % facts.spread.devices:
        return other, (f"{facts.heads} heads are no multiple of {facts.spread.devices} devices: no ulysses", why)
    own, others = (facts.sent(name) for name in ("ulysses", other))
    moved = f"a device sends {own / 2**20:.3g} MiB in ulysses, {others / 2**20:.3g} in {other}, both passes"
    if own <= others:
        return "ulysses", (moved, "each device has all rows and keys of its heads, so that work is equal")
    return other, (moved, why)


def _without_ulysses(facts: Facts) -> tuple[str, str]:
    if facts.lists:
        return "all_gather", "a mask's tiles are known where the keys are all there"
    if facts.sent("ring") < facts.sent("all_gather"):
        return "ring", f"bounds let a ring meet {len(facts.met)} of {facts.spread.devices} devices, and send less"
    if facts.held > _HELD:
        return "ring", f"all_gather would hold {facts.held / 2**30:.3g} GiB of others' keys and their gradients"
    if facts.segments:
        return "all_gather", "of packed documents a ring would send keys step by step that most rows do not see"
    return "all_gather", "what all gather comes over all links at once; a ring waits for the slowest in each step"


def groups_of(head_groups: int | None, facts: Facts) -> int:
    """In how many groups of key heads all_gather meets them."""
    if head_groups is not None and facts.kv_heads % head_groups:
        raise ValueError(f"head_groups must divide the {facts.kv_heads} heads of k and v, got {head_groups}")
    if head_groups is not None:
        return head_groups
    if facts.functions or not facts.spread.alone:
        return 1
    row = facts.batch * facts.spread.keys * facts.spread.devices * (facts.head_dim + facts.v_dim) * facts.itemsize
    heads = max(_AT_ONCE // row, 1)
    most = max(facts.batch * facts.heads * -(-facts.spread.rows // 128) // _BLOCKS, 1)
    fitting = [n for n in range(1, facts.kv_heads + 1) if facts.kv_heads % n == 0 and n <= most]
    return next((n for n in fitting if facts.kv_heads // n <= heads), fitting[-1])


def check_heads(facts: Facts) -> None:
    """Raises unless the devices divide the query heads."""
    if facts.heads % facts.spread.devices:
        raise ValueError(
            f'method="ulysses" needs query heads that {facts.spread.devices} devices divide, got {facts.heads}; use '
            '"ring" or "all_gather"'
        )
