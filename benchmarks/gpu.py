"""What a GPU is asked first: is every tuned row right, and how fast are the most telling points. See gpu.sh.

    python -m benchmarks gpu --out DIR --deadline 500

Rows: each row of the tuning table for this chip, forward or backward with the row's config in the pass that it is for,
causal and not, checked against the reference and timed. Points: width 64, 128 and 256, causal and not, 1k to 16k
tokens, forward and backward, bf16, 16k tokens and a model width of 2048 in all, so that every point is as large:
ours as tuned and with each of the memory variants, against jax.nn on XLA and cuDNN. The order is by how much a point
tells; what the deadline leaves out is not measured, and said to be.
"""

import functools
import itertools
import time

from jax_flash_attn2 import Config
from jax_flash_attn2.gpu import tuning
from jax_flash_attn2.gpu.target import Target

from .attention import Attention, Provider, Shape, flash, library, need_gpu
from .problem import Group
from .results import Record, parse_case
from .sweep import Sweep, parser, summary

PROVIDERS = ("flash-tuned", "block-ptr", "ptr-block", "xla", "cudnn")
TOKENS, WIDTH = 16384, 2048
LENGTHS = (4096, 16384, 1024, 8192, 2048)
TINY_LENGTHS = (128, 256)


def row_problem(row: int, causal: bool, seqlen: int) -> Attention:
    """One row of the tuning table in use."""
    r = tuning.ROWS[row]
    c = r.config
    config = Config(c.block_m, c.block_n, c.num_warps, c.num_stages, c.maxnreg, c.block_ptr)

    def provider(name: str) -> Provider:
        need_gpu("the Triton kernels")
        return flash(causal=causal, implementation="triton", config={r.name: config})

    shape = Shape(2, seqlen, 4, r.width, causal=causal, dtype="bfloat16")
    return Attention(shape, "fwd" if r.name == "fwd" else "bwd", provider)


def point_problem(mode: str, headdim: int, causal: bool, seqlen: int, batch: int, heads: int, dtype: str) -> Attention:
    """One of the telling points."""
    shape = Shape(batch, seqlen, heads, headdim, causal=causal, dtype=dtype)
    return Attention(shape, mode, functools.partial(_provider, causal))


def _provider(causal: bool, name: str) -> Provider:
    if name in ("xla", "cudnn"):
        return library(name, causal=causal)
    if name != "flash-tuned":
        need_gpu("the Triton kernels")
    block_ptr = {"flash-tuned": None, "block-ptr": True, "ptr-block": False}[name]
    return flash(causal=causal, block_ptr=block_ptr)


def row_groups(capability: int, tiny: bool) -> list[Group]:
    """Every row for the chip."""
    arch = tuning.architecture(Target(capability))
    rows = [i for i, row in enumerate(tuning.ROWS) if row.arch == arch]
    return [
        Group("benchmarks.gpu:row_problem", {"row": i, "causal": causal, "seqlen": 256 if tiny else 1024}, ("row",))
        for i in (rows[:2] if tiny else rows)
        for causal in (True, False)
    ]


def point_groups(tiny: bool) -> list[Group]:
    """The telling points, the most telling first."""
    made = []
    lengths = TINY_LENGTHS if tiny else LENGTHS
    telling = itertools.product((lengths[:3], lengths[3:]), ("fwd", "bwd"), (128, 64, 256), (True, False))
    for some, mode, headdim, causal in telling:
        for t in some:
            tokens, width, dtype = (256, 256, "float32") if tiny else (TOKENS, WIDTH, "bfloat16")
            case = {"mode": mode, "headdim": headdim, "causal": causal, "seqlen": t}
            case |= {"batch": max(tokens // t, 1), "heads": max(width // headdim, 1), "dtype": dtype}
            baselines = {p: "xla" for p in PROVIDERS if p != "xla"}
            made.append(Group("benchmarks.gpu:point_problem", case, PROVIDERS, baselines))
    return made


def text(records: list[Record]) -> str:
    """Both tables."""
    parts = []
    rows = [r for r in records if "row" in parse_case(r.case)]
    if rows:
        lines = [_row_line(r) for r in rows]
        right = sum(r.ok for r in rows)
        parts.append("\n".join([f"tuned rows: {right} of {len(rows)} right", *lines]))
    points = [r for r in records if "row" not in parse_case(r.case)]
    if points:
        parts.append(summary(points, against="xla"))
    return "\n\n".join(parts)


def _row_line(record: Record) -> str:
    case = parse_case(record.case)
    row = tuning.ROWS[int(case["row"])]
    c = row.config
    how = f"{c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages} {'block-ptr' if c.block_ptr else 'ptr-block'}"
    came = f"{record.ms:.3f} ms" if record.ok else f"{record.status}: {record.reason}"
    causal = "causal" if case["causal"] == "True" else "full"
    return f"  sm_{row.arch} {row.name:4} hd{row.width:<3} {causal:6} {how:28} {came}"


def main(argv: list[str] | None = None) -> int:
    made = parser("gpu", __doc__ or "", seconds=0.15, quick_seconds=0.05)
    made.add_argument("--deadline", type=float, default=500.0, metavar="S", help="start no point after (default 500)")
    made.add_argument("--tiny", action="store_true", help="a few small points: to try the program itself")
    options = made.parse_args(argv)
    began = time.monotonic()
    with Sweep(options) as sweep:
        capability = sweep.capability or 90
        groups = sweep.select([*row_groups(capability, options.tiny), *point_groups(options.tiny)])
        records, left = [], 0
        for group in groups:
            if time.monotonic() - began > options.deadline:
                left += len(group.providers)
                continue
            records += sweep.measure(group).values()
        sweep.close_bar()
        print(text(records))
        if left:
            print(f"{left} points were not started: --deadline {options.deadline:g} s had passed; --resume goes on")
        print(sweep.closing())
    return 0 if all(r.ok or r.status == "unsupported" for r in records if "row" in parse_case(r.case)) else 1
