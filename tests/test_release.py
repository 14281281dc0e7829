"""What is released is what the files say: names, versions, messages, forms, the workflow and its script."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import installing
import jax
import pytest
import yaml

from jax_flash_attn2 import __main__ as command
from jax_flash_attn2 import __version__
from jax_flash_attn2.base import errors

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = loaded(ROOT / ".ci" / "release.py")


def test_one_version():
    assert PROJECT["version"] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__


def test_cuda_is_triton_and_more():
    """What bounds the versions of the kernels' packages stands once."""
    extras = PROJECT["optional-dependencies"]
    assert all(f"{PROJECT['name']}[triton]" in extras[extra] for extra in ("cuda12", "cuda13"))
    assert all("<" in requirement for requirement in extras["triton"])


SOMEBODY_ELSES = re.compile(r"(?:install|add)(?:\s+-\S+)*\s+[\"'`]*jax[-_.]flash[-_.]attn2", re.IGNORECASE)
"""On PyPI, our import's name is another project's."""
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".in", ".txt", ".sh", ".ipynb", ".lock", ""}


def test_pattern_tells_them_apart():
    name = "jax_flash_attn2"
    for words in (f"pip install {name}", f'pip install -U "{name.replace("_", "-")}[cuda13]"', f"uv add\n  {name}"):
        assert SOMEBODY_ELSES.search(words), words
    assert not SOMEBODY_ELSES.search(errors.install("cuda13"))


def test_nobody_is_told_to_install_somebody_elses():
    wrong, seen = [], set()
    for folder, folders, files in os.walk(ROOT):
        hidden = [x for x in folders if x.startswith(".") and x not in (".ci", ".github")]
        folders[:] = sorted({*folders} - {*hidden, "__pycache__", "build", "dist", "site"})
        for file in (Path(folder) / name for name in files if Path(name).suffix in TEXT):
            seen.add(file.name)
            if SOMEBODY_ELSES.search(file.read_text(errors="ignore")):
                wrong.append(str(file.relative_to(ROOT)))
    assert {"README.md", "errors.py", "Makefile", "release.yml"} <= seen
    assert not wrong


def test_extras_that_messages_name_exist():
    extra = re.search(r"\.\[(\w+)\]", str(errors.missing_triton_error(ImportError("no triton"))))[1]
    assert extra in PROJECT["optional-dependencies"]


def test_hooks_have_the_lock_s_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = (repo["rev"] for repo in hooks if "ruff" in repo["repo"])
    assert f"\nruff=={rev.removeprefix('v')}\n" in (ROOT / "requirements-dev.lock").read_text()


