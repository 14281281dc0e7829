"""Compiled kernels on disk: what comes back is what was kept, and nothing on disk makes a call fail or be wrong."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest

from jax_flash_attn2 import Config, flash_attention, gpu_target
from jax_flash_attn2.__main__ import main
from jax_flash_attn2.base.config import Tuned
from jax_flash_attn2.base.spec import Spec
from jax_flash_attn2.gpu import cache, store

META, PARTS = {"name": "kernel", "shown": {"target": "cuda 90", "triton": "3.9.0"}}, {"z": b"late", "a": b"early" * 99}


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(store, "_warned", set())


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A store that the environment names too, with one kernel in it."""
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "kernels"))
    kept = store.current()
    kept.put("key", META, PARTS)
    return kept


def test_comes_back(kept):
    assert kept.get("key") == (META, PARTS)
    assert kept.get("another") is None
    kept.put("key", META, {"a": b""})
    assert kept.get("key") == (META, {"a": b""})


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "deep" / "kernels"))
    before = os.umask(0)
    try:
        store.current().put("key", META, PARTS)
    finally:
        os.umask(before)
    assert store.current().folder.stat().st_mode & 0o777 == 0o700
    assert store.current().path("key").stat().st_mode & 0o777 == 0o600


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def anothers(path):
    other = store.Store(path.parent, 2**20)
    other.put("another", META, {"a": b"of another kernel"})
    os.replace(other.path("another"), path)


