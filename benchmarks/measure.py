"""One group of points: each contender is built, compiled, called and compared with the reference; those that agree
are then timed by turns. A number exists only for what agreed."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import timing
from .problem import Problem
from .status import Status, classify, failure, reason
from .timing import Effort, Prepared, Times

BLOCK = 64
"""Rows that are judged together: the late ones of a causal result are far smaller than the first, and could be wrong by
half and still be near enough to them."""

Running = Callable[[str], contextlib.AbstractContextManager]


def group(
    make: Callable[[], Problem], names: Sequence[str], baselines: Mapping[str, str], effort: Effort, running: Running
) -> dict[str, dict[str, Any]]:
    """What became of each of `names`: fields of a `results.Record`.

    Args:
      make: makes the problem.
      names: its providers, to be timed by turns.
      baselines: what a provider is compared with.
      effort: how often to run.
      running: encloses whatever is done for a provider ("": for all of them).
    """
    try:
        with running(""):
            problem = make()
    except Exception as error:
        return {name: failure(error, Status.INIT_FAILED) for name in names}
    outcomes: dict[str, dict[str, Any]] = {}
    prepared: dict[str, Prepared] = {}
    for name in names:
        with running(name):
            result = _first_call(problem, name)
        if not isinstance(result, dict):
            prepared[name], got = result
            with running(""):
                result = _check(problem, name, got)
            del got
        if result:
            outcomes[name] = result
            prepared.pop(name, None)
    return {**outcomes, **_timed(problem, prepared, baselines, effort, running)}


def _first_call(problem: Problem, name: str) -> tuple[Prepared, Any] | dict[str, Any]:
    """A contender, compiled, and its result; or what is to be recorded instead."""
    failed = Status.INIT_FAILED
    try:
        work = problem.work(name)
        failed = Status.COMPILE_FAILED
        if work.prepared is None:
            with work.during():
                work.prepared = timing.prepare(work.function, *work.arguments)
        failed = Status.RUN_FAILED
        return work.prepared, work.view(work.prepared.first())
    except Exception as error:
        return failure(error, failed)


def _check(problem: Problem, name: str, got: Any) -> dict[str, Any]:
    """What is to be recorded of a result that is wrong, or that there is no reference for; nothing if it is right."""
    try:
        want = problem.expected(name)
    except Exception as error:
        return {"status": classify(error, Status.INIT_FAILED), "reason": f"the reference: {reason(error)}"}
    try:
        wrong = disagreement(got, want, problem.tolerance, getattr(problem, "row_axis", None))
    except Exception as error:
        return failure(error, Status.RUN_FAILED)
    return {"status": Status.WRONG, "reason": wrong} if wrong else {}


def _timed(problem: Problem, prepared: dict[str, Prepared], baselines, effort: Effort, running: Running):
    """Of each contender that times by turns; one that fails in the middle is left out of another try."""
    outcomes: dict[str, dict[str, Any]] = {}
    while prepared:
        now = ""

        def noting(name):
            nonlocal now
            now = name
            return running(name)

        try:
            times = timing.by_turns(prepared, effort, noting)
            break
        except Exception as error:
            outcomes[now] = failure(error, Status.RUN_FAILED)
            del prepared[now]
    else:
        return outcomes
    for name in times:
        outcomes[name] = _fields(problem, times[name], baselines.get(name, ""), times.get(baselines.get(name, "")))
        outcomes[name]["tiles"] = getattr(problem, "tiles", {}).get(name)
    return outcomes


def _fields(problem: Problem, times: Times, baseline: str, base: Times | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        **{"status": Status.OK, "ms": times.median, "ms_p20": times.p20, "ms_p80": times.p80},
        **{"samples": len(times.samples), "clock": times.clock},
        **{"compile_ms": times.compile_ms, "first_ms": times.first_ms},
        **{"memory_bytes": times.memory, "device_bytes": timing.device_memory()},
    }
    if base is not None and base is not times:
        names = ("times_faster", "times_faster_p20", "times_faster_p80")
        fields |= {"baseline": baseline, **dict(zip(names, timing.ratios(times, base), strict=True))}
    if problem.flops is not None:
        tflops = problem.flops / times.median / 1e9
        fields |= {"tflops": tflops, "peak_share": tflops / timing.matmul_peak(problem.dtype)}
    return fields


def disagreement(got: Any, want: Any, tolerance: float, row_axis: int | None = None) -> str:
    """How `got` differs from `want`, both trees of arrays; "" if it does not.

    Args:
      got: a result.
      want: the reference, which may be of a wider dtype.
      tolerance: largest error allowed, in units of the largest number of each of `want`'s arrays; 0: equal.
      row_axis: the axis of rows, where each block of `BLOCK` of them is to be measured by its own largest number.
    """
    if jax.tree.structure(got) != jax.tree.structure(want):
        return f"returned {jax.tree.structure(got)}, the reference {jax.tree.structure(want)}"
    for i, (x, y) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        if jnp.shape(x) != jnp.shape(y):
            return f"result {i} has shape {jnp.shape(x)}, the reference {jnp.shape(y)}"
        error, largest = (np.asarray(n) for n in _error(x, y, row_axis))
        wrong = np.flatnonzero(~(error <= tolerance * largest))
        if len(wrong):
            at = wrong[0]
            where = "" if row_axis is None else f" in rows from {at * BLOCK}, one of {len(wrong)} such blocks"
            return f"result {i} is off by {error[at]:.3g}{where}; {tolerance * largest[at]:.3g} are allowed"
    return ""


@functools.partial(jax.jit, static_argnums=2)
def _error(x, y, row_axis):
    """Of each block of rows, or of the whole: the largest difference (NaN where one of the two has one) and the largest
    finite number of the reference."""
    wide = jnp.float64 if y.dtype == jnp.float64 else jnp.float32
    x, y = (_blocks(a.astype(wide), row_axis) for a in (x, y))
    error = jnp.where(x == y, 0, jnp.abs(x - y))
    return jnp.max(error, 1, initial=0), jnp.max(jnp.abs(y), 1, initial=0, where=jnp.isfinite(y))


def _blocks(x, row_axis):
    """x as [blocks, numbers]."""
    if row_axis is None:
        return x.reshape(1, -1)
    x = jnp.moveaxis(x, row_axis, 0)
    x = jnp.pad(x, [(0, -len(x) % BLOCK)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(len(x) // BLOCK, -1)
