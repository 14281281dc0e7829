"""The report as HTML: one file that needs nothing else, fits a phone and a desk, and is dark where its reader is.

Text tables, as the benchmarks print them, become tables of HTML, which scroll by themselves where they are wide.
"""

import dataclasses
import html
import itertools
import re
from collections.abc import Iterator, Sequence

from . import plots
from .looks import MARKERS, look
from .plots import Panel
from .verdicts import FASTER, SLOWER, UNDECIDED, Comparison, Ratio, headline

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --ground: #fff; --dim: #57616b; --line: #cfd6dd; --soft: #f4f6f8;
  --accent: #1b6ca8; --good: #1f7a3a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ed; --ground: #12161b; --dim: #9aa5b0; --line: #38414a;
  --soft: #1a2027; --accent: #6cb4ee; --good: #6cc784; --bad: #f2857d; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 0 auto; padding: 1rem; color: var(--ink);
  background: var(--ground); overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
h1, h2, h3 { line-height: 1.2; } h1 { margin: .5rem 0; } h3 { margin: 2.5rem 0 .3rem; } a { color: var(--accent); }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--accent); padding-bottom: .2rem; overflow-wrap: anywhere; }
.small { color: var(--dim); font-size: 13px; margin: .3rem 0; } summary { cursor: pointer; padding: .3rem 0; }
nav a { margin-right: 1rem; display: inline-block; } .lead { font-size: 1.1rem; }
figure { margin: 1rem 0; min-width: 0; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: .3rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: .5rem 1.5rem; }
.panels svg { display: block; width: 100%; height: auto; max-width: 30rem; }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .6rem 0;
  font-size: 14px; }