DAMAGE = {
    "cut": (cut, "cut short or changed"),
    "changed": (changed, "cut short or changed"),
    "empty": (lambda path: path.write_bytes(b""), "not a kernel of this cache"),
    "foreign": (lambda path: path.write_text("# notes"), "not a kernel of this cache"),
    "another's": (anothers, "it holds another kernel"),
    "open to others": (lambda path: path.chmod(0o666), r"others may write to it \(mode 666\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_is_set_aside(kept, kind):
    """With one warning, however many there are; and the kernel is kept anew."""
    damage, message = DAMAGE[kind]
    damage(kept.path("key"))
    with pytest.warns(UserWarning, match=f"set aside .*{message}.*cache verify"):
        assert kept.get("key") is None
    assert not kept.path("key").exists()
    assert kept.path("key").with_suffix(store.ASIDE).exists()
    kept.put("key", META, PARTS)
    assert kept.get("key") == (META, PARTS)
    damage(kept.path("key"))
    assert kept.get("key") is None  # warnings are errors here


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("why", ["no folder", "full"])
def test_unwritable_is_one_warning(tmp_path, monkeypatch, why):
    """Root may write to any folder: one below a file stands for a read-only one."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / ("file" if why == "no folder" else "") / "kernels"
    monkeypatch.setenv(store.FOLDER, str(folder))
    if why == "full":
        monkeypatch.setattr(os, "replace", full_disk)
    assert store.current().get("key") is None
    with pytest.warns(
        UserWarning, match=f"kernels cannot be written .*Set {store.FOLDER} to a folder that can be"
    ) as seen:
        store.current().put("key", META, PARTS)
    store.current().put("another", META, PARTS)  # silently
    assert len(seen) == 1
    assert store.current().get("key") is None
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_anothers_folder_is_refused(kept):
    kept.folder.chmod(0o777)
    with pytest.warns(
        UserWarning, match=r"is not used, as others may write to it \(mode 777\).*run on the GPU"
    ) as seen:
        assert kept.get("key") is None
    kept.put("another", META, PARTS)  # silently
    assert len(seen) == 1
    kept.folder.chmod(0o700)
    assert kept.get("another") is None
    mine = types.SimpleNamespace(st_uid=os.geteuid(), st_mode=0o100600)
    assert store.refusal(mine) is None
    mine.st_uid += 1
    assert f"belongs to user {os.geteuid() + 1}" in store.refusal(mine)


def test_what_json_cannot_say_is_not_kept(kept):
    for meta in ({"a": (1, 2)}, {"a": object()}, {1: 2}):
        kept.put("odd", meta, PARTS)
        assert kept.get("odd") is None


def test_least_recently_used_goes_first(tmp_path):
    """The first write of a process looks at the size of all that is there; what has just been used stays."""
    large, small = (store.Store(tmp_path / "kernels", limit) for limit in (2**20, 20000))
    for i in range(20):
        large.put(f"key {i}", META, {"a": os.urandom(900)})
        os.utime(large.path(f"key {i}"), (1000 + i, 1000 + i))
    assert sum(entry.size for entry in large.entries()) > small.limit
    assert small.get("key 0")
    small.put("key 20", META, {"a": os.urandom(900)})
    here = [i for i in range(21) if small.path(f"key {i}").exists()]
    assert here == [0, *range(21 - len(here) + 1, 21)]
    assert 0.8 * small.limit < sum(entry.size for entry in small.entries()) <= small.limit


def test_leavings_are_bounded(kept):
    """What a killed process left, and files that were set aside."""
    for i in range(20):
        kept.path(f"bad {i}").with_suffix(store.ASIDE).write_text("")
    old, new = kept.folder / f"{'0' * 16}old{store.UNFINISHED}", kept.folder / f"{'0' * 16}new{store.UNFINISHED}"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (1000, 1000))
    kept.trim()
    assert len(kept.entries(store.ASIDE)) == store.KEPT_ASIDE
    assert not old.exists()
    assert new.exists()
    assert kept.get("key")


def test_environment(monkeypatch, tmp_path):
    """It is read when it is used."""
    monkeypatch.setenv(store.FOLDER, "off")
    assert store.current() is None
    monkeypatch.setenv(store.FOLDER, str(tmp_path))
    assert (store.current().folder, store.current().limit) == (tmp_path, store.DEFAULT_MIB * 2**20)
    monkeypatch.setenv(store.SIZE, "3")
    assert store.current().limit == 3 * 2**20
    monkeypatch.setenv(store.SIZE, "1 GiB")
    with pytest.warns(UserWarning, match="must be a whole number of MiB, at least 1, got '1 GiB'; 256 is taken"):
        assert store.current().limit == 256 * 2**20
    monkeypatch.delenv(store.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert store.current().folder == tmp_path / "xdg" / "jax_flash_attn2"


def test_key_tells_apart():
    """Equal values of equal types are spelled the same, all others are not; what has no lasting spelling has no key."""
    specs = [Spec(2, 1, 64, 64), Spec(2, 1, 64, 64, multiple_q=2), Spec(2, 1, 64, 64, multiple_q=True)]
    given = [*specs, 1, True, 1.0, "1", None, (1,), [1], ((1,),), {"a": 1}, Tuned(16, 16, 4, 1), Config(16, 16, 4, 1)]
    assert len({cache.key(x=x) for x in given}) == len(given)
    assert cache.key(x=Spec(2, 1, 64, 64)) == cache.key(x=specs[0])
    assert cache.key(x=object()) is None


FILES = [f"{name}.py" for name in ("fwd", "spec", "layout", "operands", "config")]


@pytest.mark.parametrize("part", [*FILES, "version", "environment"])
def test_key_has_what_code_depends_on(part, monkeypatch):
    """Kernels, and what `base` works out for them, among it."""
    pytest.importorskip("triton")

    def key():
        return cache.key(made_of=cache.made_of(), environment=cache.environment())

    before, read = key(), pathlib.Path.read_bytes
    assert before == key()
    if part.endswith(".py"):
        monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == part))
    elif part == "version":
        monkeypatch.setattr(cache, "VERSION", "0.0.1")
    else:
        monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    assert key() != before


def test_key_has_all_that_a_compiler_is_given(monkeypatch):
    """Any of it, changed by itself, is another key."""
    pytest.importorskip("jax_triton")
    from jax_flash_attn2.gpu import launch

    def key(**changes):
        x = {"name": "kernel", "target": ("cuda", 90), "options": {"num_warps": 4}} | dict.fromkeys(SPEC, ()) | changes
        fn = types.SimpleNamespace(__module__="kernels", __name__=x["name"])
        return launch._key(fn, types.SimpleNamespace(**{name: x[name] for name in SPEC}), x["target"], x["options"])

    keys = [key(), key(name="another"), key(target=("cuda", 80)), key(options={"num_warps": 8})]
    keys += [key(**{name: (1,)}) for name in SPEC]
    for name in launch._COMPILER:
        monkeypatch.setitem(launch._COMPILER, name, "another")
        keys.append(key())
    assert None not in keys
    assert len({*keys}) == len(keys)


def test_threads_compile_one_at_a_time():
    """With Triton's knob, which is a variable of the environment, as it was for everybody else, and for keys."""
    launch = pytest.importorskip("jax_flash_attn2.gpu.launch")
    before, entered = {**os.environ}, threading.Event()
    keys = lambda: cache.environment(launch.libtriton.get_cache_invalidating_env_vars())
    outside, done = keys(), threading.Event()

    def another():
        with launch._lines(True):
            entered.set()
            done.wait(9)

    thread = threading.Thread(target=another)
    with launch._lines(False):
        assert keys() == outside
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(9)
    done.set()
    thread.join()
    assert {**os.environ} == before


def test_an_unknown_jax_triton_is_left_alone(monkeypatch):
    launch = pytest.importorskip("jax_flash_attn2.gpu.launch")
    theirs = lambda self, *given: given
    monkeypatch.setattr(launch.triton_lib.TritonFunction, "_compile_kernel", theirs)
    spec = importlib.util.spec_from_file_location(launch.__name__, launch.__file__)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert module._COMPILER is None
    assert launch.triton_lib.TritonFunction._compile_kernel is theirs


SPEC = ("signature", "specialization", "attrs", "constants")
"""What jax-triton says of a kernel's arguments."""


@pytest.mark.parametrize("cols", [False, True])
def test_lengths_are_told_apart_where_kernels_do(cols):
    """Of 1000 to 1056, by a kernel of 64 by 64 tiles: 1024, and if an operand has a row of keys, its alignment."""
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), "bfloat16")
    specs = set()
    for n in range(1000, 1057):
        q = jax.ShapeDtypeStruct((1, n, 2, 64), "bfloat16")
        operands = {"bias": jax.ShapeDtypeStruct((1, 1, n, n), "bfloat16")} if cols else {}
        specs.add(Spec.of(Spec(2, 2, 64, 64).rules, q, q, q, operands).told_apart(Tuned(64, 64, 4, 2)))
    assert len(specs) == (6 if cols else 2)
    assert Spec.of(Spec(2, 2, 64, 64).rules, x, x, x, {}).told_apart(Tuned(64, 64, 4, 2)).multiple_q == 64


