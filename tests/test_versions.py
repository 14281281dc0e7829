"""Which versions go together: what is too old is refused by name, and the table, the list and pyproject.toml agree."""

import importlib
import re
import subprocess
import sys
import tomllib

import jax
import matrix
import pytest

import jax_flash_attn2
import jax_flash_attn2.equinox
import jax_flash_attn2.flax
from jax_flash_attn2 import __main__ as command
from jax_flash_attn2 import supported
from jax_flash_attn2.base import versions
from jax_flash_attn2.gpu import loading

PROJECT = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = matrix.LOCK.read_text()


def having(monkeypatch, **found):
    """These versions instead of those that are installed."""
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda package: found.get(package) or real(package))


# Messages.

AN_OLD_JAX = """
import importlib.metadata
importlib.metadata.version = lambda package: "0.10.2"
import jax_flash_attn2
"""


def test_an_old_jax_is_refused():
    done = subprocess.run([sys.executable, "-c", AN_OLD_JAX], cwd=matrix.ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        'ImportError: jax_flash_attn2 needs jax 0.11.1 or later, got 0.10.2: pip install --upgrade "jax>=0.11.1"'
    )


@pytest.mark.parametrize(("name", "old", "oldest"), [("flax", "0.12.6", "0.12.7"), ("equinox", "0.13.0", "0.13.1")])
def test_adapters_refuse_what_is_too_old(monkeypatch, name, old, oldest):
    having(monkeypatch, **{name: old})
    wanted = (
        f'jax_flash_attn2.{name} needs {name} {oldest} or later, got {old}: pip install --upgrade "{name}>={oldest}"'
    )
    with pytest.raises(ImportError, match=f"^{re.escape(wanted)}$"):
        importlib.reload(getattr(jax_flash_attn2, name))


@pytest.mark.parametrize("version", ["0.11.1", "0.11.1.dev20260801", "0.11.1rc1", "0.12", "0.12.0+cpu", "1", None])
def test_what_is_new_enough(monkeypatch, version):
    monkeypatch.setattr(versions, "installed", lambda package: version)
    versions.check("jax_flash_attn2", "jax")


@pytest.mark.parametrize(("name", "old", "oldest"), [("jax-triton", "0.4.0", "0.4.1"), ("triton", "3.7.1", "3.8")])
def test_kernels_refuse_what_is_too_old(monkeypatch, name, old, oldest):
    having(monkeypatch, **{name: old})
    with pytest.raises(ImportError, match=rf"^the Triton kernels need .*\({name} {oldest} or later, got {old}\): pip"):
        loading.launcher()
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), "float32")
    with jax_flash_attn2.gpu_target(compute_capability=80):
        assert not supported(x, x, x, implementation="triton")
    assert supported(x, x, x)


def test_what_is_too_new_is_said_where_it_fails(monkeypatch):
    """Something that is used is no longer there; with versions that are known, that is a bug, and stays what it is."""

    def lacks(*_):
        raise AttributeError("module 'jax_triton' has no attribute 'triton_call'")

    monkeypatch.setattr(loading.importlib, "import_module", lacks)
    having(monkeypatch, **{"jax": "0.11.2", "jax-triton": "0.5.0", "triton": "3.9.0"})
    with pytest.raises(ImportError, match=r"'triton_call'; jax-triton 0\.5\.0 is newer than .* \(below 0\.5\)\): pip"):
        loading.launcher()
    having(monkeypatch, **{"jax": "0.11.2", "jax-triton": "0.4.1", "triton": "3.9.0"})
    with pytest.raises(AttributeError):
        loading.launcher()


def test_what_fails_is_noted(monkeypatch):
    launch = pytest.importorskip("jax_flash_attn2.gpu.launch", reason="there is no Triton here")
    newer = "triton 3.10.0 is newer than what the kernels are tested with (below 3.10)"
    having(monkeypatch, jax="0.11.2", triton="3.10.0")
    monkeypatch.setattr(launch, "_NEWER", tuple(versions.untested(*versions.KERNELS)))
    with pytest.raises(ValueError, match="no") as raised, launch._noted():
        raise ValueError("no")
    assert raised.value.__notes__ == [newer]
    assert ("newer", newer) in list(command.about())


# What is promised.


def bounds(requirements):
    """The lowest and the highest of each, as they are written."""
    found = [(re.match(r"[\w-]+", x)[0], *(re.search(rf"{s}([\d.]+)", x) for s in (">=", "<"))) for x in requirements]
    return {name: tuple(x and x[1] for x in both) for name, *both in found}


def test_the_package_asks_for_what_it_checks():
    kernels = bounds(EXTRAS["triton"])
    assert {name: kernels[name] for name in versions.KERNELS} == {
        name: (versions.OLDEST[name], versions.UNTESTED[name]) for name in versions.KERNELS
    }
    assert bounds(PROJECT["dependencies"])["jax"][0] == versions.OLDEST["jax"]
    for name in ("flax", "equinox"):
        lowest, _ = bounds(EXTRAS[name])[name]
        assert versions._numbers(lowest) >= versions._numbers(versions.OLDEST[name])


