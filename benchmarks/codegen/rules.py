"""What must hold of a kernel's code: rules, and a baseline that it is held to."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_flash_attn2.gpu.target import Target

from .points import EXTRAS, Extra, Point

BASELINE = Path(__file__).with_name("baseline.json")
WORSE = 1.05
"""How many times the baseline is too much."""


def broken_rules(point: Point, code) -> list[str]:
    """What is wrong with a kernel's code; nothing, for a row that may stay in the table."""
    limit = Target(point.arch).shared_memory
    loops, extra = code.loops, EXTRAS[point.extra]
    rules = {
        "no hot loop found": not loops and point.name != "combine",
        "it spills": extra.decodes and code.spill_bytes > 0,
        "narrow loads": extra.decodes and not extra.score and any(_narrow(extra, loop) > 4 for loop in loops),
        f"{code.shared} bytes of shared memory, the chip has {limit}": code.shared > limit,
        "a spill in a loop": any(loop["local"] for loop in loops),
        f"{code.registers} registers and yet spills": code.registers < 64 and code.spill_bytes > 0,
        "wgmma serialised by ptxas": code.serialized,
        "a wait behind every wgmma": any(loop["depbar"] > 4 + 4 for loop in loops),
    }
    if extra.dtype != "float32":  # whose IEEE products run on the FMA units
        rules |= {
            "no asynchronous copy in a loop": any(not loop["cp.async"] + loop["tma"] for loop in loops),
            "products without wgmma": _has_wgmma(point) and any(loop["wgmma"] < loop["mma"] for loop in loops),
        }
    if not extra.mixes:  # what is loaded, drawn or computed besides changes the mix
        rules |= {
            "tiles loaded without asynchronous copies": any(loop["wide ldg"] for loop in loops),
            "no fused multiply-add before each exp2": any(loop["ffma"] < 0.9 * loop["ex2"] for loop in loops),
            "a layout conversion in the forward loop": _converts(point) and any(loop["sts"] for loop in loops),
            "the softmax runs beside no product": point.config.overlaps
            and loops[-1]["mufu alone"] > loops[-1]["mufu"] / 4,
            "the masked loop takes more than 1.75 times the bare one's instructions": mask_cost(loops) > 1.75,
        }
    return [rule for rule, broken in rules.items() if broken]


def _narrow(extra: Extra, loop: Mapping[str, int]) -> int:
    """How many copies are of less than 16 bytes, or 8 of a cache of bytes; page numbers and scales are."""
    return loop["cp.async"] - loop["wide cp.async"] - (loop["half-wide cp.async"] if extra.cache else 0)


def _has_wgmma(point: Point) -> bool:
    """Whether this kernel's products should be Hopper's: all, but for dk and dv of width 256 through pointers, or with
    a second tile beside the logits, where tiles that are large enough spill."""
    wide = (point.name, point.head_dim) == ("dkdv", 256)
    return (
        point.arch == 90
        and point.config.block_m >= 64
        and not (wide and (EXTRAS[point.extra].mixes or not point.config.block_ptr))
    )


def mask_cost(loops: Sequence[Mapping[str, int]]) -> float:
    """How many instructions the masked loop, which comes first, takes for each of the bare one."""
    return loops[0]["total"] / loops[-1]["total"] if loops else 0.0


def _converts(point: Point) -> bool:
    """Whether a store to shared memory in this kernel's loop would be a layout conversion that need not be.

    Below sm_90 Triton lays warps side by side along o's width where that exceeds block_m, so that a row's maximum
    crosses warps. Widths to 128 have tiles of 128 rows; 256 rows of 256 fit no registers. On sm_100 p goes to the
    tensor cores through memory.
    """
    return point.name == "fwd" and (point.arch == 90 or (point.arch < 90 and point.head_dim <= 128))


def summary(point: Point, code) -> dict[str, Any]:
    """What the baseline holds of a kernel: less is better, each by itself."""
    elements = point.config.block_m * point.config.block_n / (32 * code.warps)
    return {
        "instructions": [loop["total"] for loop in code.loops],
        "ex2 per element": [round(loop["ex2"] / elements, 3) for loop in code.loops],
        "special functions beside no wgmma": [loop["mufu alone"] if loop["wgmma"] else 0 for loop in code.loops],
        "bytes loaded by threads": [32 * code.warps * loop["global bytes"] for loop in code.loops],
        "registers": code.registers,
        "spilled bytes": code.spill_bytes,
        "shared memory": code.shared,
        "tensor memory": code.tensor_memory,
    }


def worse(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What takes more than it did, both numbers with it."""
    found = []
    for name, old in before.items():
        new = now[name]
        pairs = zip(old, new, strict=False) if isinstance(old, list) else [(old, new)]
        if isinstance(old, list) and len(old) != len(new):
            found.append(f"{len(new)} loops, {len(old)} in the baseline")
        elif any(y > WORSE * x for x, y in pairs):
            found.append(f"{name} {new}, {old} in the baseline")
    return found


class Baseline:
    """What each kernel took when it was last written down (`--baseline`), by its title."""

    def __init__(self, versions: Mapping[str, str], path: Path = BASELINE):
        self.path, self.versions = path, {"triton": versions["triton"]}
        kept = json.loads(path.read_text()) if path.exists() else {"versions": self.versions, "kernels": {}}
        self.made_with, self.kernels = kept["versions"], kept["kernels"]

    def broken(self, point: Point, code) -> list[str]:
        """What is worse than it was; by another Triton's numbers nothing can be said, and that is said."""
        if self.made_with != self.versions:
            return [f"the baseline is of {self.made_with}, this is {self.versions}: renew it with --baseline"]
        if point.title not in self.kernels:
            return ["not in the baseline: add it with --baseline"]
        return worse(self.kernels[point.title], summary(point, code))

    def write(self, lines: Iterable[tuple[Point, Any]], *, whole: bool) -> None:
        """Renews the kernels of `lines`; the others stay, unless these are the whole."""
        kernels = {} if whole or self.made_with != self.versions else dict(self.kernels)
        kernels |= {point.title: summary(point, code) for point, code in lines}
        body = ",\n".join(f" {json.dumps(title)}: {json.dumps(kernels[title])}" for title in sorted(kernels))
        self.path.write_text(f'{{"versions": {json.dumps(self.versions)},\n"kernels": {{\n{body}\n}}}}\n')
