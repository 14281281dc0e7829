"""How evenly the programs of the dk and dv kernel fill a chip: a simulation, as no compiler can say.

    python -m benchmarks.codegen.programs

A program takes as long as it meets tiles, and starts where a multiprocessor is free first, in the order of its number,
which is what GPUs do. Printed is the time until the last has ended, in units of what it would be if all multiprocessors
worked all the time: with one program for all query heads that share keys, and as `tuning.one_head` decides.
"""

import argparse
import heapq
import itertools
import sys

import jax.numpy as jnp

from jax_flash_attn2.base.config import Config, Tuned
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.gpu import tuning
from jax_flash_attn2.gpu.target import Target

HEADS = 32
CHIPS = (80, 90, 100)


def works(spec: Spec, config: Tuned, batch: int, seqlen: int, summed: int) -> list[int]:
    """The tiles that each program meets, in launch order; rows see keys causally if the spec says."""
    blocks, rows = -(-seqlen // config.block_n), -(-seqlen // config.block_m)
    first = [i * config.block_n // config.block_m if spec.causal else 0 for i in range(blocks)]
    return [(rows - f) * summed for f in first] * (batch * spec.heads // summed)


def ends(works: list[int], multiprocessors: int) -> int:
    """When the last program ends."""
    free = [0] * multiprocessors
    for work in works:
        heapq.heapreplace(free, free[0] + work)
    return max(free)


def line(capability: int, batch: int, kv_heads: int, seqlen: int) -> tuple[list[str], float]:
    """A line of the table, and how many times the balanced time it takes as things are."""
    target, spec = Target(capability), Spec(HEADS, kv_heads, 128, 128, Rules(right=0))
    config = tuning.choose("dkdv", spec, jnp.bfloat16, target, Config())
    one = tuning.one_head(spec, config, batch, seqlen, target)
    found = []
    for summed in (spec.group, 1 if one else spec.group):
        each = works(spec, config, batch, seqlen, summed)
        balanced = sum(each) / target.multiprocessors
        found.append((len(each), ends(each, target.multiprocessors) / balanced))
    (programs, before), (programs_now, now) = found
    cells = [target.name, target.multiprocessors, batch, kv_heads, seqlen, programs, f"{before:.2f}"]
    return [*map(str, cells), *((str(programs_now), f"{now:.2f}") if one else ("", ""))], now


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen.programs", description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    heads = ("chip", "SMs", "B", "Hkv", "T", "programs", "time", "programs now", "time now")
    rows = [line(*case)[0] for case in itertools.product(CHIPS, (1, 2, 4), (1, 2, 4, 8), (512, 1024, 2048, 4096, 8192))]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"{HEADS} query heads, width 128, causal; time is in units of the balanced time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
