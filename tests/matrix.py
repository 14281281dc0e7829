"""Runs tests with versions other than the pinned ones: the rows of `matrix.toml`, each in an environment of its own.

    python tests/matrix.py                      # all of it; with --third 0, 1 or 2 what is due on such a day
    python tests/matrix.py triton38 python313   # these rows
    python tests/matrix.py --write              # the table of docs/install.md

An environment, `.venv-NAME`, holds what a row pins; all else is found in that of the Python which runs this. A row
whose Python or package is not to be had here is named, with the reason, and left out. Ends with what became of each
row; with status 1 if one failed (unless it is `hopeful`), or if none was run.
"""

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "matrix.toml"
LOCK = ROOT / "requirements-dev.lock"
PAGE = ROOT / "docs" / "install.md"
PACKAGES = ("python", "jax", "jax-triton", "triton", "flax", "equinox")
"""The table's columns."""
PINNED_PYTHON = "3.12"
"""What `.venv` is made with where there is a choice, and what the pinned set is chosen for."""
ABSENT = re.compile(r"^\s*(?:ERROR: No matching distribution|fatal: unable to access).*", re.MULTILINE)
"""What pip, or git for it, says of what is not there to be installed. What else goes wrong is a failure."""


class NotHereError(Exception):
    """Something is not to be had on this machine."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of pytest."""

    shows: str
    tests: list[str]
    only: str = ""
    interpret: bool = False
    thirds: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A combination of versions."""

    name: str
    runs: list[Run]
    python: str = ""
    pins: list[str] = dataclasses.field(default_factory=list)
    pre: bool = False
    day: int | None = None
    hopeful: bool = False

    @property
    def when(self) -> str:
        """When CI runs it."""
        if self.day is not None:
            return "every third day"
        return "always, a third of the tests each day" if any(run.thirds for run in self.runs) else "always"

    @property
    def shows(self) -> list[str]:
        return list(dict.fromkeys(run.shows for run in self.runs))


def rows() -> list[Row]:
    listed = tomllib.loads(LIST.read_text())
    return [Row(name, **row | {"runs": [Run(**run) for run in row["runs"]]}) for name, row in listed.items()]


# Environments.


def interpreter(version: str) -> str:
    """A Python of this version, with what makes environments: on the path, or of pyenv's.

    Raises:
      NotHereError: there is none.
    """
    found = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python3"))]
    check = f"import sys, venv, ensurepip; assert sys.version.startswith('{version}.')"
    for python in (str(x) for x in found if x is not None):
        if subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
            return python
    raise NotHereError(f"no Python {version}")


def environment(row: Row) -> str:
    """The Python of a row's environment, which is made if it is not what the row and the lock say.

    Raises:
      NotHereError: a Python or a package is not to be had.
    """
    folder = ROOT / f".venv-{row.name}"
    base = interpreter(row.python) if row.python else sys.executable
    text = "\n".join([repr(row), base, *(x.read_text() for x in (LOCK, ROOT / "pyproject.toml"))])
    wanted, stamp, python = hashlib.sha256(text.encode()).hexdigest(), folder / "stamp", str(folder / "bin" / "python")
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    if row.python:
        _pip(python, "-r", str(LOCK))
    else:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "rest.pth").write_text("\n".join(site.getsitepackages()))
    if row.pins:
        _pip(python, *["--pre"] * row.pre, "--upgrade", *row.pins)
    _pip(python, "--no-build-isolation", "-e", ".")
    stamp.write_text(wanted)
    return python


def _pip(python: str, *what: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps"]
    done = subprocess.run([*command, *what], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        if found := ABSENT.search(done.stderr):
            raise NotHereError(found[0])
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)


# Running.


def passes(row: Row, jobs: int, third: int | None) -> bool:
    """Runs a row's tests: all of them, or on a day a third of those that come in thirds."""
    python, good = environment(row), True
    for run in row.runs:
        print(f"=== {row.name}: {run.shows}", flush=True)
        command = [python, "-m", "pytest", *[f"tests/test_{name}.py" for name in run.tests]]
        command += ["-n", str(jobs), "--dist", "worksteal", *(["-k", run.only] if run.only else [])]
        command += ["--part", str(third)] if run.thirds and third is not None else []
        settings = {"JAX_PLATFORMS": "cpu"} | ({"TRITON_INTERPRET": "1"} if run.interpret else {})
        if status := subprocess.run(command, cwd=ROOT, env=os.environ | settings).returncode:
            print(f"=== {row.name}: {run.shows}: status {status}", flush=True)  # a signal's says nothing by itself
            good = False
    return good


def outcome(row: Row, jobs: int, third: int | None) -> str:
    """What became of a row, in a word or with a reason."""
    if None not in (third, row.day) and row.day != third:
        return f"another day (make test-matrix THIRD={row.day})"
    failed = "failed, and may" if row.hopeful else "FAILED"
    try:
        return "passed" if passes(row, jobs, third) else failed
    except NotHereError as why:
        return f"not here: {why}"
    except subprocess.CalledProcessError as error:
        return f"{failed}: {error}\n{error.stderr or ''}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python tests/matrix.py")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--third", type=int, choices=(0, 1, 2), help="leave out what is for other days")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table of docs/install.md, and run nothing")
    options = parser.parse_args(arguments)
    if options.write:
        PAGE.write_text(filled_in(PAGE.read_text()))
        return 0
    chosen = {row.name: row for row in rows()}
    if unknown := {*options.names} - {*chosen}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    became = {}
    for name in options.names or chosen:
        start = time.monotonic()
        became[name] = (outcome(chosen[name], options.jobs, options.third), time.monotonic() - start)
    print("\n=== versions (tests/matrix.toml)")
    for name, (what, seconds) in became.items():
        print(f"{name:18} {seconds:5.0f} s  {what}")
    every = [what for what, _ in became.values()]
    return 1 if any(x.startswith("FAILED") for x in every) or "passed" not in every else 0


# The table.


def table() -> str:
    """The pinned versions, and each row that is promised."""
    pinned = {name: _pinned(LOCK.read_text(), name) for name in PACKAGES[1:]} | {"python": PINNED_PYTHON}
    lines = ["| " + " | ".join([*PACKAGES, "what runs", "in CI"]) + " |", "|---" * (len(PACKAGES) + 2) + "|"]
    lines.append(_line(pinned, "everything", "always"))
    for row in (row for row in rows() if not row.hopeful):
        own = {name: version for name in PACKAGES for pin in row.pins if (version := _pinned(pin, name))}
        versions = {name: f"**{own[name]}**" if name in own else pinned[name] for name in PACKAGES}
        if row.python:
            versions["python"] = f"**{row.python}**"
        lines.append(_line(versions, ", ".join(row.shows), row.when))
    return "\n".join(lines)


def _line(versions: dict[str, str], what: str, when: str) -> str:
    return "| " + " | ".join([*(versions[name] for name in PACKAGES), what, when]) + " |"


def _pinned(text: str, package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def filled_in(page: str) -> str:
    """A page with the table in its place, `<!-- matrix -->` to `<!-- end -->`."""
    return re.sub(r"(<!-- matrix -->\n).*?(<!-- end -->)", lambda x: f"{x[1]}{table()}\n{x[2]}", page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
