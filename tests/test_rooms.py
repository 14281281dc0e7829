"""The package is rooms, each above those that it may use. An import upwards would make a reader's map wrong."""

import ast
import graphlib
import pathlib
import tomllib

import jax_flash_attn2

PACKAGE = pathlib.Path(jax_flash_attn2.__file__).parent
ROOMS = (
    "kernels",
    "base",
    "functions",
    "tiles",
    "masks",
    "xla",
    "gpu",
    "primitives",
    "call",
    "context",
    "serving",
    "doors",
)
"""From the lowest to the highest; "doors" are the files of the package itself."""
APART = {("masks", "xla"), ("masks", "gpu"), ("xla", "gpu")}
"""Side by side: neither uses the other."""


def room(parts):
    return parts[0] if len(parts) > 1 else "doors"


def imports(path):
    """The rooms that a file imports, wherever in it, with the line."""
    own = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*own[: len(own) - node.level], *module]
            elif module[0] == "jax_flash_attn2":
                module = module[1:]
            else:
                continue
            for alias in node.names:
                whole = [*module, alias.name]
                yield (whole[0] if whole[0] in ROOMS else "doors"), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("jax_flash_attn2."):
                    yield alias.name.split(".")[1], node.lineno


def test_no_room_imports_upwards():
    wrong = []
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room(f.relative_to(PACKAGE).parts) for f in files} | {"kernels"} == set(ROOMS)
    for path in files:
        here = room(path.relative_to(PACKAGE).parts)
        for there, line in imports(path):
            if ROOMS.index(there) > ROOMS.index(here) or {(here, there), (there, here)} & APART:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)


def test_kernels_know_only_triton():
    for path in (PACKAGE.parent / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in ("triton", "typing"), path
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in ("triton", "typing") for alias in node.names), path


def test_benchmarks_import_in_no_circle():
    graph = {}
    root = PACKAGE.parent / "benchmarks"
    for path in root.rglob("*.py"):
        own = path.relative_to(root).with_suffix("").parts
        graph[".".join(own)] = set()
        for n in ast.walk(ast.parse(path.read_text())):
            if isinstance(n, ast.ImportFrom) and n.level:
                parts = [*own[: len(own) - n.level], *((n.module or "").split(".") if n.module else [])]
                names = [[*parts, alias.name] if not n.module else parts for alias in n.names]
                graph[".".join(own)] |= {".".join(name) for name in names}
    assert "codegen.points" in graph["gpu"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


LONGEST = 400
"""Lines of a file, above which it has more than one idea in it."""


def test_files_are_short():
    files = [
        f for folder in ("jax_flash_attn2", "kernels", "benchmarks") for f in (PACKAGE.parent / folder).rglob("*.py")
    ]
    lines = {f.relative_to(PACKAGE.parent): len(f.read_text().splitlines()) for f in files}
    assert lines
    assert not {f: n for f, n in lines.items() if n > LONGEST}


def test_every_room_is_installed():
    """Not only where the sources are: the list of packages in pyproject.toml is all of them."""
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {f"jax_flash_attn2.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert {*listed} == rooms | {"jax_flash_attn2", "jax_flash_attn2.kernels"}
