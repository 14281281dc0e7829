"""What is measured: problems, what their contenders run, and which of them are timed by turns."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass
class Work:
    """What one contender runs."""

    function: Callable
    """Jitted, if it is to be compiled; else it is called as it is."""
    arguments: tuple[Any, ...]
    during: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """What encloses tracing and compiling."""
    view: Callable[[Any], Any] = lambda result: result
    """What of a result is compared with the reference."""
    prepared: Any = None
    """A `timing.Prepared`, once compiled: a problem that hands out the same work again saves that."""


class Problem(Protocol):
    """One case, and all ways to compute it. Lives in the worker."""

    tolerance: float
    """Largest error, in units of the largest number of the reference; 0: equal."""
    flops: float | None
    dtype: str
    """Whose `timing.matmul_peak` the FLOPs are compared with."""
    # A problem may have a row_axis, too, whose blocks are judged by their own sizes (`measure.disagreement`).

    def work(self, provider: str) -> Work:
        """What a provider runs; raises `status.Unsupported` if it cannot here."""
        ...

    def expected(self, provider: str) -> Any:
        """What it must return."""
        ...


@dataclasses.dataclass(frozen=True)
class Group:
    """Points of one case that are timed by turns."""

    problem: str
    """"module:function", which makes the `Problem` of a case."""
    case: Mapping[str, Any]
    providers: tuple[str, ...]
    baselines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What a provider is compared with, which runs too though it be none of `providers`."""

    @property
    def contenders(self) -> tuple[str, ...]:
        """All that runs."""
        return tuple(dict.fromkeys([*(b for p, b in self.baselines.items() if p in self.providers), *self.providers]))
