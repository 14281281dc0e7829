"""With `--gpu`, GPU tests are run or the run fails; here with a platform that is announced and does nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = """
import os, jax, pytest
real = jax.devices
jax.devices = lambda backend=None: ["a GPU"] if backend == "gpu" else real(backend)
count = 0

@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    global count
    count += 1
    if os.environ["FAKE"] == "skips" or count > 100:
        pytest.skip("for another reason")
    assert count != 7, "the seventh"
    return True
"""


def run(tmp_path, fake, *options):
    """pytest on the GPU tests: its exit status and what it said."""
    (tmp_path / "fake_gpu.py").write_text(FAKE)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "FAKE": fake, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    environment.pop("JAX_PLATFORMS", None)
    if not fake:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", "-p", "no:cacheprovider", *options]
    command += ["-p", "fake_gpu"] if fake else []
    done = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_without_a_gpu(tmp_path):
    status, said = run(tmp_path, "")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--gpu: " in said
    assert "JAX_PLATFORMS is 'cpu'" in said


def test_no_test_passes(tmp_path):
    status, said = run(tmp_path, "skips")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "needs a GPU" not in said
    assert "no GPU test passed" in said


def test_every_test_is_run_once(tmp_path):
    """None is skipped for want of a GPU; what passed is not run again, and what failed is told at once."""
    kept = tmp_path / "kept"
    status, said = run(tmp_path, "passes", "--keep", str(kept), "-rs")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "needs a GPU" not in said
    assert "1 failed, 99 passed" in said
    assert "the seventh" in (kept / "failed.txt").read_text()
    assert len((kept / "passed.txt").read_text().splitlines()) == 99
    status, said = run(tmp_path, "passes", "--keep", str(kept), "--seconds", "0")
    assert status == pytest.ExitCode.INTERRUPTED
    assert "1 passed, " in said
    assert "99 deselected" in said