@pytest.mark.parametrize("name", ["jax", "triton", "flax", "equinox"])
def test_a_row_has_the_oldest(name):
    lowest, _ = bounds([*PROJECT["dependencies"], *EXTRAS["triton"], *EXTRAS["flax"], *EXTRAS["equinox"]])[name]
    pinned = [version for row in matrix.rows() for pin in row.pins if (version := matrix._pinned(pin, name))]
    lowest = f"{lowest}.0" if lowest.count(".") < 2 else lowest
    assert lowest in pinned


def test_every_python_is_run():
    named = {x.rpartition(" ")[2] for x in PROJECT["classifiers"] if re.search(r"Python :: 3\.", x)}
    assert named == {matrix.PINNED_PYTHON} | {row.python for row in matrix.rows() if row.python}
    assert PROJECT["requires-python"] == f">={min(named, key=versions._numbers)}"


def test_the_table_is_the_list():
    page = matrix.PAGE.read_text()
    assert page == matrix.filled_in(page), "python tests/matrix.py --write"
    assert page.count(matrix.table()) == 1
    said = re.search(
        r"Tested together: jax (\S+),\njax-triton (\S+), triton (\S+) ", (matrix.ROOT / "README.md").read_text()
    )
    assert said.groups() == tuple(matrix._pinned(LOCK, name) for name in ("jax", "jax-triton", "triton"))


@pytest.mark.parametrize("row", matrix.rows(), ids=lambda row: row.name)
def test_rows_name_tests_that_exist(row):
    assert row.runs
    for run in row.runs:
        assert [x for x in run.tests if not (matrix.ROOT / f"tests/test_{x}.py").exists()] == []


def test_what_is_due():
    """Each day has something, and all of it is had in three."""
    assert {row.day for row in matrix.rows()} == {None, 0, 1, 2}


# The runner.


@pytest.fixture
def listed(monkeypatch):
    """Three rows, of which one is for another day and one for a Python that nobody has."""
    found = [matrix.Row("good", []), matrix.Row("later", [], day=1), matrix.Row("strange", [], python="3.99")]
    monkeypatch.setattr(matrix, "rows", lambda: found)
    monkeypatch.setattr(matrix, "passes", lambda row, jobs, third: bool(row.python and matrix.environment(row)) or True)
    return found


def test_what_is_left_out_is_named(listed, capsys):
    assert matrix.main(["--third", "0"]) == 0
    said = [re.split(r"\s+\d+ s  ", line) for line in capsys.readouterr().out.strip().splitlines()[1:]]
    later = "another day (make test-matrix THIRD=1)"
    assert said == [["good", "passed"], ["later", later], ["strange", "not here: no Python 3.99"]]


@pytest.mark.parametrize("third", [None, 2])
def test_a_third_of_the_tests(third, monkeypatch):
    """On a day, of the runs that come in thirds."""
    commands = []
    run = lambda command, **options: commands.append(command) or subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(matrix, "environment", lambda row: "python")
    monkeypatch.setattr(matrix.subprocess, "run", run)
    runs = [matrix.Run("all", ["xla"]), matrix.Run("some", ["xla"], thirds=True)]
    assert matrix.passes(matrix.Row("any", runs), 2, third)
    assert ["--part" in command for command in commands] == [False, third is not None]
    assert third is None or commands[1][-2:] == ["--part", "2"]


def test_nothing_run_is_no_success(listed):
    assert matrix.main(["strange"]) == 1
    with pytest.raises(SystemExit):
        matrix.main(["unknown"])


@pytest.mark.parametrize(("hopeful", "status"), [(False, 1), (True, 0)])
def test_failures(listed, monkeypatch, capsys, hopeful, status):
    listed.append(matrix.Row("bad", [], hopeful=hopeful))
    monkeypatch.setattr(matrix, "passes", lambda row, jobs, third: row.name == "good")
    assert matrix.main(["good", "bad"]) == status
    assert ("failed, and may" if hopeful else "FAILED") in capsys.readouterr().out


PIP = {
    "ERROR: Could not find a version that satisfies it\nERROR: No matching distribution found for jax>9": "not here",
    "  fatal: unable to access 'https://host.example/': Could not resolve host": "not here",
    "ERROR: No space left on device": "FAILED",
}


@pytest.mark.parametrize("said", PIP)
def test_only_what_is_not_there_is_left_out(monkeypatch, said):
    real = subprocess.run
    script = f"import sys; print({said!r}, file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(matrix.subprocess, "run", lambda _, **options: real([sys.executable, "-c", script], **options))
    monkeypatch.setattr(matrix, "passes", lambda row, jobs, third: matrix._pip("python", "jax>9"))
    became = matrix.outcome(matrix.Row("any", []), 2, None)
    assert became.startswith(PIP[said])
    assert said.strip().splitlines()[-1] in became