def test_about(monkeypatch, capsys):
    """What forms ask for."""
    monkeypatch.setattr(command, "PACKAGES", ("jax", "not-there"))
    monkeypatch.setenv("TRITON_SOMETHING", "7")
    assert command.main([]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["version"].startswith(f"{__version__}, in ")
    assert (said["jax"], said["not-there"]) == (jax.__version__, "not installed")
    assert said["devices"].endswith("x cpu")
    assert said["runs"].startswith("xla on cpu: the Triton kernels need a GPU")
    assert said["kernels"].startswith("kept in ")
    assert said["setting"]


@pytest.mark.parametrize(
    "error",
    [
        errors.missing_triton_error(ImportError("no triton")),
        ValueError("the Triton kernels need compute capability 8.0"),
    ],
)
def test_about_of_a_gpu_that_cannot_run_kernels(monkeypatch, error):
    """Something is not installed, or it is too old."""

    def refuses(*_):
        raise error

    monkeypatch.setattr(command, "explained", refuses)
    monkeypatch.setenv(command.store.FOLDER, "off")
    said = dict(command.about())
    assert said["runs"].startswith("nothing: the Triton kernels need")
    assert said["kernels"] == "not kept"


# The workflow and its script.

URL = "https://host.example/us/it"


README = "![plot]({raw}a/b.png) and [words]({blob}docs/c.md#d), [paper](https://a.example), [up](#up)"
CHANGELOG = f"""# Changelog

## {__version__} (DATE)

- New.

## 0.0.1 (2029-01-01)

- Old.
"""


def checkout(folder, date="2030-01-31"):
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (folder / "README.md").write_text(README.format(raw="", blob=""))
    (folder / "CHANGELOG.md").write_text(CHANGELOG.replace("DATE", date))


def test_prepared(tmp_path):
    checkout(tmp_path)
    tag = f"v{__version__}"
    release.prepare(tmp_path, tag, URL)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert project["project"].pop("urls")["Issues"] == f"{URL}/issues"
    assert project == tomllib.loads((ROOT / "pyproject.toml").read_text())
    readme = README.format(raw=f"{URL}/raw/{tag}/", blob=f"{URL}/blob/{tag}/")
    assert (tmp_path / "README.md").read_text() == readme
    with pytest.raises(SystemExit, match=r"has \[project.urls\] already"):
        release.prepare(tmp_path, tag, URL)


def test_no_link_of_the_readme_is_left_relative():
    readme = release.with_links((ROOT / "README.md").read_text(), URL, "v1")
    assert f"]({URL}/blob/v1/CONTRIBUTING.md)" in readme
    assert not re.findall(r"""(?:\]\(|src=["']|href=["'])(?!https?:|#).*""", readme)


def test_refused(tmp_path):
    checkout(tmp_path)
    with pytest.raises(SystemExit, match=rf"the tag must be v{__version__}.*got v99"):
        release.prepare(tmp_path, "v99", URL)
    checkout(tmp_path, "unreleased")
    with pytest.raises(SystemExit, match=r"YYYY-MM-DD.*got \(unreleased\)"):
        release.prepare(tmp_path, f"v{__version__}", URL)
    assert "urls" not in tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]


def test_notes(tmp_path):
    checkout(tmp_path)
    text = (tmp_path / "CHANGELOG.md").read_text()
    assert release.notes(text, __version__) == "- New."
    assert release.notes(text, "0.0.1") == "- Old."
    with pytest.raises(SystemExit, match=r"must have a part '## 3\.0 \(DATE\)'"):
        release.notes(text, "3.0")


def test_workflow_may_do_no_more_than_it_must():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    jobs = workflow["jobs"]
    writes = {(name, what) for name, job in jobs.items() for what, how in job["permissions"].items() if how == "write"}
    assert workflow["permissions"] == {}
    assert writes == {("github", "contents"), ("pypi", "id-token")}
    assert [jobs[name].get("needs") for name in ("build", "try", "github", "pypi")] == [None, "build", "try", "github"]
    assert jobs["pypi"]["environment"] == "pypi"
    assert not any("run" in step for step in jobs["pypi"]["steps"])  # no code of ours runs where that is allowed


@pytest.mark.parametrize("form", ["bug", "slow", "feature"])
def test_forms(form):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    fields = form["body"]
    assert {"name", "description", "labels", "body"} == {*form}
    assert len({field["id"] for field in fields}) == len(fields)
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    if form["labels"] != ["enhancement"]:
        assert {"what", "code", "about", "explain"} <= {field["id"] for field in fields}


def test_needed_follows_extras_and_markers():
    """Of what `make dist` links, nothing may be there that was not asked for."""
    assert not installing.needed(["jax; extra == 'a'", "jax; python_version < '3'"], {""})
    assert {"jax", "jaxlib", "numpy"} <= {*installing.needed(["jax; extra == 'a'"], {"a"})}
    assert "triton" not in installing.needed(["jax"], {""})


def test_same_says_what_differs():
    with pytest.raises(SystemExit, match=r"the wheel lacks \['a'\] and should not have \['b'\]"):
        installing.same("the wheel", {"b"}, {"a"})
