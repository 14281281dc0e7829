"""Which versions of other packages there must be. Each is looked at where it is first needed, so that one too old is
named, and not what it lacks.

Older ones lack something: jaxlib 0.11.0 what jax-triton 0.4.1 describes tensors with, and jax 0.11.0 a `ClosedJaxpr`
that makes arguments of constants; jax-triton 0.4.0 None for an argument; Triton 3.7 tensor descriptors from the host.
Flax 0.12.6 and Equinox 0.13.0 use what jax 0.11 took away.
"""

import importlib.metadata
import re
from collections.abc import Iterator

OLDEST = {"jax": "0.11.1", "jax-triton": "0.4.1", "triton": "3.8", "flax": "0.12.7", "equinox": "0.13.1"}
"""By distribution. The extras in pyproject.toml ask for these or later; for what all tests pass with, that is."""
UNTESTED = {"jax": "0.12", "jax-triton": "0.5", "triton": "3.10"}
"""From which on the kernels are tried with none: the extra `triton` stops there."""
KERNELS = ("jax", "jax-triton", "triton")
"""What the kernels run on."""


def installed(package: str) -> str | None:
    """The version of a distribution; None if there is none, or one that does not say."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(what: str, package: str) -> None:
    """Refuses a package that is too old.

    Raises:
      ImportError: with what needs it, what is needed, what was found, and what to do.
    """
    for old in too_old(package):
        raise ImportError(f'{what} needs {old}: pip install --upgrade "{package}>={OLDEST[package]}"')


def too_old(*packages: str) -> Iterator[str]:
    """For each package that is, what is needed and what was found."""
    for package in packages:
        found, oldest = installed(package), OLDEST[package]
        if found is not None and _numbers(found) < _numbers(oldest):
            yield f"{package} {oldest} or later, got {found}"


def untested(*packages: str) -> Iterator[str]:
    """A line for each package that is newer than what the kernels are tested with."""
    for package in packages:
        found = installed(package)
        if found is not None and package in UNTESTED and _numbers(found) >= _numbers(UNTESTED[package]):
            yield f"{package} {found} is newer than what the kernels are tested with (below {UNTESTED[package]})"


def _numbers(version: str) -> tuple[int, ...]:
    """Of the release: what follows (`rc1`, `.dev2`, `+cpu`) is not looked at."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(x) for x in found[0].split(".")) if found else ()
