"""The first thing to run on a GPU: one small forward and backward of each width, compared with the definition.

    python -m benchmarks gpu_smoke                       # every width, both memory variants
    compute-sanitizer python -m benchmarks gpu_smoke --widths 64 --variants ptr
    ncu python -m benchmarks gpu_smoke --widths 128 --variants tuned --seqlen 8192 --batch 2

Prints what each took to compile and how far it is off, in units of the largest number near it. The length is odd, so
that tiles are cut, and heads are grouped. Ends with 1 if one is wrong.
"""

import argparse
import sys
import time

import jax
import numpy as np

from .attention import Attention, Shape, flash, need_gpu
from .measure import disagreement
from .status import Unsupported, reason

VARIANTS = {"tuned": None, "ptr": False, "block": True}


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks gpu_smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--widths", default="64,128,256,32,96", help="head dims, in this order (default %(default)s)")
    made.add_argument("--variants", default="tuned,ptr,block", help=f"some of {', '.join(VARIANTS)} (default all)")
    made.add_argument("--seqlen", type=int, default=333)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = made.parse_args(argv)
    if unknown := set(options.variants.split(",")) - VARIANTS.keys():
        made.error(f"--variants: {', '.join(sorted(unknown))} is none of {', '.join(VARIANTS)}")
    try:
        need_gpu("the Triton kernels")
    except Unsupported as error:
        print(error, file=sys.stderr)
        return 1
    wrong = 0
    for width in map(int, options.widths.split(",")):
        for variant in options.variants.split(","):
            shape = Shape(options.batch, options.seqlen, 4, width, causal=True, dtype=options.dtype, kv_heads=2)
            said = run(shape, VARIANTS[variant])
            wrong += not said.startswith("right")
            print(f"hd{width:<3} {variant:5} {said}", flush=True)
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0


def run(shape: Shape, block_ptr: bool | None, implementation: str = "triton") -> str:
    """What became of a forward and backward pass: "right ..." or what is wrong."""
    problem = Attention(shape, "bwd", lambda _: flash(causal=True, implementation=implementation, block_ptr=block_ptr))
    try:
        work = problem.work("flash")
        began = time.perf_counter()
        compiled = work.function.lower(*work.arguments).compile()
        seconds = time.perf_counter() - began
        got = jax.block_until_ready(compiled(*work.arguments))
    except Exception as error:  # one that fails must not keep the others from being tried
        return reason(error)
    want = problem.expected("flash")
    if said := disagreement(got, want, problem.tolerance, problem.row_axis):
        return f"wrong: {said}"
    off = max(float(np.max(np.abs(np.asarray(x, np.float32) - np.asarray(y)))) for x, y in zip(got, want, strict=True))
    return f"right, off by {off:.2g}; compiled in {seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
