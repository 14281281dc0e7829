"""The documentation does what it says: every python block and every example of a docstring runs; links lead somewhere.

`make docs` builds the site, and there links between pages are checked, down to their headings.
"""

import importlib.util
import re

import jax
import pytest
import snippets

_spec = importlib.util.spec_from_file_location("measured", snippets.ROOT / "docs" / "measured.py")
measured = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(measured)

WITH_BLOCKS = [page for page in snippets.PAGES if snippets.blocks(page)]
PAGE = """# A page

```python
x = 1
```

-   an item

    ```python
    print(x, "a b")
    ```

    ```text
    1
    a b
    ```

```python
int("z")
```
```text
ValueError: ...'z'
```
"""
WITH_EXAMPLES = [name for name in snippets.public_names() if snippets.examples(name)]


@pytest.fixture(autouse=True)
def as_people_write():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(snippets.ROOT)))
def test_blocks(page):
    snippets.run(page)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    assert snippets.run_examples(name)


def test_a_page_is_held_to_what_it_prints(tmp_path, monkeypatch):
    """What a block prints, or the error that ends it, is compared; blocks share names; lines are those of the page."""
    monkeypatch.setattr(snippets, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    want = [(3, None), (9, "1\na b\n"), (18, "ValueError: ...'z'\n")]
    assert [(block.line, block.printed) for block in snippets.blocks(page)] == want
    snippets.run(page)
    page.write_text(PAGE.replace("    a b", "    b a"))
    with pytest.raises(AssertionError, match=r"page.md:9: the page says\n1\nb a\n\nand this was printed:\n1 a b"):
        snippets.run(page)
    page.write_text(PAGE.replace("x = 1", "x = y"))
    with pytest.raises(NameError):
        snippets.run(page)


def test_links_of_the_readme():
    """To files that are there, and to headings that are on their pages."""
    text = (snippets.ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (snippets.ROOT / target).exists(), target


def test_numbers_are_those_measured():
    """`python docs/measured.py` writes them anew."""
    for page in measured.PAGES:
        text = page.read_text()
        assert measured.filled_in(text) == text
        assert set(re.findall(r"<!-- ([\w-]+ [\w-]+) -->", text)) <= set(measured.places())


def test_everything_public_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in (snippets.ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.M))
    wanted = {name.replace(":", ".") for name in snippets.public_names()}
    wanted -= {"jax_flash_attn2.__version__", "jax_flash_attn2.masks"}
    assert shown == wanted
