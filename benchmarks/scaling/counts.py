"""What one device sends, holds and computes: exact, as tests find it in the compiled programs."""

import dataclasses

from jax_flash_attn2.context.hops import messages
from jax_flash_attn2.context.ulysses import copies_of_keys

from .cases import Case

PASSES = ("forward", "backward")
FP32 = 4
"""Bytes of an element of what is summed over devices: gradients of keys and values."""
IDS = 4
"""Bytes of a segment id."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind and size."""

    kind: str
    """As XLA names it."""
    what: str
    bytes: int
    """That a device sends in each: its message; of what all gather (scatter, exchange), all but its own part."""
    count: int


def sent(case: Case, of: str) -> list[Sent]:
    """What a device sends in a pass, "forward" or "backward". The backward pass is taken for itself: within one program
    XLA may keep what the forward pass has gathered."""
    if case.devices == 1:
        return []
    return {"ring": _ring, "all_gather": _all_gather, "ulysses": _ulysses}[case.method](case, of == "backward")


def bytes_sent(case: Case, of: str) -> int:
    return sum(x.bytes * x.count for x in sent(case, of))


def collectives(case: Case, of: str) -> int:
    return sum(x.count for x in sent(case, of))


def keys_bytes(case: Case, itemsize: int) -> int:
    """Keys and values of a device, or their gradients."""
    return 2 * case.share * case.kv_heads * case.head_dim * itemsize


def _ring(case: Case, backward: bool) -> list[Sent]:
    counted: dict[tuple[bool, bool], int] = {}  # whether keys are in a message, and sums; how many such there are
    for run in case.runs:
        for message in messages(run, case.devices, backward):
            counted[message] = counted.get(message, 0) + 1
    keys, sums = keys_bytes(case, case.itemsize), keys_bytes(case, FP32)
    made = []
    for (has_keys, has_sums), count in counted.items():
        what = " and ".join(["keys"] * has_keys + ["their gradients"] * has_sums)
        made.append(Sent("collective-permute", what, keys * has_keys + sums * has_sums, count))
    ids = sum(count for (has_keys, _), count in counted.items() if has_keys)
    if case.document is not None and ids:
        made.append(Sent("collective-permute", "segment ids", case.share * IDS, ids))
    return made


def _all_gather(case: Case, backward: bool) -> list[Sent]:
    others = case.devices - 1
    of_group = lambda itemsize: others * keys_bytes(case, itemsize) // case.groups
    made = [Sent("all-gather", "keys", of_group(case.itemsize), case.groups)]
    if backward:
        made.append(Sent("reduce-scatter", "gradients of keys", of_group(FP32), case.groups))
    elif case.document is not None:
        made.append(Sent("all-gather", "segment ids", others * case.share * IDS, 1))
    return made


def _ulysses(case: Case, backward: bool) -> list[Sent]:
    n = case.devices
    copies = copies_of_keys(case.kv_heads, n)
    rows, keys = (case.share * heads * case.head_dim * case.itemsize for heads in (case.heads, case.kv_heads * copies))
    names = ("gradients of o and q", "gradients of k and v") if backward else ("q and o", "k and v")
    made = [Sent("all-to-all", name, x * (n - 1) // n, 2) for name, x in zip(names, (rows, keys), strict=True)]
    if case.document is not None and not backward:
        made.append(Sent("all-gather", "segment ids", (n - 1) * case.share * IDS, 2))
    return made


def hops(case: Case, of: str) -> int:
    """Over how many links in turn a pass's messages go: those of a ring one each; a gathering and a scattering go round
    all devices, as NCCL does it; an exchange is direct."""
    if case.method == "all_gather":
        return sum(x.count * (case.devices - 1) for x in sent(case, of) if "ids" not in x.what)
    return sum(x.count for x in sent(case, of) if "ids" not in x.what)


def held(case: Case, of: str) -> int:
    """Bytes of keys, values and fp32 sums of their gradients that are there at once, besides the device's own keys and
    the result.

    ring: the keys that are computed with, and those that come; backward, with each the sums, and what the step gives.
    all_gather: all keys of two groups of heads; backward, the gradients of two: one made, one on its way. ulysses: all
    keys of the device's heads; backward, what it gives for them.
    """
    backward, keys, sums = of == "backward", keys_bytes(case, case.itemsize), keys_bytes(case, FP32)
    if case.devices == 1:
        return 0
    if case.method == "ring":
        return 2 * keys + (3 * sums if backward else 0)
    if case.method == "all_gather":
        return min(2, case.groups) * case.devices * (keys + (sums if backward else 0)) // case.groups
    return copies_of_keys(case.kv_heads, case.devices) * keys * (2 if backward else 1)


def flops(case: Case, of: str) -> int:
    """Of all devices, as FlashAttention counts them: products of pairs that are seen, 2 forward and 5 backward."""
    return 2 * case.head_dim * {"forward": 2, "backward": 5}[of] * case.heads * case.pairs
