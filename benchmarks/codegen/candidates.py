"""What may be faster than a row of the tuning table, for a GPU to decide: `benchmarks/candidates.json`.

    python -m benchmarks.codegen.candidates          # about 20 minutes on two cores

Of every pass and width of each chip, configs of a grid are compiled; those that break no rule are ordered by the model
(`roofline.py`) and the best few kept that are no row already. On sm_100 warp specialisation is tried besides.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

from jax_flash_attn2.base.config import ONLY_FOR, Tuned
from jax_flash_attn2.gpu import tuning
from jax_flash_attn2.gpu.target import Target

from . import roofline
from .command import measure_all, versions
from .points import Point

FILE = Path(__file__).parents[1] / "candidates.json"
CHIPS = (80, 90, 100)
KEPT = 4


def grid(arch: int, name: str, width: int) -> list[Tuned]:
    """What is tried: the row's tile and those of half and twice its rows or keys, four and eight warps, two and three
    stages; the row's tile by the other way to memory, and without what else it does."""
    row = next(r.config for r in tuning.ROWS if (r.arch, r.name, r.width, r.v_width) == (arch, name, width, None))
    m, n = row.block_m, row.block_n
    tiles = [(m, n), (2 * m, n), (m // 2, n), (m, 2 * n), (m, n // 2)]
    made = [Tuned(*t, w, s, None, row.block_ptr, overlaps=row.overlaps) for t in tiles for w in (4, 8) for s in (2, 3)]
    if Target(arch).has_tma and name != "dbias":
        overlaps = row.overlaps and name != "fwd"
        made += [Tuned(m, n, w, s, None, not row.block_ptr, overlaps=overlaps) for w in (4, 8) for s in (2, 3)]
    if row.overlaps:
        made.append(dataclasses.replace(row, overlaps=False))
    # Fewer than 8 or more than 128 elements for each thread idle or spill.
    return [
        c for c in made if min(c.block_m, c.block_n) >= 16 and 8 <= c.block_m * c.block_n // (32 * c.num_warps) <= 128
    ]


def specialized(arch: int, name: str, width: int, jobs: int | None) -> list[Tuned]:
    """The first row with warps of their own for loads and products, which no model here speaks of: without spills."""
    if not Target(arch).has_tensor_memory or name not in ONLY_FOR["warp_specialize"] or width > 128:
        return []
    row = next(r.config for r in tuning.ROWS if (r.arch, r.name, r.width) == (arch, name, width))
    tried = [dataclasses.replace(row, num_warps=w, warp_specialize=True) for w in (4, 8)]
    lines = measure_all([Point(arch, name, width, True, config) for config in tried], jobs)
    return [line.point.config for line in lines if line.code is not None and not line.code.spill_bytes]


def best(arch: int, name: str, width: int, jobs: int | None) -> list[tuple[Tuned, float]]:
    """The few to try, with the predicted share of peak."""
    extra = "dbias" if name == "dbias" else ""
    rows = {r.config for r in tuning.ROWS if (r.arch, r.name, r.width) == (arch, name, width)}
    tried = [Point(arch, name, width, True, c, extra) for c in grid(arch, name, width) if c not in rows]
    factors, _ = roofline.stalls()
    good = []
    for line in measure_all(tried, jobs):
        rules = [rule for rule in line.broken if "baseline" not in rule]
        if line.code is not None and not rules:
            alone = line.code.ctas_per_sm(arch) == 1
            good.append((line.point.config, roofline.share(roofline.units(line.point, line.code), factors[alone])))
    good.sort(key=lambda pair: -pair[1])
    apart = {dataclasses.replace(config, overlaps=False) for config in rows if config.overlaps}
    return good[:KEPT] + [pair for pair in good[KEPT:] if pair[0] in apart]  # a GPU shall say what overlap is worth


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen.candidates", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    lines = []
    for arch, name, width in itertools.product(CHIPS, ("fwd", "dq", "dkdv", "dbias"), (64, 128, 256)):
        found = best(arch, name, width, options.jobs)
        print(f"sm_{arch} {name:5} hd{width:<3} {len(found)} kept", flush=True)
        for config, predicted in found:
            row = {"arch": arch, "name": name, "width": width, "predicted": round(predicted, 3)}
            lines.append(row | {"config": dataclasses.asdict(config)})
        for config in specialized(arch, name, width, options.jobs):
            row = {"arch": arch, "name": name, "width": width, "predicted": None}
            lines.append(row | {"config": dataclasses.asdict(config)})
    body = ",\n ".join(map(json.dumps, lines))
    FILE.write_text(f'{{"versions": {json.dumps(versions())}, "rows": [\n {body}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
