"""The benchmark of decoding, at its smallest: what is measured, compared, read and shown."""

import contextlib
import json

import jax
import numpy as np
import pytest

from benchmarks import decode, decoding, gpu, gpu_decode, report
from benchmarks.decoding import FILLS, Cache
from benchmarks.measure import group
from benchmarks.results import Record, case_name
from benchmarks.status import Status
from benchmarks.timing import Effort

SMALL = Cache(2, 256, 4, 2, 16)
LATENT = Cache(2, 256, 4, 1, 48, 32)
pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_cases():
    """All lengths with every filling in both dtypes; single sequences, other heads, a few rows, latent; none twice."""
    made = decode.cases()
    assert len(made) == len({decode.title(case) for case in made}) == len(set(made))
    of_eight = {(c.seqlen, c.dtype, f) for c, f in made if c == Cache(8, c.seqlen, 32, 8, 128, dtype=c.dtype)}
    assert of_eight == {(s, dtype, f) for s in (4096, 8192, 16384, 32768) for dtype in decode.DTYPES for f in FILLS}
    assert {c.seqlen for c, _ in made if c.batch == 1} == {64, 256, 1024, 32768}
    assert {(c.heads, c.kv_heads) for c, _ in made if not c.v_dim} == {(32, 8), (32, 32), (64, 1)}
    assert {(c.heads, c.kv_heads, c.head_dim) for c, _ in made if c.v_dim == 512} == {(16, 1, 576), (128, 1, 576)}
    assert {c.rows for c, _ in made} == {1, 4}
    assert Cache(8, 32768).token_bytes * 8 * 32768 == 2 * 2**30
    for cache in {c for c, filled in [*made, *decode.quick_cases()] if filled == "mixed"}:
        lengths = np.stack([cache.lengths(filled) for filled in FILLS])
        assert (lengths % 16 == 0).all()
        assert (lengths[0] == cache.seqlen).all()
        assert (lengths[1] == cache.seqlen // 4).all()
        assert lengths[2].min() == cache.seqlen // 8
        assert lengths[2].max() == cache.seqlen


@pytest.mark.parametrize("cache", [SMALL, LATENT], ids=["usual", "latent"])
def test_pages_hold_what_the_cache_holds(cache):
    made = decode.arrays(cache)
    table = np.asarray(made["page_table"])
    assert (np.sort(table.ravel()) == np.arange(table.size)).all()
    assert (table.ravel() != np.arange(table.size)).any()
    for name in {"k", "v"} & made.keys():
        pages = np.asarray(made[f"{name}_pages"])
        np.testing.assert_array_equal(pages[table].reshape(made[name].shape), made[name])
        assert 0.9 < made[name].std() < 1.1
        assert abs(made[name].mean()) < 0.1
    assert ("v" in made) == (not cache.v_dim)


@pytest.mark.parametrize("dtype", decode.DTYPES)
def test_reading(dtype):
    """Every live word once and no other, where it lies."""
    cache = Cache(3, 64, 2, 2, 16, dtype=dtype)
    made, lengths = decoding.dense(cache), np.int32([64, 16, 32])
    dirty = {name: np.array(x) for name, x in made.items()}
    for name in ("k", "v"):
        for b, n in enumerate(lengths):
            dirty[name][b, n:] = np.nan
    sums = decode.reading([jax.numpy.asarray(dirty[name]) for name in ("k", "v")], lengths)()
    live = [dirty[name][b, :n].ravel().view(np.float32).sum(dtype=np.float64) for name in ("k", "v")
            for b, n in enumerate(lengths)]  # fmt: skip
    np.testing.assert_allclose([np.asarray(x, np.float64).sum() for x in sums], live, rtol=1e-4, atol=1e-3)


@pytest.mark.in_thirds
def test_quick(monkeypatch, capsys, tmp_path):
    """A tiny one of each kind: each provider agrees and has numbers, and the page shows them."""
    rows = Cache(1, 128, 4, 2, 16, rows=3, dtype="bfloat16")
    monkeypatch.setattr(
        decode, "quick_cases", lambda: [(SMALL, f) for f in FILLS] + [(LATENT, "quarter"), (rows, "full")]
    )
    file = tmp_path / "here" / "decode.json"
    with jax.numpy_dtype_promotion("standard"):  # jax.nn promotes bfloat16
        assert decode.main(["--quick", "--seconds", "0", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    records = json.loads(file.read_text())["results"]
    assert [r["title"] for r in records] == [decode.title(case) for case in decode.quick_cases()]
    for r in records:
        assert all(name in out for name in (r["title"], *r["providers"]))
        assert [*r["providers"]] == (["paged", "plain", "read"] if r["v_dim"] else ["ours", "paged", "jax.nn", "read"])
        for name, x in r["providers"].items():
            assert x["ms"] > 0
            assert x["gb_per_s"] == pytest.approx(r["live_bytes"] / x["ms"] / 1e6, rel=2e-3)
            assert ("temporary" in x) == ("times_reading" in x) == (name != "read")
            assert ("times_faster" in x) == (name not in ("read", r["baseline"]))
    assert records[1]["live_bytes"] == 2 * 64 * SMALL.token_bytes
    page = report.build(tmp_path)
    assert "decode: a query row over a long cache" in page
    assert page.count("<svg ") == len(FILLS) + 2  # other shapes, latent attention
    with pytest.raises(SystemExit):
        decode.main(["--quick", "--only", "no such case"])


def test_what_is_wrong_has_no_time(monkeypatch, capsys):
    """One sequence of two is off: it is found, and the others are timed."""
    right = decoding.paged
    monkeypatch.setattr(decoding, "paged", lambda *x, **named: right(*x, **named).at[1, 0, 0, 0].add(0.01))
    monkeypatch.setattr(decode, "quick_cases", lambda: [(SMALL, "full")])
    assert decode.main(["--quick", "--seconds", "0"]) == 1
    out = capsys.readouterr().out
    assert "wrong: B2 S256 H4:2 D16 float32 full paged: sequence 1: result 0 is off by 0.01" in out
    assert out.count(" paged") == 1


def test_what_does_not_fit_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(decode, "available", lambda: 2**10)
    monkeypatch.setattr(decode, "quick_cases", lambda: [(SMALL, "full")])
    assert decode.main(["--quick", "--seconds", "0"]) == 0
    assert "skipped: B2 S256 H4:2 D16 float32 full: needs 0.0 GiB, where 0.0 are free" in capsys.readouterr().out


def test_available():
    assert decode.available() > 2**28


def test_table():
    ours = {"ms": 2.0, "gb_per_s": 5.0, "temporary": 0.04, "times_faster": [3, 2.5, 3.5], "times_reading": [1.4, 1, 2]}
    library = {"ms": 6.0, "gb_per_s": 1.7, "temporary": 1.02, "times_reading": [4.2, 4.1, 4.3]}
    providers = {"ours": ours, "jax.nn": library, "read": {"ms": 1.4, "gb_per_s": 7.1}}
    records = [{"title": "B8 S64 full", "providers": providers}, {"title": "B9 S64 full", "skipped": "no room"}]
    lines = [" ".join(line.split()) for line in decode.tables(records).splitlines()]
    assert lines[0] == "case ms x faster p20 to p80 x read p20 to p80 GB/s temporary"
    assert lines[2:] == [
        "B8 S64 full ours 2 3.00 2.50 to 3.50 1.40 1.00 to 2.00 5 4%",
        "jax.nn 6 - - 4.20 4.10 to 4.30 1.7 102%",
        "read 1.4 - - - - 7.1 -",
        "skipped: B9 S64 full: no room",
    ]


def test_gpu_points():
    """What a GPU is asked; no cache of them that would not fit beside its pages."""
    made = gpu_decode.groups(tiny=False)
    assert len(made) == len({case_name(g.case) for g in made})
    assert {g.case["batch"] for g in made} == {1, 8, 64}
    assert {g.case["seqlen"] for g in made} >= {4096, 32768, 131072}
    assert {(g.case["heads"], g.case["kv_heads"]) for g in made} == {(32, 8), (64, 1), (16, 1), (128, 1)}
    assert {g.case["filled"] for g in made} == set(FILLS)
    for g in made:
        cache, filled = gpu_decode._read(case_name(g.case))
        assert cache == Cache(
            head_dim=g.case["headdim"], **{k: v for k, v in g.case.items() if k not in ("headdim", "filled")}
        )
        assert filled == g.case["filled"]
        assert cache.batch * cache.seqlen * cache.token_bytes <= 4.5 * 2**30
        assert "copy" in g.providers
        assert set(g.baselines.values()) == ({"plain"} if cache.v_dim else {"xla"})
        assert g.problem == "benchmarks.gpu_decode:problem"


@pytest.mark.parametrize("latent", [False, True], ids=["usual", "latent"])
def test_gpu_points_agree(latent):
    """Each that a CPU can run, in bf16; the rest are unsupported. The copy moves as many bytes as are read."""
    g = gpu_decode.groups(tiny=True)[latent]
    problem = gpu_decode.problem(**g.case)
    with jax.numpy_dtype_promotion("standard"):
        made = group(
            lambda: problem, g.providers, g.baselines, Effort(0, least=1, warmup=0), lambda _: contextlib.nullcontext()
        )
    wanted = lambda name: Status.UNSUPPORTED if name.startswith(("splits", "block", "ptr", "cudnn")) else Status.OK
    assert {name: x["status"] for name, x in made.items()} == {name: wanted(name) for name in g.providers}
    copied = problem.work("copy").function(problem.arrays["k"])
    assert 2 * copied.nbytes == pytest.approx(int(problem.lengths.sum()) * problem.cache.token_bytes, rel=0.01)
    records = [Record("gpu", case_name(g.case), name, **fields) for name, fields in made.items()]
    text = gpu.text(records)
    assert text.startswith("Decoding:\n")
    assert "x copy" in text
    assert gpu.usual_points(records) == []
