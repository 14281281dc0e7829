"""A folder of compiled kernels, kept from process to process. Knows nothing of Triton.

One file per kernel, named by the SHA-256 of its key, written once and never changed, so that processes and hosts may
share a folder without locks. Code from it runs on the GPU: folder and files must be their owner's alone, and nothing in
a file is executed or unpickled. Nothing here raises because of what is, or is not, on disk.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = "JAX_FLASH_ATTN2_CACHE"
SIZE = "JAX_FLASH_ATTN2_CACHE_MIB"
DEFAULT_MIB = 256

# A file: MAGIC, the SHA-256 of all that follows, the length of the header (4 bytes, big-endian), the header (JSON), and
# the parts, one after the other, deflated.
FORMAT = 1
MAGIC = b"jax_flash_attn2 kernel %d\n" % FORMAT
KERNEL, ASIDE, UNFINISHED = ".kernel", ".bad", ".part"
_OURS = re.compile(r"[0-9a-f]{64}\.(kernel|bad)|[0-9a-f]{16}\w+\.part")
KEPT_ASIDE = 8
"""How many files that were set aside are kept, to be looked at."""


class Damaged(Exception):
    """Why a file is not what it should be."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of the folder, as far as its name and the file system tell."""

    path: Path
    size: int
    used: float
    """When it was last used, in seconds since 1970."""


def default_folder() -> Path:
    """Where the platform keeps what can be made anew.

    Raises:
      RuntimeError: there is no home folder.
    """
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "jax_flash_attn2" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jax_flash_attn2"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "jax_flash_attn2"


def current() -> "Store | None":
    """The store that the environment names at this moment, or None if it says `off`."""
    named = os.environ.get(FOLDER, "")
    if named.lower() == "off":
        return None
    try:
        folder = (Path(named).expanduser() if named else default_folder()).absolute()
    except (OSError, RuntimeError) as error:  # no home folder, or no working folder
        _warn_once("nowhere", f"no kernels are kept: {error}. Set {FOLDER} to a folder, or to off")
        return None
    return _store(folder, _limit())


def _limit() -> int:
    text = os.environ.get(SIZE, "")
    if text and not (text.isascii() and text.isdigit() and int(text)):
        _warn_once(SIZE, f"{SIZE} must be a whole number of MiB, at least 1, got {text!r}; {DEFAULT_MIB} is taken")
        text = ""
    return int(text or DEFAULT_MIB) * 2**20


@functools.lru_cache(maxsize=16)
def _store(folder: Path, limit: int) -> "Store":
    return Store(folder, limit)


_warned: set[str] = set()


def _warn_once(what: str, message: str) -> None:
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"jax_flash_attn2's cache of kernels: {message}", stacklevel=2)


def refusal(status: os.stat_result) -> str | None:
    """Why a folder or file is not to be trusted, if so: somebody else could have put code there."""
    if os.name != "posix":
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return None


