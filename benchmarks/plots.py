"""How the report draws: panels of dots with whiskers, of which a page shows each as SVG and a file all as PNG.

A panel says what was measured; everything that is seen of it is decided here, once for all benchmarks. A point without
a time is marked by its status, never drawn as one. Nothing is a bar: on a log scale a bar's length means nothing.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .looks import look

WIDTH = 4.4
"""Inches of a panel: what a phone shows at the size of its text."""
_STEP = 0.15
"""Inches between the providers of a row."""
_INK = "#0a0b0c"
"""Axes and text; of an SVG the page decides it."""
_RC = {
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One number that was measured, and the 20th and 80th percentile of its runs where they are known."""

    middle: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """Of each provider a point for each place."""

    title: str
    value: str
    """What the numbers are, with their unit."""
    places: Sequence[str] | Sequence[int]
    """Names, which stand one below the other; or lengths, along an axis."""
    lines: Mapping[str, Sequence[Point | str | None]]
    """A provider's points, one for each place; a status (text) where there is no time, None where nothing was tried."""
    place: str = ""
    """What the lengths are of."""
    log: bool = True
    one: str = ""
    """What 1 stands for, if it stands for something: a dashed line."""
    extent: tuple[float, float] | None = None
    """Least and largest number that there is room for; None: what is there."""

    @property
    def along(self) -> bool:
        """Whether places are lengths."""
        return not isinstance(self.places[0], str)


def draw(panel: Panel, axes: Any, title: bool = True) -> None:
    """Draws a panel into matplotlib axes."""
    (_draw_along if panel.along else _draw_below)(panel, axes)
    if title:
        axes.set_title(_title(panel), fontsize=9, loc="left")


def _title(panel: Panel) -> str:
    """In lines as long as what it stands above."""
    return textwrap.fill(panel.title, 40)


def _draw_below(panel: Panel, axes: Any) -> None:
    """A row for each place, the first on top, the providers that have something there one below the other in it.

    The axis counts inches, so that what is written never meets what is written next to it.
    """
    heights = _row_heights(panel)
    ends = list(itertools.accumulate(heights, initial=0.0))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    for row, middle in enumerate(middles):
        there = [(name, line[row]) for name, line in panel.lines.items() if line[row] is not None]
        for i, (name, point) in enumerate(there):
            colour, marker = look(name)
            y = middle + (i - (len(there) - 1) / 2) * _STEP
            if isinstance(point, str):
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 7}
                axes.text(0.99, y, f"{name}: {point}", color=colour, **place)
            elif point is not None:
                axes.plot(point.middle, y, marker, ms=4.5, color=colour)
                axes.hlines(y, *_whisker(point), color=colour, lw=1.3)
    axes.set_yticks(middles, [_wrapped(str(p)) for p in panel.places])
    axes.set_ylim(ends[-1], 0)
    axes.tick_params(axis="y", length=0)
    for end in ends[1:-1]:
        axes.axhline(end, color=_INK, alpha=0.12, lw=0.6)
    if panel.one:
        axes.axvline(1, color=_INK, lw=1, ls="--")
    _scale(axes, "x", panel)


def _row_heights(panel: Panel) -> list[float]:
    """Inches of each: of its providers, or of its name."""
    return [
        max(_STEP * (1 + sum(line[row] is not None for line in panel.lines.values())),
            0.16 * (1 + _wrapped(str(place)).count("\n")) + 0.08)
        for row, place in enumerate(panel.places)
    ]  # fmt: skip


def _wrapped(place: str) -> str:
    """In lines of about 22 characters, cut behind commas."""
    lines = [""]
    for part in place.split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > 20:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + part
    return ",\n".join(lines)


