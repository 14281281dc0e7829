"""Settings of every test process: CPU unless `--gpu`, eight devices, JAX at its strictest about dtypes, compiling once.

What XLA makes of a program is kept in `.cache/xla`, and our kernels in `.cache/kernels`: a second run compiles only
what has changed. Programs are compiled with few optimisations and by XLA's older emitters, in half the time, as a test
runs each once, on a few numbers; `--fully` compiles them as a user's are.
"""

import os
import pathlib

os.environ.setdefault("JAX_FLASH_ATTN2_CACHE", str(pathlib.Path(__file__).parents[1] / ".cache" / "kernels"))

import caching
import gpu_runs
import jax
import pytest
import selection

jax.config.update("jax_numpy_dtype_promotion", "strict")
caching.use()

INTERPRETED = ("test_kernels.py", "test_context_kernels.py", "test_decode_kernels.py", "test_translate.py")
OLDER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
"""The newer ones set up MLIR's rewrite patterns anew for each kernel, 15 ms or more. XLA ignores what it does not know
here."""


def pytest_addoption(parser):
    parser.addoption("--fully", action="store_true", help="compile with all optimisations, except where a file says no")
    selection.add_option(parser)
    gpu_runs.add_options(parser)


def pytest_configure(config):
    gpu_runs.configure(config)
    fully, flags = config.getoption("--fully"), os.environ.get("XLA_FLAGS", "")
    jax.config.update("jax_disable_most_optimizations", not fully)
    if not fully and OLDER_EMITTERS not in flags:  # a worker has them already
        os.environ["XLA_FLAGS"] = f"{flags} {OLDER_EMITTERS}"  # XLA reads it with its first program
    if not hasattr(config, "workerinput"):  # before any worker starts
        caching.trim()


def pytest_report_header(config):
    return selection.header(config)


def pytest_ignore_collect(collection_path):
    """Interpreter tests live in a process of their own, with TRITON_INTERPRET=1 from its start; others must not."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return True if interpreted != (collection_path.name in INTERPRETED) else None


def _setting(name, value):
    before = jax.config.read(name)
    jax.config.update(name, value)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def compiled_quickly():
    """Even under `--fully`: for files that spend nearly all their time compiling what then runs once."""
    yield from _setting("jax_disable_most_optimizations", True)


@pytest.fixture
def compiled_fully():
    """Even without `--fully`, but for the emitters: for what looks at, or stands for, the code that users get."""
    yield from _setting("jax_disable_most_optimizations", False)


@pytest.fixture
def compiled_anew():
    """Nothing comes from disk: for what times compiling."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # which else remembers that it is on
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_collection_modifyitems(config, items):
    gpu_runs.select(config, items)
    selection.select(config, items)
