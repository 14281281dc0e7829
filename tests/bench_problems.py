"""Problems for the tests of the sweep: a good provider, and one for each way to fail. Imported by worker processes."""

import functools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError

from benchmarks.problem import Work
from benchmarks.status import Unsupported
from jax_flash_attn2 import Config, flash_attention, gpu_target


def make(seconds=0.0, start="here", flops=None):
    if start == "nowhere":
        raise ValueError("no inputs\nfor this case")
    time.sleep(seconds)
    return Doubling(flops)


class Doubling:
    """x -> 2 x."""

    tolerance, dtype = 1e-6, "float32"

    def __init__(self, flops):
        self.flops = flops  # with it, each process first measures its peak
        self.x = jax.random.normal(jax.random.key(0), (8, 8))

    def expected(self, provider):
        return 2 * self.x

    def work(self, provider):
        return getattr(self, provider)()

    def good(self):
        return Work(jax.jit(lambda x: x + x), (self.x,))

    def slow(self):
        return Work(lambda x: (time.sleep(0.02), x + x)[1], (self.x,))

    def wrong(self):
        return Work(jax.jit(lambda x: x + 2.001 * x - x), (self.x,))

    def nan(self):
        return Work(lambda x: x * np.nan, (self.x,))

    def throws(self):
        raise KeyError("no such thing\nand a second line")

    def elsewhere(self):
        raise Unsupported("another machine is needed")

    def untraceable(self):
        return Work(jax.jit(lambda x: x @ x[:3]), (self.x,))

    def refused_by_ptxas(self):
        def call(x):
            raise JaxRuntimeError("INTERNAL: ptxas fatal: Unsupported .version 9.4; current version is '8.8'")

        return Work(jax.jit(call), (self.x,))

    def too_large(self):
        """Tiles that no sm_86 has room for, compiled by Triton without a GPU."""
        q = jax.random.normal(jax.random.key(0), (1, 1024, 2, 256), jnp.bfloat16)
        attend = functools.partial(flash_attention, config=Config(128, 128, num_warps=8))
        return Work(ForCuda(attend), (q, q, q), functools.partial(gpu_target, compute_capability=86))

    def out_of_memory(self):
        return Work(lambda x: jnp.zeros((2**42,), x.dtype), (self.x,))

    def hangs(self):
        return Work(lambda x: time.sleep(1000), (self.x,))

    def hangs_later(self):
        return Work(Third(lambda: time.sleep(1000)), (self.x,))

    def raises_later(self):
        return Work(Third(lambda: 1 / 0), (self.x,))

    def exits(self):
        return Work(lambda x: os._exit(3), (self.x,))

    def killed(self):
        return Work(lambda x: os.kill(os.getpid(), signal.SIGKILL), (self.x,))


class ForCuda:
    """A jitted function that `prepare` lowers for a GPU that is not there."""

    def __init__(self, function):
        self.function = jax.jit(function)

    def __call__(self, *args):
        return self.function(*args)

    def lower(self, *args):
        return self.function.trace(*args).lower(lowering_platforms=("cuda",))


class Third:
    """Right twice, then something else."""

    def __init__(self, then):
        self.then, self.calls = then, 0

    def __call__(self, x):
        self.calls += 1
        return x + x if self.calls < 3 else self.then()
