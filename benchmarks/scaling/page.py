"""The tables and the plot of docs/scaling.md.

python -m benchmarks.scaling                # print the tables
python -m benchmarks.scaling --write        # put them into docs/scaling.md, and draw docs/scaling.png
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_flash_attn2.context import choosing

from . import counts, machine, tiles
from .cases import METHODS, Case

DOCS = Path(__file__).parents[2] / "docs"
TOKENS = {2**17: "128k", 2**20: "1M", 10 * 2**20: "10M"}
DEVICES = (8, 16, 64, 256, 1024)
ORDERS = ("contiguous", "zigzag", "striped")
WAYS = [(method, order) for method in METHODS[:2] for order in ORDERS] + [("ulysses", "zigzag")]
"""Of ulysses any order is as good: all rows of a head are together."""
MASKS = {
    "causal": {},
    "causal, window of 4096": {"window": 4096},
    "causal, packed documents of 8192 tokens in the mean": {"document": 8192},
}
NO_SUCH = "—"


def blocks() -> dict[str, str]:
    """The page's tables, by the names of their places in it."""
    made = {f"costs-{name}": _table(_COSTS, _costs(tokens)) for tokens, name in TOKENS.items()}
    made["tiles"] = _by_way(f"1M tokens, {{mask}}: {_TILES}", _tiles)
    made["efficiency"] = "\n\n".join(
        _table(["GPUs", *_titles()], _ways(tokens, {}, _efficiency), f"{name} tokens")
        for tokens, name in TOKENS.items()
    )
    made["masks"] = _by_way("1M tokens, {mask}", _efficiency, masks=list(MASKS)[1:])
    made["machines"] = _table(["1M tokens", "method", *map(str, DEVICES)], _machines())
    names = [f"{where}, {of}" for where in ("one node", "several nodes") for of in counts.PASSES]
    made["hidden"] = _table(["a device's share", *names], _hidden())
    made["groups"] = _table(["tokens", "head_groups", "GB held, bwd", *map(str, DEVICES)], _groups())
    made["choice"] = _table(["tokens", *map(str, DEVICES)], _choices())
    return made


def filled_in(page: str) -> str:
    """A page with these tables in their places."""
    for name, text in blocks().items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no place for {name!r}")
        page = place.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


# What each way costs.

_COSTS = [
    *("GPUs", "method", "collectives", "hops", "GB sent, fwd", "bwd", "GB held, fwd", "bwd"),
    *("PFLOP", "ideal s", "predicted s", "efficiency"),
]


def _costs(tokens: int) -> Iterator[list[str]]:
    for devices in DEVICES:
        for method in METHODS:
            case = Case(tokens, devices, method)
            if not case.usable:
                yield [str(devices), method, *[NO_SUCH] * (len(_COSTS) - 2)]
                continue
            both = lambda f, case=case: [f(case, of) for of in counts.PASSES]
            work = sum(both(counts.flops)) / devices
            total = sum(machine.time(case, of).total for of in counts.PASSES)
            yield [
                str(devices), method, _sum(both(counts.collectives)), _sum(both(counts.hops)),
                *(_three(x / 1e9) for f in (counts.bytes_sent, counts.held) for x in both(f)),
                _three(work / 1e15), _three(sum(both(machine.ideal))), _three(total), _efficiency(case),
            ]  # fmt: skip


def _sum(x: Sequence[int]) -> str:
    return " + ".join(map(str, x))


# By method and order.

_TILES = "tiles that the busiest device visits, fair share of the pairs = 1"


def _tiles(case: Case) -> str:
    fair = case.pairs / case.devices / tiles.TILE**2
    if case.method == "ulysses":
        return _three(tiles.one_device(case) / case.devices / fair)
    if case.method == "all_gather":
        return _three(tiles.whole(case).max() / fair)
    return _three(tiles.by_hop(case).max(1).sum() / fair)  # a step lasts as long as its busiest device takes


def _efficiency(case: Case) -> str:
    """With a star where a kernel does not fill the GPU."""
    return _share(case) + ("" if min(machine.filled(case)) == 1 else "\\*")


def _titles() -> list[str]:
    return [method if method == "ulysses" else f"{method}, {order}" for method, order in WAYS]


def _ways(tokens: int, mask: dict[str, int], value: Any) -> Iterator[list[str]]:
    for devices in DEVICES:
        cases = [Case(tokens, devices, method, order, **mask) for method, order in WAYS]
        yield [str(devices), *(value(case) if case.usable else NO_SUCH for case in cases)]


def _by_way(title: str, value: Any, masks: Sequence[str] = tuple(MASKS)) -> str:
    return "\n\n".join(
        _table(["GPUs", *_titles()], _ways(2**20, MASKS[name], value), title.format(mask=name)) for name in masks
    )


def _machines() -> Iterator[list[str]]:
    kinds = {"as above": machine.TRITON, "FlashAttention-3's rates": machine.FASTEST, "200 GB/s": machine.CROWDED}
    for kind, what in kinds.items():
        for method in METHODS:
            cases = [Case(2**20, devices, method) for devices in DEVICES]
            yield [kind, method, *(f"{machine.efficiency(x, what):.2f}" if x.usable else NO_SUCH for x in cases)]


def _hidden() -> Iterator[list[str]]:
    """The least share of a device at which a ring's messages take no longer than its steps."""
    for kind, what in {"as above": machine.TRITON, "FlashAttention-3's rates": machine.FASTEST}.items():
        yield [kind, *(f"{_least_share(of, n, what)} tokens" for n in (8, 16) for of in counts.PASSES)]


