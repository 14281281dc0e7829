"""The programs that XLA compiles for H100s, without one: what hides behind what, what is held, what it leaves out.

In a process of its own: GPUs that are only compiled for are a backend beside the CPU's.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax_cuda13_plugin")
pytest.importorskip("jax_triton")

ROOT = Path(__file__).parents[1]


@functools.cache
def compiled(method):
    """What `python -m benchmarks.ahead` says of a method."""
    return json.loads(printed("-m", "benchmarks.ahead", method).splitlines()[-1])


def printed(*arguments):
    """By Python, with these, where there may be GPUs to compile for."""
    environment = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    ran = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


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


SPLIT_AND_JOINED = """
import sys, tempfile
from benchmarks.ahead import devices
with tempfile.TemporaryDirectory() as folder:
    gpu, *_ = devices(folder, "1x1x1")
    import jax, jax.numpy as jnp
    from jax_flash_attn2.base.rounding import joined, split
    x = jax.ShapeDtypeStruct((999,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(gpu))
    for dtype in ("bfloat16", "float16"):
        print(jax.jit(lambda x: joined(*split(x, dtype))).lower(x).compile().as_text())
"""


def test_what_rounding_loses():
    """XLA leaves out conversions there and back, which it does not on CPUs: nothing may be counted twice."""
    x = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    bfloat16, float16 = re.findall(r"^%fused.*?^}", printed("-c", SPLIT_AND_JOINED), re.MULTILINE | re.DOTALL)
    np.testing.assert_allclose(evaluated(bfloat16, x), x, rtol=2.0**-15)
    np.testing.assert_allclose(evaluated(float16, x), x, rtol=2.0**-19)


HLO = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "bitcast": lambda x, dtype: x.view(dtype),
    "broadcast": lambda x: x,
    "compare": lambda x, y, direction: {"EQ": np.equal, "NE": np.not_equal, "LT": np.less}[direction](x, y),
    "convert": lambda x, dtype: x.astype(dtype),
    "minimum": np.minimum,
    "multiply": np.multiply,
    "reduce-precision": lambda x, dtype: x.astype(np.float16).astype(dtype),
    "round-nearest-even": np.rint,
    "select": np.where,
    "shift-left": np.left_shift,
    "shift-right-arithmetic": np.right_shift,
    "subtract": np.subtract,
}
DTYPES = {"f32": np.float32, "s32": np.int32, "s8": np.int8, "pred": bool}


def evaluated(computation, x):
    """What a fusion of elementwise operations makes of x."""
    values = {}
    for name, dtype, operation, operands, rest in re.findall(r"%(\S+) = (\w+)\S* ([\w-]+)\((.*?)\)(.*)", computation):
        arguments = [values[operand] for operand in re.findall(r"%([^\s,]+)", operands)]
        options = {"dtype": DTYPES.get(dtype)} if operation in ("bitcast", "convert", "reduce-precision") else {}
        options |= dict(re.findall(r"(direction)=(\w+)", rest))
        if operation == "parameter":
            values[name] = x
        elif operation == "constant":
            values[name] = np.asarray(float(operands), DTYPES[dtype])
        else:
            values[name] = HLO[operation](*arguments, **options)
    return values[name]  # the root is the last
