"""Runs points in a process of their own, so that one that hangs, or takes the process down, costs only itself."""

import contextlib
import functools
import importlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import Any

from .problem import Group, Problem
from .status import Status

_STARTS_WITHIN = 180.0  # seconds: importing JAX and finding the device


class _Watch:
    """Which contender is running since when, and what it has used up, in memory that parent and worker share."""

    def __init__(self, shared: Any):
        self.shared = shared  # number, since when, seconds used before

    @contextlib.contextmanager
    def running(self, number: int, used: dict[int, float]) -> Iterator[None]:
        start = time.monotonic()
        self.shared[:] = [number, start, used.get(number, 0.0)]
        try:
            yield
        finally:
            used[number] = used.get(number, 0.0) + time.monotonic() - start
            self.shared[:] = [-1, start, 0.0]

    def read(self) -> tuple[int, float]:
        """The contender that is running, -1 for none, and the seconds that it has used (none: 0)."""
        number, since, before = self.shared[:]
        return int(number), before + (time.monotonic() - since if number >= 0 else 0.0)


def _context() -> Any:
    """How processes start. Where Linux can, as forks of one that has imported JAX and started no device: importing is
    all that takes long, and a sweep over points that hang or die starts many."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "jax_flash_attn2", f"{__package__}.measure", f"{__package__}.results"])
    return context


class Worker:
    """A process that measures groups. Close it after use.

    Args:
      timeout: seconds that one point may take in all: inputs, reference, compiling, checking and timing.
    """

    def __init__(self, timeout: float):
        self.timeout, self.context = timeout, _context()
        self.machine: dict[str, Any] = {}
        self.capability: int | None = None
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        shared = self.context.RawArray("d", [-1, 0, 0])
        self.watch = _Watch(shared)
        self.process = self.context.Process(target=_serve, args=(theirs, shared), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(_STARTS_WITHIN):
            self.close()
            raise RuntimeError(f"the measuring process did not start within {_STARTS_WITHIN:.0f} s")
        try:
            self.machine, self.capability = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            raise RuntimeError(
                f"the measuring process did not start; {_death(self.process.exitcode)['reason']}"
            ) from None

    def run(self, group: Group, effort: Any) -> dict[str, dict[str, Any]]:
        """What became of each contender: fields of a `results.Record`."""
        outcomes: dict[str, dict[str, Any]] = {}
        while remaining := tuple(name for name in group.contenders if name not in outcomes):
            self.pipe.send((group, remaining, effort))
            lost, outcome = self._wait(remaining)
            if lost is None:
                return outcomes | outcome
            outcomes |= {name: outcome for name in ([lost] if lost else remaining)}
            self._start()
        return outcomes

    def _wait(self, names: tuple[str, ...]) -> tuple[str | None, dict[str, Any]]:
        """(None, outcomes); or who had to be given up ("" for the inputs of all) and its outcome."""
        while True:
            try:
                if self.pipe.poll(0.1):
                    return None, self.pipe.recv()
            except (EOFError, ConnectionError):
                self.process.join(10)
                return self._running(names)[0], _death(self.process.exitcode)
            name, used = self._running(names)
            if used > self.timeout:
                self.close()
                what = "" if name else "the inputs took "
                return name, {"status": Status.TIMEOUT, "reason": f"{what}more than {self.timeout:g} s"}

    def _running(self, names: tuple[str, ...]) -> tuple[str, float]:
        """Who is running ("": the inputs, or nobody) and the seconds that it has used."""
        number, used = self.watch.read()
        return names[number] if 0 <= number < len(names) else "", used

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


def _death(code: int | None) -> dict[str, Any]:
    if code == -9:
        return {"status": Status.OOM, "reason": "the process was killed, most likely for want of memory"}
    return {"status": Status.RUN_FAILED, "reason": f"the process died with exit code {code}"}


def _serve(pipe: Any, shared: Any) -> None:
    """The process: groups in, outcomes out, until the pipe closes."""
    from . import measure, results

    pipe.send((results.machine(), results.capability()))
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            group, names, effort = pipe.recv()
            watch, used = _Watch(shared), {}
            pipe.send(
                measure.group(
                    functools.partial(_problem, group.problem, tuple(group.case.items())),
                    names,
                    group.baselines,
                    effort,
                    lambda name: watch.running(names.index(name) if name else len(names), used),  # noqa: B023
                )
            )


@functools.lru_cache(maxsize=1)
def _problem(name: str, case: tuple[tuple[str, Any], ...]) -> Problem:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)(**dict(case))
