"""The plots of the report: each draws what the results of a benchmark say into a matplotlib figure.

A point without a time is marked, never drawn as one.
"""

import collections
import itertools
from collections.abc import Callable
from typing import Any

from . import attention_mask, components, gpu, results, sdpa, sparse_masks
from .results import Record, parse_case

COLOURS = ("#1b6ca8", "#e07b39", "#3a9d5d", "#8e5ea2", "#b8860b", "#c0392b", "#5f6f7a", "#17a2b8")


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


def _plain_log(axes: Any, at: tuple[int, ...] = ()) -> None:
    """A log scale with numbers that one reads as they are, of `at` in each power of ten or as many as have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=at or ((1, 2, 5) if high / low < 50 else (1,))))
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


def draw_mha(records: list[Record], figure: Any) -> None:
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


def draw_attention_mask(records: list[Record], figure: Any) -> None:
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


def draw_sparse_masks(records: list[Record], figure: Any) -> None:
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


def draw_block_masks(records: list[Record], figure: Any) -> None:
    for mode, axes in zip(("fwd", "bwd"), figure.subplots(1, 2, sharey=True), strict=True):
        cases, lines = _lines(records, ("block-mask", "option"), lambda case, mode=mode: case["mode"] == mode)
        titles = [f"{c['mask']}\n{c['seqlen']}" for c in map(parse_case, cases)]
        _bars(axes, titles, lines, lambda r: r.times_faster, lambda r: (r.times_faster_p20, r.times_faster_p80))
        axes.axhline(1, color="#222", lw=1, ls="--")
        axes.set_xlabel({"fwd": "forward", "bwd": "forward and backward"}[mode] + ", by mask and length")
        axes.tick_params(axis="x", labelsize=7)
        _legend_above(axes)
    figure.axes[0].set_ylabel("times faster than causal attention")


def draw_components(records: list[Record], figure: Any) -> None:
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


def draw_sdpa(records: list[Record], figure: Any) -> None:
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


def draw_gpu(records: list[Record], figure: Any) -> None:
    """TFLOP/s over length, one panel for each mode and width."""
    points = gpu.usual_points(records)
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


def draw_decode(made: list[dict[str, Any]], figure: Any) -> None:
    """How many times as long as a reading, over the length of the cache: one panel for each dtype and filling."""
    made = [r for r in made if "skipped" not in r and r["rows"] == 1]
    kind = lambda r: (r["batch"], r["heads"], r["kv_heads"], r["head_dim"], r["v_dim"])
    kinds = collections.Counter(kind(r) for r in {(kind(r), r["seqlen"]): r for r in made}.values())
    shown = kinds.most_common(1)[0][0] if kinds else None
    made = sorted((r for r in made if kind(r) == shown), key=lambda r: r["seqlen"])
    dtypes, fills = ([*dict.fromkeys(r[key] for r in made)] for key in ("dtype", "filled"))
    names = [*dict.fromkeys(name for r in made for name in r["providers"] if name != "read")]
    figure.set_size_inches(11, 2.9 * max(len(dtypes), 1) + 0.8)
    panels = figure.subplots(max(len(dtypes), 1), max(len(fills), 1), squeeze=False, sharex=True, sharey=True)
    for row, dtype in zip(panels, dtypes, strict=False):
        row[0].set_ylabel("times the reading (log scale)")
        for axes, filled in zip(row, fills, strict=True):
            some = [r for r in made if (r["dtype"], r["filled"]) == (dtype, filled)]
            for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
                there = [(r["seqlen"], r["providers"][name]["times_reading"]) for r in some if _timed(r, name)]
                at = [n * 1.06 ** (i - (len(names) - 1) / 2) for n, _ in there]  # spreads lie side by side
                middle, low, high = ([x[part] for _, x in there] for part in range(3))
                axes.plot(at, middle, "o-", ms=4, color=colour, label=name)
                axes.vlines(at, low, high, color=colour, lw=1)
            axes.axhline(1, color="#222", lw=1, ls="--", label="read")
            axes.set_title(f"{dtype}, {filled}", fontsize=10)
            axes.grid(alpha=0.3)
    lengths = [*dict.fromkeys(r["seqlen"] for r in made)]
    for axes in panels.ravel():
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n}" for n in lengths], fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("tokens allotted (log scale)")
    _plain_log(panels[0, 0], (1, 2, 5))
    if shown is not None:
        batch, heads, kv_heads, head_dim, _ = shown
        figure.suptitle(
            f"One query row, batch {batch}, {heads} query heads and {kv_heads} key heads of {head_dim}: "
            "time over that of reading the live keys and values once",
            fontsize=10,
        )
        figure.legend(*panels[0, 0].get_legend_handles_labels(), ncols=4, loc="outside lower center", frameon=False)


def _timed(record: dict[str, Any], name: str) -> bool:
    return "times_reading" in record["providers"].get(name, {})
