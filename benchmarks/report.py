"""All results as one HTML page that needs no server and no network: tables as the benchmarks print them, and plots.

    python -m benchmarks report                     # benchmarks/results/*/*.csv -> benchmarks/results/report.html
    python -m benchmarks report --results DIR --html FILE

It begins with what the results say, computed from them (`verdicts.py`): what was compared, where ours is faster and
where slower, and how sure that is. The plots are drawn anew and written beside the results as PNG too.
"""

import argparse
import dataclasses
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import (
    attention_mask,
    block_masks,
    cold_start,
    comparisons,
    components,
    decode,
    figures,
    gpu,
    numerics,
    page,
    plots,
    results,
    sdpa,
    soak,
    sparse_masks,
)
from .results import Record, parse_case
from .sweep import failures, summary, table
from .verdicts import Comparison

_HOW = """Every time is the median of runs that were waited for, after a first call and a warm-up, of a result that had
just agreed with the reference; p20 and p80 are percentiles of the same runs, and so are whiskers. What is compared ran
by turns in one process (A B A B ...), and "x" is the median of the ratios of neighbouring runs. Ours is called faster
where both percentiles of a ratio are above 1 (it was faster in at least four of five turns), slower where both are
below, and else the case is undecided; "typically" is the geometric mean over the cases. TFLOP/s count the products
that the definition needs over visible pairs: 4 per pair and head width forward, 14 forward and backward. "%peak" is of
a large matrix product measured in the same process; where a point was faster than that, the machine was busy with
something else when the peak was measured, and no share of it is shown. On GPUs times are of the kernels, with the
second-level cache flushed; elsewhere of the wall clock."""


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page says of one benchmark."""

    title: str
    table: str
    """The title of its first table; goes before those of the others."""
    text: Callable[[list[Any]], str]
    """Its tables, of its records."""
    panels: Callable[[list[Any]], list[plots.Panel]] = lambda records: []
    compare: Callable[[list[Any]], tuple[Comparison, ...]] = lambda records: ()
    against: str = ""
    more: Callable[[list[Any]], list[plots.Panel]] = lambda records: []
    """Panels for who wants to know all."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """One file of results on the page."""

    name: str
    """Its id."""
    text: str
    compared: tuple[Comparison, ...] = ()


def build(root: Path) -> str:
    """The page of all results below a folder; draws the plots.

    Raises:
      ValueError: there are no results.
    """
    found: dict[str, list[_Part]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []:
        parts = [part for path in sorted(folder.glob("*.csv")) if (part := _part(path))]
        known = (path for path in folder.glob("*.json*") if of(path) in JSON_SECTIONS)
        parts += [_json_part(path) for path in sorted(known, key=_place)]
        if parts:
            found[folder.name] = parts
    if not found:
        raise ValueError(f"no results below {root}; run python -m benchmarks NAME first")
    compared = [(device, part.name, part.compared) for device, parts in found.items() for part in parts]
    gpus = [device for device in found if not device.startswith(("cpu-", "compiled-"))]
    note = "" if gpus else "None of these results is of a GPU: they say nothing of how fast the kernels are."
    body = [page.conclusions(compared, note), f"<h3>How it was measured</h3>\n<p>{html.escape(_HOW)}</p>\n"]
    for device, parts in found.items():
        body += [f'<h2 id="{device}">{device}</h2>\n', *(part.text for part in parts)]
    return page.page("jax_flash_attn2: benchmarks", ["conclusions", *found], "".join(body))


def _part(path: Path) -> _Part | None:
    """One file of `Record`s; None if it holds none."""
    records = results.load(path)
    section = SECTIONS.get(records[0].benchmark) if records else None
    if section is None:
        return None
    some = [r for r in records if r.status is not results.Status.UNSUPPORTED]
    quick = " (quick set)" if path.stem.endswith("-quick") else ""
    details = page.tables(summary(some, against=section.against), "All points")
    details += page.figures(plots.together(section.more(records)), f"{path.parent.name}-{path.stem}-more")
    missing = failures(records).splitlines()
    said = "".join(f"<li>{html.escape(line)}</li>\n" for line in missing)
    return _made(
        path, section, records, section.title + quick, _machine(records),
        (f"<details><summary>{len(missing)} reasons why points have no time</summary><ul>{said}</ul></details>\n"
         if missing else "")
        + f"<details><summary>all {len(some)} points that could be tried</summary>{details}</details>\n",
    )  # fmt: skip


def _json_part(path: Path) -> _Part:
    section, (records, about) = JSON_SECTIONS[of(path)], read_json(path)
    return _made(path, section, records, section.title, about)


def read_json(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a file of `results.write_json`, or of one in each line; and what it says of the machine."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()], ""
    made = json.loads(path.read_text())
    return made["results"], ", ".join(f"{key} {value}" for key, value in made["machine"].items())


def of(path: Path) -> str:
    """The benchmark of a file NAME.json or NAME-WHAT.json."""
    return path.stem.split("-")[0]


def _place(path: Path) -> tuple[int, str]:
    """Where a file of JSON stands on the page."""
    return list(JSON_SECTIONS).index(of(path)), path.stem


def _made(path: Path, section: Section, records: list[Any], title: str, about: str, more: str = "") -> _Part:
    """What all files have; writes the PNG."""
    name, panels = f"{path.parent.name}-{path.stem}", plots.together(section.panels(records))
    if panels:
        plots.write_png(panels, path.with_suffix(".png"))
    text = (
        f'<h3 id="{name}">{html.escape(title)}</h3>\n<p class="small">{html.escape(about)}</p>\n'
        f"{page.figures(panels, name)}{page.tables(section.text(records), section.table)}\n{more}"
    )
    return _Part(name, text, section.compare(records))


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


def _text_ahead(made: list[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(["method", "order", *(key for r in made for key in r if key != "schedule")]))
    return table([heads, *([str(r.get(key, "-")) for key in heads] for r in made)], left=2)


SECTIONS = {
    "mha": Section(
        "mha: attention forward and backward", "Sizes left to us", _text_mha,
        figures.of_mha, comparisons.of_mha, "jax", figures.of_block_sizes,
    ),
    "attention_mask": Section(
        "attention_mask: three ways to build a causal mask", "Building a causal mask", attention_mask.tables,
        figures.of_attention_mask, comparisons.of_attention_mask, "make_causal_mask",
    ),
    "sparse_masks": Section(
        "sparse_masks: masks of weights, as entries or dense", "Milliseconds", _text_sparse_masks,
        figures.of_sparse_masks, comparisons.of_sparse_masks, "sparse",
    ),
    "block_masks": Section(
        "block_masks: what skipping tiles brings", "Attention through a mask", block_masks.tables,
        figures.of_block_masks, comparisons.of_block_masks, "causal",
    ),
    "components": Section(
        "components: where a layer's time goes", "Stages of a layer", _text_components,
        figures.of_components, comparisons.of_components,
    ),
    "sdpa": Section(
        "sdpa: iterations per second, and what each optimisation brings", "Attention, batch 4", _text_sdpa,
        figures.of_sdpa, comparisons.of_sdpa, "ours",
    ),
    "gpu": Section(
        "gpu: tuned rows, and the most telling points", "Points", gpu.text, figures.of_gpu, comparisons.of_gpu, "xla"
    ),
}  # fmt: skip
"""Of files of `Record`s."""

JSON_SECTIONS = {
    "xla_path": Section(
        "xla_path: the XLA path against jax.nn", "Times faster than jax.nn", _text_xla_path,
        figures.of_xla_path, comparisons.of_xla_path,
    ),
    "decode": Section(
        "decode: a query row over a long cache", "Decoding", decode.tables, figures.of_decode, comparisons.of_decode
    ),
    "cold_start": Section(
        "cold_start: what a new process pays", "Cold start", cold_start.tables,
        figures.of_cold_start, comparisons.of_cold_start,
    ),
    "numerics": Section(
        "numerics: how far results are from fp64", "Against fp64",
        numerics.tables, figures.of_numerics,
    ),
    "soak": Section("soak: an hour of mixed calls in one process", "What grew", soak.tables),
    "ahead": Section("ahead: programs compiled for eight H100s", "Programs, each of one device", _text_ahead),
}  # fmt: skip
"""Of files of what no `Record`, whose points are times of one call, has."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="folder of folders of results")
    parser.add_argument("--html", type=Path, help="the page (default report.html in that folder)")
    options = parser.parse_args(argv)
    file = options.html or options.results / "report.html"
    text = build(options.results)
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", text)  # nothing to be fetched
    file.write_text(text)
    print(f"{file}: {len(text) / 2**20:.1f} MiB")
    return 0
