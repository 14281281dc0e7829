"""All results as one HTML page that needs no server and no network: tables as the benchmarks print them, and plots.

    python -m benchmarks report                     # benchmarks/results/*/*.csv -> benchmarks/results/report.html
    python -m benchmarks report --results DIR --html FILE

The plots are drawn anew from the results and written beside them as PNG too. A point without a time is marked, never
drawn as one.
"""

import argparse
import base64
import dataclasses
import html
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import attention_mask, block_masks, cold_start, components, gpu, results, sdpa, sparse_masks
from .results import Record, parse_case
from .sweep import failures, summary, table

COLOURS = ("#1b6ca8", "#e07b39", "#3a9d5d", "#8e5ea2", "#b8860b", "#c0392b", "#5f6f7a", "#17a2b8")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 2px solid #1b6ca8; padding-bottom: .2rem; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: 12.5px; line-height: 1.35; }
img { max-width: 100%; height: auto; } .plots { display: grid; gap: .5rem;
grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); } dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
nav a { margin-right: 1rem; } .small { color: #555; font-size: 13px; } summary { cursor: pointer; }
"""
_HOW = """Every time is the median of runs that were waited for, after a first call and a warm-up, of a result that had
just agreed with the reference; p20 and p80 are percentiles of the same runs. What is compared ran by turns in one
process (A B A B ...), and "x" is the median of the ratios of neighbouring runs. TFLOP/s count the products that the
definition needs over visible pairs: 4 per pair and head width forward, 14 forward and backward. "%peak" is of a large
matrix product measured in the same process. On GPUs times are of the kernels, with the second-level cache flushed;
elsewhere of the wall clock."""


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page says of one benchmark."""

    title: str
    text: Callable[[list[Record]], str]
    """Its tables."""
    draw: Callable[[list[Record], Any], None] | None = None
    """Draws into a matplotlib figure."""
    against: str = ""


def build(root: Path) -> str:
    """The page of all results below a folder; draws the plots.

    Raises:
      ValueError: there are no results.
    """
    parts, names = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []:
        sections = [part for path in sorted(folder.glob("*.csv")) if (part := _section(path))]
        if (folder / "xla_path.json").exists():
            sections.append(_xla_path(folder / "xla_path.json"))
        if (folder / "cold_start.json").exists():
            sections.append(_cold_start(folder / "cold_start.json"))
        if sections:
            names.append(folder.name)
            parts.append(f'<h2 id="{folder.name}">{folder.name}</h2>\n' + "\n".join(sections))
    if not parts:
        raise ValueError(f"no results below {root}; run python -m benchmarks NAME first")
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>jax_flash_attn2: benchmarks</title>\n'
        f"<style>{_STYLE}</style>\n<h1>jax_flash_attn2: benchmarks</h1>\n<nav>{links}</nav>\n<p>{_HOW}</p>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _section(path: Path) -> str:
    """One file of results; "" if it holds none."""
    records = results.load(path)
    section = SECTIONS.get(records[0].benchmark) if records else None
    if section is None:
        return ""
    some = [r for r in records if r.status is not results.Status.UNSUPPORTED]
    images = (
        [_drawn(section.draw, records, path.with_suffix(".png"))] if section.draw and any(r.ok for r in some) else []
    )
    pictures = "".join(f'<img src="{_data(image)}" alt="{image.stem}">' for image in images)
    others = sorted(path.with_suffix("").glob("*.png"))
    if others:
        grid = "".join(f'<img src="{_data(image)}" alt="{html.escape(image.stem)}">' for image in others)
        title = f"{len(others)} plots, one for each shape and pair of block sizes"
        pictures += f'<details><summary>{title}</summary><div class="plots">{grid}</div></details>'
    missing = failures(records)
    quick = " (quick set)" if path.stem.endswith("-quick") else ""
    return (
        f"<h3>{html.escape(section.title)}{quick}</h3>\n"
        f'<p class="small">{html.escape(_machine(records))}</p>\n{pictures}\n'
        f"<pre>{html.escape(section.text(records))}</pre>\n"
        + (f"<p>Points without a time:</p>\n<pre>{html.escape(missing)}</pre>\n" if missing else "")
        + f"<details><summary>all {len(some)} points that could be tried</summary>"
        f"<pre>{html.escape(summary(some, against=section.against))}</pre></details>\n"
    )


def _machine(records: list[Record]) -> str:
    """What a file was measured on, with what, and when."""
    first, dates = records[0], sorted(r.date for r in records)
    versions = ((name, getattr(first, name)) for name in ("python", "jax", "jaxlib", "jax_triton", "triton"))
    when = dates[0][:10] if dates[0][:10] == dates[-1][:10] else f"{dates[0][:10]} to {dates[-1][:10]}"
    commits = ", ".join(dict.fromkeys(r.commit for r in records))
    clock = next((r.clock for r in records if r.clock), "wall")
    return (
        f"{first.processor}, {first.cores} cores; {', '.join(f'{n} {v}' for n, v in versions if v)}; "
        f"commit {commits}; {when}; {clock} clock"
    )


def _drawn(draw: Callable[[list[Record], Any], None], records: list[Record], path: Path) -> Path:
    """Draws, and writes the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4.2), layout="constrained")
    draw(records, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=90)
    pyplot.close("all")
    return path


def _data(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


# The plots.


def _bars(
    axes: Any, groups: list[str], lines: dict[str, list[Record | None]], value: Callable, spread: Callable | None = None
):
    """Bars side by side: a line of records for each name, one record for each group; a cross where there is none."""
    width, colours = 0.8 / max(len(lines), 1), itertools.cycle(COLOURS)
    for i, (name, line) in enumerate(lines.items()):
        at = [g + (i - (len(lines) - 1) / 2) * width for g in range(len(groups))]
        heights = [value(r) if r is not None and r.ok else 0.0 for r in line]
        colour = next(colours)
        axes.bar(at, heights, width, label=name, color=colour)
        for x, record in zip(at, line, strict=True):
            if record is not None and record.ok and spread is not None:
                axes.vlines(x, *spread(record), color="#222", lw=1)
            elif record is not None and not record.ok and record.status is not results.Status.UNSUPPORTED:
                axes.annotate(
                    str(record.status), (x, 0), rotation=90, fontsize=7, ha="center", va="bottom", color=colour
                )
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def _plain_log(axes: Any) -> None:
    """A log scale with numbers that one reads as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_above(axes: Any, columns: int = 3) -> None:
    """Where it covers no bar."""
    axes.legend(ncols=columns, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _lines(
    records: list[Record], providers: tuple[str, ...], keep: Callable[[dict[str, str]], bool] = lambda case: True
):
    """Cases that are kept, and the records of each provider over them."""
    cases = [c for c in dict.fromkeys(r.case for r in records) if keep(parse_case(c))]
    found = {(r.case, r.provider): r for r in records}
    lines = {p: [found.get((c, p)) for c in cases] for p in providers}
    return cases, {p: line for p, line in lines.items() if any(r is not None and r.ok for r in line)}


def _draw_mha(records: list[Record], figure: Any) -> None:
    """Times faster than jax, tuned sizes: one panel for each mode."""
    modes = [m for m in ("fwd", "bwd") if any(parse_case(r.case)["mode"] == m for r in records)]
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    for mode, axes in zip(modes, panels, strict=True):
        free = [r for r in records if "blocksize_q" not in parse_case(r.case)]
        cases, lines = _lines(free, ("flash-tuned", "jax-cudnn"), lambda case, mode=mode: case["mode"] == mode)
        keys = {key: len({parse_case(c)[key] for c in cases}) for c in cases[:1] for key in parse_case(c)}
        varying = [key for key, n in keys.items() if n > 1 and key != "mode"]
        names = {"bias": {"True": "bias", "False": "no bias"}}
        titles = ["\n".join(names.get(k, {}).get(v, v if k == "seqlen" else f"{k} {v}")
                            for k in varying for v in [parse_case(c)[k]]) for c in cases]  # fmt: skip
        _bars(axes, titles, lines, lambda r: r.times_faster, lambda r: (r.times_faster_p20, r.times_faster_p80))
        axes.axhline(1, color="#222", lw=1, ls="--")
        axes.set_xlabel({"fwd": "forward", "bwd": "forward and backward"}[mode] + ", by sequence length")
    panels[0].set_ylabel("times faster than jax.nn (XLA)")
    _legend_above(panels[0])


def _draw_attention_mask(records: list[Record], figure: Any) -> None:
    jits = [j for j in ("True", "False") if any(parse_case(r.case)["jit"] == j for r in records)]
    for jit, axes in zip(jits, figure.subplots(1, len(jits), squeeze=False)[0], strict=True):
        cases, lines = _lines(records, tuple(attention_mask.BUILDERS), lambda case, jit=jit: case["jit"] == jit)
        titles = [
            f"{c['batch']}x{c['seqlen']}" + ("\npadding" if c["padding"] == "True" else "")
            for c in map(parse_case, cases)
        ]
        _bars(axes, titles, lines, lambda r: r.ms, lambda r: (r.ms_p20, r.ms_p80))
        axes.set_ylabel("ms (log scale)")
        axes.set_xlabel("with jit" if jit == "True" else "without jit")
        axes.tick_params(axis="x", labelsize=7)
        _plain_log(axes)
        _legend_above(axes)


def _draw_sparse_masks(records: list[Record], figure: Any) -> None:
    panels = figure.subplots(1, 5)
    for operation, axes in zip(sparse_masks.PROVIDERS, panels, strict=True):
        cases, lines = _lines(records, sparse_masks.PROVIDERS[operation], lambda c, o=operation: c["operation"] == o)
        parsed = [parse_case(c) for c in cases]
        titles = [f"{c['sparsity']}%" if "sparsity" in c else f"{c['size']}\nafter\n{c['previous']}" for c in parsed]
        _bars(axes, titles, lines, lambda r: r.ms)
        axes.set_xlabel(f"{operation}, by zeros" if operation in sparse_masks.OPERATIONS else f"{operation} masker")
        axes.tick_params(axis="x", labelsize=7)
        _plain_log(axes)
        _legend_above(axes, 1)
    panels[0].set_ylabel("ms (log scale)")


def _draw_block_masks(records: list[Record], figure: Any) -> None:
    for mode, axes in zip(("fwd", "bwd"), figure.subplots(1, 2, sharey=True), strict=True):
        cases, lines = _lines(records, ("block-mask", "option"), lambda case, mode=mode: case["mode"] == mode)
        titles = [f"{c['mask']}\n{c['seqlen']}" for c in map(parse_case, cases)]
        _bars(axes, titles, lines, lambda r: r.times_faster, lambda r: (r.times_faster_p20, r.times_faster_p80))
        axes.axhline(1, color="#222", lw=1, ls="--")
        axes.set_xlabel({"fwd": "forward", "bwd": "forward and backward"}[mode] + ", by mask and length")
        axes.tick_params(axis="x", labelsize=7)
        _legend_above(axes)
    figure.axes[0].set_ylabel("times faster than causal attention")


def _draw_components(records: list[Record], figure: Any) -> None:
    """Shares of the stages, and what the cache saves."""
    left, right = figure.subplots(1, 2)
    found = {
        t: x for t, x in components.by_length(records).items() if all(s in x and x[s].ok for s in components.STAGES)
    }
    before = [0.0] * len(found)
    for stage, colour in zip(components.STAGES, COLOURS, strict=False):
        sums = [sum(x[s].ms or 0.0 for s in components.STAGES) for x in found.values()]
        shares = [100 * (x[stage].ms or 0.0) / total for x, total in zip(found.values(), sums, strict=True)]
        left.barh(list(found), shares, left=before, label=stage, color=colour)
        before = [a + b for a, b in zip(before, shares, strict=True)]
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("% of the sum of the stages")
    left.set_ylabel("length")
    _legend_above(left)
    _, lines = _lines(records, ("eager-cached", "eager-flash"))
    named = {"eager-cached": "dense attention, mask cached", "eager-flash": "flash attention, no mask"}
    titles = list(components.by_length(records))
    _bars(right, titles, {named[p]: line for p, line in lines.items()}, lambda r: r.times_faster,
          lambda r: (r.times_faster_p20, r.times_faster_p80))  # fmt: skip
    right.axhline(1, color="#222", lw=1, ls="--")
    right.set_xlabel("length; called without jit")
    right.set_ylabel("times faster than dense attention, mask built")
    _legend_above(right)


def _draw_sdpa(records: list[Record], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    cases, lines = _lines(records, ("ours", *sdpa.OTHERS))
    titles = [f"{c['size']}\n{'causal' if c['causal'] == 'True' else 'full'}" for c in map(parse_case, cases)]
    _bars(left, titles, lines, lambda r: 1000 / r.ms, lambda r: (1000 / r.ms_p80, 1000 / r.ms_p20))
    left.set_ylabel("iterations per second (log scale)")
    _plain_log(left)
    _legend_above(left)
    cases, lines = _lines(records, sdpa.RUNGS)
    _bars(
        right, titles, lines, lambda r: 1 / r.times_faster, lambda r: (1 / r.times_faster_p80, 1 / r.times_faster_p20)
    )
    right.axhline(1, color="#222", lw=1, ls="--")
    right.set_ylabel("time with it switched off, ours = 1")
    _legend_above(right, 4)


def _draw_gpu(records: list[Record], figure: Any) -> None:
    """TFLOP/s over length, one panel for each mode and width."""
    points = [r for r in records if "row" not in parse_case(r.case)]
    kinds = list(dict.fromkeys((c["mode"], c["headdim"], c["causal"]) for c in (parse_case(r.case) for r in points)))
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // max(columns, 1))
    figure.set_size_inches(11, 2.6 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    for kind, axes in zip(kinds, panels, strict=False):
        for provider, colour in zip(gpu.PROVIDERS, COLOURS, strict=False):
            cases = [(parse_case(r.case), r) for r in points if r.provider == provider and r.ok]
            line = sorted(
                (int(c["seqlen"]), r.tflops or 0.0) for c, r in cases if (c["mode"], c["headdim"], c["causal"]) == kind
            )
            axes.plot(*zip(*line, strict=True) if line else ((), ()), "o-", ms=3, color=colour, label=provider)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{kind[0]}, width {kind[1]}, {'causal' if kind[2] == 'True' else 'full'}", fontsize=9)
        axes.grid(alpha=0.3)
    if len(panels):
        panels[0].legend(fontsize=7)
        panels[0].set_ylabel("TFLOP/s")


# The tables.


def _text_mha(records: list[Record]) -> str:
    free = [
        r for r in records if "blocksize_q" not in parse_case(r.case) and r.status is not results.Status.UNSUPPORTED
    ]
    return summary(free, against="jax")


def _text_components(records: list[Record]) -> str:
    cache = components.cache_table(records)
    return f"{components.stage_table(records)}\n\nThe mask cache, attention called without jit:\n{cache}"


def _text_sparse_masks(records: list[Record]) -> str:
    return "\n".join([sparse_masks.tables(records), *sparse_masks.verdicts(records)[0]])


def _text_sdpa(records: list[Record]) -> str:
    ladder = sdpa.ladder(records)
    return f"{sdpa.rates(records, 500)}\n\nTime with an optimisation switched off, ours = 1:\n{ladder}"


def _xla_path(path: Path) -> str:
    """The numbers of the README, which are in a file of their own."""
    made = json.loads(path.read_text())
    rows = [["case", "pass", "ours ms", "jax.nn ms", "x", "p20", "p80"]]
    for r in made["results"]:
        rows.append([r["title"], r["pass"], *(f"{x:.2f}" for x in (*r["ms"], r["times_faster"], r["p20"], r["p80"]))])
    return _plain("The XLA path against jax.nn", made["machine"], table(rows, left=2))


def _cold_start(path: Path) -> str:
    """CPU-seconds of the stages of a process's start, which `Record`, whose points are times of one call, has not."""
    made = json.loads(path.read_text())
    return _plain("cold_start: what a new process pays", made["machine"], cold_start.tables(made["results"]))


def _plain(title: str, machine: dict, text: str) -> str:
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f'<h3>{html.escape(title)}</h3>\n<p class="small">{html.escape(about)}</p>\n<pre>{html.escape(text)}</pre>\n'


SECTIONS = {
    "mha": Section("mha: attention forward and backward", _text_mha, _draw_mha, "jax"),
    "attention_mask": Section(
        "attention_mask: three ways to build a causal mask",
        attention_mask.tables,
        _draw_attention_mask,
        "make_causal_mask",
    ),
    "sparse_masks": Section(
        "sparse_masks: masks of weights, as entries or dense", _text_sparse_masks, _draw_sparse_masks, "sparse"
    ),
    "block_masks": Section("block_masks: what skipping tiles brings", block_masks.tables, _draw_block_masks, "causal"),
    "components": Section("components: where a layer's time goes", _text_components, _draw_components),
    "sdpa": Section("sdpa: iterations per second, and what each optimisation brings", _text_sdpa, _draw_sdpa, "ours"),
    "gpu": Section("gpu: tuned rows, and the most telling points", gpu.text, _draw_gpu, "xla"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of folders of results")
    parser.add_argument("--html", type=Path, help="the page (default report.html in that folder)")
    options = parser.parse_args(argv)
    page = options.html or options.results / "report.html"
    text = build(options.results)
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing to be fetched
    page.write_text(text)
    print(f"{page}: {len(text) / 2**20:.1f} MiB")
    return 0
