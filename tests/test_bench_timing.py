"""The harness measures what it says: known sleeps, results that are not waited for by themselves, ratios."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.timing import Effort, compare, do_bench, prepare, ratios

pytestmark = pytest.mark.usefixtures("compiled_fully", "compiled_anew")

FEW = Effort(seconds=0.0, least=5, warmup=1)


def draw(*shape):
    return jax.random.normal(jax.random.key(0), shape)


def test_known_sleep():
    def sleeper(x):
        time.sleep(0.02)
        return x

    times = do_bench(sleeper, draw(4), effort=FEW)
    assert 20 <= times.p20 <= times.median <= times.p80
    assert times.median < 60  # a busy machine wakes up late
    assert len(times.samples) == 5
    assert times.first_ms >= 20
    assert times.compile_ms is None
    assert times.clock == "wall"


def test_asynchronous_results_are_waited_for():
    """Dispatch returns at once; what is timed is the result."""
    x = draw(800, 800)
    f = jax.jit(lambda x: x @ x @ x @ x)
    jax.block_until_ready(f(x))
    unwaited, waited = [], []
    for _ in range(5):
        start = time.perf_counter()
        result = f(x)
        unwaited.append(1e3 * (time.perf_counter() - start))
        jax.block_until_ready(result)
        waited.append(1e3 * (time.perf_counter() - start))
    dispatch = min(unwaited)  # whatever else the machine had to do
    assert dispatch < np.median(waited) / 5  # so it is asynchronous
    times = do_bench(f, x, effort=FEW)
    assert times.median > np.median(waited) / 3
    assert times.median > 3 * dispatch


def test_compiling_is_apart():
    x = draw(64, 64)
    times = do_bench(jax.jit(lambda x: jnp.sin(x @ x)), x, effort=FEW)
    assert times.compile_ms is not None
    assert times.compile_ms > 5 * times.median
    assert times.memory is not None
    assert times.memory >= 2 * x.nbytes


def test_by_turns():
    """A B A B ..., the first calls and the warm-up aside; ratios are of neighbours."""
    order = []

    def sleeper(name, seconds):
        def run(x):
            order.append(name)
            time.sleep(seconds)
            return x

        return run

    both = compare({"a": sleeper("a", 0.01), "b": sleeper("b", 0.03)}, draw(4), effort=FEW)
    assert order == ["a", "b"] * 7
    middle, low, high = ratios(both["a"], both["b"])
    assert low <= middle <= high
    assert 2 < middle < 4
    with pytest.raises(ValueError, match="as many samples"):
        ratios(both["a"], do_bench(lambda x: x, draw(4), effort=Effort(seconds=0, least=2)))


def test_zeros_are_refused():
    with pytest.raises(ValueError, match=r"array 1 of the arguments is all 0\.0; time with random numbers"):
        prepare(jax.jit(jnp.add), draw(4), jnp.zeros(4))


@pytest.mark.parametrize("wrong", [{"least": 0}, {"seconds": -1.0}, {"least": 5, "most": 4}, {"warmup": -1}])
def test_effort(wrong):
    with pytest.raises(ValueError, match="an effort needs seconds >= 0"):
        Effort(**wrong)
