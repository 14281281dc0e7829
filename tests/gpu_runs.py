"""Where tests run: on the CPU, or with `--gpu` on a GPU. A run that was to use one and did not, fails; one that is cut
short keeps what it learned and can be gone on with.
"""

import os
import time
from pathlib import Path

import jax
import pytest


def add_options(parser):
    parser.addoption("--gpu", action="store_true", help="run on the GPU; fail if there is none or no GPU test passes")
    parser.addoption(
        "--keep",
        type=Path,
        metavar="DIR",
        help="note in DIR what passes, and what failed and how; run no test again that passed",
    )
    parser.addoption("--seconds", type=float, metavar="S", help="start no test after so many seconds")


def configure(config):
    """Chooses the platform, before JAX starts it."""
    wanted = os.environ.get("JAX_PLATFORMS")
    if not config.getoption("--gpu"):
        if not wanted:
            os.environ["JAX_PLATFORMS"] = wanted = "cpu"  # for the processes that tests start
            jax.config.update("jax_platforms", "cpu")
        if wanted == "cpu":
            jax.config.update("jax_num_cpu_devices", 8)
    elif problem := _no_gpu():
        raise pytest.UsageError(f"--gpu: {problem} (JAX_PLATFORMS is {wanted!r})")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(config), "gpu_runs")


def _no_gpu() -> str:
    try:
        return "" if jax.devices("gpu") else "JAX has no GPU"
    except RuntimeError as error:
        return str(error)


def select(config, items):
    """Skips GPU tests where there is none; leaves out what `--keep` says has passed."""
    if not config.getoption("--gpu"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU (pytest --gpu tests/test_gpu.py)"))
    if folder := config.getoption("--keep"):
        passed = set(_lines(folder / "passed.txt"))
        if done := [item for item in items if item.nodeid in passed]:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in passed]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class Report:
    """Counts the GPU tests that pass, notes what becomes of each test, and ends the run in time."""

    def __init__(self, config):
        self.config, self.began, self.passed = config, time.monotonic(), 0
        self.folder = config.getoption("--keep")
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.passed = len(_lines(self.folder / "passed.txt"))
            if (failed := self.folder / "failed.txt").exists():  # what it names is run again
                failed.replace(self.folder / "failed-before.txt")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed += "gpu" in report.keywords
            self._note("passed.txt", report.nodeid)
        if report.failed:  # now, as a run that is killed prints none
            self._note("failed.txt", f"{report.nodeid} ({report.when})\n{report.longreprtext}\n")

    def _note(self, name: str, text: str) -> None:
        if self.folder:
            with open(self.folder / name, "a") as file:
                file.write(f"{text}\n")

    def pytest_runtest_logfinish(self, nodeid, location):
        seconds = self.config.getoption("--seconds")
        if seconds is not None and time.monotonic() - self.began > seconds:
            self.session.shouldstop = f"{seconds:g} s have passed"

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            if self._idle():
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            elif self.folder and self.passed:  # nothing is left to do
                session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter):
        if self._idle():
            terminalreporter.write_line("FAILED: --gpu, and no GPU test passed", red=True)

    def _idle(self) -> bool:
        return self.config.getoption("--gpu") and not self.config.getoption("collectonly") and not self.passed
