"""Each benchmark at its smallest: what it prints, what it checks, and the page that is made of it all."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention as definition

from benchmarks import (
    attention,
    attention_mask,
    block_masks,
    cold_start,
    components,
    gpu,
    mha,
    report,
    sdpa,
    sparse_masks,
)
from benchmarks.__main__ import NAMES
from benchmarks.__main__ import main as cli
from benchmarks.measure import disagreement, group
from benchmarks.results import Record, Store, case_name
from benchmarks.status import Status
from benchmarks.sweep import Sweep
from benchmarks.timing import Effort
from benchmarks.worker import Worker

FEW = Effort(seconds=0.0, least=2, warmup=0)
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("compiled_quickly")  # in this process; workers compile with all optimisations


@pytest.fixture(scope="module")
def worker():
    made = Worker(timeout=60)
    yield made
    made.close()


@pytest.fixture
def run(worker, monkeypatch, capsys, tmp_path):
    """Runs a benchmark's `main` with the worker of these tests; returns what it printed."""

    def sweep(options, effort=None):
        return Sweep(options, FEW, worker=worker)

    def runs(module, *arguments):
        monkeypatch.setattr(module, "Sweep", sweep)
        status = module.main([*arguments, "--out", str(tmp_path / "here"), "--quick"])
        assert status == 0
        return capsys.readouterr().out

    return runs


@pytest.mark.parametrize(("mode", "causal"), [("fwd", True), ("bwd", False)])
def test_reference(mode, causal, monkeypatch):
    """What numbers are checked against is the definition, also when cut into blocks; and what is wrong is found."""
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2**12)
    shape = attention.Shape(1, 96, 2, 16, causal=causal, bias=True)
    problem = attention.Attention(shape, mode, lambda name: attention.flash(causal=causal))
    got, (q, k, v, bias, do) = problem.expected("x"), problem.arrays
    want, vjp = jax.vjp(lambda *x: definition(*x, bias, causal=causal, compute=jnp.float32)[0], q, k, v)
    if mode == "bwd":  # o is a result too, or a rival whose gradients do without it would not compute it
        want = want, *vjp(do)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)
    other = attention.Attention(shape, mode, lambda name: attention.flash(causal=not causal))
    work = other.work("x")
    assert "is off by" in disagreement(work.function(*work.arguments), got, problem.tolerance)


def test_flops():
    """4 for each visible pair and width; backward 2.5 times that besides."""
    full, causal = attention.Shape(2, 8, 3, 16), attention.Shape(2, 8, 3, 16, causal=True)
    assert full.flops("fwd") == 4 * 2 * 3 * 64 * 16
    assert causal.flops("fwd") == 4 * 2 * 3 * 36 * 16
    assert full.flops("bwd") == 3.5 * full.flops("fwd")


def test_the_full_grid():
    """The grid of the document, and the providers that its users know."""
    grid = mha.GPU
    assert grid.seqlen == (1024, 2048, 4096, 6144, 8192)
    assert len(grid.blocks) == 9
    points = [(case_name(g.case), p) for g in mha.groups(grid) for p in g.providers]
    assert len(points) == len(set(points)) == 2 * 3 * 2 * 3 * 3 * 5 * (3 + 9 * 2)
    assert {p for _, p in points} == {"triton-block-ptr", "triton-ptr-block", "flash-tuned", "jax", "jax-cudnn"}


def test_triton_reads_the_environment(monkeypatch):
    """The memory variants are chosen as their users choose them, and the environment is as it was."""
    monkeypatch.setattr(attention, "need_gpu", lambda what: None)
    monkeypatch.setenv("FLASH_ATTN_BLOCK_PTR", "something")
    one, other = (attention.triton(block_ptr, 32, 64).attend for block_ptr in (True, False))
    assert one is not other
    assert attention.triton(True, 32, 64).attend is one  # cached
    assert os.environ["FLASH_ATTN_BLOCK_PTR"] == "something"


@pytest.mark.in_thirds
def test_attention_mask(run):
    out = run(attention_mask, "--only", "batch=2", "--jit", "--iterations", "2", "--warmup", "0")
    assert re.search(r"^True +2 +128 +[\d.]+ +[\d.]+ +[\d.]+", out, re.MULTILINE)
    assert "6 ok" in out
    assert attention_mask._effort(attention_mask.argparse.Namespace(warmup=5, iterations=20)) == Effort(0, 20, 20, 5)


