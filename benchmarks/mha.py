"""Attention forward and backward against `jax.nn.dot_product_attention`, over shapes and block sizes.

    python -m benchmarks mha --quick
    python -m benchmarks mha --only 'headdim=64,mode=fwd' --resume

Providers: triton-block-ptr and triton-ptr-block (our kernels, through tensor descriptors and through pointers, with
the block sizes of the plot), flash-tuned (ours, all choices left to it), jax (`implementation="xla"`) and jax-cudnn.
Without a GPU the first two and the last are `unsupported`, and flash-xla is swept in their place: our XLA path with
the block sizes of the plot, in float32 instead of float16.

"bwd" is a forward and a backward pass: o and the gradients of q, k and v. Each point runs by turns with jax. The plots
and tables come from `triton.testing.perf_report`; in its tables (one CSV beside each PNG) 100 ms stand for too little
memory (shared memory for ours) and 300 ms for a call that could not be built; the status columns say which, and the
plots mark such points at their upper edge. All else is in one tidy CSV (`benchmarks/results.py`).
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

from .attention import Attention, Provider, Shape, flash, library, triton
from .looks import look
from .problem import Group, Work
from .results import Record, case_name
from .status import SENTINELS, Status
from .sweep import Sweep, parser, summary

LINES = {
    "triton-block-ptr": ("Triton-BlockPtr", look("triton-block-ptr")[0], "-"),
    "triton-ptr-block": ("Triton-PtrBlock", look("triton-ptr-block")[0], "-."),
    "flash-xla": ("Flash-XLA", look("flash-xla")[0], "--"),
    "flash-tuned": ("Flash-Tuned", look("flash-tuned")[0], "-"),
    "jax": ("Jax", look("jax")[0], ":"),
    "jax-cudnn": ("Jax-cuDNN", look("jax-cudnn")[0], "--"),
}
"""Providers: name in the plots, colour, style."""
BY_BLOCKS = ("triton-block-ptr", "triton-ptr-block", "flash-xla")
"""Those that the block sizes are for."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is swept."""

    mode: tuple[str, ...] = ("bwd", "fwd")
    batch: tuple[int, ...] = (1, 2, 4)
    bias: tuple[bool, ...] = (True, False)
    headdim: tuple[int, ...] = (64, 128, 256)
    heads: tuple[int, ...] = (8, 16, 32)
    blocks: tuple[tuple[int, int], ...] = tuple(itertools.product((32, 64, 128), repeat=2))
    """Block sizes of q and of k."""
    seqlen: tuple[int, ...] = (1024, 2048, 4096, 6144, 8192)
    dtype: str = "float16"
    providers: tuple[str, ...] = tuple(p for p in LINES if p != "flash-xla")


GPU = Grid()
GPU_QUICK = Grid(
    batch=(2,), bias=(False,), headdim=(64, 128), heads=(16,), blocks=((64, 64), (128, 64)), seqlen=(1024, 4096, 8192)
)
CPU = Grid(
    batch=(1, 2), headdim=(64, 128), heads=(8,), seqlen=(256, 512, 1024, 2048), dtype="float32", providers=tuple(LINES)
)
CPU_QUICK = dataclasses.replace(CPU, batch=(1,), headdim=(64,), blocks=((64, 64), (128, 128)), seqlen=(256, 512, 1024))


def problem(blocksize_q: int = 0, blocksize_k: int = 0, **shape: Any) -> "Blocks":
    """The problem of a case."""
    return Blocks(_attention(**shape), blocksize_q, blocksize_k)


@functools.lru_cache(maxsize=1)
def _attention(mode: str, batch: int, bias: bool, headdim: int, heads: int, dtype: str, seqlen: int) -> Attention:
    """Inputs and reference, the same for all block sizes."""
    return Attention(Shape(batch, seqlen, heads, headdim, bias=bias, dtype=dtype), mode, _provider)


def _provider(name: str) -> Provider:
    if name == "flash-tuned":
        return flash()
    if name == "jax":
        return library("xla")
    if name == "jax-cudnn":
        return library("cudnn")
    raise ValueError(f"no provider {name!r}; there are {', '.join(LINES)}")


class Blocks:
    """A `worker.Problem`: attention, and the block sizes of those who take them."""

    def __init__(self, attention: Attention, blocksize_q: int, blocksize_k: int):
        self.attention, self.blocks = attention, (blocksize_q, blocksize_k)
        self.tolerance, self.flops, self.dtype = attention.tolerance, attention.flops, attention.dtype
        self.row_axis = attention.row_axis

    def work(self, provider: str) -> Work:
        if provider not in BY_BLOCKS:
            return self.attention.work(provider)
        if provider == "flash-xla":
            from jax_flash_attn2 import get_cached_flash_attention

            q, k = self.blocks
            return self.attention.work_of(Provider(get_cached_flash_attention(q, k, implementation="xla")))
        return self.attention.work_of(triton(provider == "triton-block-ptr", *self.blocks))

    def expected(self, provider: str) -> Any:
        return self.attention.expected(provider)


def shapes(grid: Grid) -> list[dict[str, Any]]:
    """Cases but for the block sizes."""
    names = ("mode", "batch", "bias", "headdim", "heads")
    values = itertools.product(*(getattr(grid, name) for name in names))
    return [
        dict(zip(names, value, strict=True)) | {"dtype": grid.dtype, "seqlen": t}
        for value in values
        for t in grid.seqlen
    ]