# The command.


def test_command_shows(kept, capsys):
    kept.put("another", META, PARTS)
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert str(kept.folder) in out
    assert "kernels    2, 0.0 of at most 256 MiB" in out
    assert out.splitlines()[-1].split()[:5] == ["kernel", "cuda", "90", "3.9.0", "2"]


def test_command_verifies(kept, capsys):
    assert main(["cache", "verify"]) == 0
    cut(kept.path("key"))
    assert main(["cache"]) == 0
    assert "cannot be read: verify" in capsys.readouterr().out
    assert main(["cache", "verify"]) == 1
    assert f"{kept.path('key')} was set aside: it is cut short or changed" in capsys.readouterr().out
    assert main(["cache", "verify"]) == 0


def test_command_clears_its_own(kept, capsys):
    others = [kept.folder / name for name in ("notes.kernel", "film.part", f"{'0' * 64}.txt")]
    for path in others:
        path.write_text("")
    kept.path("bad").with_suffix(store.ASIDE).write_text("")
    assert main(["cache", "clear"]) == 0
    assert "2 files were removed" in capsys.readouterr().out
    assert sorted(kept.folder.iterdir()) == sorted(others)


def test_command_says_why_not(kept, capsys, monkeypatch):
    kept.folder.chmod(0o777)
    if os.name == "posix":
        assert main(["cache", "clear"]) == 1
        assert "is not used, as others may write to it" in capsys.readouterr().out
        assert kept.path("key").exists()
    monkeypatch.setenv(store.FOLDER, "off")
    assert main(["cache"]) == 0
    assert f"{store.FOLDER} is off" in capsys.readouterr().out


# With Triton.

QUICK = Config(16, 16, num_warps=1, num_stages=1)