def _draw_along(panel: Panel, axes: Any) -> None:
    """Lines over lengths."""
    for i, (name, line) in enumerate(panel.lines.items()):
        colour, marker = look(name)
        aside = 1.05 ** (i - (len(panel.lines) - 1) / 2)  # whiskers lie side by side
        there = [(n * aside, p) for n, p in zip(panel.places, line, strict=True) if isinstance(p, Point)]
        axes.plot([n for n, _ in there], [p.middle for _, p in there], f"{marker}-", ms=4.5, lw=1, color=colour)
        for n, point in there:
            axes.vlines(n, *_whisker(point), color=colour, lw=1.3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(panel.places, [_length(n) for n in panel.places])
    axes.minorticks_off()
    axes.set_xlabel("\n".join([panel.place, *_missing(panel)]))
    if panel.one:
        axes.axhline(1, color=_INK, lw=1, ls="--")
    _scale(axes, "y", panel)


def _length(n: Any) -> str:
    return f"{n // 1024}k" if n and n % 1024 == 0 else f"{n}"


def _missing(panel: Panel) -> list[str]:
    """Which lengths have no time, below the plot, where they cover nothing: a line for each provider."""
    said = []
    for name, line in panel.lines.items():
        lost = [f"{_length(n)} {x}" for n, x in zip(panel.places, line, strict=True) if isinstance(x, str)]
        if lost:
            said += textwrap.wrap(f"{name}: {', '.join(lost)}", 50)
    return said


def _whisker(point: Point) -> tuple[float, float]:
    low, high = (point.middle if x is None else x for x in (point.low, point.high))
    return low, high


def _scale(axes: Any, which: str, panel: Panel) -> None:
    """The axis of the numbers, with ticks that one reads as they are."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    least, most = panel.extent or _extent(panel)
    if panel.log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        least, most = least / 1.08, most * 1.08
    else:
        least, most = 0, most * 1.08
    (axes.set_xlim if which == "x" else axes.set_ylim)(least, most)
    axis.set_major_locator(FixedLocator(list(ticks(least, most))) if panel.log else MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    label = panel.value + (" (log scale)" if panel.log else "")
    axes.set_xlabel(label, loc="right") if which == "x" else axes.set_ylabel(label)  # there names leave room for it
    axes.grid(axis=which, alpha=0.2, color=_INK, lw=0.6)


def _extent(panel: Panel) -> tuple[float, float]:
    """Least and largest number that is there."""
    points = [p for line in panel.lines.values() for p in line if isinstance(p, Point)]
    numbers = [x for p in points for x in (p.low, p.middle, p.high) if x is not None]
    numbers += [1.0] if panel.one or not numbers else []
    return min(numbers), max(numbers)


def ticks(least: float, most: float, room: int = 6) -> list[float]:
    """As many round numbers between two as there is room for, on a log scale."""
    tens = (range(10, 20), range(20, 30, 2), range(30, 50, 5), range(50, 100, 10))
    every = tuple(x / 10 for x in itertools.chain(*tens))
    for steps in (every, (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [x for power in range(-12, 13) for step in steps if least <= (x := step * 10.0**power) <= most]
        if len(found) <= room:
            break
    return [float(f"{x:.3g}") for x in found[:: -(-len(found) // room) or 1]]


def height(panel: Panel) -> float:
    """Inches."""
    return 2.9 + 0.16 * len(_missing(panel)) if panel.along else sum(_row_heights(panel)) + 0.55


def together(panels: Sequence[Panel]) -> list[Panel]:
    """The same panels, those of one ratio on one scale: what is compared by eye must be of one size."""
    extents: dict[str, tuple[float, float]] = {}
    for panel in panels:
        if panel.one:
            least, most = _extent(panel)
            before = extents.get(panel.value, (least, most))
            extents[panel.value] = min(least, before[0]), max(most, before[1])
    return [dataclasses.replace(p, extent=extents[p.value]) if p.one else p for p in panels]


def svg(panel: Panel, name: str) -> str:
    """A panel as an `<svg>` element, ink and ground of which are the page's.

    Args:
      panel: what is drawn; the title only as what a screen reader says.
      name: goes before every id in it, so that those of one page differ.
    """
    with _figures() as new:
        figure = new(figsize=(WIDTH, height(panel)), layout="constrained")
        draw(panel, figure.subplots(), title=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    label = panel.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" aria-label="{label}">', text, count=1)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text.replace("xlink:href", "href"))
    return text.replace(_INK, "currentColor").strip()


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """All panels and who is who, in columns, as a file."""
    columns = min(len(panels), 3)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(height(p) + 0.17 * (1 + _title(p).count("\n")) for p in row) for row in rows]
    with _figures() as new:
        figure = new(figsize=(WIDTH * columns, sum(heights) + 0.3), layout="constrained", facecolor="white")
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).ravel()
        for panel, axes in zip(panels, grid, strict=False):
            draw(panel, axes)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        made = [_handle(name) for name in names(panels)]
        figure.legend(handles=made, ncols=min(len(made), 3 * columns), loc="outside lower center", frameon=False)
        figure.savefig(path, dpi=90)


def names(panels: Sequence[Panel]) -> list[str]:
    """All providers of some panels, each once."""
    return list(dict.fromkeys(name for panel in panels for name in panel.lines))


def _handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = look(name)
    return Line2D([], [], color=colour, marker=marker, ls="", label=name)


@contextlib.contextmanager
def _figures() -> Iterator[Any]:
    """matplotlib's class of figures, in this style while the block lasts; no window shows them."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        yield Figure
