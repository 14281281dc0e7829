"""Faults, injected at random, and what came of them: nothing wrong, nothing that hangs, nothing lost.

    python tests/faults.py                          # all of them, and their table (`make faults`)
    python tests/faults.py --only disk --times 3    # those whose name holds this, so often each

Each fault raises where something is not as it should be, and otherwise says in a few words what happened. Processes
that are disturbed do what `faulty.py` says. What this machine does not let us do (mount a disk) is left out, and said
so.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faulty import ROOT, content, store_module

sys.path.insert(0, str(ROOT))

from benchmarks.results import load

PROGRAM = [sys.executable, str(ROOT / "tests" / "faulty.py")]
LIMIT = 300
"""Seconds after which a process hangs."""
store = store_module()


class NotHereError(Exception):
    """This machine cannot do that."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    what: str
    times: int
    inject: Callable[[random.Random, Path], str]
    """Of a source of chance, and an empty folder."""


def start(*command: str, **environment: str) -> subprocess.Popen:
    """A process of `faulty.py`, leader of a group of its own."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore:os.fork:RuntimeWarning", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*PROGRAM, *command], env=env, start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> tuple[Any, str]:
    """What it printed at its end, and its errors; raises if it hangs, or failed."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hung: no end after {LIMIT} s") from None
    if process.returncode:
        raise AssertionError(f"ended with {process.returncode}: {err[-1500:]}")
    return json.loads(out.splitlines()[-1]), err


def result(*command: str, **environment: str) -> Any:
    """Of an undisturbed process."""
    return ended(start(*command, **environment))[0]


def killed(process: subprocess.Popen, after: float) -> bool:
    """Kills it so many seconds after it is ready; whether it still ran."""
    process.stdout.readline()
    time.sleep(after)
    running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def whole(folder: Path, limit: int = 2**30) -> tuple[Any, int]:
    """A store of which no file is damaged; how many are unfinished, which go when they are an hour old."""
    kept = store.Store(folder, limit)
    assert kept.verify() == [], kept.verify()
    unfinished = kept.entries(store.UNFINISHED)
    for entry in unfinished:
        os.utime(entry.path, (0, 0))
    kept.trim()
    assert not kept.entries(store.UNFINISHED)
    return kept, len(unfinished)


# Killed.


def while_keeping(rng: random.Random, folder: Path) -> str:
    """All kernels that are there are whole, and the next process adds what is missing."""
    running = killed(start("keep", str(folder), "0", "100"), rng.uniform(0, 0.35))
    kept, unfinished = whole(folder)
    there = len(kept.entries())
    assert result("keep", str(folder), "0", "100") == there
    assert len(kept.entries()) == 100
    if not running:
        return "was done already"
    return "a file half written is swept up" if unfinished else "between two files"


_modules: dict[str, str] = {}


def lowered(folder: str, version: str = "") -> str:
    """What an undisturbed process makes, which must be the same wherever it finds its kernels."""
    made = result("lower", version, JAX_FLASH_ATTN2_CACHE=folder)
    assert made == _modules.setdefault("module", made), "another module"
    return made


def while_compiling(rng: random.Random, folder: Path) -> str:
    """The next process makes the same module."""
    lowered("off")
    running = killed(start("lower", JAX_FLASH_ATTN2_CACHE=str(folder)), rng.uniform(0, 4))
    there = len(whole(folder)[0].entries())
    lowered(str(folder))
    assert len(whole(folder)[0].entries()) == 1
    return f"{'kept' if there else 'compiled anew'}{'' if running else '; was done already'}"


def while_benchmarking(rng: random.Random, folder: Path) -> str:
    """Resumed, every point is there once, and those measured before are as they were."""
    options = ["--quick", "--out", str(folder), "--seconds", "0", "--resume"]
    options += ["--only", "mode=fwd,bias=False,seqlen=256,provider=jax|flash-xla"]
    command = [sys.executable, "-m", "benchmarks", "mha", *options]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
    time.sleep(rng.uniform(1, 14))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    path = folder / "mha-quick.csv"
    before = load(path) if path.exists() else []
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=LIMIT)
    after = load(path)
    assert after[: len(before)] == before, "a point was lost"
    assert len({record.key for record in after}) == len(after) > 0
    return f"{'some' if before else 'no'} points were there"


