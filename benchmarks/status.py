"""What can become of a point, and how an error says which."""

import enum
import re
from typing import Any

from jax.errors import JaxRuntimeError


class Status(enum.StrEnum):
    """Of one point. Only `OK` has a time."""

    OK = "ok"
    SMEM_OVERFLOW = "smem_overflow"  # the block sizes need more shared memory than the chip has
    OOM = "oom"
    COMPILE_FAILED = "compile_failed"
    INIT_FAILED = "init_failed"  # inputs, or the function to call, could not be made
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"  # on this device, or by this implementation
    RUN_FAILED = "run_failed"  # it compiled, and raised or died when called
    WRONG = "wrong"  # it ran, and disagreed with the reference


SENTINELS = {
    Status.SMEM_OVERFLOW: 100.0,
    Status.OOM: 100.0,
    Status.COMPILE_FAILED: 300.0,
    Status.INIT_FAILED: 300.0,
}
"""The milliseconds that stand for a failure in the tables of `mha`, for those who know its numbers from before:
100: too little memory, 300: the call could not be built. Other failures have no number at all."""


class Unsupported(Exception):
    """A contender that cannot run here; the message says why. No other error makes a point `UNSUPPORTED`: ptxas says
    "unsupported", too, of what it should have been able to assemble."""


_OOM = re.compile(r"RESOURCE_EXHAUSTED|out of memory|unable to allocate|bad_alloc", re.IGNORECASE)
_SMEM = re.compile(r"shared memory", re.IGNORECASE)


def classify(error: BaseException, failed: Status) -> Status:
    """The status of an error.

    Args:
      error: what was raised.
      failed: what it means when the error is nothing more specific: `INIT_FAILED`, `COMPILE_FAILED`, `RUN_FAILED`.
    """
    text = str(error)
    if isinstance(error, Unsupported):
        return Status.UNSUPPORTED
    if isinstance(error, ValueError | JaxRuntimeError) and _SMEM.search(text):
        return Status.SMEM_OVERFLOW
    if isinstance(error, MemoryError) or _OOM.search(text):
        return Status.OOM
    return failed


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if isinstance(error, Unsupported) and lines else f"{type(error).__name__}: {(lines or [''])[0]}"


def failure(error: BaseException, failed: Status) -> dict[str, Any]:
    """The outcome of an error."""
    return {"status": classify(error, failed), "reason": reason(error)}
