"""Which devices' keys a device must meet: not those that bounds hide from all its rows."""

from typing import NamedTuple

import numpy as np

from ..base.spec import Rules
from .orders import piece_length, sequence_order
from .spread import Spread


class Way(NamedTuple):
    """A way round: keys that move on by one device after each step."""

    first: int
    """The keys met first come from this many devices before this one; negative: after it."""
    count: int

    @property
    def step(self) -> int:
        """1: to the next device; -1: to the one before."""
        return -1 if self.first < 0 else 1

    @property
    def last(self) -> int:
        """As `first`, of those that are met last."""
        return self.first + self.step * (self.count - 1)


def ways(needed: np.ndarray) -> tuple[Way, ...]:
    """The ways round: from the device's own keys forward, and from the next one's backward, such that the longest
    stretch of hops that nobody needs is left out. needed: bool `[devices]`, of each hop."""
    n = len(needed)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ~needed[1:], [0]]).astype(np.int8))) + 1
    begin, end = max(zip(edges[::2], edges[1::2], strict=True), key=lambda gap: gap[1] - gap[0], default=(n, n))
    behind = [Way(-1, n - int(end))] if end < n else []
    return (Way(0, int(begin)), *behind)


UNROLLED = 3
"""Up to how many steps are written out: then nothing is sent that nobody needs. More are a loop, which compiles in the
same time whatever their number, and sends the last keys on in vain, and the first sums, which are zeros."""


def messages(way: Way, devices: int, backward: bool) -> list[tuple[bool, bool]]:
    """What a device sends on one way round: whether each message has keys, and sums of their gradients."""
    made = [(True, False)] if way.first else []
    if way.count > UNROLLED:
        made += [(True, backward)] * way.count
    else:
        each = [(n + 1 < way.count, backward and n > 0) for n in range(way.count)]
        made += [message for message in each if any(message)]
    return made + ([(False, True)] if backward and way.last % devices else [])


def needed_hops(spread: Spread, rules: Rules, ahead: int) -> np.ndarray:
    """bool `[devices]`: whether bounds let some device see keys of the device so many before it, where positions follow
    from the tokens and a row is `ahead` of its own."""
    n = spread.devices
    (row_first, row_last), (first, last) = (_ends(spread, length) for length in (spread.rows, spread.keys))
    row_first, row_last = (x[:, None, :, None] + ahead for x in (row_first, row_last))  # [device, 1, piece, 1]
    first, last = (x[None, :, None, :] for x in (first, last))
    seen = np.ones((n, n, 1, 1), bool)
    if rules.right is not None:
        seen = seen & (first <= row_last + rules.right)
    if rules.left is not None:
        seen = seen & (last >= row_first - rules.left)
    seen, device = seen.any((2, 3)), np.arange(n)
    return np.array([seen[device, (device - hop) % n].any() for hop in range(n)])


def _ends(spread: Spread, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last token of each piece that a device has, of so many: `[devices, pieces]` each."""
    n = spread.devices
    if spread.order == "striped":  # one piece, whose tokens are n apart
        first = np.arange(n)[:, None]
        return first, first + n * (length - 1)
    size = piece_length(length, spread.order)
    pieces = sequence_order(n * length // size, n, spread.order).reshape(n, -1).astype(np.int64)
    return pieces * size, (pieces + 1) * size - 1