class Store:
    """Kernels in one folder, of `limit` bytes together; those not used for longest go first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._unchecked = limit  # bytes written since the folder's size was looked at; the first write looks

    def path(self, key: str) -> Path:
        """Where the kernel of this key is, or would be."""
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + KERNEL)

    def refused(self) -> str | None:
        """Why the folder is not used, if so."""
        try:
            return refusal(self.folder.stat())
        except OSError:
            return None  # not there, or not to be read; a write will tell

    def get(self, key: str) -> tuple[dict[str, Any], dict[str, bytes]] | None:
        """What `put` was given, or None. A file that cannot be used is set aside, with one warning per process."""
        if self._warned_off():
            return None
        path = self.path(key)
        try:
            header, parts = read(path)
            if header["key"] != key:
                raise Damaged("it holds another kernel")
        except OSError:
            return None  # not there (any more), or not for us to read
        except Damaged as why:
            self._set_aside(path)
            _warn_once(
                f"damaged {self.folder}",
                f"{path} was set aside (as {ASIDE}), as {why}; the kernel is compiled anew. Any others go the same way "
                f"silently; `python -m jax_flash_attn2 cache verify` finds them all",
            )
            return None
        with contextlib.suppress(OSError):  # a folder that is only read
            os.utime(path)
        return header["meta"], parts

    def put(self, key: str, meta: Mapping[str, Any], parts: Mapping[str, bytes]) -> None:
        """Keeps what JSON can say (`meta`) and some bytes. What does not come back as it was is not kept."""
        if self._warned_off():
            return
        header = {"key": key, "meta": dict(meta), "parts": [[name, len(part)] for name, part in parts.items()]}
        try:
            text = json.dumps(header)
        except (TypeError, ValueError):
            return
        if json.loads(text) != header:
            return
        head = text.encode()
        body = len(head).to_bytes(4, "big") + head + zlib.compress(b"".join(parts.values()))
        try:
            self._write(self.path(key), MAGIC + hashlib.sha256(body).digest() + body)
            self._unchecked += len(body)
            if self._unchecked > self.limit // 16:
                self._unchecked = 0
                self.trim()
        except OSError as error:
            _warn_once(
                f"unwritable {self.folder}",
                f"{self.folder} cannot be written ({error}), so every process compiles its kernels again. "
                f"Set {FOLDER} to a folder that can be, or to off",
            )

    def _write(self, path: Path, content: bytes) -> None:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        file, unfinished = tempfile.mkstemp(suffix=UNFINISHED, prefix=path.stem[:16], dir=self.folder)  # mode 0600
        try:
            with os.fdopen(file, "wb") as out:
                out.write(content)
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise

    def _warned_off(self) -> bool:
        why = self.refused()
        if why is not None:
            _warn_once(
                f"refused {self.folder}",
                f"{self.folder} is not used, as {why}: what is in it would run on the GPU. "
                f"Set {FOLDER} to a folder that only you may write to, or to off",
            )
        return why is not None

    def _set_aside(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(ASIDE))

    def entries(self, suffix: str = KERNEL) -> list[Entry]:
        """The files of a kind, those not used for longest first."""
        return sorted(_files(self.folder, suffix), key=lambda entry: (entry.used, entry.path))

    def trim(self) -> None:
        """Removes what is too much: kernels beyond the limit, and an eighth more, so that it is not soon due again; all
        but the last files set aside; what a process that died left unfinished."""
        kernels = self.entries()
        aside = self.entries(ASIDE)[-KEPT_ASIDE:]
        total = sum(entry.size for entry in (*kernels, *aside))
        if total > self.limit:
            while kernels and total > self.limit - self.limit // 8:
                total -= kernels[0].size
                _remove(kernels.pop(0))
        for entry in self.entries(ASIDE)[:-KEPT_ASIDE]:
            _remove(entry)
        for entry in self.entries(UNFINISHED):
            if entry.used < time.time() - 3600:
                _remove(entry)

    def verify(self) -> list[tuple[Path, str]]:
        """Reads every kernel, sets aside those that cannot be used, and says which and why."""
        bad = []
        for entry in self.entries():
            try:
                header, _ = read(entry.path)
                if self.path(header["key"]) != entry.path:
                    raise Damaged("it holds another kernel")
            except FileNotFoundError:
                continue  # another process removed it
            except (OSError, Damaged) as why:
                bad.append((entry.path, str(why)))
                self._set_aside(entry.path)
        return bad

    def clear(self) -> int:
        """Removes every file of the cache, and nothing else; how many these were."""
        return sum(_remove(entry) for suffix in (KERNEL, ASIDE, UNFINISHED) for entry in self.entries(suffix))


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The key and the meta data, and the parts, of one file.

    Raises:
      OSError: it cannot be read.
      Damaged: it is not one of ours, not whole, or not to be trusted.
    """
    with open(path, "rb") as file:
        if (why := refusal(os.fstat(file.fileno()))) is not None:
            raise Damaged(why)
        content = file.read()
    magic, digest, body = content[: len(MAGIC)], content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
    if magic != MAGIC:
        raise Damaged("it is not a kernel of this cache")
    if hashlib.sha256(body).digest() != digest:
        raise Damaged("it is cut short or changed")
    try:
        end = 4 + int.from_bytes(body[:4], "big")
        header, parts = json.loads(body[4:end].decode()), {}
        payload = zlib.decompressobj().decompress(body[end:], sum(length for _, length in header["parts"]) + 1)
        for name, length in header["parts"]:
            if not 0 <= length <= len(payload):
                raise ValueError(f"{name!r} is not {length} bytes")
            parts[name], payload = payload[:length], payload[length:]
        if payload:
            raise ValueError("there is more than its header says")
        return {"key": str(header["key"]), "meta": dict(header["meta"])}, parts
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError, zlib.error) as error:
        raise Damaged(f"it cannot be read ({error!r})") from error


def _files(folder: Path, suffix: str) -> Iterator[Entry]:
    try:
        with os.scandir(folder) as every:
            found = [entry for entry in every if entry.name.endswith(suffix) and _OURS.fullmatch(entry.name)]
    except OSError:
        return
    for entry in found:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue  # another process removed it
        yield Entry(Path(entry.path), status.st_size, status.st_mtime)


def _remove(entry: Entry) -> bool:
    try:
        entry.path.unlink()
    except OSError:
        return False
    return True
