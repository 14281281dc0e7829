"""What a GPU is asked first: is every tuned row right, and how fast are the most telling points. See gpu.sh.

    python -m benchmarks gpu --out DIR --deadline 500 --what rows,points

Rows: each row of the tuning table for this chip, forward or backward with the row's config in the pass that it is for,
causal and not, checked against the reference and timed. Points: width 64, 128 and 256, causal and not, 1k to 16k
tokens, forward and backward, bf16, 16k tokens and a model width of 2048 in all, so that every point is as large;
and what differs from these: grouped and single key heads, a bias, 512 tokens, 32k and 128k. Ours as tuned and with
each of the memory variants, against jax.nn on XLA and cuDNN. Decoding: see gpu_decode.py. The order is by how much a
point tells; what the deadline leaves out is not measured, and said to be.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_flash_attn2 import Config
from jax_flash_attn2.base.config import Tuned
from jax_flash_attn2.gpu import tuning
from jax_flash_attn2.gpu.target import Target

from . import gpu_decode
from .attention import Attention, Provider, Shape, flash, library, need_gpu
from .codegen.points import read, written
from .problem import Group
from .results import Record, parse_case
from .sweep import Sweep, parser, summary

PROVIDERS = ("flash-tuned", "block-ptr", "ptr-block", "xla", "cudnn")
TOKENS, WIDTH = 16384, 2048
LENGTHS = (4096, 16384, 1024, 8192, 2048)
TINY_LENGTHS = (128, 256)
CANDIDATES = Path(__file__).with_name("candidates.json")
"""Made by `python -m benchmarks.codegen.candidates`."""


def row_problem(row: str, name: str, headdim: int, **shape: Any) -> Attention:
    """A config (`codegen.points.written`) in the pass it is for."""

    def provider(_: str) -> Provider:
        need_gpu("the Triton kernels")
        return flash(causal=shape["causal"], implementation="triton", config={name: _as_asked(read(row))})

    made = Shape(head_dim=headdim, dtype="bfloat16", bias=name == "dbias", dbias=name == "dbias", **shape)
    return Attention(made, "fwd" if name == "fwd" else "bwd", provider)


def _as_asked(tuned: Tuned) -> Config:
    """What a caller would ask for to get it."""
    return Config(**{f.name: getattr(tuned, f.name) for f in dataclasses.fields(Config)})


def point_problem(mode: str, causal: bool, headdim: int, **shape: Any) -> Attention:
    """One of the telling points; the rest of its `Shape`."""
    return Attention(Shape(head_dim=headdim, causal=causal, **shape), mode, functools.partial(_provider, causal))


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
    rows = [row for row in tuning.ROWS if row.arch == arch]
    shape = {"seqlen": 256 if tiny else 1024, "batch": 2, "heads": 4}
    return [_row(row, causal, shape) for row in (rows[:2] if tiny else rows) for causal in (True, False)]


def candidate_groups(capability: int, tiny: bool) -> list[Group]:
    """The rows for the chip and what may be better (`candidates.json`), where the chip is full; timed by turns."""
    arch = tuning.architecture(Target(capability))
    found = [row for row in tuning.ROWS if row.arch == arch] + [row for row in candidates() if row.arch == arch]
    shape = {"seqlen": 256, "batch": 1, "heads": 1} if tiny else {"seqlen": 4096, "batch": 4, "heads": 16}
    return [_row(row, True, shape) for row in (found[:1] if tiny else found)]


def candidates() -> list[tuning.Row]:
    """What the compiler alone cannot choose between.

    Raises:
      SystemExit: the list has not been made.
    """
    if not CANDIDATES.exists():
        raise SystemExit(f"{CANDIDATES} is not there: python -m benchmarks.codegen.candidates makes it, without a GPU")
    return [
        tuning.Row(line["arch"], line["name"], line["width"], Tuned(**line["config"]))
        for line in json.loads(CANDIDATES.read_text())["rows"]
    ]


def _row(row: tuning.Row, causal: bool, shape: dict[str, int]) -> Group:
    case = {"row": written(row.config), "name": row.name, "headdim": row.width, "causal": causal, **shape}
    if row.v_width:  # of multi-head latent attention
        case |= {"headdim": 192, "v_dim": row.v_width}
    return Group("benchmarks.gpu:row_problem", case, ("row",))


def point_groups(tiny: bool) -> list[Group]:
    """The telling points, the most telling first."""
    lengths = TINY_LENGTHS if tiny else LENGTHS
    made: list[Group] = []
    for some in (lengths[:3], lengths[3:]):
        for mode, headdim, causal in itertools.product(("fwd", "bwd"), (128, 64, 256), (True, False)):
            for t in some:
                tokens, width, dtype = (256, 256, "float32") if tiny else (TOKENS, WIDTH, "bfloat16")
                case = {"mode": mode, "headdim": headdim, "causal": causal, "seqlen": t}
                case |= {"batch": max(tokens // t, 1), "heads": max(width // headdim, 1), "dtype": dtype}
                made.append(_points(case))
        if some == lengths[:3]:
            made += [_points(case) for case in _special(tiny)]
    return made


def _special(tiny: bool) -> list[dict[str, Any]]:
    """What the others have in common, varied in one thing each."""
    usual = {"headdim": 128, "causal": True, "seqlen": 4096, "batch": 4, "heads": 32, "dtype": "bfloat16"}
    varied: list[dict[str, Any]] = [
        {"kv_heads": 8},
        {"kv_heads": 1, "batch": 1, "seqlen": 2048},
        {"bias": True, "causal": False},
        {"seqlen": 512, "batch": 32},
        {"seqlen": 32768, "batch": 1, "heads": 16},
        {"seqlen": 131072, "batch": 1, "heads": 8},
    ]
    cases = [{"mode": mode} | usual | more for more in varied for mode in ("fwd", "bwd")]
    if tiny:
        small = {"headdim": 16, "seqlen": 64, "batch": 1, "dtype": "float32"}
        cases = [c | small | {"heads": 4} | ({"kv_heads": 1} if "kv_heads" in c else {}) for c in cases[:6]]
    return cases


def _points(case: dict[str, Any]) -> Group:
    return Group("benchmarks.gpu:point_problem", case, PROVIDERS, {p: "xla" for p in PROVIDERS if p != "xla"})


WHAT: dict[str, Callable[[int, bool], list[Group]]] = {
    "rows": row_groups,
    "points": lambda capability, tiny: point_groups(tiny),
    "decode": lambda capability, tiny: gpu_decode.groups(tiny),
    "candidates": candidate_groups,
}
"""What may be measured: its groups, by compute capability, and whether they are tiny."""


def text(records: list[Record]) -> str:
    """All tables."""
    rows = [r for r in records if "row" in parse_case(r.case)]
    parts = []
    for shape in dict.fromkeys(_shape(r) for r in rows):
        some = [r for r in rows if _shape(r) == shape]
        lines = [_row_line(r) for r in _fastest_first(some)]
        parts.append("\n".join([f"rows at {shape}: {sum(r.ok for r in some)} of {len(some)} right", *lines]))
    if points := usual_points(records):
        parts.append(summary(points, against="xla"))
    if decoding := [r for r in records if gpu_decode.is_point(r)]:
        parts.append(f"Decoding:\n{gpu_decode.tables(decoding)}")
    return "\n\n".join(parts)


def usual_points(records: list[Record]) -> list[Record]:
    """The telling points, without those of decoding."""
    return [r for r in records if "row" not in parse_case(r.case) and not gpu_decode.is_point(r)]


def _shape(record: Record) -> str:
    return ", ".join(f"{key} {parse_case(record.case)[key]}" for key in ("seqlen", "batch", "heads"))


def _fastest_first(records: list[Record]) -> list[Record]:
    """Those of one pass, width and mask together, in the order in which these first come."""

    def group(record: Record) -> tuple[str, ...]:
        case = parse_case(record.case)
        return case["name"], case["headdim"], case["causal"]

    order = list(dict.fromkeys(map(group, records)))
    return sorted(records, key=lambda r: (order.index(group(r)), r.ms if r.ok and r.ms else float("inf")))


def _row_line(record: Record) -> str:
    case = parse_case(record.case)
    came = f"{record.status}: {record.reason}"
    if record.ok:
        came = f"{record.ms:8.3f} ms, compiled in {(record.compile_ms or 0) / 1e3:.1f} s"
    causal = "causal" if case["causal"] == "True" else "full"
    return f"  {case['name']:4} hd{case['headdim']:<3} {causal:6} {case['row']:22} {came}"


def main(argv: list[str] | None = None) -> int:
    made = parser("gpu", __doc__ or "", seconds=0.15, quick_seconds=0.05)
    made.add_argument("--deadline", type=float, default=500.0, metavar="S", help="start no point after (default 500)")
    made.add_argument(
        "--what", default="rows,points", metavar="A,B", help=f"some of {', '.join(WHAT)} (default %(default)s)"
    )
    made.add_argument("--tiny", action="store_true", help="a few small points: to try the program itself")
    options = made.parse_args(argv)
    what = options.what.split(",")
    if unknown := set(what) - WHAT.keys():
        made.error(f"--what: {', '.join(sorted(unknown))} is none of {', '.join(WHAT)}")
    began = time.monotonic()
    with Sweep(options) as sweep:
        capability = sweep.capability or 90
        groups = sweep.select([group for name in what for group in WHAT[name](capability, options.tiny)])
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
        fine = all(r.ok or not sweep.on_gpu for r in records if "row" in parse_case(r.case))
    return 0 if fine else 1
