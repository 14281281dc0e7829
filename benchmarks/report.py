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
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import attention_mask, block_masks, cold_start, components, decode, gpu, plots, results, sdpa, sparse_masks
from .results import Record, parse_case
from .sweep import failures, summary, table

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
    text: Callable[[list[Any]], str]
    """Its tables, of its records."""
    draw: Callable[[list[Any], Any], None] | None = None
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
        sections += [_json_section(path) for name in JSON_SECTIONS if (path := folder / f"{name}.json").exists()]
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


def _json_section(path: Path) -> str:
    """One file of `results.write_json`."""
    made, section = json.loads(path.read_text()), JSON_SECTIONS[path.stem]
    about = ", ".join(f"{key} {value}" for key, value in made["machine"].items())
    picture = ""
    if section.draw:
        image = _drawn(section.draw, made["results"], path.with_suffix(".png"))
        picture = f'<img src="{_data(image)}" alt="{image.stem}">\n'
    return (
        f'<h3>{html.escape(section.title)}</h3>\n<p class="small">{html.escape(about)}</p>\n{picture}'
        f"<pre>{html.escape(section.text(made['results']))}</pre>\n"
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


def _drawn(draw: Callable[[list[Any], Any], None], records: list[Any], path: Path) -> Path:
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


def _text_xla_path(made: list[dict[str, Any]]) -> str:
    rows = [["case", "pass", "ours ms", "jax.nn ms", "x", "p20", "p80"]]
    for r in made:
        rows.append([r["title"], r["pass"], *(f"{x:.2f}" for x in (*r["ms"], r["times_faster"], r["p20"], r["p80"]))])
    return table(rows, left=2)


SECTIONS = {
    "mha": Section("mha: attention forward and backward", _text_mha, plots.draw_mha, "jax"),
    "attention_mask": Section(
        "attention_mask: three ways to build a causal mask",
        attention_mask.tables,
        plots.draw_attention_mask,
        "make_causal_mask",
    ),
    "sparse_masks": Section(
        "sparse_masks: masks of weights, as entries or dense", _text_sparse_masks, plots.draw_sparse_masks, "sparse"
    ),
    "block_masks": Section(
        "block_masks: what skipping tiles brings", block_masks.tables, plots.draw_block_masks, "causal"
    ),
    "components": Section("components: where a layer's time goes", _text_components, plots.draw_components),
    "sdpa": Section(
        "sdpa: iterations per second, and what each optimisation brings", _text_sdpa, plots.draw_sdpa, "ours"
    ),
    "gpu": Section("gpu: tuned rows, and the most telling points", gpu.text, plots.draw_gpu, "xla"),
}
"""Of files of `Record`s."""

JSON_SECTIONS = {
    "xla_path": Section("The XLA path against jax.nn", _text_xla_path),
    "decode": Section("decode: a query row over a long cache", decode.tables, plots.draw_decode),
    "cold_start": Section("cold_start: what a new process pays", cold_start.tables),
}
"""Of files of what no `Record`, whose points are times of one call, has."""


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