# Disks.


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A disk of memory, mounted in a folder."""
    where = folder / "disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(where)], capture_output=True, check=False)
    if done.returncode:
        raise NotHereError("mounting a disk")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def full_disk(rng: random.Random, folder: Path) -> str:
    """What fits is kept, and whole; the process goes on, with one warning."""
    with disk(folder, f"size={rng.randrange(64, 2000)}k") as where:
        process = start("keep", str(where / "kernels"), "0", "50")
        found, err = ended(process)
        assert found == 0
        assert err.count("cannot be written") == 1, err
        there = len(whole(where / "kernels")[0].entries()) if (where / "kernels").exists() else 0
        assert there < 50
    return "as many as fit" if there else "none fits"


def full_disk_lowering(rng: random.Random, folder: Path) -> str:
    with disk(folder, "size=8k") as where:
        lowered(str(where / "kernels"))
    return "the same module"


def no_more_in_a_file(rng: random.Random, folder: Path) -> str:
    """A limit on the size of files, which cuts writing short wherever it likes."""
    size = rng.randrange(1, 60_000)
    assert ended(start("keep", str(folder), "0", "20", "", str(size)))[1].count("cannot be written") == 1
    kept, unfinished = whole(folder)
    assert (len(kept.entries()), unfinished) == (0, 0)
    return "nothing is kept"


def read_only_home(rng: random.Random, folder: Path) -> str:
    with disk(folder, "size=64k,ro") as where:
        made, err = ended(start("lower", HOME=str(where), XDG_CACHE_HOME="", **{store.FOLDER: ""}))
        assert made == lowered("off")
        assert err.count("cannot be written") == 1, err
    return "the same module, one warning"


# Several at once.


def two_formats(rng: random.Random, folder: Path) -> str:
    """Processes of two versions write the same kernels into one folder, some of them killed."""
    processes = [start("keep", str(folder), "0", "60", str(1 + n % 2)) for n in range(6)]
    dying = processes[:2]
    for process in dying:
        killed(process, rng.uniform(0, 0.3))
    for process in processes[2:]:
        ended(process)
    for form in "12":
        assert result("keep", str(folder), "0", "60", form) == 60
    return "both find their own"


def two_versions(rng: random.Random, folder: Path) -> str:
    """Of the package, that lower the same at the same time."""
    processes = [start("lower", version, JAX_FLASH_ATTN2_CACHE=str(folder)) for version in ("", "0.0.1", "", "0.0.1")]
    made = {ended(process)[0] for process in processes}
    assert made == {lowered("off")}
    assert len(whole(folder)[0].entries()) == 2
    return "both find their own"


_bits: list[str] = []
"""Of the calls, as the first process had them."""


def threads(rng: random.Random, folder: Path) -> str:
    """All calls of a new process at once: the bits of calls one by one, and of the processes before."""
    made = result("by_threads", str(rng.choice([2, 5, 16])))
    assert made["wrong"] == [], made
    _bits[:] = _bits or made["bits"]
    assert made["bits"] == _bits
    return "the same bits in every process"


def forks(rng: random.Random, folder: Path) -> str:
    """Forked before JAX runs, and while another thread fills a cache: children have the parent's bits."""
    made = result("by_forks", "3")
    assert set(made["children"]) == {made["parent"]}, made
    return "the same bits"


def memory(rng: random.Random, folder: Path) -> str:
    made = result("out_of_memory", str(rng.randrange(100, 1500)))
    assert "RESOURCE_EXHAUSTED: Out of memory" in made["error"], made
    assert made["same"]
    return "RESOURCE_EXHAUSTED, then the same bits"


# What lies in the cache, and where that is.

_CODE = ("exec", "compile", "import", "subprocess.Popen", "os.system", "os.exec", "marshal.loads", "pickle.find_class")
_seen: list[str] = []
_watching = False  # a hook cannot be taken away again


def _watch(event: str, args: tuple) -> None:
    if _watching and event in _CODE:
        _seen.append(f"{event} {str(args)[:80]}")


@functools.cache
def _hooked() -> None:
    sys.addaudithook(_watch)


def damaged(rng: random.Random, folder: Path) -> str:
    """Bytes changed, cut off, put in; also with a hash that is right: what comes back is what was kept, or nothing, or
    what a header of the right form says; no code runs."""
    global _watching
    kept = store.Store(folder, 2**30)
    key, meta, parts = content(0)
    kept.put(key, meta, parts)
    path = kept.path(key)
    raw = bytearray(path.read_bytes())
    start_of_body = len(store.MAGIC) + 32
    forged = rng.random() < 0.7
    begin = start_of_body if forged else 0
    for _ in range(rng.choice([1, 1, 2, 20])):
        at = rng.randrange(begin, min(len(raw), begin + rng.choice([8, 200, 10**6])))
        change = rng.choice(["flip", "cut", "insert", "number"])
        if change == "flip":
            raw[at] ^= 1 << rng.randrange(8)
        elif change == "cut":
            del raw[at : at + rng.choice([1, 100, 10**6])]
        elif change == "insert":
            raw[at:at] = rng.choice([b"null", b"\x00" * 50, b'{"key": 1}', b"[" * 3000, rng.randbytes(9)])
        else:
            raw[at : at + 4] = rng.randbytes(4)
        if len(raw) <= begin:
            break
    if forged:
        raw[len(store.MAGIC) : start_of_body] = hashlib.sha256(raw[start_of_body:]).digest()
    path.write_bytes(raw)
    _hooked()
    store._warned.add(f"damaged {folder}")
    _watching = True
    try:
        got = kept.get(key)
        bad = kept.verify()
    finally:
        _watching = False
    assert _seen == [], _seen
    if got is None:
        assert bad == []  # it is set aside by then
        return "compiled anew"
    if got == (meta, parts):
        return "unharmed"
    assert forged
    assert isinstance(got[0], dict)
    assert all(isinstance(part, bytes) for part in got[1].values())
    return "whoever can write the hash is trusted"


