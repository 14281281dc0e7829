"""Attention forward in iterations per second, and what each of our optimisations brings.

    python -m benchmarks sdpa                  # 500 iterations of everything
    python -m benchmarks sdpa --only causal=True

Batch 4, 8 heads of 64; small, medium and large are 128, 512 and 1024 tokens. Ours (`flash_attention`) against jax.nn
on XLA and cuDNN and against naive jnp (all logits at once), by turns. Then ours with one optimisation switched off:

  fixed-tiles     64 x 64 tiles instead of the tuned ones (`Config`)
  dense-bias      the causal mask given as a bias of -inf, so that nobody knows which tiles are hidden
  eager           called without jit
  no-skip         tiles that the causal mask hides are computed all the same       (XLA path)
  all-masked      no tile is known to be seen whole: all go through the mask       (XLA path)
  no-whole-rows   running statistics even where whole rows of logits fit a tile    (XLA path)
  one-stage       no software pipeline that loads tiles ahead (`Config`)           (GPU)
  other-memory    pointers where descriptors are tuned, and the other way round    (GPU)

A switch that leaves the compiled program as it was is `unsupported` there: the optimisation was not at work. Those of
the XLA path replace one function of `jax_flash_attn2.xla.tiling` while it is traced; everything else is public.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jax_flash_attn2 import Config
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.gpu import tuning
from jax_flash_attn2.gpu.target import present
from jax_flash_attn2.xla import tiling

from .attention import Attention, Provider, Shape, flash, library, naive, need_gpu
from .problem import Group, Work
from .results import Record, parse_case
from .status import Unsupported
from .sweep import Sweep, milliseconds, parser, ratio, table
from .timing import Effort

SIZES = {"small": 128, "medium": 512, "large": 1024}
OTHERS = ("jax", "jax-cudnn", "naive")
OF_XLA = ("no-skip", "all-masked", "no-whole-rows")
OF_GPU = ("one-stage", "other-memory")
RUNGS = ("fixed-tiles", "dense-bias", "eager", *OF_XLA, *OF_GPU)


def problem(size: str, causal: bool, dtype: str) -> "Ladder":
    """The problem of a case."""
    return Ladder(Shape(4, SIZES[size], 8, 64, causal=causal, dtype=dtype))


class Ladder(Attention):
    """Attention with ours, whole and in part, among the providers."""

    def __init__(self, shape: Shape):
        super().__init__(shape, "fwd", self._provider)

    def work(self, provider: str) -> Work:
        work = super().work(provider)
        if provider in RUNGS and provider != "eager" and self._program(work) == self._program(super().work("ours")):
            raise Unsupported("changes nothing here: the compiled program is the same")
        return work

    def _program(self, work: Work) -> str:
        with work.during():
            return work.function.lower(*work.arguments).as_text()

    def _provider(self, name: str) -> Provider:
        causal = self.shape.causal
        plain = functools.partial(flash, causal=causal)
        gpu = jax.default_backend() == "gpu"
        if name in OF_XLA and gpu:
            raise Unsupported("this is of the XLA path; here the Triton kernels run")
        if name in OF_GPU:
            need_gpu(f"{name}: the Triton kernels")
        if name == "dense-bias" and not causal:
            raise Unsupported("nothing is hidden")
        made: dict[str, Callable[[], Provider]] = {
            "ours": plain,
            "jax": lambda: library("xla", causal=causal),
            "jax-cudnn": lambda: library("cudnn", causal=causal),
            "naive": lambda: Provider(functools.partial(naive, causal=causal)),
            "fixed-tiles": lambda: plain(config=Config(64, 64)),
            "dense-bias": lambda: Provider(_with_dense_bias),
            "eager": lambda: Provider(plain().attend, jit=False),
            "no-skip": lambda: Provider(plain().attend, during=no_skip),
            "all-masked": lambda: Provider(plain().attend, during=all_masked),
            "no-whole-rows": lambda: Provider(plain().attend, during=no_whole_rows),
            "one-stage": lambda: plain(config=Config(num_stages=1)),
            "other-memory": lambda: plain(block_ptr=not self._tuned_block_ptr()),
        }
        return made[name]()

    def _tuned_block_ptr(self) -> bool:
        q, k, v = self.arrays[:3]
        spec = Spec.of(Rules(right=0 if self.shape.causal else None), q, k, v, {})
        return tuning.choose("fwd", spec, q.dtype, present(), Config()).block_ptr


def _with_dense_bias(q, k, v, bias=None):
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
    return flash().attend(q, k, v, jnp.where(seen, 0, -jnp.inf).astype(q.dtype)[None, None])


@contextlib.contextmanager
def _spans(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Iterator[None]:
    """While traced, a block of query rows meets `change(tiling, full, end)` in place of (full, end)."""
    own, before = tiling.Tiling, tiling.Tiling.key_span
    with mock.patch.object(own, "key_span", lambda self, start_m: change(self, *before(self, start_m))):
        yield


def no_skip() -> contextlib.AbstractContextManager[None]:
    """Every block of rows meets all tiles of keys."""
    return _spans(lambda tiling, full, end: (full, tiling.blocks_k))


def all_masked() -> contextlib.AbstractContextManager[None]:
    """No tile is met without the mask."""
    return _spans(lambda tiling, full, end: (0, end) if tiling.masked else (full, end))


@contextlib.contextmanager
def no_whole_rows() -> Iterator[None]:
    """Tiles as if whole rows of logits had no advantage."""
    before = tiling.choose_blocks

    def choose(seqlen_q, seqlen_k, batch_heads, whole_rows, *rest):
        return before(seqlen_q, seqlen_k, batch_heads, False, *rest)

    with mock.patch.object(tiling, "choose_blocks", choose):
        yield


def groups(dtype: str) -> list[Group]:
    """All points."""
    providers = ("ours", *OTHERS, *RUNGS)
    return [
        Group("benchmarks.sdpa:problem", {"size": size, "causal": causal, "dtype": dtype}, providers,
              {p: "ours" for p in providers if p != "ours"})
        for size in SIZES
        for causal in (True, False)
    ]  # fmt: skip


def rates(records: list[Record], iterations: int) -> str:
    """Iterations per second of ours and of the others, and how many times faster ours is."""
    rows = [["size", "causal", "provider", "iterations/s", "ms", f"s for {iterations}", "ours is x faster"]]
    for r in records:
        if r.provider in RUNGS or (not r.ok and r.provider != "ours" and r.status == "unsupported"):
            continue
        case = parse_case(r.case)
        per_second = "-" if not r.ok or not r.ms else f"{1000 / r.ms:.1f}"
        total = "-" if not r.ok or not r.ms else f"{iterations * r.ms / 1000:.2f}"
        rows.append([case["size"], case["causal"], r.provider, per_second, milliseconds(r), total, _inverse(r)])
    return table(rows, left=3)


def ladder(records: list[Record]) -> str:
    """How many times as long ours takes with each optimisation switched off, case by case."""
    cases = list(dict.fromkeys(r.case for r in records))
    found = {(r.case, r.provider): r for r in records}
    heads = [f"{c['size']} {'causal' if c['causal'] == 'True' else 'full'}" for c in map(parse_case, cases)]
    rows = [["switched off", *heads]]
    rows.append(["(nothing) ms", *(milliseconds(found.get((case, "ours"))) for case in cases)])
    for rung in RUNGS:
        line = [found.get((case, rung)) for case in cases]
        if any(r is not None and r.ok for r in line):
            rows.append([rung, *("-" if r is None or not r.ok else f"x {_inverse(r)}" for r in line)])
    return table(rows)


def _inverse(record: Record) -> str:
    """How many times as long as its baseline."""
    return "-" if ratio(record) == "-" or not record.times_faster else f"{1 / record.times_faster:.2f}"


def main(argv: list[str] | None = None) -> int:
    made = parser("sdpa", __doc__ or "", seconds=0.0, quick_seconds=0.0)
    made.add_argument("--iterations", type=int, help="timed runs of each (default 500; 15 with --quick)")
    options = made.parse_args(argv)
    iterations = options.iterations or (15 if options.quick else 500)
    effort = Effort(options.seconds or 0.0, least=iterations, most=10**6 if options.seconds else iterations)
    with Sweep(options, effort) as sweep:
        dtype = "bfloat16" if sweep.on_gpu else "float32"
        records = sweep.measure_all(sweep.select(groups(dtype)))
        sweep.close_bar()
        print(f"{rates(records, 500)}\n\nTime with an optimisation switched off, ours = 1:\n{ladder(records)}\n")
        print(sweep.closing())
    return 0
