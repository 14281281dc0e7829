"""What all benchmarks share: options, points that are there already, progress, and the file they go to."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import results
from .problem import Group
from .results import Record, Store, case_name, parse_case
from .status import Status
from .timing import Effort
from .worker import Worker

try:
    from tqdm import tqdm
except ImportError:  # a machine that has only JAX: gpu.sh
    tqdm = None


def parser(name: str, doc: str, *, seconds: float, quick_seconds: float) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
      name: of the benchmark.
      doc: the docstring of its module.
      seconds: timed runs of each point, unless --seconds says.
      quick_seconds: likewise with --quick.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--quick", action="store_true", help="few and small points: under 3 minutes on two cores")
    add("--resume", action="store_true", help="keep the points that the results already hold")
    add("--only", default="", metavar="KEY=VALUE,...", help="e.g. headdim=64,mode=fwd; VALUE|VALUE for either")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds that a point may take (default %(default)s)")
    add("--seconds", type=float, help=f"of timed runs of a point (default {seconds}; {quick_seconds} with --quick)")
    add("--out", type=Path, help="folder of the results (default benchmarks/results/DEVICE)")
    made.set_defaults(name=name, seconds_by_quick={False: seconds, True: quick_seconds})
    return made


class Sweep:
    """The points of one run of a benchmark. Use it in a `with` block.

    Args:
      options: what `parser` parsed.
      effort: how often to run a point; by default what the options say.
      worker: the process that measures; one of its own by default. It is closed with the sweep if it is its own.
    """

    def __init__(self, options: argparse.Namespace, effort: Effort | None = None, worker: Worker | None = None):
        self.options = options
        seconds = options.seconds if options.seconds is not None else options.seconds_by_quick[options.quick]
        self.effort = effort or Effort(seconds=seconds, warmup=1 if options.quick else 2)
        self.only = _only(options.only)
        self.worker, self._close_worker = worker or Worker(options.timeout), worker is None
        self.machine = self.worker.machine
        folder = options.out or results.ROOT / self.machine["device"]
        self.stem = options.name + ("-quick" if options.quick else "")
        self.folder, path = folder, folder / f"{self.stem}.csv"
        if path.exists() and not options.resume:
            print(f"{path} is measured anew (--resume would keep its points)", file=sys.stderr)
        self.store = Store(path, resume=options.resume)
        self.bar: Any = None
        self.began = time.monotonic()

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_: object) -> None:
        if self._close_worker:
            self.worker.close()
        if self.bar is not None:
            self.bar.close()

    @property
    def capability(self) -> int | None:
        """CUDA compute capability times ten; None without a GPU."""
        return self.worker.capability

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return not self.machine["device"].startswith("cpu-")

    def select(self, groups: Iterable[Group]) -> list[Group]:
        """The groups with the points that --only leaves; starts the progress bar over them.

        A group that has not all keys that --only names has none of its points.

        Raises:
          SystemExit: --only names what no point has.
        """
        groups = list(groups)
        known = {key for group in groups for key in group.case} | {"provider"}
        if unknown := self.only.keys() - known:
            raise SystemExit(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
        chosen = []
        for group in groups:
            providers = tuple(p for p in group.providers if self._wanted({**group.case, "provider": p}))
            if providers:
                chosen.append(dataclasses.replace(group, providers=providers))
        if not chosen:
            raise SystemExit(f"--only {self.options.only} leaves no point")
        points = {(case_name(g.case), p) for g in chosen for p in g.providers}
        done = len(points & self.store.records.keys())
        self.bar = _Bar(len(points), done, self.stem)
        return chosen

    def _wanted(self, case: Mapping[str, Any]) -> bool:
        return all(str(case.get(key, "")).lower() in values for key, values in self.only.items())

    def measure(self, group: Group) -> dict[str, Record]:
        """The points of a group: from the file if they are there, else measured and added to it."""
        case = case_name(group.case)
        missing = tuple(p for p in group.providers if (case, p) not in self.store.records)
        if missing:
            self.bar.at(case)  # the last key and value say enough
            outcomes = self.worker.run(dataclasses.replace(group, providers=missing), self.effort)
            fields = {"benchmark": self.options.name, "case": case, **self.worker.machine}
            self.store.add(Record(provider=p, **{**fields, **outcomes[p]}) for p in missing)
            self.bar.add(len(missing))
        return {p: self.store.records[case, p] for p in group.providers}

    def measure_all(self, groups: Sequence[Group]) -> list[Record]:
        """`measure` of each group, in order."""
        return [record for group in groups for record in self.measure(group).values()]

    def close_bar(self) -> None:
        """Ends the progress bar, so that what is printed next stands alone."""
        if self.bar is not None:
            self.bar.close()

    def closing(self) -> str:
        """What failed; then how many points, where and how long."""
        counts = {status: 0 for status in Status}
        for record in self.store.records.values():
            counts[record.status] += 1
        text = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        lines = [failures(self.store.records.values()), f"{self.store.path}: {text}"]
        return "\n".join(filter(None, lines)) + f"; {time.monotonic() - self.began:.0f} s"


def _only(text: str) -> dict[str, list[str]]:
    """ "headdim=64|128,mode=fwd" -> {"headdim": ["64", "128"], "mode": ["fwd"]}."""
    chosen = {}
    for part in filter(None, text.split(",")):
        key, equals, values = part.partition("=")
        if not (key and equals and values):
            raise SystemExit(f"--only: wanted KEY=VALUE,KEY=VALUE, got {text!r}")
        chosen[key.strip()] = [value.strip().lower() for value in values.split("|")]
    return chosen


class _Bar:
    """Points done, and how long the rest will take: tqdm, or a line every ten seconds where there is none."""

    def __init__(self, total: int, done: int, title: str):
        self.total, self.done, self.title, self.first, self.began = total, done, title, done, time.monotonic()
        self.printed = self.began
        self.bar = tqdm(total=total, initial=done, desc=title, unit="point", dynamic_ncols=True) if tqdm else None

    def at(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text.rsplit(",", 3)[-1])

    def add(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() - self.printed > 10 or self.done == self.total:
            self.printed = time.monotonic()
            left = (self.printed - self.began) / max(self.done - self.first, 1) * (self.total - self.done)
            print(f"{self.title}: {self.done}/{self.total} points, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of text as aligned columns, the first of them the head; the first `left` columns flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def milliseconds(record: Record | None) -> str:
    """A time for a table, or why there is none."""
    if record is None:
        return "-"
    if not record.ok or record.ms is None:
        return str(record.status)
    return f"{record.ms:.3f}" if record.ms < 100 else f"{record.ms:.0f}"


def ratio(record: Record | None) -> str:
    """How many times faster than its baseline, for a table."""
    return "-" if record is None or record.times_faster is None else f"{record.times_faster:.2f}"


def summary(records: Sequence[Record], *, against: str = "") -> str:
    """All that was measured of some points, a line each; of what their cases say, what differs from case to case.

    Args:
      records: of one benchmark.
      against: the head of the column of ratios: what the points are compared with.
    """
    cases = [parse_case(r.case) for r in records]
    keys = [key for case in cases for key in case]
    keys = [key for key in dict.fromkeys(keys) if len({case.get(key) for case in cases}) > 1]
    rows = [[*keys, "provider", "ms", "p20", "p80", f"x {against}" if against else "x", *["TFLOP/s", "%peak", "MiB"]]]
    shares = peak_shares(records)
    for case, r, share in zip(cases, records, shares, strict=True):
        percent = None if share is None else 100 * share
        mib = None if r.memory_bytes is None else r.memory_bytes / 2**20
        numbers = (r.ms_p20, r.ms_p80, r.times_faster, r.tflops, percent, mib)
        formats = (".3f", ".3f", ".2f", ".3g", ".0f", ".1f")
        texts = ["-" if x is None else format(x, form) for x, form in zip(numbers, formats, strict=True)]
        rows.append([*(case.get(key, "") for key in keys), r.provider, milliseconds(r), *texts])
    busy = sum(r.peak_share is not None and share is None for r, share in zip(records, shares, strict=True))
    said = f"\n%peak of {busy} points is left out: peak measured while the machine was busy" if busy else ""
    return table(rows, left=len(keys) + 1) + said


def peak_shares(records: Sequence[Record]) -> list[float | None]:
    """Each point's share of the peak; None where the peak was measured while the machine was busy.

    That it was is known from the points: one of the same device and dtype did more in a second than the "peak".
    """
    kind = lambda r: (r.device, parse_case(r.case).get("dtype"))
    most: dict[tuple[str, str | None], float] = {}
    for r in records:
        most[kind(r)] = max(most.get(kind(r), 0.0), r.tflops or 0.0)
    fine = lambda r: r.tflops and r.peak_share and r.tflops / r.peak_share >= most[kind(r)] * (1 - 1e-4)
    return [r.peak_share if fine(r) else None for r in records]


def failures(records: Iterable[Record]) -> str:
    """Which points have no time, and why: one line for each reason; "" if all have."""
    why: dict[tuple[str, str, str], int] = {}
    for r in records:
        if not r.ok:
            key = (r.provider, str(r.status), r.reason)
            why[key] = why.get(key, 0) + 1
    return "\n".join(f"{n} x {provider}: {status}: {text}" for (provider, status, text), n in why.items())
