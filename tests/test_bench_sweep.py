"""Every status is provoked; a sweep that is killed goes on where it stopped."""

import collections
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import mha
from benchmarks.attention import TOLERANCE, reference
from benchmarks.measure import disagreement
from benchmarks.problem import Group
from benchmarks.results import Record, Store, case_name, load, parse_case
from benchmarks.status import SENTINELS, Status
from benchmarks.sweep import Sweep, failures, parser
from benchmarks.timing import Effort
from benchmarks.worker import Worker

FEW = Effort(seconds=0.0, least=3, warmup=1)
ROOT = Path(__file__).parents[1]


def group(*providers, baselines=(), **case):
    return Group("bench_problems:make", case, providers, dict(baselines))


@pytest.fixture(scope="module")
def worker():
    made = Worker(timeout=20)
    yield made
    made.close()


STATUSES = {
    "good": (Status.OK, ""),
    "wrong": (Status.WRONG, "result 0 is off by"),
    "nan": (Status.WRONG, "result 0 is off by nan"),
    "throws": (Status.INIT_FAILED, "KeyError: 'no such thing"),
    "elsewhere": (Status.UNSUPPORTED, "another machine is needed"),
    "refused_by_ptxas": (Status.COMPILE_FAILED, "JaxRuntimeError: INTERNAL: ptxas fatal: Unsupported .version"),
    "untraceable": (Status.COMPILE_FAILED, "TypeError: dot_general requires"),
    "too_large": (Status.SMEM_OVERFLOW, "ValueError: attn_fwd_kernel with block_m=128, block_n=128"),
    "out_of_memory": (Status.OOM, "JaxRuntimeError: RESOURCE_EXHAUSTED"),
    "raises_later": (Status.RUN_FAILED, "ZeroDivisionError: division by zero"),
}


def test_statuses(worker):
    """One group: what fails does not keep the others from being timed."""
    outcomes = worker.run(group(*STATUSES, baselines={"good": "slow"}, flops=1000.0), FEW)
    for name, (status, text) in STATUSES.items():
        assert outcomes[name]["status"] is status, (name, outcomes[name])
        assert outcomes[name].get("reason", "").startswith(text)
        assert "\n" not in outcomes[name].get("reason", "")
        assert ("ms" in outcomes[name]) == (status is Status.OK)  # a number only for what agreed
    assert outcomes["slow"]["ms"] >= 20
    assert outcomes["good"]["times_faster"] > 2
    assert 0 < outcomes["good"]["peak_share"] < 1
    assert set(SENTINELS) == {Status.SMEM_OVERFLOW, Status.OOM, Status.COMPILE_FAILED, Status.INIT_FAILED}


@pytest.mark.thorough
def test_hung_points(worker, monkeypatch):
    """A point that hangs, at once or when timed, is given up; the others of its group are measured."""
    monkeypatch.setattr(worker, "timeout", 2.0)
    outcomes = worker.run(group("hangs", "good", "hangs_later"), FEW)
    assert {name: x["status"] for name, x in outcomes.items()} == {
        "hangs": Status.TIMEOUT, "good": Status.OK, "hangs_later": Status.TIMEOUT
    }  # fmt: skip
    assert outcomes["hangs"]["reason"] == "more than 2 s"


def test_processes_that_die(worker):
    outcomes = worker.run(group("exits", "good", "killed"), FEW)
    assert outcomes["exits"] == {"status": Status.RUN_FAILED, "reason": "the process died with exit code 3"}
    assert outcomes["killed"]["status"] is Status.OOM, outcomes
    assert outcomes["good"]["status"] is Status.OK


def test_inputs_that_fail(worker, monkeypatch):
    outcomes = worker.run(group("good", start="nowhere"), FEW)
    assert outcomes["good"] == {"status": Status.INIT_FAILED, "reason": "ValueError: no inputs"}
    monkeypatch.setattr(worker, "timeout", 0.5)
    outcomes = worker.run(group("good", "slow", seconds=30.0), FEW)
    assert {x["reason"] for x in outcomes.values()} == {"the inputs took more than 0.5 s"}


def test_sentinels(tmp_path, capsys):
    """The tables of mha: 100 and 300 ms, a status column, and nothing that looks like a time in the plot."""
    grid = mha.Grid(
        ("fwd",), (1,), (False,), (64,), (8,), ((32, 32),), (128, 256, 512), "float32", ("jax", "flash-xla")
    )
    status = {"jax": (Status.OK, Status.OOM, Status.INIT_FAILED)}
    status["flash-xla"] = (Status.SMEM_OVERFLOW, Status.TIMEOUT, Status.COMPILE_FAILED)
    records = {}
    for g in mha.groups(grid):
        for provider in g.providers:
            s = status[provider][(128, 256, 512).index(g.case["seqlen"])]
            ms = 7.0 if s is Status.OK else None
            record = Record("mha", case_name(g.case), provider, s, ms=ms, ms_p20=ms, ms_p80=ms)
            records[record.key] = record
    mha.plots(grid, records, tmp_path)
    (table,) = tmp_path.glob("*.csv")
    assert table.read_text().splitlines() == [
        "seqlen,Jax (MS),Flash-XLA (MS),Jax status,Flash-XLA status",
        "128.000000,7.000000,100.000000,ok,smem_overflow",
        "256.000000,100.000000,,oom,timeout",
        "512.000000,300.000000,300.000000,init_failed,compile_failed",
    ]
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert "smem_overflow" in capsys.readouterr().out