def groups(grid: Grid) -> list[Group]:
    """All points, in the order that makes each shape's inputs once."""
    made = []
    for shape in shapes(grid):
        free = tuple(p for p in grid.providers if p not in BY_BLOCKS)
        made.append(Group("benchmarks.mha:problem", shape, free, {p: "jax" for p in free if p != "jax"}))
        bound = tuple(p for p in grid.providers if p in BY_BLOCKS)
        for q, k in grid.blocks:
            case = shape | {"blocksize_q": q, "blocksize_k": k}
            made.append(Group("benchmarks.mha:problem", case, bound, dict.fromkeys(bound, "jax")))
    return made


def plots(grid: Grid, records: dict[tuple[str, str], Record], folder: Path) -> None:
    """Prints a table for each shape and pair of block sizes; draws it and writes it as CSV into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("mode", "batch", "bias", "headdim", "heads")
    for value in itertools.product(*(getattr(grid, name) for name in names), grid.blocks):
        *shape, (q, k) = value
        _plot(grid, dict(zip(names, shape, strict=True)) | {"dtype": grid.dtype}, q, k, records, folder)


def _plot(grid: Grid, shape: dict[str, Any], blocksize_q: int, blocksize_k: int, records, folder: Path) -> None:
    from matplotlib import pyplot
    from triton.testing import Benchmark, perf_report

    def find(seqlen: int, provider: str) -> Record | None:
        case = shape | {"seqlen": seqlen}
        if provider in BY_BLOCKS:
            case |= {"blocksize_q": blocksize_q, "blocksize_k": blocksize_k}
        return records.get((case_name(case), provider))

    found = {p: [find(t, p) for t in grid.seqlen] for p in grid.providers}
    found = {p: line for p, line in found.items() if any(line)}
    if not found:
        return  # --only left nothing of this plot
    name = "-".join(f"{key}={x}" for key, x in shape.items() if key not in ("mode", "dtype"))
    name += f"-blocksize_q={blocksize_q}-blocksize_k={blocksize_k}-mode={shape['mode']}"

    def point(seqlen: int, provider: str) -> Any:
        """The time of one point, for perf_report: (median, p20, p80), or what draws nothing."""
        record = find(seqlen, provider)
        return (record.ms, record.ms_p20, record.ms_p80) if record is not None and record.ok else float("nan")

    benchmark = Benchmark(
        x_names=["seqlen"],
        x_vals=list(grid.seqlen),
        line_arg="provider",
        line_vals=list(found),
        line_names=[LINES[p][0] for p in found],
        styles=[LINES[p][1:] for p in found],
        ylabel="MS",
        plot_name=name,
        args={},
    )
    frame = perf_report(benchmark)(point).run(save_path="", return_df=True)
    for p, line in found.items():
        column = f"{LINES[p][0]} (MS)"
        frame[column] = [_or_sentinel(ms, r) for ms, r in zip(frame[column], line, strict=True)]
        frame[f"{LINES[p][0]} status"] = ["" if r is None else str(r.status) for r in line]
    print(f"{name}:\n{frame.to_string(index=False, na_rep='-')}\n")
    frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6f")
    _mark(pyplot.gca(), grid, found, name)
    pyplot.savefig(folder / f"{name}.png", dpi=80)
    pyplot.close("all")


def _or_sentinel(ms: Any, record: Record | None) -> float:
    return SENTINELS.get(record.status, float("nan")) if record is not None and not record.ok else ms


def _mark(axes: Any, grid: Grid, found: dict[str, list[Record | None]], name: str) -> None:
    """Title and legend; a cross at the upper edge where there is no time, and why."""
    absent = [p for p, line in found.items() if all(r is not None and r.status is Status.UNSUPPORTED for r in line)]
    failing = [
        (p, line) for p, line in found.items() if p not in absent and any(r is not None and not r.ok for r in line)
    ]
    for row, (p, line) in enumerate(failing):
        height, said = 0.97 - 0.07 * row, ""
        for i, (t, record) in enumerate(zip(grid.seqlen, line, strict=True)):
            if record is None or record.ok:
                continue
            place = {"color": LINES[p][1], "transform": axes.get_xaxis_transform()}
            axes.plot([t], [height], "x", **place)
            if record.status != said:  # once for neighbours with the same fate
                side = "right" if i == len(line) - 1 else "left"
                axes.text(t, height - 0.02, str(record.status), fontsize=7, va="top", ha=side, **place)
            said = record.status
    handles, labels = axes.get_legend_handles_labels()
    gone = {f"{LINES[p][0]} (MS)" for p in absent}
    shown = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label not in gone]
    axes.legend([h for h, _ in shown], [label.removesuffix(" (MS)") for _, label in shown])
    axes.set_title(name.replace("-blocksize_q", "\nblocksize_q"), fontsize=9)
    axes.set_ylabel("ms (lower is better)")
    axes.set_ylim(0, axes.get_ylim()[1] * (1 + 0.1 * len(failing)))
    axes.set_xticks(grid.seqlen)
    axes.figure.subplots_adjust(bottom=0.15)
    if absent:
        axes.figure.text(0.01, 0.01, f"unsupported here: {', '.join(LINES[p][0] for p in absent)}", fontsize=7)


def main(argv: list[str] | None = None) -> int:
    options = parser("mha", __doc__ or "", seconds=1.0, quick_seconds=0.25).parse_args(argv)
    with Sweep(options) as sweep:
        if sweep.on_gpu:
            grid = GPU_QUICK if options.quick else GPU
        else:
            grid = CPU_QUICK if options.quick else CPU
        records = sweep.measure_all(sweep.select(groups(grid)))
        sweep.close_bar()
        plots(grid, {r.key: r for r in records}, sweep.folder / sweep.stem)
        print(summary([r for r in records if r.status is not Status.UNSUPPORTED], against="jax"))
        print(sweep.closing())
    return 0