def lower(config=QUICK, gradient=False):
    """What is lowered for an H100, its seconds of CPU, and how often Triton compiled."""
    launch = pytest.importorskip("jax_flash_attn2.gpu.launch", reason="lowering for CUDA needs jax-triton")
    pytest.importorskip("jax_cuda13_plugin", reason="lowering for CUDA needs JAX's CUDA plugin")
    from jax_flash_attn2.kernels import bwd, fwd

    for kernel in (fwd.attn_fwd_kernel, bwd.attn_bwd_dq_kernel, bwd.attn_bwd_dkdv_kernel):
        kernel.__dict__.pop("_jT_kernel_cache", None)  # as in a new process
    compiled, compiler = [], launch.triton_lib.tc.ASTSource.make_ir

    def counted(self, *args):
        compiled.append(self.fn.__name__)
        return compiler(self, *args)

    x = jax.ShapeDtypeStruct((1, 64, 2, 64), "bfloat16")
    call = functools.partial(flash_attention, config=config, causal=True)
    if gradient:
        call = jax.grad(lambda *x: flash_attention(*x, causal=True).astype(jnp.float32).sum(), (0, 1, 2))
    with pytest.MonkeyPatch.context() as patch, gpu_target(compute_capability=90):
        patch.setattr(launch.triton_lib.tc.ASTSource, "make_ir", counted)
        traced = jax.jit(call).trace(x, x, x)
        start = time.process_time()
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return text, time.process_time() - start, len(compiled)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_second_process_does_not_compile(folder, monkeypatch):
    """Forward and backward: the same module to the byte, in a quarter of the time at most. The code is for the oldest
    CUDA that will do, and has no lines of the source in it."""
    saved, save = [], cache.save
    monkeypatch.setattr(cache, "save", lambda key, kernel, **about: (saved.append(kernel), save(key, kernel, **about)))
    cold, first, compiled = lower(gradient=True)
    assert compiled == len(saved) == 3
    assert all(b".version 8.6" in kernel.binary for kernel in saved)
    assert not any(b".loc" in kernel.binary or b".debug_line" in kernel.binary for kernel in saved)
    warm, second, compiled = lower(gradient=True)
    assert compiled == 0
    assert warm == cold
    assert second <= first / 4


def test_kept_kernels_are_checked_too(folder, monkeypatch):
    """Damaged ones are compiled anew, another version's left alone, one that does not fit the chip refused."""
    from jax_flash_attn2.gpu.target import Target

    text, _, compiled = lower()
    assert compiled == 1
    (path,) = folder.iterdir()
    cut(path)
    with pytest.warns(UserWarning, match="set aside") as seen:
        assert lower()[::2] == (text, 1)
    assert len(seen) == 1
    monkeypatch.setattr(cache, "VERSION", "0.0.1")
    assert lower()[::2] == (text, 1)
    assert lower()[::2] == (text, 0)
    assert len(list(folder.glob("*.kernel"))) == 2
    monkeypatch.setattr(Target, "shared_memory", 100)
    with pytest.raises(ValueError, match=r"attn_fwd_kernel with block_m=16.* needs \d+ bytes of shared memory"):
        lower()


def test_without_a_folder(folder, monkeypatch):
    text = lower()[0]
    monkeypatch.setenv(store.FOLDER, "off")
    assert lower()[::2] == (text, 1)
    folder.with_name("file").write_text("")
    monkeypatch.setenv(store.FOLDER, str(folder.with_name("file") / "kernels"))
    with pytest.warns(UserWarning, match="cannot be written") as seen:
        assert lower()[::2] == (text, 1)
    assert len(seen) == 1


PROCESS = """
import hashlib, json, sys, warnings
sys.path.insert(0, {tests!r})
import test_cache
warnings.simplefilter("error", UserWarning)
print("ready", flush=True)
sys.stdin.readline()
text, _, compiled = test_cache.lower()
print(json.dumps([hashlib.sha256(text.encode()).hexdigest(), compiled]))
"""


def test_two_processes_at_once(folder):
    """Both start with nothing, both are right, a third finds what they left."""
    pytest.importorskip("jax_triton", reason="lowering for CUDA needs jax-triton")
    pytest.importorskip("jax_cuda13_plugin", reason="lowering for CUDA needs JAX's CUDA plugin")
    command = [sys.executable, "-c", PROCESS.format(tests=os.path.dirname(__file__))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in both]
    expected, _, compiled = lower()
    assert compiled == 0
    assert [digest for digest, _ in results] == [hashlib.sha256(expected.encode()).hexdigest()] * 2
    assert len(list(folder.iterdir())) == 1
