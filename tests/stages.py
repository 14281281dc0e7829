"""Runs the stages of `make test` and `make test-all`, each a target of the Makefile, and says how long each took.

    python tests/stages.py NAME TARGET...

`stages.toml` holds the CPU-seconds that each stage is expected to take: fresh, and again, which is where the same stage
passed before with the same files. A stage that takes more than a fifth more is marked. STAGES=write in the environment
writes what was measured there instead. Ends with the status of the first stage that fails, and runs none after it.
"""

import dataclasses
import hashlib
import os
import resource
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "tests" / "stages.toml"
PASSED = ROOT / ".cache" / "passed"
"""A file for each stage that passed, named by it, which holds what `state` said then."""
SOURCES = (
    "jax_flash_attn2",
    "kernels",
    "benchmarks",
    "tests",
    "tests/matrix.toml",
    "pyproject.toml",
    "requirements-dev.lock",
)
MORE = 1.2
LEAST = 5.0
"""CPU-seconds by which a stage must be slower, too: a small one may take twice its time by chance."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One that ran."""

    name: str
    wall: float
    cpu: float
    status: int
    again: bool

    @property
    def kind(self) -> str:
        return "again" if self.again else "fresh"


def state() -> str:
    """A hash of all that the stages run, and which part of it they were asked for."""
    files = sorted(f for name in SOURCES for f in [ROOT / name, *(ROOT / name).rglob("*.py")] if f.is_file())
    text = "".join(f"{f.relative_to(ROOT)} {hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in files)
    return hashlib.sha256((text + parts()).encode()).hexdigest()


def parts() -> str:
    """Which parts of everything the stages were asked for, as they are given to make."""
    return " ".join(f"{name}={part}" for name in ("THIRD", "NINTH") if (part := os.environ.get(name)))


def cpu() -> float:
    """The CPU-seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(group: str, target: str, make: list[str], now: str) -> Stage:
    """Makes a target, and notes that it passed."""
    passed = PASSED / f"{group}-{target}"
    again = passed.exists() and passed.read_text() == now
    wall, used = time.monotonic(), cpu()
    print(f"=== {target}", flush=True)
    status = subprocess.run([*make, target], cwd=ROOT).returncode
    if status == 0:
        PASSED.mkdir(parents=True, exist_ok=True)
        passed.write_text(now)
    return Stage(target, time.monotonic() - wall, cpu() - used, status, again)


def table(stages: list[Stage], figures: dict) -> str:
    """What was measured, beside what was expected."""
    lines = [f"{'stage':16} {'wall s':>7} {'CPU-s':>7} {'expected':>9}"]
    for s in stages:
        want = figures.get(s.name, {}).get(s.kind)
        expected = "" if want is None else f"{want:.0f} {s.kind}"
        note = f"FAILED (status {s.status})" if s.status else ""
        if not s.status and want is not None and s.cpu > max(MORE * want, want + LEAST):
            note = f"slower than expected by {100 * (s.cpu / want - 1):.0f}%" if want else "slower than expected"
        lines.append(f"{s.name:16} {s.wall:7.0f} {s.cpu:7.0f} {expected:>9} {note}".rstrip())
    wall, used = sum(s.wall for s in stages), sum(s.cpu for s in stages)
    return "\n".join([*lines, f"{'all':16} {wall:7.0f} {used:7.0f}"])


def written(figures: dict) -> str:
    """The text of `stages.toml`."""
    lines = ["# CPU-seconds of each stage, on two cores. Renewed by `make test STAGES=write`, and so `make test-all`."]
    for group, stages in sorted(figures.items()):
        for name, kinds in stages.items():
            lines.append(f"\n[{group}.{name}]")
            lines += [f"{kind} = {seconds}" for kind, seconds in sorted(kinds.items())]
    return "\n".join(lines) + "\n"


def renewed(figures: dict, group: str, stages: list[Stage]) -> dict:
    """The figures with those of the stages that passed."""
    new = {name: {stage: dict(kinds) for stage, kinds in of.items()} for name, of in figures.items()}
    for s in stages:
        if not s.status:
            new.setdefault(group, {}).setdefault(s.name, {})[s.kind] = round(s.cpu)
    return new


def main(group: str, *targets: str) -> int:
    make, now, stages = [os.environ.get("MAKE", "make"), "--no-print-directory"], state(), []
    for target in targets:
        stages.append(run(group, target, make, now))
        if stages[-1].status:
            break
    figures = tomllib.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if os.environ.get("STAGES") == "write":
        figures = renewed(figures, group, stages)
        FIGURES.write_text(written(figures))
    print(f"\n=== make {group} {parts()}".rstrip())
    print(table(stages, figures.get(group, {})))
    if status := stages[-1].status:
        print(f"=== {stages[-1].name} failed; by itself: make {stages[-1].name}")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