def _least_share(of: str, devices: int, what: machine.Machine) -> int:
    for share in range(2 * tiles.TILE, 2**16, 2 * tiles.TILE):
        case = Case(devices * share, devices, "ring")
        message = what.message(max(x.bytes for x in counts.sent(case, of)), devices)
        if message <= machine.time(case, of, what).computing / devices:
            return share
    raise ValueError("no share is large enough")


def _groups() -> Iterator[list[str]]:
    for tokens, name in TOKENS.items():
        for groups in (8, 4, 2, 1):
            cases = [Case(tokens, devices, "all_gather", head_groups=groups) for devices in DEVICES]
            held = _three(counts.held(cases[0], "backward") / 1e9)  # the same on any number of devices
            yield [name, str(groups), held, *map(_efficiency, cases)]


MOST_HELD = 20e9
"""Bytes, in the choice: a quarter of an H100, as the layer and the rest of the model want theirs."""


def _choices() -> Iterator[list[str]]:
    """Which way is fastest, and what "auto" takes."""
    rows = [(name, tokens, {}) for tokens, name in TOKENS.items()]
    rows += [("1M, window", 2**20, {"window": 4096}), ("1M, documents", 2**20, {"document": 8192})]
    for name, tokens, mask in rows:
        yield [name, *(_choice(tokens, devices, mask) for devices in DEVICES)]


def _choice(tokens: int, devices: int, mask: dict[str, int]) -> str:
    cases = [Case(tokens, devices, *way, **mask) for way in WAYS]
    for way in WAYS:
        if way[0] == "all_gather":
            cases += [Case(tokens, devices, *way, **mask, head_groups=groups) for groups in (4, 2, 1)]
    cases = [case for case in cases if case.usable and counts.held(case, "backward") <= MOST_HELD]
    best = max(cases, key=lambda case: round(machine.efficiency(case), 3))  # of equals the one that holds least
    title = best.method if best.method == "ulysses" else f"{best.method}, {best.order}"
    title += f", head_groups={best.head_groups}" if best.head_groups else ""
    taken, _ = choosing.choose("auto", None, Case(tokens, devices, "ring", **mask).facts)
    auto = Case(tokens, devices, taken, **mask)
    return f"{title} **{_share(best)}** ({taken} {_share(auto)})"


def _share(case: Case) -> str:
    share = machine.efficiency(case)
    return f"{share:.2f}" if share >= 0.01 else f"{share:.3f}"


# Text.


def _three(x: float) -> str:
    """Three digits that count."""
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".") if x else "0"


def _table(head: Sequence[str], rows: Any, title: str = "") -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["--:"] * (len(head) - 1), *rows)]
    return "\n".join(([f"**{title}**", ""] if title else []) + lines)


# The plot.

COLOURS = {"ring": "#1b6ca8", "all_gather": "#e07b39", "ulysses": "#3a9d5d"}
DRAWN = tuple(2**n for n in range(3, 11))
"""GPUs."""


def draw(figure: Any) -> None:
    """Efficiency, and memory held for it, over GPUs; a panel for each length."""
    figure.set_size_inches(11, 6.4)
    panels = figure.subplots(2, len(TOKENS), sharex=True, sharey="row")
    for (tokens, name), (above, below) in zip(TOKENS.items(), panels.T, strict=True):
        above.set_title(f"{name} tokens", fontsize=11)
        for method, colour in COLOURS.items():
            cases = [x for devices in DRAWN if (x := Case(tokens, devices, method)).usable]
            at = [x.devices for x in cases]
            shares = [machine.efficiency(x) for x in cases]
            above.plot(at, shares, color=colour, label=method, lw=1.8)
            for x, share in zip(cases, shares, strict=True):
                face = colour if min(machine.filled(x)) == 1 else "white"
                above.plot(x.devices, share, "o", ms=5.5, color=colour, mfc=face, zorder=3)
            below.plot(at, [counts.held(x, "backward") / 1e9 for x in cases], "o-", ms=4, color=colour, lw=1.8)
        best = [
            max(machine.efficiency(Case(tokens, devices, "all_gather", head_groups=groups)) for groups in (8, 4, 2, 1))
            for devices in DRAWN
        ]
        uneven = [machine.efficiency(Case(tokens, devices, "ring", "contiguous")) for devices in DRAWN]
        above.plot(DRAWN, best, ":", color=COLOURS["all_gather"], lw=1.8, label="all_gather, best head_groups")
        above.plot(DRAWN, uneven, "--", color=COLOURS["ring"], lw=1.2, label="ring, contiguous order")
        below.axhline(80, color="#888", lw=1, ls=":")
        below.set_xlabel("GPUs along the sequence")
        for axes in (above, below):
            axes.axvspan(7, 8.6, color="#000", alpha=0.05, lw=0)  # one node
            axes.tick_params(axis="x", labelsize=8.5)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    first, lower = panels[:, 0]
    first.set_ylim(0, 1.05)
    first.set_ylabel("predicted efficiency, both passes")
    first.annotate("one\nnode", (7.8, 0.03), ha="center", fontsize=7.5, color="#555")
    lower.set_xscale("log", base=2)
    lower.set_xlim(7, 1200)
    lower.set_xticks(DRAWN, map(str, DRAWN))
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter("{x:g}")
    lower.set_ylabel("GB held for keys and their\ngradients, backward")
    lower.annotate("an H100 has 80 GB", (16, 80), (0, 3), textcoords="offset points", fontsize=8, color="#666")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False, fontsize=9.5)
    figure.tight_layout(rect=(0, 0, 1, 0.95))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md and docs/scaling.png")
    if not parser.parse_args(argv).write:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in blocks().items()))
        return 0
    path = DOCS / "scaling.md"
    path.write_text(filled_in(path.read_text()))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure()
    draw(figure)
    figure.savefig(DOCS / "scaling.png", dpi=110)
    return 0
