"""The three builders of dense causal masks, with and without padding, with and without jit.

    python -m benchmarks attention_mask --jit --warmup 5 --iterations 20
    python -m benchmarks attention_mask --no-jit        # each call traces and dispatches op by op
    python -m benchmarks attention_mask                 # both

make_causal_mask composes predicates with vmap; naive_tril and naive_comparison are `jnp.tril` and a comparison of
indices. A batch of [batch, seqlen, 768]; with padding, half of its sequences are half padding. All three must give the
same bits. Ratios are to make_causal_mask: how many times faster the naive ones are.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_flash_attn2.masks import causal_mask_comparison, causal_mask_tril, make_causal_mask

from .problem import Group, Work
from .results import Record, parse_case
from .sweep import Sweep, milliseconds, parser, ratio, table
from .timing import Effort

HIDDEN = 768
BUILDERS = {
    "make_causal_mask": make_causal_mask,
    "naive_tril": causal_mask_tril,
    "naive_comparison": causal_mask_comparison,
}
SIZES = tuple(itertools.product((2, 4, 8, 16), (128, 512, 1024, 2048)))
QUICK_SIZES = ((2, 128), (4, 512), (8, 1024), (16, 2048))


def problem(batch: int, seqlen: int, padding: bool, jit: bool) -> "Masks":
    """The problem of a case."""
    return Masks(batch, seqlen, padding, jit)


class Masks:
    """A `worker.Problem`: x `[batch, seqlen, hidden]`, and which of its tokens are real, to a mask."""

    tolerance, flops, dtype = 0.0, None, "bool"

    def __init__(self, batch: int, seqlen: int, padding: bool, jit: bool):
        self.x, self.jit = jax.random.normal(jax.random.key(0), (batch, seqlen, HIDDEN)), jit
        self.real = np.ones((batch, seqlen), bool)
        self.real[: batch // 2, seqlen // 2 :] = False
        self.arguments: tuple[Any, ...] = (self.x, jax.device_put(self.real)) if padding else (self.x,)

    def work(self, provider: str) -> Work:
        builder: Callable = BUILDERS[provider]

        def build(x, real=None):
            return builder(x, padding_mask=real)

        return Work(jax.jit(build) if self.jit else build, self.arguments)

    def expected(self, provider: str) -> np.ndarray:
        batch, seqlen, _ = self.x.shape
        seen = np.tri(seqlen, dtype=bool)[None, None]
        if len(self.arguments) > 1:
            seen = seen & self.real[:, None, None, :]
        return np.broadcast_to(seen, (batch, 1, seqlen, seqlen))


def groups(sizes: tuple[tuple[int, int], ...], jits: tuple[bool, ...]) -> list[Group]:
    """All points."""
    baselines = {name: "make_causal_mask" for name in BUILDERS if name != "make_causal_mask"}
    return [
        Group(
            "benchmarks.attention_mask:problem",
            {"batch": batch, "seqlen": seqlen, "padding": padding, "jit": jit},
            tuple(BUILDERS),
            baselines,
        )
        for jit in jits
        for padding in (False, True)
        for batch, seqlen in sizes
    ]


def tables(records: list[Record]) -> str:
    """Milliseconds of the three, one table with jit and one without, as far as measured."""
    parts, found = [], {(r.case, r.provider): r for r in records}
    for jit in ("True", "False"):
        rows = [
            ["padding", "batch", "seqlen", *(f"{name} ms" for name in BUILDERS), "x tril", "x comparison", "fastest"]
        ]
        for name in dict.fromkeys(r.case for r in records):
            case = parse_case(name)
            if case["jit"] != jit:
                continue
            line = [found.get((name, builder)) for builder in BUILDERS]
            ok = [r for r in line if r is not None and r.ok]
            fastest = min(ok, key=lambda r: r.ms or 0.0).provider if ok else "-"
            cells = [*map(milliseconds, line), *map(ratio, line[1:]), fastest]
            rows.append([*(case[key] for key in ("padding", "batch", "seqlen")), *cells])
        if len(rows) > 1:
            parts.append(f"{'with' if jit == 'True' else 'without'} jit\n{table(rows, left=3)}\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    made = parser("attention_mask", __doc__ or "", seconds=1.0, quick_seconds=0.4)
    made.add_argument("--jit", action=argparse.BooleanOptionalAction, help="only with, or only without; default both")
    made.add_argument("--warmup", type=int, help="runs before those that are timed (default 2)")
    made.add_argument("--iterations", type=int, help="timed runs (default: as many as fit in --seconds)")
    options = made.parse_args(argv)
    with Sweep(options, _effort(options)) as sweep:
        jits = (True, False) if options.jit is None else (options.jit,)
        records = sweep.measure_all(sweep.select(groups(QUICK_SIZES if options.quick else SIZES, jits)))
        sweep.close_bar()
        print(tables(records))
        print(sweep.closing())
    return 0


def _effort(options: argparse.Namespace) -> Effort | None:
    """What --warmup and --iterations say; None if they say nothing."""
    if options.warmup is None and options.iterations is None:
        return None
    warmup = 2 if options.warmup is None else options.warmup
    if options.iterations is None:
        return Effort(options.seconds or options.seconds_by_quick[options.quick], warmup=warmup)
    return Effort(0.0, least=options.iterations, most=options.iterations, warmup=warmup)
