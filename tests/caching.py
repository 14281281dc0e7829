"""What XLA compiles is kept in `.cache/xla` from run to run, for all test processes together.

JAX can bound the folder by itself, but then reads all of it, under a lock, for each program that it writes.
"""

import sys
from pathlib import Path

import jax

CACHE = Path(__file__).resolve().parents[1] / ".cache"
XLA = CACHE / ("xla" if sys.version_info < (3, 14) else "xla-zstd")
"""From Python 3.14 on JAX compresses otherwise, and reads nothing that an older one wrote."""
LIMIT = 2**30
"""Bytes; a run of everything leaves about a tenth of it."""


def use() -> None:
    """Keeps every program, however small."""
    jax.config.update("jax_compilation_cache_dir", str(XLA))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def trim(folder: Path = XLA, limit: int = LIMIT) -> None:
    """Removes the files not read for longest, until those left are of `limit` bytes together."""
    found = [(path, path.stat()) for path in folder.glob("*")]
    for path, status in sorted(found, key=lambda entry: entry[1].st_atime, reverse=True):
        limit -= status.st_size
        if limit < 0:
            path.unlink(missing_ok=True)