def paths(rng: random.Random, folder: Path) -> str:
    """Whatever a variable or a key says, files appear in the folder that is meant, and others stay as they are."""
    sandbox, outside = folder / "sandbox", folder / "outside"
    for made in (sandbox, outside):
        made.mkdir(mode=0o700)
    (outside / "precious").write_text("precious")
    (sandbox / "link").symlink_to(outside)
    before = os.getcwd(), dict(os.environ)
    try:
        os.chdir(sandbox)
        os.environ |= {"HOME": str(sandbox)}
        value = rng.choice(["kernels", "./a/../b", "~/k", "deep/er/and/deeper", "", "a b", "ü", "-rf", "$HOME", "*"])
        os.environ[store.FOLDER] = value
        os.environ.pop("XDG_CACHE_HOME", None)
        where = store.current()
        for key in ("../../escape", "/etc/escape", "a\0b", "~", "k" * 10_000, "\N{SNOWMAN}"):
            where.put(key, {"name": key}, {"binary": b"x"})
            assert where.get(key) == ({"name": key}, {"binary": b"x"})
        # A file of the cache that leads elsewhere is replaced or removed, not followed.
        for act in (lambda: where.put("key", {}, {"binary": b"x"}), where.clear, where.trim, where.verify):
            link = where.path("key")
            link.unlink(missing_ok=True)
            link.symlink_to(outside / "precious")
            act()
            assert (outside / "precious").read_text() == "precious"
        assert sorted(outside.iterdir()) == [outside / "precious"]
        assert where.folder.resolve().is_relative_to(sandbox)
    finally:
        os.chdir(before[0])
        os.environ.clear()
        os.environ.update(before[1])
    return "within its folder"


def modes(rng: random.Random, folder: Path) -> str:
    """Folder and files are their owner's alone whatever the process leaves to others."""
    mask = os.umask(rng.choice([0, 0o002, 0o022, 0o027]))
    try:
        kept = store.Store(folder / "kernels", 2**30)
        kept.put(*content(1))
    finally:
        os.umask(mask)
    of = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert of(kept.folder) == 0o700
    assert {of(entry.path) for entry in kept.entries()} == {0o600}
    return "0700 and 0600"


FAULTS = {
    "kill: keeping": Fault("killed at random while 100 kernels are kept", 100, while_keeping),
    "kill: compiling": Fault("killed at random while a kernel is traced, compiled and kept", 10, while_compiling),
    "kill: benchmark": Fault("a benchmark and its workers killed at random, then resumed", 6, while_benchmarking),
    "disk: full": Fault("a disk that fills up while kernels are kept", 20, full_disk),
    "disk: full, lowering": Fault("the same while a module is made", 2, full_disk_lowering),
    "disk: cut short": Fault("files that may not grow, cut off anywhere", 20, no_more_in_a_file),
    "disk: read-only home": Fault("a home folder that cannot be written", 2, read_only_home),
    "share: formats": Fault("six processes of two formats in one folder, two of them killed", 10, two_formats),
    "share: versions": Fault("four processes of two versions compile at once", 2, two_versions),
    "threads": Fault("up to 16 threads make the first calls of a process", 4, threads),
    "forks": Fault("children forked while a thread fills a cache", 2, forks),
    "memory": Fault("a call that wants 2 GiB, under a limit", 6, memory),
    "cache: damaged": Fault("bytes of a kernel changed, lost or put in, some with a hash that is right", 3000, damaged),
    "cache: paths": Fault("folders and keys that would lead out; links", 60, paths),
    "cache: modes": Fault("whatever the umask", 20, modes),
}


def run(name: str, times: int, seed: int = 0) -> collections.Counter:
    """Injects a fault so many times: how often what happened.

    Raises:
      AssertionError: with the number of the injection, whose chance is `random.Random(f"{seed} {name} {number}")`.
    """
    outcomes = collections.Counter()
    for number in range(times):
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        try:
            outcomes[FAULTS[name].inject(random.Random(f"{seed} {name} {number}"), folder)] += 1
        except NotHereError as error:
            return collections.Counter({f"not here: {error}": 0})
        except AssertionError as error:
            raise AssertionError(f"{name}, number {number}: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--times", type=int, help="how often each; by default as many as it has")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = []
    print(f"{'fault':20}  {'times':>5}  what happened")
    for name, fault in FAULTS.items():
        if args.only not in name:
            continue
        try:
            outcomes = run(name, args.times or fault.times, args.seed)
            said = [f"{what} ({count})" if len(outcomes) > 1 else what for what, count in outcomes.most_common()]
            text = "; ".join(said)
            print(f"{name:20}  {outcomes.total():5}  {fault.what}: {text}", flush=True)
        except AssertionError as error:
            wrong.append(name)
            print(f"{name:20}  WRONG  {error}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