@pytest.mark.in_thirds
def test_components_add_up(monkeypatch):
    """All parts agree with their references, at a width that takes no time; the shares printed add to 100%."""
    for name, n in (("HIDDEN", 64), ("HEADS", 2), ("HEAD_DIM", 32), ("LENGTHS", (8,))):
        monkeypatch.setattr(components, name, n)
    components._weights.cache_clear()
    problem, records = components.problem(8), []
    for g in components.groups():
        outcomes = group(
            lambda: problem, g.contenders, g.baselines, FEW, lambda name: attention.contextlib.nullcontext()
        )
        records += [Record("components", case_name(g.case), name, **fields) for name, fields in outcomes.items()]
    components._weights.cache_clear()
    assert {(r.status, r.reason) for r in records} == {(Status.OK, "")}
    assert sorted(r.provider for r in records) == sorted(components.PROVIDERS)
    shares = re.findall(r"([\d.]+)%", components.stage_table(records))
    assert shares.pop() == "100.0"
    assert len(shares) == len(components.STAGES)
    assert round(sum(map(float, shares)), 6) == 100
    assert re.search(r"^8 .* to .*$", components.cache_table(records), re.MULTILINE)


@pytest.mark.parametrize("parts", [[1, 1, 1], [0.1, 99.9, 3.3, 7.7], [5], [1e-9, 1]])
def test_percentages(parts):
    assert round(sum(float(x[:-1]) for x in components.percentages(parts)), 6) == 100


@pytest.mark.in_thirds
def test_sparse_masks(run):
    out = run(sparse_masks, "--only", "sparsity=99.5")
    assert out.count("99.5% zeros") == 3
    assert re.search(r"merge: recommended '(sparse|dense)', default 'dense': the default (holds|is beaten)", out, re.I)
    out = run(sparse_masks, "--only", "size=small,operation=sink,previous=empty")
    assert "small B2 H8 128x512 after empty" in out


@pytest.mark.in_thirds
def test_block_masks():
    """Masks agree with dense attention over their evaluated rows; another mask than the one named is refused."""

    def measured(problem, *names):
        return group(
            lambda: problem,
            names,
            dict.fromkeys(names[1:], "causal"),
            FEW,
            lambda name: attention.contextlib.nullcontext(),
        )

    problem = block_masks.problem("documents", 256, "fwd", "float32")
    made = measured(problem, "causal", "block-mask", "option")
    assert [x["status"] for x in made.values()] == [Status.OK] * 3
    assert made["block-mask"]["tiles"] == 2  # of 4: six documents end where a tile does
    assert measured(block_masks.problem("documents", 256, "build", "float32"), "build")["build"]["status"] is Status.OK
    wrong = block_masks.problem("random", 256, "fwd", "float32")
    wrong.block = problem.block
    outcome = measured(wrong, "block-mask")["block-mask"]
    assert outcome["status"] is Status.WRONG
    assert "ms" not in outcome


def test_a_beaten_default():
    def record(provider, ms):
        return Record("sparse_masks", "operation=merge,sparsity=10", provider, Status.OK, ms=ms)

    lines, good = sparse_masks.verdicts([record("sparse", 1.0), record("dense", 2.0)])
    assert lines == [
        "merge: recommended 'sparse', default 'dense': THE DEFAULT IS BEATEN; the default takes 2.00 times as long"
    ]
    assert not good
    assert sparse_masks.verdicts([record("sparse", 1.0), record("dense", 1.05)])[1]  # a tie


@pytest.mark.in_thirds
def test_sdpa_and_report(run, tmp_path):
    """Each rung changes the program or says that it does not; the page holds it all and fetches nothing."""
    out = run(sdpa, "--only", "size=medium,causal=True,provider=ours|no-skip|one-stage")
    assert re.search(r"^medium +True +ours +[\d.]+ ", out, re.MULTILINE)
    assert re.search(r"^no-skip +x [\d.]+$", out, re.MULTILINE)
    assert "1 x one-stage: unsupported: one-stage: the Triton kernels need a GPU; this is cpu" in out
    failed = Record("gpu", "mode=fwd,headdim=64,causal=True,seqlen=128", "xla", Status.OOM, reason="<no> memory")
    Store(tmp_path / "here" / "gpu.csv", resume=False).add([failed])
    assert report.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "&lt;no&gt; memory" in page
    assert page.count("<svg ") == 2  # of the rates, and of what is switched off
    assert "http" not in page
    with pytest.raises(ValueError, match="no results below"):
        report.build(tmp_path / "here")


def test_switches_that_do_nothing():
    """At 128 tokens there is one tile: nothing to skip, and the point says so."""
    problem = sdpa.problem("small", True, "float32")
    outcome = group(lambda: problem, ["no-skip"], {}, FEW, lambda name: attention.contextlib.nullcontext())
    assert outcome["no-skip"]["status"] is Status.UNSUPPORTED
    assert "the compiled program is the same" in outcome["no-skip"]["reason"]


