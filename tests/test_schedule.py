"""The programs that XLA compiles for eight H100s, without one: what hides behind what, and what is held.

In a process of its own: GPUs that are only compiled for are a backend beside the CPU's.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax_cuda13_plugin")
pytest.importorskip("jax_triton")

ROOT = Path(__file__).parents[1]


@functools.cache
def compiled(method):
    """What `python -m benchmarks.ahead` says of a method."""
    environment = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.ahead", method],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_ring():
    """One permute a step, begun before the step's kernels and done after them; but the way home, one more. No keys are
    gathered."""
    made = compiled("ring")
    loops = [steps for steps in made["schedule"].values() if "kernel" in steps]
    begin, end = "collective-permute-start", "collective-permute-done"
    assert sorted(loops, key=len) == [[begin, "kernel", end], [begin, "kernel", "kernel", end]]
    (rest,) = (steps for steps in made["schedule"].values() if "kernel" not in steps)
    assert rest == ["while", "while", "collective-permute"]
    assert made["temporary MiB"] <= 480  # o is 64 of it, and what it lost 32


@pytest.mark.thorough
def test_all_gather():
    """The gathering of the next group of heads hides behind this one's kernels, and so does the scattering of the
    last."""
    made = compiled("all_gather")
    loops = [steps for steps in made["schedule"].values() if "kernel" in steps and "while" not in steps]
    forward, backward = sorted((steps for steps in loops if len(steps) > 1), key=len)
    assert forward == ["all-gather-start", "kernel", "all-gather-done"]
    begin, end = backward.index("reduce-scatter-start"), backward.index("reduce-scatter-done")
    assert backward[begin + 1 : end] == ["kernel", "kernel"]
    assert made["temporary MiB"] <= 450


@pytest.mark.thorough
def test_ulysses():
    """Exchanges of q, k and v; of the gradients of o, which is not asked for itself, and of q, k and v."""
    made = compiled("ulysses")
    (steps,) = (steps for steps in made["schedule"].values() if "kernel" in steps)
    assert sum(step in ("all-to-all-start", "all-to-all") for step in steps) == 7
    assert made["temporary MiB"] <= 240
