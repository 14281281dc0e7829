"""Compiles every row of the tuning table for its GPU, without one, and checks the machine code.

    python -m benchmarks.codegen                    # a table of registers, spills, shared memory, instruction mix
    python -m benchmarks.codegen --check            # exit status 1 if a row breaks a rule, or is worse than it was
    python -m benchmarks.codegen --baseline         # write down what each takes now
    python -m benchmarks.codegen --roofline         # cycles of each unit for a tile, and what they leave of peak
    python -m benchmarks.codegen --only "arch=90,name=dkdv|dq" --json out.json

What was read off is kept in `.cache/codegen`; a kernel is compiled again when something changes that its code depends
on, or with `--anew`. The kernels are compiled as `jax_flash_attn2` launches them, from the same operands, and
assembled by the ptxas that Triton carries with the options that JAX uses. A GPU is needed to say how fast a kernel
is; that it spills, waits for every product or loads without overlap can be read off here.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jax_flash_attn2.base.config import Tuned

from .compile import compile_point
from .points import Point, points, read
from .rules import Baseline, broken_rules


@dataclasses.dataclass
class Line:
    """What became of one kernel."""

    point: Point
    code: Any = None
    broken: list[str] = dataclasses.field(default_factory=list)


def _measure(point: Point, anew: bool = False, ptxas: str | None = None) -> Line:
    try:
        code = compile_point(point, anew=anew, ptxas=ptxas)
    except Exception as error:  # one row that does not compile must not lose the others
        return Line(point, None, [f"{type(error).__name__}: {error}"[:500]])
    broken = broken_rules(point, code) if ptxas is None else []
    return Line(point, code, broken if ptxas else broken + Baseline(versions()).broken(point, code))


_COLUMNS = "regs spill  shared CTAs | instructions of each hot loop: total (mma wgmma ex2 ffma | cp.async tma ldg sts)"


def _format(line: Line) -> str:
    code = line.code
    if code is None:
        return f"{line.point.title} | did not compile"
    loops = "   ".join(
        f"{x['total']:>4} ({x['mma']} {x['wgmma']} {x['ex2']} {x['ffma']} | "
        f"{x['cp.async']} {x['tma']} {x['ldg']} {x['sts']})"
        for x in code.loops
    )
    fit = code.ctas_per_sm(line.point.arch)
    return f"{line.point.title:58} {code.registers:>4} {code.spill_bytes:>5} {code.shared:>7} {fit:>4} | {loops}"


def _part(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 0 <= part < parts:
        raise ValueError(text)
    return part, parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a row breaks a rule or got worse")
    parser.add_argument("--baseline", action="store_true", help="write what each takes to baseline.json")
    parser.add_argument("--roofline", action="store_true", help="print cycles per tile and the predicted share of peak")
    parser.add_argument("--ptxas", metavar="FILE", help="only see whether this ptxas assembles them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was read off")
    parser.add_argument("--only", default="", metavar="KEY=VALUE,...", help="arch=80|90,name=fwd,causal=True,extra=")
    parser.add_argument("--config", metavar="C,C", help="with each of these in place of its own: 128x64-w8-s2-ptr,...")
    parser.add_argument("--anew", action="store_true", help="compile what is kept too")
    parser.add_argument("--part", type=_part, metavar="I/N", help="only part I, from 0 on, of N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled side by side")
    options = parser.parse_args(argv)
    wanted = dict(part.split("=") for part in options.only.split(",") if part)
    chosen = [p for p in points() if all(str(getattr(p, key)) in value.split("|") for key, value in wanted.items())]
    if options.config:
        chosen = [
            dataclasses.replace(p, config=dataclasses.replace(config, starts=p.config.starts))
            for p in dict.fromkeys(
                dataclasses.replace(p, config=Tuned(0, 0, 0, 0, starts=p.config.starts)) for p in chosen
            )
            for config in map(read, options.config.split(","))
        ]
    if options.part is not None:
        part, parts = options.part
        print(f"part {part} of {parts} of the kernels (--part {part}/{parts})", flush=True)
        chosen = chosen[part::parts]
    if not chosen:
        parser.error(f"no row matches --only {options.only}")
    lines = list(measure_all(chosen, options.jobs, options.anew, options.ptxas))
    made = [(line.point, line.code) for line in lines if line.code is not None]
    if options.baseline:
        Baseline(versions()).write(made, whole=not wanted and options.part is None and len(made) == len(lines))
        lines = [dataclasses.replace(line, broken=broken_rules(line.point, line.code)) for line in lines if line.code]
    if options.roofline:
        from . import roofline

        print(roofline.table(made))
    elif options.ptxas is None:
        print(f"{'':58} {_COLUMNS}")
        for line in lines:
            print(_format(line))
    if options.config:  # tried, in no baseline
        lines = [dataclasses.replace(x, broken=broken_rules(x.point, x.code) if x.code else x.broken) for x in lines]
    broken = [line for line in lines if line.broken]
    for line in broken:
        print(f"BROKEN {line.point.title}: {'; '.join(line.broken)}")
    print(
        f"{len(lines)} kernels, {len(broken)} break a rule"
        if not options.ptxas
        else f"{len(made)} of {len(lines)} assembled"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"versions": versions(), "kernels": [_plain(x) for x in lines]}, indent=1) + "\n"
        )
    return 1 if (options.check or options.ptxas) and broken else 0


def _plain(line: Line) -> dict[str, Any]:
    code = {} if line.code is None else dataclasses.asdict(line.code)
    return {"title": line.point.title, **dataclasses.asdict(line.point), **code, "broken": line.broken}


def measure_all(chosen: list[Point], jobs: int | None, anew: bool = False, ptxas: str | None = None):
    """What became of each of `chosen`, in order, with a progress bar."""
    measure = functools.partial(_measure, anew=anew, ptxas=ptxas)
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        yield from tqdm(pool.map(measure, chosen), total=len(chosen), desc="compiling", unit="kernel")


@functools.cache
def versions() -> dict[str, str]:
    """What the code was made with."""
    import triton

    return {"python": sys.version.split()[0], "jax": jax.__version__, "triton": triton.__version__}
