"""What the release workflow does to a checkout, and asks of it. Needs nothing but Python.

    python .ci/release.py prepare TAG URL    checks that the tag is this version; writes the repository's address
    python .ci/release.py notes              prints the version's part of the changelog

Where the repository is, only the host that builds the release knows for certain, so no file here says it: `prepare`
writes it into pyproject.toml (the project's links) and README.md (whose relative links lead nowhere on an index).
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version(pyproject: str) -> str:
    """As pyproject.toml has it."""
    return tomllib.loads(pyproject)["project"]["version"]


def with_urls(pyproject: str, url: str, tag: str) -> str:
    """The text of pyproject.toml, with the project's links."""
    if "urls" in tomllib.loads(pyproject)["project"]:
        raise SystemExit("pyproject.toml has [project.urls] already")
    links = {
        "Repository": url,
        "Documentation": f"{url}/blob/{tag}/README.md",
        "Changelog": f"{url}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    return pyproject + "\n[project.urls]\n" + "".join(f'{name} = "{link}"\n' for name, link in links.items())


def with_links(readme: str, url: str, tag: str) -> str:
    """The text of README.md, with links and pictures that do not depend on where it is read."""
    readme = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\g<1>{url}/raw/{tag}/", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)", rf"\g<1>{url}/blob/{tag}/", readme)


def notes(changelog: str, of: str) -> str:
    """What the changelog says of a version."""
    found = re.search(rf"^## {re.escape(of)} \(([^\n]*)\)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"CHANGELOG.md must have a part '## {of} (DATE)'")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", found[1]):
        raise SystemExit(f"CHANGELOG.md must say when {of} was released, '## {of} (YYYY-MM-DD)', got ({found[1]})")
    return found[2].strip()


def prepare(root: Path, tag: str, url: str) -> None:
    """Writes the address into the checkout; exits if the tag is not of this version."""
    pyproject, readme = root / "pyproject.toml", root / "README.md"
    text = pyproject.read_text()
    if tag != f"v{version(text)}":
        raise SystemExit(f"the tag must be v{version(text)}, the version in pyproject.toml, got {tag}")
    notes((root / "CHANGELOG.md").read_text(), version(text))
    pyproject.write_text(with_urls(text, url, tag))
    readme.write_text(with_links(readme.read_text(), url, tag))


def main(command: str, *arguments: str) -> None:
    """Runs one of the two."""
    if command == "prepare":
        prepare(ROOT, *arguments)
    elif command == "notes":
        print(notes((ROOT / "CHANGELOG.md").read_text(), version((ROOT / "pyproject.toml").read_text())))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