def test_gpu_points():
    """The rows of the chip, all of them; every point as large; the program needs no pandas, matplotlib or tqdm."""
    rows = gpu.row_groups(90, tiny=False)
    assert len(rows) == 2 * sum(row.arch == 90 for row in gpu.tuning.ROWS)
    for row in gpu.tuning.ROWS:
        assert gpu.read(gpu.written(row.config)) == row.config
    assert {g.case["v_dim"] for g in rows if g.case["headdim"] == 192} == {128}
    points = [g for g in gpu.point_groups(tiny=False) if g.case["heads"] * g.case["headdim"] == gpu.WIDTH]
    points = [g for g in points if g.case["batch"] * g.case["seqlen"] == gpu.TOKENS]
    assert len(points) == 2 * 3 * 2 * 5
    special = [g for g in gpu.point_groups(tiny=False) if g not in points]
    assert {g.case.get("kv_heads") for g in special} == {None, 8, 1}
    assert {g.case["seqlen"] for g in special} >= {512, 32768, 131072}
    assert any(g.case.get("bias") for g in special)
    small = {"causal": True, "seqlen": 32, "batch": 1, "heads": 2, "row": "16x16-w4-s2-ptr"}
    problem = gpu.row_problem(name="dbias", headdim=16, v_dim=32, **small)
    assert [x.shape[1:] for x in problem.expected("row")] == [(32, 2, n) for n in (32, 16, 16, 32)] + [(1, 32, 32)]
    absent = "import sys; sys.modules.update(dict.fromkeys(['pandas', 'matplotlib', 'tqdm', 'rich']))"
    program = f"{absent}; from benchmarks import gpu, sweep; bar = sweep._Bar(1, 0, 'x'); bar.add(1)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "x: 1/1 points" in done.stderr


@pytest.mark.in_thirds
@pytest.mark.parametrize("option", cold_start.OPTIONS)
def test_cold_start_compares(option, monkeypatch):
    """What is timed is what the definition says, of ours and of jax.nn, where a window hides something."""
    monkeypatch.setattr(cold_start, "WINDOW", 16)
    monkeypatch.setattr(cold_start, "SINKS", 4)
    x = cold_start.operands(64, 2, 2, 8)
    arguments = [x[name] for name in ("q", "k", "v", *cold_start.TAKES.get(option, ()))]
    want = jax.jit(cold_start.definition(option))(*arguments)
    for attend in (cold_start.ours, *([cold_start.theirs] if option in cold_start.THEIRS else [])):
        cold_start._compare(jax.jit(attend(option))(*arguments), want)
    with pytest.raises(ValueError, match="wrong: off by"):
        cold_start._compare(want * 1.01, want)


def test_cold_start(monkeypatch, capsys, tmp_path):
    """Tables of compiling, of calls without jit and of the kernels' cache, and the page that shows them."""
    environments = []

    def here(task, environment=None):
        environments.append(environment)
        return {"lower": 4.0 / len(environments)} if task["what"] == "cuda" else cold_start.measure(task)

    monkeypatch.setattr(cold_start, "in_new_process", here)
    file = tmp_path / "here" / "cold_start.json"
    assert cold_start.main(["--quick", "--only", "causal", "--seqlen", "32", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    number = r" +[\d.]+"
    assert re.search(rf"^causal{6 * number}$", out, re.MULTILINE)
    assert re.search(rf"^causal{4 * (number + ' /' + number)}$", out, re.MULTILINE)
    if cold_start.run_cuda(1):
        assert re.search(rf"^second{number}$", out, re.MULTILINE)
        first, second = environments[-2:]
        assert first == second  # the folder that the first process fills
        assert list(first) == ["JAX_FLASH_ATTN2_CACHE"]
    assert "trace, lower and compile" in report.build(tmp_path)


@pytest.mark.thorough
def test_cold_start_in_a_new_process():
    """A process's measurement comes back; what made it fail does too."""
    task = {"what": "compile", "option": "causal", "provider": "jax.nn", "calls": 1}
    shape = {"batch": 1, "seqlen": 8, "heads": 1, "head_dim": 8}
    measured = cold_start.in_new_process(task | {"shape": shape})
    assert list(measured) == list(cold_start.STAGES)
    assert all(x > 0 for x in measured.values())
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        cold_start.in_new_process(task | {"shape": shape, "provider": "nobody"})


def test_cli(capsys):
    assert cli([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)
    assert cli(["nothing"]) == 2
    for name in NAMES:
        assert importlib.util.find_spec(f"benchmarks.{name}")
