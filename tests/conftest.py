"""Settings of every test process: CPU, eight devices, and JAX at its strictest about dtypes."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_FLASH_ATTN2_CACHE", str(pathlib.Path(__file__).resolve().parents[1] / ".cache" / "kernels"))

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

INTERPRETED = ("test_kernels.py",)


def pytest_ignore_collect(collection_path):
    """Interpreter tests live in a process of their own, with TRITON_INTERPRET=1 from its start; others must not."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return True if interpreted != (collection_path.name in INTERPRETED) else None


@pytest.fixture(scope="module")
def compiled_quickly():
    """For tests that spend nearly all their time compiling what then runs once, on a few numbers."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
