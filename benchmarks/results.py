"""One schema for everything that is measured, and files of it that survive being cut off.

A file is CSV, one line per point. Lines are appended with one write each and flushed to the disk, so whatever happens
a file holds whole lines; the piece of a line that a crash may leave at the end is cut off when the file is read again.
"""

import csv
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .status import Status

ROOT = Path(__file__).parent / "results"
MS_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Record:
    """One point: one case, run one way, on one machine. What was not measured is None."""

    benchmark: str
    case: str
    """"key=value,key=value": what `parse_case` reads."""
    provider: str
    """What ran it."""
    status: Status
    reason: str = ""
    """First line of the error, unless `OK`."""
    ms: float | None = None
    """Median."""
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    clock: str = ""
    """"device" or "wall", as in `timing.Times`."""
    baseline: str = ""
    """The provider that it is compared with, timed by turns with it."""
    times_faster: float | None = None
    """Median of the ratios of neighbouring runs, baseline over this."""
    times_faster_p20: float | None = None
    times_faster_p80: float | None = None
    tflops: float | None = None
    """Of the products that the definition needs (`attention.flops`), whatever was computed besides."""
    peak_share: float | None = None
    """`tflops` over what a large matrix product of the same dtype reached in the same process."""
    compile_ms: float | None = None
    first_ms: float | None = None
    memory_bytes: int | None = None
    """Arguments, results and temporaries, as XLA planned them."""
    device_bytes: int | None = None
    """Most that the process had had on its device by then, where that is counted."""
    tiles: int | None = None
    """Tiles of the logits that are visited, where a block mask says."""
    device: str = ""
    processor: str = ""
    cores: int | None = None
    python: str = ""
    jax: str = ""
    jaxlib: str = ""
    jax_triton: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What names the point in its file."""
        return self.case, self.provider

    @property
    def ok(self) -> bool:
        """Whether there is a time."""
        return self.status is Status.OK


_FIELDS = [f.name for f in dataclasses.fields(Record)]
_NUMBERS = {
    f.name: float if "float" in str(f.type) else int for f in dataclasses.fields(Record) if "None" in str(f.type)
}


def case_name(case: Mapping[str, Any]) -> str:
    """A case as text; its order is kept."""
    return ",".join(f"{key}={value}" for key, value in case.items())


def parse_case(text: str) -> dict[str, str]:
    """`case_name` undone, values as text."""
    return dict(part.split("=", 1) for part in text.split(",") if part)


class Store:
    """The points of one benchmark in one file.

    Args:
      path: a CSV file, made when the first point is added.
      resume: keep what it holds; else start anew.

    Raises:
      ValueError: the file has other columns.
    """

    def __init__(self, path: Path, *, resume: bool):
        self.path, self.records = path, {}
        if path.exists():
            if resume:
                self._cut_off_partial_line()
                self.records = {r.key: r for r in load(path)}
            else:
                path.unlink()

    def add(self, records: Iterable[Record]) -> None:
        """Appends points that are not there yet.

        Raises:
          ValueError: one of them is there.
        """
        records = list(records)
        for record in records:
            if record.key in self.records:
                raise ValueError(f"{self.path} already holds {record.case} of {record.provider}")
            self.records[record.key] = record
        text = "".join(map(_line, records))
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = ",".join(_FIELDS) + "\n" + text
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _cut_off_partial_line(self) -> None:
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(self.path, end)


def _line(record: Record) -> str:
    out = io.StringIO()
    values = (getattr(record, name) for name in _FIELDS)
    csv.writer(out, lineterminator="\n").writerow([_text(x) for x in values])
    return out.getvalue()


def _text(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.{MS_DIGITS}g}"
    return " ".join(str(x).split())  # a line break would end the line


def load(path: Path) -> list[Record]:
    """All points of a file.

    Raises:
      ValueError: the file has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _FIELDS:
            if path.stat().st_size == 0:
                return []
            raise ValueError(f"{path} has columns {reader.fieldnames}, wanted {_FIELDS}; move it away to start anew")
        return [_record(row) for row in reader]


def _record(row: Mapping[str, str]) -> Record:
    values: dict[str, Any] = {**row, "status": Status(row["status"])}
    for name, number in _NUMBERS.items():
        values[name] = number(row[name]) if row[name] else None
    return Record(**values)


def machine() -> dict[str, Any]:
    """What the numbers are measured on, as fields of `Record`. Starts JAX: call it in the process that measures."""
    import jax

    gpu, name = jax.default_backend() == "gpu", _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = jax.devices()[0].device_kind
    return {
        "device": _slug(kind) if gpu else _slug(f"cpu {name} {cores} cores"),
        "processor": kind if gpu else name,
        "cores": cores,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("jax", "jaxlib", "jax_triton", "triton")},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(file: Path, machine: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    """What a benchmark measured whose numbers are no `Record`s, and on what."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "results": records}, indent=1) + "\n")


def capability() -> int | None:
    """CUDA compute capability of the GPU times ten; None without one."""
    import jax

    text = getattr(jax.devices()[0], "compute_capability", None)
    return round(float(text) * 10) if jax.default_backend() == "gpu" and text else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    name = re.sub(r"\((R|TM)\)|CPU|@.*|\d+-Core|Processor", " ", name)
    return " ".join(name.split()) or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout that this file is in; with a "+" where files differ from it."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
