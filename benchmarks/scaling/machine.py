"""How fast nodes of 8 H100s send and compute, and so how long a call takes: bandwidths and latencies, no queues.

Every figure has its source in docs/scaling.md, under the same name.
"""

import dataclasses

import numpy as np

from . import tiles
from .cases import Case
from .counts import FP32, PASSES, flops, keys_bytes, sent

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates in FLOP/s and bytes/s, of one GPU and in one direction; latencies in seconds."""

    forward: float = 378e12
    """Of the products of pairs that are seen: a FlashAttention-2 in Triton."""
    backward: float = 322e12 * 5 / 7
    """Likewise: FlashAttention-2's 322, which makes 5 products, at the rate of our 7."""
    nvlink: float = 370 * GB
    gathering: float = 370 * GB
    """Of collectives of several nodes, over all their cards."""
    nic: float = 48.5 * GB
    """Of a GPU's own network card."""
    memory: float = 3350 * GB
    per_node: int = 8
    start: float = 8.4e-6
    """Of a collective."""
    hop: float = 3.4e-6
    """Over NVLink."""
    far_hop: float = 14.0e-6
    """To another node."""
    multiprocessors: int = 132

    def rate(self, of: str) -> float:
        return self.forward if of == "forward" else self.backward

    def nodes(self, devices: int) -> int:
        return -(-devices // self.per_node)

    def message(self, size: int, devices: int) -> float:
        """Each device to the next: where there are several nodes, one in eight sends to another, over its own card, and
        all wait for it."""
        far = devices > self.per_node
        return self.start + (self.far_hop + size / self.nic if far else self.hop + size / self.nvlink)

    def collective(self, size: int, devices: int) -> float:
        """all_gather and reduce_scatter, of which a device sends so much: round all devices, over all cards of a
        node."""
        far = self.nodes(devices) - 1
        rate = min(self.gathering, self.per_node * self.nic) if far else self.nvlink
        return self.start + far * self.far_hop + (devices - 1 - far) * self.hop + size / rate

    def exchange(self, size: int, devices: int) -> float:
        """all_to_all, of which a device sends so much: to those of its node over NVLink, to others over its card."""
        near = min(devices, self.per_node) - 1
        far = devices - 1 - near
        part = size / (devices - 1)
        return self.start + (self.far_hop if far else self.hop) + max(near * part / self.nvlink, far * part / self.nic)


TRITON = Machine()
FASTEST = Machine(forward=616e12, backward=561e12)
"""With FlashAttention-3's kernels."""
CROWDED = Machine(gathering=200 * GB)
"""Where collectives of several nodes reach what some clusters are reported to."""


@dataclasses.dataclass(frozen=True)
class Time:
    """Of a pass, in seconds."""

    total: float
    computing: float
    """Of the busiest device, all tiles that it visits."""
    sending: float
    """Of all messages, one after the other, whether hidden or not."""
    merging: float
    """What a ring reads and writes to sum fp32 parts."""

    @property
    def exposed(self) -> float:
        """What of the sending is not hidden behind anything."""
        return self.total - self.computing - self.merging


def ideal(case: Case, of: str, machine: Machine = TRITON) -> float:
    """Seconds, if nothing were sent and every device computed its part of the pairs that are seen, and no others."""
    return flops(case, of) / case.devices / machine.rate(of)


def time(case: Case, of: str, machine: Machine = TRITON) -> Time:
    """Of a pass, "forward" or "backward"."""
    return {"ring": _ring, "all_gather": _all_gather, "ulysses": _ulysses}[case.method](case, of, machine)


def efficiency(case: Case, machine: Machine = TRITON) -> float:
    """The ideal time of both passes as a share of the predicted one."""
    return sum(ideal(case, of, machine) for of in PASSES) / sum(time(case, of, machine).total for of in PASSES)


def filled(case: Case, machine: Machine = TRITON) -> tuple[float, float]:
    """What share of a GPU's multiprocessors have a block of rows, and one of keys, in each call of a kernel."""
    heads = {"ring": case.heads, "all_gather": case.heads // case.groups, "ulysses": case.heads // case.devices}
    rows = case.tokens if case.method == "ulysses" else case.share
    keys = case.share if case.method == "ring" else case.tokens
    return tuple(min(1.0, -(-x // tiles.TILE) * heads[case.method] / machine.multiprocessors) for x in (rows, keys))


def _of_tiles(case: Case, of: str, machine: Machine, heads: int) -> float:
    """Seconds for one tile in so many heads. Of 7 products of the backward pass 3 are made by blocks of rows."""
    rows, keys = filled(case, machine)
    slower = 1 / rows if of == "forward" else (3 / rows + 4 / keys) / 7
    return slower * 2 * case.head_dim * {"forward": 2, "backward": 5}[of] * tiles.TILE**2 * heads / machine.rate(of)


def _ring(case: Case, of: str, machine: Machine) -> Time:
    """Each step takes as long as its message, or as the busiest device computes; the first gradients' way home is not
    hidden."""
    steps = tiles.by_hop(case).max(1) * _of_tiles(case, of, machine, case.heads)
    # The kernel writes fp32, which is read with what is there, and their sum written: o forward, dq backward.
    merge = 4 * case.share * case.heads * case.head_dim * FP32 / machine.memory if len(steps) > 1 else 0.0
    messages = [
        machine.message(x.bytes, case.devices)
        for x in sorted(sent(case, of), key=lambda x: x.what == "their gradients")  # the way home last
        if x.what != "segment ids"  # hidden with what they come with
        for _ in range(x.count)
    ]
    beside = messages[: len(steps)] + [0.0] * (len(steps) - len(messages))
    total = np.maximum(steps + merge, beside).sum() + sum(messages[len(steps) :])
    return Time(float(total), float(steps.sum()), sum(messages), merge * len(steps))


def _all_gather(case: Case, of: str, machine: Machine) -> Time:
    """Each group's computing hides one thing, as XLA has one collective on its way at a time: forward the gathering of
    the next group, backward the scattering of the last, which is more. What is left is hidden by nothing."""
    n, groups = case.devices, case.groups
    computing = float(tiles.whole(case).max()) * _of_tiles(case, of, machine, case.heads)
    if n == 1:
        return Time(computing, computing, 0.0, 0.0)
    gather = machine.collective((n - 1) * keys_bytes(case, case.itemsize) // groups, n)
    scatter = machine.collective((n - 1) * keys_bytes(case, FP32) // groups, n) if of == "backward" else 0.0
    total = gather + scatter
    for group in range(groups):
        coming, going = gather if group + 1 < groups else 0.0, scatter if group else 0.0
        total += max(computing / groups, going) + coming if going else max(computing / groups, coming)
    return Time(total, computing, groups * (gather + scatter), 0.0)


def _ulysses(case: Case, of: str, machine: Machine) -> Time:
    """Everything waits for everything."""
    computing = tiles.one_device(case) * _of_tiles(case, of, machine, case.heads) / case.devices
    sending = sum(x.count * machine.exchange(x.bytes, case.devices) for x in sent(case, of) if x.kind == "all-to-all")
    return Time(computing + sending, computing, sending, 0.0)
