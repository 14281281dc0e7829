"""What `make test` says of its stages, and which tests it leaves out."""

import os
import tomllib
import types

import caching
import pytest
import selection
import stages
from cases import CASES
from stages import Stage

MAKEFILE = """
good:
	@echo was made
bad:
	@exit 3
never:
	@touch never
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Another root, with a Makefile of its own."""
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name, path in {"ROOT": ".", "FIGURES": "stages.toml", "PASSED": "passed"}.items():
        monkeypatch.setattr(stages, name, tmp_path / path)
    monkeypatch.delenv("STAGES", raising=False)
    monkeypatch.delenv("MAKE", raising=False)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    return tmp_path


def test_a_failure_ends_it(project, capfd):
    assert stages.main("test", "good", "bad", "never") != 0
    said = capfd.readouterr().out
    assert "was made" in said
    assert "FAILED" in said
    assert "=== bad failed; by itself: make bad" in said
    assert not (project / "never").exists()


def test_figures_are_written_and_kept_to(project, capfd, monkeypatch):
    """Fresh the first time, again the second, fresh once more when a file has changed."""
    assert stages.main("test", "good") == 0
    monkeypatch.setenv("STAGES", "write")
    assert stages.main("test", "good") == 0
    assert tomllib.loads((project / "stages.toml").read_text()) == {"test": {"good": {"again": 0}}}
    (project / "pyproject.toml").write_text("# changed")
    assert stages.main("test", "good") == 0
    assert tomllib.loads((project / "stages.toml").read_text()) == {"test": {"good": {"again": 0, "fresh": 0}}}
    assert "slower" not in capfd.readouterr().out


def test_more_than_a_fifth_is_said():
    seconds = {"on time": 119.0, "slow": 121.0, "small": 7.0, "new": 50.0}
    figures = {"on time": {"fresh": 100}, "slow": {"fresh": 100}, "small": {"fresh": 4}}
    lines = stages.table([Stage(n, 1.0, s, 0, False) for n, s in seconds.items()], figures).splitlines()
    assert [line.split()[0] for line in lines if "slower" in line] == ["slow"]
    assert "slower than expected by 21%" in lines[2]
    assert lines[-1].split() == ["all", "4", "297"]


def item(*names, mark=None):
    params = {str(i): types.SimpleNamespace(name=name) for i, name in enumerate(names)}
    return types.SimpleNamespace(
        name="-".join(names),
        callspec=types.SimpleNamespace(params=params),
        get_closest_marker=lambda name: name if name == mark else None,
    )


ITEMS = {
    "pair": [item(f"pair_{n:02}") for n in range(45)],
    "bias": [item(case.name) for case in CASES if case.name.startswith("bias_")],
    "marked": [item(f"case{n}", mark="in_thirds") for n in range(45)],
}


@pytest.mark.parametrize("kind", ITEMS)
def test_thirds_are_all_together(kind):
    thirds = [[i for i, x in enumerate(ITEMS[kind]) if selection.kept(x, third)] for third in selection.THIRDS]
    assert sorted(n for third in thirds for n in third) == list(range(len(ITEMS[kind])))
    assert all(len(ITEMS[kind]) // 4 <= len(third) <= len(ITEMS[kind]) // 2 for third in thirds)


@pytest.mark.parametrize("third", selection.THIRDS)
def test_what_is_in_every_third_and_in_none(third):
    assert selection.kept(item("causal", "float16_bias"), third)
    assert selection.kept(types.SimpleNamespace(get_closest_marker=lambda name: None), third)
    assert not selection.kept(item("drawn", mark="thorough"), third)


def test_parts_are_all_together():
    """A third of any tests, whose names say which."""
    items = [types.SimpleNamespace(nodeid=f"test_xla.py::test[case{n}]") for n in range(90)]
    parts = [[x for x in items if selection.in_part(x, part)] for part in selection.THIRDS]
    assert sum(map(len, parts)) == len(items)
    assert all(15 <= len(part) <= 45 for part in parts)


def test_the_cache_is_bounded(tmp_path):
    """Those read last stay."""
    for age, name in enumerate("abc"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 0))
    caching.trim(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
