"""Each fault of `faults.py` a few times; `make faults` injects more."""

import faults
import pytest

QUICK = ("kill: keeping", "disk: full", "disk: cut short", "cache: damaged", "cache: paths", "cache: modes")
TIMES = {"cache: damaged": 300, "cache: paths": 20}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in faults.FAULTS]
)
def test_nothing_is_wrong_and_nothing_lost(name):
    if "compiling" in name or "lower" in name or "versions" in name or "home" in name:
        pytest.importorskip("jax_triton", reason="lowering for CUDA needs jax-triton")
        pytest.importorskip("jax_cuda13_plugin", reason="lowering for CUDA needs JAX's CUDA plugin")
    faults.run(name, TIMES.get(name, 2 if name in QUICK else 1))
