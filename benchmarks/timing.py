"""How long something takes: every run waited for, compared things by turns, compile and first-call time apart.

    times = do_bench(jax.jit(f), x, y)             # median, p20 and p80 in ms, and what compiling took
    both = compare({"a": f, "b": g}, x, y)         # A B A B ... in one process
    ratios(both["a"], both["b"])                   # of neighbours: what slows both does not show

On a GPU the second-level cache is flushed before each run, and what is timed is the kernels (CUPTI, through what JAX
carries of it); where that cannot be had, and on CPUs, it is the wall clock around a call and the wait for its result.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FLUSHED_BYTES = 256 * 2**20  # more than the second-level cache of any GPU so far


@dataclasses.dataclass(frozen=True)
class Effort:
    """How often to run."""

    seconds: float = 1.0
    """Timed runs of each contender together; the last one is finished."""
    least: int = 5
    """Timed runs, however long they take."""
    most: int = 2000
    warmup: int = 2
    """Runs that are not counted, after the first."""

    def __post_init__(self):
        if not (self.seconds >= 0 and 1 <= self.least <= self.most and self.warmup >= 0):
            raise ValueError(f"an effort needs seconds >= 0, 1 <= least <= most and warmup >= 0, got {self}")


@dataclasses.dataclass(frozen=True)
class Times:
    """What was measured of one thing; milliseconds and bytes."""

    samples: tuple[float, ...]
    clock: str
    """"device": the sum of the kernels' times; "wall": from the call to its result."""
    compile_ms: float | None
    """Tracing, lowering and compiling; None for what is not jitted."""
    first_ms: float
    """The first call, compiled already where jitted."""
    memory: int | None
    """What the compiled function has at its peak, arguments and results included; None for what is not jitted."""

    median = property(lambda self: float(np.median(self.samples)))
    p20 = property(lambda self: float(np.percentile(self.samples, 20)))
    p80 = property(lambda self: float(np.percentile(self.samples, 80)))


@dataclasses.dataclass
class Prepared:
    """A function with its arguments, compiled if it can be."""

    call: Callable[[], Any]
    compile_ms: float | None
    memory: int | None
    first_ms: float | None = None

    def first(self) -> Any:
        """The result of the first call, which is timed."""
        start = time.perf_counter()
        result = jax.block_until_ready(self.call())
        self.first_ms = 1e3 * (time.perf_counter() - start)
        return result


def prepare(fn: Callable, *args: Any) -> Prepared:
    """Compiles a jitted function; takes any other as it is.

    Raises:
      ValueError: an argument is an array of equal numbers: zeros and ones multiply faster than what people have.
    """
    for i, x in enumerate(jax.tree.leaves(args)):
        if (
            isinstance(x, jax.Array)
            and x.size > 1
            and jnp.issubdtype(x.dtype, jnp.floating)
            and bool((x == x.ravel()[0]).all())
        ):
            raise ValueError(f"array {i} of the arguments is all {x.ravel()[0]}; time with random numbers")
    if not hasattr(fn, "lower"):
        return Prepared(lambda: fn(*args), None, None)
    start = time.perf_counter()
    compiled = fn.lower(*args).compile()
    return Prepared(lambda: compiled(*args), 1e3 * (time.perf_counter() - start), _memory(compiled))


def do_bench(fn: Callable, *args: Any, effort: Effort = Effort()) -> Times:
    """The time of `fn(*args)`, result waited for.

    Args:
      fn: any function of arrays; one that `jax.jit` made is compiled first, which is timed apart.
      *args: random arrays.
      effort: how often to run.
    """
    return compare({"it": fn}, *args, effort=effort)["it"]


def compare(functions: Mapping[str, Callable], *args: Any, effort: Effort = Effort()) -> dict[str, Times]:
    """`do_bench` of each, run by turns: samples of the same number are neighbours in time."""
    prepared = {name: prepare(fn, *args) for name, fn in functions.items()}
    for x in prepared.values():
        x.first()
    return by_turns(prepared, effort)


