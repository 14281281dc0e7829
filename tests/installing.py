"""Looks at what `make dist` built, and tries it where nothing else of the checkout is.

    python tests/installing.py FOLDER [--index]

The wheel must hold the package's sources and nothing else, the sdist what builds it. Then, without extras and with
"triton", it is installed into an empty environment, and `SMOKE` is run there in another folder. The environments' other
packages are links to those of this Python, from which pip may take any but can add none: that shows which packages the
wheel asks for, and in which versions, in no time. With --index pip chooses and downloads them, as it does for a user.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"jax_flash_attn2": "jax_flash_attn2", "kernels": "jax_flash_attn2/kernels"}
"""Where sources are, and where they are in the wheel."""

SMOKE = """
import importlib.util, sys
import jax, jax.numpy as jnp
import jax_flash_attn2 as fa

extra = sys.argv[1]
assert fa.__file__.startswith(sys.prefix), fa.__file__
assert bool(importlib.util.find_spec("triton")) == bool(extra)
x = jnp.linspace(-1.0, 1.0, 2 * 9 * 2 * 16).reshape(2, 9, 2, 16)

def loss(attention, x):
    return (attention(x, x[:, 1:], x[:, 1:]) ** 2).sum()

def close(a, b):  # sums of hundreds of float32, in another order
    return abs(a - b).max() < 1e-5 * abs(b).max()

def plain(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

def ours(q, k, v):
    return fa.flash_attention(q, k, v, causal=True, implementation="triton" if extra else None)

want, want_slope = jax.value_and_grad(loss, argnums=1)(plain, x)
got, slope = jax.value_and_grad(loss, argnums=1)(ours, x)
assert close(got, want) and close(slope, want_slope), (got, want)
"""


def contents(folder: Path) -> Path:
    """The wheel, if it and the sdist hold what they should."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    wanted = {
        f"{there}/{file.relative_to(ROOT / here)}"
        for here, there in FOLDERS.items()
        for file in (ROOT / here).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as opened:
        same("the wheel", {name for name in opened.namelist() if ".dist-info/" not in name}, wanted)
    with tarfile.open(sdist) as opened:
        got = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    other = {"pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    sources = {re.sub(r"^jax_flash_attn2/kernels/", "kernels/", name) for name in wanted}
    made = {name for name in got if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    same("the sdist", got - made, sources | other)
    return wheel


def same(what: str, got: set[str], wanted: set[str]) -> None:
    """Exits, and says the difference, if there is one."""
    if got != wanted:
        raise SystemExit(f"{what} lacks {sorted(wanted - got)} and should not have {sorted(got - wanted)}")


def needed(requirements: list[str], extras: set[str]) -> dict[str, Distribution]:
    """The distributions of this Python that are asked for, by name, and what these ask for."""
    found: dict[str, Distribution] = {}
    waiting = [(requirements, extras)]
    while waiting:
        texts, extras = waiting.pop()
        for asked in map(Requirement, texts):
            if asked.marker and not any(asked.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            name = canonicalize_name(asked.name)
            if name not in found:
                found[name] = distribution(name)
                waiting.append((found[name].requires or [], asked.extras))
    return found


def link(distributions: dict[str, Distribution], site: Path) -> None:
    """Makes them importable from another folder of packages, and known to pip."""
    for d in distributions.values():
        for top in {file.parts[0] for file in d.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(d.locate_file(top)).resolve())


def requires(wheel: Path) -> list[str]:
    """What the wheel asks for."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        return re.findall(r"^Requires-Dist: (.*)$", opened.read(name).decode(), re.MULTILINE)


def run(*command: str | Path, **options: Any) -> str:
    """What a command prints to `stdout`; exits if it fails."""
    done = subprocess.run(command, text=True, **options)
    if done.returncode:
        raise SystemExit(f"status {done.returncode} of: {' '.join(map(str, command))}")
    return done.stdout


def try_it(wheel: Path, extra: str, index: bool) -> None:
    """Installs the wheel by itself and runs it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python, smoke = folder / "env" / "bin" / "python", folder / "smoke.py"
        smoke.write_text(SMOKE)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
        if not index:
            where = "import sysconfig; print(sysconfig.get_path('purelib'))"
            link(needed(requires(wheel), {extra}), Path(run(python, "-c", where, stdout=subprocess.PIPE).strip()))
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
        run(*pip, *(() if index else ("--no-index",)), f"{wheel}[{extra}]" if extra else wheel)
        settings = {"JAX_PLATFORMS": "cpu", "JAX_FLASH_ATTN2_CACHE": "off", "TRITON_INTERPRET": "1" if extra else "0"}
        run(python, smoke, extra, cwd=folder, env=settings)
        run(python, "-m", "jax_flash_attn2", cwd=folder, env=settings)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--index", action="store_true")
    options = parser.parse_args()
    wheel = contents(options.folder)
    for extra in ("", "triton") if sys.platform == "linux" else ("",):  # there is no Triton elsewhere
        print(f"{wheel.name}[{extra}], installed by itself" if extra else f"{wheel.name}, installed by itself")
        try_it(wheel.resolve(), extra, options.index)


if __name__ == "__main__":
    main()
