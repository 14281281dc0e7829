"""What the documentation shows, found and run: the python blocks of pages, and the examples (`>>>`) of docstrings.

    python tests/snippets.py    # what there is, counted

The blocks of a page run in order, in one namespace, as a reader would run them. A block of `text` right behind one of
`python` is what that prints, with the error that ends it, if one does: lines may be broken anywhere, and `...`
stands for anything.
"""

import contextlib
import dataclasses
import doctest
import importlib
import io
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ("jax_flash_attn2", "jax_flash_attn2.masks", "jax_flash_attn2.flax", "jax_flash_attn2.equinox")
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$(?:\n\s*^\1```text\n(.*?)^\1```$)?", re.M | re.S)
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclasses.dataclass(frozen=True)
class Block:
    line: int
    """Of the page, before the first of the code."""
    code: str
    printed: str | None


def blocks(page: Path) -> list[Block]:
    text, dedent = page.read_text(), textwrap.dedent
    return [
        Block(text.count("\n", 0, found.start(2)), dedent(found[2]), None if found[3] is None else dedent(found[3]))
        for found in BLOCK.finditer(text)
    ]


def run(page: Path) -> None:
    """Raises what a block raises, or an AssertionError where one prints something else than the page says."""
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        code = compile("\n" * block.line + block.code, str(page), "exec")  # lines are the page's, in tracebacks too
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(code, namespace)
            except Exception as error:
                if block.printed is None:
                    raise
                out.write(f"{type(error).__name__}: {error}\n")
        if block.printed is not None and not doctest.OutputChecker().check_output(
            block.printed, out.getvalue(), LOOSELY
        ):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            raise AssertionError(f"{where}: the page says\n{block.printed}\nand this was printed:\n{out.getvalue()}")


def public_names() -> list[str]:
    """What users import, module and name."""
    names = []
    for name in MODULES:
        module = importlib.import_module(name)
        own = [n for n, x in vars(module).items() if not n.startswith("_") and getattr(x, "__module__", "") == name]
        names += [f"{name}:{n}" for n in getattr(module, "__all__", own)]
    return names


def examples(name: str) -> list[doctest.DocTest]:
    """Of a public name and its methods; they find in place what a reader has imported by then."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    module, _, attribute = name.partition(":")
    module = importlib.import_module(module)
    known = {n: getattr(module, n) for n in getattr(module, "__all__", [attribute])}
    known |= {"jax": jax, "jnp": jnp, "np": np}
    found = doctest.DocTestFinder().find(getattr(module, attribute), attribute, globs=known)
    return [test for test in found if test.examples]


def run_examples(name: str) -> int:
    """How many there were; raises where one gives something else."""
    count = 0
    for test in examples(name):
        doctest.DebugRunner(optionflags=LOOSELY).run(test, clear_globs=False)
        count += len(test.examples)
    return count


if __name__ == "__main__":
    for page in PAGES:
        print(f"{len(blocks(page)):4} blocks  {page.relative_to(ROOT)}")
    with_examples = {name: sum(len(test.examples) for test in examples(name)) for name in public_names()}
    print(f"{sum(len(blocks(page)) for page in PAGES)} blocks on {len(PAGES)} pages")
    count = sum(x > 0 for x in with_examples.values())
    print(f"{sum(with_examples.values())} examples in the docstrings of {count} of {len(with_examples)} public names")
