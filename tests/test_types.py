"""What type checkers say of a user's program: nothing, but of the lines that are wrong."""

import json
import pathlib
import re
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).with_name("user_program.py")
ROOT = PROGRAM.parents[1]
WRONG = [n for n, line in enumerate(PROGRAM.read_text().splitlines(), 1) if line.endswith("# wrong")]


def said(command, **options):
    run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, **options)
    assert run.returncode == 1, run.stdout + run.stderr
    return run.stdout


def test_mypy():
    """In strict mode, as of a package that is installed: its own files are followed, not judged."""
    options = [
        "--strict",
        "--follow-imports=silent",
        "--no-warn-unused-ignores",
        "--cache-dir",
        ROOT / ".cache" / "mypy",
    ]
    out = said(["mypy", *options, PROGRAM], env={"MYPYPATH": str(ROOT)}, cwd=ROOT)
    found = sorted({int(n) for n in re.findall(r"user_program\.py:(\d+): error", out)})
    assert found == WRONG, out


def test_pyright(tmp_path):
    """basedpyright is pyright with its node; in pyright's own strict mode."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "include": [str(PROGRAM)]}
    unknown = ("MemberType", "LambdaType", "VariableType")  # JAX's own
    settings |= {f"reportUnknown{name}": False for name in unknown}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    out = said(["basedpyright", "--pythonpath", sys.executable, "--outputjson", "-p", tmp_path])
    errors = [x for x in json.loads(out)["generalDiagnostics"] if x["severity"] == "error"]
    assert sorted({x["range"]["start"]["line"] + 1 for x in errors}) == WRONG, json.dumps(errors, indent=1)[:4000]