def by_turns(
    prepared: Mapping[str, Prepared],
    effort: Effort,
    running: Callable[[str], contextlib.AbstractContextManager] = lambda name: contextlib.nullcontext(),
) -> dict[str, Times]:
    """Times what has had its first call, A B A B ... `running(name)` encloses every run, outside of what is timed."""
    clock, samples = Clock(), {name: [] for name in prepared}
    for _ in range(effort.warmup):
        for name, x in prepared.items():
            with running(name):
                clock.time(x.call)
    stop = time.perf_counter() + effort.seconds * len(prepared)
    for turn in range(effort.most):
        if turn >= effort.least and time.perf_counter() >= stop:
            break
        for name, x in prepared.items():
            with running(name):
                samples[name].append(clock.time(x.call))
    return {
        name: Times(tuple(samples[name]), clock.name, x.compile_ms, x.first_ms or 0.0, x.memory)
        for name, x in prepared.items()
    }


def ratios(one: Times, other: Times) -> tuple[float, float, float]:
    """How many times faster one is than the other: median, p20 and p80 of the ratios of neighbours."""
    if len(one.samples) != len(other.samples):
        raise ValueError(f"timed by turns they would have as many samples: {len(one.samples)}, {len(other.samples)}")
    each = np.asarray(other.samples) / np.maximum(np.asarray(one.samples), 1e-9)
    low, middle, high = (float(x) for x in np.percentile(each, (20, 50, 80)))
    return middle, low, high


class Clock:
    """Times single runs: the kernels on a GPU, else the wall clock."""

    def __init__(self):
        self.cupti = _cupti() if jax.default_backend() == "gpu" else None

    @property
    def name(self) -> str:
        """As in `Times.clock`."""
        return "wall" if self.cupti is None else "device"

    def time(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one run."""
        _flush_cache()
        if self.cupti is None:
            start = time.perf_counter()
            jax.block_until_ready(call())
            return 1e3 * (time.perf_counter() - start)
        self.cupti._cupti_init()
        try:
            jax.block_until_ready(call())
        finally:
            kernels = self.cupti._cupti_get_timings(False)
        return sum(ms for _, ms in kernels)


@functools.cache
def _cupti() -> Any:
    """JAX's binding of CUPTI (behind `jax.experimental.mosaic.gpu.profiler`), if it works here."""
    try:
        from jax._src.lib import mosaic_gpu

        ext = mosaic_gpu._mosaic_gpu_ext
        x = jax.block_until_ready(jnp.arange(1024.0))
        ext._cupti_init()
        jax.block_until_ready(x @ x)
        return ext if ext._cupti_get_timings(False) else None
    except Exception as error:  # no such binding, another subscriber, no permission: the wall clock is left
        print(f"kernels cannot be timed here, the wall clock is used: {type(error).__name__}: {error}")
        return None


@functools.cache
def _flusher() -> tuple[Callable, list]:
    return jax.jit(lambda x: x + 1, donate_argnums=0), [jnp.arange(_FLUSHED_BYTES // 4, dtype=jnp.int32)]


def _flush_cache() -> None:
    if jax.default_backend() != "gpu":
        return
    add, held = _flusher()
    held[0] = jax.block_until_ready(add(held[0]))


def _memory(compiled: Any) -> int | None:
    """Bytes that a compiled function needs, as XLA planned them."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return int(
        plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
    )


def device_memory() -> int | None:
    """Most bytes that this process has had on its device so far; None where nobody counts (CPUs)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@functools.cache
def matmul_peak(dtype: str) -> float:
    """TFLOP/s of a large square matrix product in `dtype`, accumulated in fp32: what a share of the peak is of.

    The best of some runs. fp32 is multiplied as IEEE fp32, which is what attention is asked for here.
    """
    n = 8192 if jax.default_backend() == "gpu" else 1536
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(key, (n, n), jnp.dtype(dtype)) for key in keys)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32))
    times = do_bench(product, x, y, effort=Effort(seconds=0.3, least=5, warmup=1))
    return 2 * n**3 / min(times.samples) / 1e9
