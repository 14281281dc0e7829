"""What is kept of a compiled kernel (`store.py` says where and how), and what it is known by.

Knows Triton's words: `launch` hands over what a compiler would be given.
"""

import dataclasses
import hashlib
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import base, kernels
from ..base.spelling import spell
from ..base.version import VERSION
from . import store

_HARMLESS = ("TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "TRITON_HOME", "TRITON_DISABLE_LINE_INFO")
"""The last is said otherwise (`launch._LINES`), and is set while a kernel is compiled."""
_ASKED = ("spec", "layout", "operands", "config")
"""The files of `base` that work out what kernels ask of a spec and a config."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a launch needs of a kernel."""

    name: str
    """The entry point."""
    shared: int
    """Bytes of shared memory that one block uses."""
    scratch: tuple[int, int] | None
    """Bytes of global memory that one block uses, and their alignment."""
    descriptors: list[dict[str, Any]] | None
    """How each tensor descriptor is laid out."""
    ttir: str
    """Triton's intermediate code, which jaxlib keeps for dumps."""
    binary: bytes
    """PTX, or an AMD code object."""


def made_of() -> tuple[str, str, int] | None:
    """What makes code of a kernel and what it is given: our sources, and Triton. None: the sources cannot be read.

    The library's size stands for builds that share a version: to hash it, as Triton does, takes a second.
    """
    import triton
    from triton._C import libtriton

    files = sorted(Path(kernels.__path__[0]).glob("*.py"))
    files += [Path(base.__path__[0], f"{name}.py") for name in _ASKED]
    try:
        text = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    except OSError:
        return None
    return hashlib.sha256("\n".join(text).encode()).hexdigest(), triton.__version__, os.path.getsize(libtriton.__file__)


def environment(named: Mapping[str, str] = types.MappingProxyType({})) -> dict[str, str]:
    """The variables that may change what Triton makes of a kernel. named: those that Triton says do."""
    ours = {k: v for k, v in sorted(os.environ.items()) if k.startswith("TRITON_")}
    return {k: v for k, v in (ours | {**named}).items() if k not in _HARMLESS}


def key(**given: Any) -> str | None:
    """One text for all that decides what a kernel is compiled to; None if something has no lasting spelling."""
    try:
        return spell({"format": store.FORMAT, "package": VERSION, **given})
    except TypeError:
        return None


def load(key: str) -> Compiled | None:
    """The kernel of this key, if it was kept."""
    where = store.current()
    found = None if where is None else where.get(key)
    if found is None:
        return None
    meta, parts = found
    try:
        scratch = meta["scratch"] and tuple(meta["scratch"])
        texts = {"ttir": parts["ttir"].decode(), "binary": parts["binary"]}
        return Compiled(meta["name"], meta["shared"], scratch, meta["descriptors"], **texts)
    except (KeyError, UnicodeDecodeError):
        return None  # of a working copy whose format changed without its number


def save(key: str, kernel: Compiled, **shown: Any) -> None:
    """Keeps a kernel. shown: what the listing says of it."""
    if (where := store.current()) is None:
        return
    meta = {
        "name": kernel.name,
        "shared": kernel.shared,
        "scratch": kernel.scratch and list(kernel.scratch),
        "descriptors": kernel.descriptors,
        "shown": shown,
    }
    where.put(key, meta, {"ttir": kernel.ttir.encode(), "binary": kernel.binary})