def test_store(tmp_path):
    """Records come back as they were; a line that a crash cut off is measured again; nothing is there twice."""
    path = tmp_path / "x.csv"
    case = case_name({"a": 1, "b": "x"})
    assert parse_case(case) == {"a": "1", "b": "x"}
    first = Record("x", case, "one", Status.OK, ms=1.25, samples=3, device="here, or there")
    second = Record("x", case, "two", Status.OOM, reason='no "memory",\nnone')
    Store(path, resume=False).add([first, second])
    assert load(path)[0] == first
    assert load(path)[1].reason == 'no "memory", none'
    with path.open("a") as file:
        file.write("x,a=2,one,ok,,1.2")
    store = Store(path, resume=True)
    assert list(store.records) == [first.key, second.key]
    with pytest.raises(ValueError, match="already holds a=1,b=x of one"):
        store.add([first])
    store.add([Record("x", "a=2", "one", Status.OK, ms=3.0)])
    assert [r.ms for r in load(path)] == [1.25, None, 3.0]
    assert Store(path, resume=False).records == {}
    assert not path.exists()
    path.write_text("something,else\n")
    with pytest.raises(ValueError, match="move it away to start anew"):
        Store(path, resume=True)


def test_failures_are_counted():
    records = [Record("x", f"a={i}", "p", Status.OOM, reason="no memory") for i in range(3)]
    assert failures(records) == "3 x p: oom: no memory"


def test_only_names_what_there_is(tmp_path, worker):
    options = parser("x", "", seconds=0.1, quick_seconds=0.1).parse_args(["--out", str(tmp_path), "--only", "size=1"])
    with Sweep(options, worker=worker) as sweep:
        with pytest.raises(SystemExit, match="size is none of provider, seconds"):
            sweep.select([group("good", seconds=0.0)])
        sweep.only = {"provider": ["good"], "seconds": ["0.0"]}
        (chosen,) = sweep.select([group("good", "wrong", seconds=0.0), group("good", seconds=1.0)])
        assert chosen.providers == ("good",)
        first = sweep.measure(chosen)["good"]
        assert sweep.measure(chosen)["good"] is first  # from the file, so to speak
        assert [r.key for r in load(tmp_path / "x.csv")] == [("seconds=0.0", "good")]
    with pytest.raises(SystemExit, match="wanted KEY=VALUE,KEY=VALUE, got 'size'"):
        Sweep(parser("x", "", seconds=0.1, quick_seconds=0.1).parse_args(["--only", "size"]), worker=worker)


@pytest.mark.thorough
def test_killed_and_resumed(tmp_path):
    """`mha --quick`, killed at some point: resumed, every point is there exactly once."""
    providers = ("jax", "jax-cudnn", "flash-xla")
    options = ["--quick", "--out", str(tmp_path), "--seconds", "0", "--resume"]
    options += ["--only", f"mode=fwd,bias=False,seqlen=256,provider={'|'.join(providers)}"]
    command = [sys.executable, "-m", "benchmarks", "mha", *options]
    path, environment = tmp_path / "mha-quick.csv", {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = load(path)
    assert mha.main(options) == 0
    counts = collections.Counter(r.key for r in load(path))
    grid = dataclasses.replace(mha.CPU_QUICK, mode=("fwd",), bias=(False,), seqlen=(256,))
    assert counts == dict.fromkeys(
        ((case_name(g.case), p) for g in mha.groups(grid) for p in g.providers if p in providers), 1
    )
    assert load(path)[: len(before)] == before
    assert {r.status for r in load(path)} == {Status.OK, Status.UNSUPPORTED}
    assert load(path)[0].device.startswith("cpu-")


def test_disagreement():
    x = jnp.arange(4.0)
    assert disagreement(x, x, 0.0) == ""
    assert disagreement((x,), x, 0.0).startswith("returned PyTreeDef((*,))")
    assert disagreement(x[:2], x, 1.0) == "result 0 has shape (2,), the reference (4,)"
    assert disagreement(x + 0.1, x, 0.01) == "result 0 is off by 0.1; 0.03 are allowed"
    assert disagreement(x > 1, x > 1, 0.0) == ""
    assert disagreement(x > 1, x > 2, 0.0).startswith("result 0 is off by 1")
    infinite = x.at[0].set(-jnp.inf)
    assert disagreement(infinite, infinite, 0.0) == ""


def test_late_rows_are_judged_by_their_own_size():
    """Those of a causal result are small: halved, they are still within the tolerance of its first rows."""
    x = jax.random.normal(jax.random.key(0), (1, 1024, 1, 8), jnp.float32)
    o = reference(x, x, x, causal=True)
    late = jnp.arange(1024)[:, None, None] >= 512
    halved = jnp.where(late, o / 2, o)
    assert disagreement(halved, o, TOLERANCE["bfloat16"], row_axis=1) != ""
    assert "in rows from 512, one of 8 such blocks" in disagreement(halved, o, TOLERANCE["bfloat16"], row_axis=1)
    assert disagreement(o.astype(jnp.bfloat16), o, TOLERANCE["bfloat16"], row_axis=1) == ""
    ragged = o[:, :1000]
    assert disagreement(ragged, ragged, 0.0, row_axis=1) == ""
