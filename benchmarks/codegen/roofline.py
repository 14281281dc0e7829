"""How fast the code of a kernel could be: cycles per tile of each unit of a multiprocessor, and what is left of peak.

A tile takes `cycles`: its products, and after them what the warps issue or the special-function unit computes, whatever
is more, `stalls` times, as neither overlaps much in code without warp specialisation, but for one product with which
the softmax does where the code says so (`sass.Code.loops`, "mufu alone"); and at the least as long as the busiest unit
takes. `stalls` comes from a plain forward kernel (`plain.py`) compiled by the same Triton: what Triton's
tutorial kernel, of the same loop, was published to reach on an H100 says how many cycles there were for each that was
counted, where one block has a multiprocessor to itself (width 128) and where two fill each other's waits (64). With
that overlap the model says 57% of peak for the forward pass of width 128; FlashAttention-3's paper measured 58% with
such an overlap and no warp specialisation (table 2). It is a model: it orders kernels of one chip, and a measured time
outweighs it.

Peak rates of a multiprocessor per clock: NVIDIA's architecture whitepapers (A100, GA102, Ada, H100, Blackwell).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .points import Point, arrays


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one multiprocessor does in a clock."""

    flops: int
    """Dense products of 16-bit numbers, summed in fp32."""
    l2: float
    """Bytes from the second-level cache, of all multiprocessors at once."""
    hbm: float
    """Bytes from memory, likewise."""
    special: int = 16
    issue: int = 4
    shared: int = 128


CHIPS = {
    80: Chip(2048, 47, 13.4),
    86: Chip(512, 32, 6.7),
    89: Chip(512, 32, 3.1),
    90: Chip(4096, 42, 14.5),
    100: Chip(8192, 42, 29.0),
    120: Chip(512, 32, 4.4),
}
PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkdv": (2, 2), "dbias": (1, 1)}
"""How many products of a tile are as wide as q, and how many as wide as v."""
PUBLISHED = {64: (403, 403), 128: (395, 477)}
"""TFLOP/s, least and most, of Triton's tutorial on an H100, forward, not causal, 16k tokens: FlashAttention-3's paper
(figure 5), pytorch/benchmark #2391."""
H100_PEAK = 989


def units(point: Point, code: Any) -> dict[str, float]:
    """Cycles of each unit for one tile of the bare loop, which comes last; and of the product beside which the softmax
    is computed (that with v: p v, or do vᵀ), as far as it is."""
    chip, loop, c = CHIPS[point.arch], code.loops[-1], point.config
    _, q, _, v, _ = arrays(point)
    size = q.dtype.itemsize
    by_q, by_v = PRODUCTS[point.name]
    depth = by_q * q.shape[3] + by_v * v.shape[3]
    rate = chip.flops if size == 2 else 256  # fused multiply-adds of fp32
    streamed = (c.block_m if point.name == "dkdv" else c.block_n) * (q.shape[3] + v.shape[3]) * size
    seqlen = 4096
    tiles = seqlen * seqlen / (c.block_m * c.block_n)
    threads = 32 * code.warps
    # wgmma reads its second operand from shared memory once for every 64 rows of the first.
    read = depth * c.block_n * (c.block_m / 64) * size if loop["wgmma"] else 0
    work = {
        "tensor": 2 * c.block_m * c.block_n * depth / rate,
        "special": threads * loop["mufu"] / chip.special,
        "issue": code.warps * loop["total"] / chip.issue,
        "shared": (threads * loop["shared bytes"] + read + streamed) / chip.shared,
        "L2": (streamed + threads * loop["global bytes"] * (loop["cp.async"] == 0)) / chip.l2,
        "HBM": 2 * seqlen * (q.shape[3] + v.shape[3]) * size / tiles / chip.hbm,
    }
    beside = 1 - loop["mufu alone"] / loop["mufu"] if loop["wgmma"] and loop["mufu"] else 0.0
    return work | {"beside": beside * work["tensor"] * v.shape[3] / depth}


def cycles(found: Mapping[str, float], stalls: float) -> float:
    """Of one tile, as the module's docstring says."""
    softmax = stalls * max(found["issue"], found["special"])
    return max(found["tensor"] + softmax - min(found["beside"], softmax), *found.values())


def share(found: Mapping[str, float], stalls: float) -> float:
    """Of the tensor cores' peak."""
    return found["tensor"] / cycles(found, stalls)


def stalls() -> tuple[dict[bool, float], list[str]]:
    """The factor, by whether a block has a multiprocessor to itself, and what it is from."""
    from . import plain

    factors, lines = {}, []
    for width, (least, most) in PUBLISHED.items():
        point, code = plain.compiled(width)
        found, alone = units(point, code), code.ctas_per_sm(90) == 1
        total = found["tensor"] * H100_PEAK / ((least + most) / 2)
        factors[alone] = (total - found["tensor"]) / max(found["issue"], found["special"])
        lines.append(
            f"plain kernel hd{width}: {code.loops[-1]['total']} instructions, published {least} to {most} TFLOP/s, so "
            f"{factors[alone]:.2f} cycles for each counted where {'one block is' if alone else 'several are'} on an SM"
        )
    return factors, lines


def table(measured: list[tuple[Point, Any]]) -> str:
    """Cycles of each unit, what binds, and the predicted share of peak, for each kernel."""
    factors, lines = stalls()
    lines.append(f"{'':58} tensor special issue shared    L2   HBM beside | binds    predicted share of peak")
    for point, code in measured:
        if not code.loops:
            continue
        found = units(point, code)
        binds = max(found, key=lambda name: found[name] if name != "beside" else 0.0)
        numbers = " ".join(f"{found[name]:>6.0f}" for name in found)
        predicted = share(found, factors[code.ctas_per_sm(point.arch) == 1])
        lines.append(f"{point.title:58} {numbers} | {binds:8} {100 * predicted:3.0f}%")
    return "\n".join(lines)