.wide { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.wide table { width: max-content; }
.wide th, .wide td { padding: .15rem .6rem; white-space: nowrap; text-align: left; }
.wide .n { text-align: right; } thead th { border-bottom: 1px solid var(--line); background: var(--soft); }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: var(--soft); }
tbody tr:nth-child(even) td { background: var(--soft); }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; font-size: 12.5px; line-height: 1.35; }
.said { width: 100%; font-size: 14px; } .said td, .said th { text-align: left; vertical-align: top;
  padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
.faster { color: var(--good); } .slower { color: var(--bad); } .faster, .slower { font-weight: 600; }
li { margin: .2rem 0; } .cases { font-size: 14px; padding-left: 1.2rem; }
@media (max-width: 45rem) {
  .wide th:first-child, .wide td:first-child { max-width: 40vw; white-space: normal; }
  .said thead { display: none; } .said tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .said tbody tr:nth-child(even) td { background: none; }
  .said td { display: block; border: 0; padding: 0; } .said td[data-head]::before { content: attr(data-head) ": ";
    color: var(--dim); }
}
@media (min-width: 45.01rem) { .panels figcaption { min-height: 2.6em; }
  .said tbody tr:nth-child(even) td { background: none; } }
"""
_MOST = 8
"""Cases that a line of the conclusions names; the rest are in the details."""


def page(title: str, names: Sequence[str], body: str) -> str:
    """The document.

    Args:
      title: of it.
      names: ids of what the head links to.
      body: HTML.
    """
    links = "".join(f'<a href="#{name}">{html.escape(name)}</a>' for name in names)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


# Tables.


@dataclasses.dataclass(frozen=True)
class Table:
    """What `sweep.table` made text of."""

    title: str
    rows: list[list[str]]
    """The first is the head."""
    right: list[bool]
    """Columns that are flush right."""


_RULE = re.compile(r"-+(  -+)*")


def parts(text: str) -> Iterator[Table | str]:
    """The tables of a text, each with the line above it as its title, and what is between them."""
    lines, between, i = text.splitlines(), [], 0
    while i < len(lines):
        if i + 1 < len(lines) and lines[i].strip() and _RULE.fullmatch(lines[i + 1]):
            spans = [m.span() for m in re.finditer("-+", lines[i + 1])]
            rows = [lines[i]]
            i += 2
            while i < len(lines) and _fits(lines[i], spans):
                rows.append(lines[i])
                i += 1
            title = between.pop().strip().rstrip(":") if between and between[-1].strip() else ""
            if any(map(str.strip, between)):
                yield "\n".join(between).strip("\n")
            between = []
            cells = [[row.ljust(spans[-1][1])[a:b] for a, b in spans] for row in rows]
            right = [_flush_right([row[c] for row in cells]) for c in range(len(spans))]
            yield Table(title, [[x.strip() for x in row] for row in cells], right)
        else:
            between.append(lines[i])
            i += 1
    if any(map(str.strip, between)):
        yield "\n".join(between).strip("\n")


def _flush_right(column: list[str]) -> bool:
    """Whether it was: something stands behind blanks; or, where all is as wide, all are numbers."""
    behind = any(x.startswith(" ") and x.strip() for x in column)
    return behind or all(re.fullmatch(r"|-|(x )?[\d.]+%?", x.strip()) for x in column[1:])


def _fits(line: str, spans: list[tuple[int, int]]) -> bool:
    """Whether a line is a row of the columns: nothing stands between or beyond them."""
    gaps = (line[end:start] for (_, end), (start, _) in itertools.pairwise(spans))
    return bool(line.strip()) and not "".join(gaps).strip() and len(line) <= spans[-1][1]


def tables(text: str, title: str) -> str:
    """A benchmark's text as HTML.

    Args:
      text: with tables of `sweep.table`.
      title: of tables that have none of their own; goes before those that have.
    """
    made = []
    for part in parts(text):
        if isinstance(part, Table):
            made.append(_table(part, ": ".join(filter(None, (title, part.title)))))
        elif re.search(r"^ |\S   +\S", part, re.MULTILINE):  # aligned by its author
            made.append(f'<pre tabindex="0">{html.escape(part)}</pre>')
        else:
            made.append(f"<p>{html.escape(part).replace('\n', '<br>')}</p>\n")
    return "\n".join(made)


def _table(table: Table, title: str) -> str:
    def row(cells: list[str], tag: str) -> str:
        kinds = (' class="n"' if right else "" for right in table.right)
        return "".join(f"<{tag}{kind}>{html.escape(x)}</{tag}>" for x, kind in zip(cells, kinds, strict=True))

    head, *rows = table.rows
    body = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in rows)
    title = html.escape(title)
    return (
        f'<figure><figcaption>{title}</figcaption><div class="wide" tabindex="0" role="region" aria-label="{title}">'
        f"<table><thead><tr>{row(head, 'th')}</tr></thead>\n<tbody>\n{body}</tbody></table></div></figure>\n"
    )


# Figures.


def figures(panels: Sequence[Panel], name: str) -> str:
    """Panels side by side as far as there is room, under one key; "" without any.

    Args:
      panels: what is drawn.
      name: goes before all ids.
    """
    if not panels:
        return ""
    made = "".join(
        f"<figure><figcaption>{html.escape(panel.title)}</figcaption>{plots.svg(panel, f'{name}-{i}')}</figure>\n"
        for i, panel in enumerate(panels)
    )
    return f'{_key(plots.names(panels))}<div class="panels">\n{made}</div>\n'


def _key(names: Sequence[str]) -> str:
    looks = ((name, *look(name)) for name in names)
    items = (
        f'<li><span style="color:{colour}">{MARKERS[marker]}</span> {html.escape(name)}</li>'
        for name, colour, marker in looks
    )
    return f'<ul class="key">{"".join(items)}</ul>\n'


# Conclusions.


def conclusions(found: Sequence[tuple[str, str, Sequence[Comparison]]], note: str = "") -> str:
    """What was compared, where ours wins, where it loses, how sure that is.

    Args:
      found: of each file of results the device, the id of its section, and its comparisons.
      note: what limits all of it.
    """
    everything = [c for *_, comparisons in found for c in comparisons]
    made = [f'<h2 id="conclusions">Conclusions</h2>\n<p class="lead">{html.escape(headline(everything))}</p>\n']
    made += [f"<p>{html.escape(note)}</p>\n"] if note else []
    for rival, title in ((True, "Ours against others"), (False, "What our own choices bring")):
        rows = [(d, i, c) for d, i, comparisons in found for c in comparisons if c.rival == rival]
        if rows:
            made.append(_said(title, rows))
            made.append(_cases("Where it is faster" if rival else "Where the choice is right", rows, FASTER))
            made.append(_cases("Where it is slower" if rival else "Where another choice is faster", rows, SLOWER))
    return "".join(made)


def _said(title: str, rows: Sequence[tuple[str, str, Comparison]]) -> str:
    """A line for each comparison; on a phone a paragraph."""
    heads = ("compared", "cases", "typically", "from, to", "how sure", "measured on")
    lines = []
    for device, anchor, c in rows:
        least, most = c.range
        counts = ", ".join(
            f'<span class="{verdict}">{n} {verdict}</span>'
            for verdict in (FASTER, SLOWER, UNDECIDED)
            if (n := c.count(verdict))
        )
        cells = (
            f'<a href="#{anchor}">{html.escape(c.what)}</a>: {html.escape(c.ours)} against {html.escape(c.other)}',
            counts,
            f"{c.typical:.2f} times as fast",
            html.escape(f"{_case(least)} to {_case(most)}" if len(c.ratios) > 1 else _case(least)),
            html.escape(c.sure),
            html.escape(device),
        )
        named = ("", *heads[1:])
        lines.append(
            "<tr>" + "".join(f"<td{f' data-head={head!r}' if head else ''}>{x}</td>"
                             for head, x in zip(named, cells, strict=True)) + "</tr>\n"
        )  # fmt: skip
    head = "".join(f"<th>{x}</th>" for x in heads)
    return (
        f'<figure><figcaption>{title}</figcaption><table class="said"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody></table></figure>\n"
    )


def _case(ratio: Ratio) -> str:
    return f"{ratio.middle:.2f}" + (f" ({ratio.case})" if ratio.case else "")


def _cases(title: str, rows: Sequence[tuple[str, str, Comparison]], verdict: str) -> str:
    """The cases of one verdict, comparison by comparison, and the ends that make it one."""
    items = []
    for device, _, c in rows:
        cases = [f"{r.case or 'the only case'} {r}" for r in c.of(verdict)]
        if cases:
            name = html.escape(f"{c.what}, {c.ours} against {c.other}, {device}")
            shown, rest = (html.escape("; ".join(x)) for x in (cases[:_MOST], cases[_MOST:]))
            n = len(cases) - _MOST
            shown += f"<details><summary>and {n} more</summary>{rest}</details>" if rest else ""
            items.append(f"<li>{name}: {shown}</li>\n")
    n = sum(c.count(verdict) for *_, c in rows)
    if not items:
        return f"<h3>{title}</h3>\n<p>Nowhere, of what is here.</p>\n"
    listed = f'<ul class="cases">\n{"".join(items)}</ul>\n'
    if verdict == FASTER:  # the long one
        listed = f"<details><summary>{n} cases, the most telling first</summary>{listed}</details>\n"
    return f"<h3>{title}</h3>\n{listed}"
