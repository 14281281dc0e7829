"""The page of results: what it concludes, what it never shows, and that it fits a phone."""

import json
import re

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks import (
    attention_mask,
    components,
    decode,
    gpu,
    gpu_decode,
    looks,
    mha,
    page,
    plots,
    report,
    results,
    sdpa,
)
from benchmarks.figures import labels, spread, unsaid
from benchmarks.plots import Panel, Point
from benchmarks.results import Record, Store
from benchmarks.status import Status
from benchmarks.sweep import peak_shares, summary, table
from benchmarks.verdicts import FASTER, SLOWER, UNDECIDED, Comparison, Ratio, between, headline

SHAPE = "batch=1,bias=False,headdim=64,heads=8,dtype=float32"


def record(case, provider, ms, **more):
    more = {"ms_p20": 0.9 * ms, "ms_p80": 1.2 * ms, "samples": 30} | more
    return Record("mha", case, provider, Status.OK, ms=ms, device="cpu-x", **more)


def pair(mode, seqlen, ratio, share=0.5, tflops=0.1):
    """Ours and jax.nn at one length; ours has the ratio (median, p20, p80)."""
    case = f"mode={mode},{SHAPE},seqlen={seqlen}"
    faster = dict(zip(("times_faster", "times_faster_p20", "times_faster_p80"), ratio, strict=True))
    ours = record(case, "flash-tuned", 1.0, baseline="jax", tflops=tflops, peak_share=share, **faster)
    return [ours, record(case, "jax", ratio[0])]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of two lengths won, one lost and one undecided, of which one was faster than the "peak"."""
    root = tmp_path_factory.mktemp("results")
    records = [
        *pair("fwd", 256, (2.0, 1.8, 2.2)),
        *pair("fwd", 512, (0.5, 0.4, 0.6), share=1.25, tflops=0.25),
        *pair("fwd", 1024, (1.1, 0.9, 1.3)),
        *pair("bwd", 256, (3.0, 2.5, 3.5)),
        Record("mha", f"mode=fwd,{SHAPE},seqlen=256", "jax-cudnn", Status.OOM, reason="<no> memory"),
    ]
    Store(root / "cpu-x" / "mha-quick.csv", resume=False).add(records)
    assert report.main(["--results", str(root)]) == 0
    return (root / "report.html").read_text()


def test_conclusions_come_first(made):
    """Computed from the records: the loss is told, with the case and how sure it is."""
    first, rest = made.split('<h2 id="cpu-x">')
    assert "of 4 cases ours is faster in 2, slower in 1, undecided in 1," in first
    assert "Slower: Attention, forward (1 of 3)." in first
    slower = re.search(r"<h3>Where it is slower</h3>\n<ul.*?</ul>", first, re.DOTALL)
    assert "flash_attention against jax.nn on XLA, cpu-x: length 512 0.50 (0.40 to 0.60)" in slower[0]
    assert "length 256" not in slower[0]
    assert "0.50 (length 512) to 2.00 (length 256)" in first
    assert "30 turns; p20 to p80 spans 36% of the median" in first
    assert "None of these results is of a GPU" in first
    assert "&lt;no&gt; memory" in rest


def test_no_share_of_a_peak_that_was_passed(made):
    assert "%peak of 4 points is left out: peak measured while the machine was busy" in made
    assert "125" not in re.sub(r"<svg.*?</svg>", "", made, flags=re.DOTALL)
    busy = [*pair("fwd", 256, (2.0, 1.8, 2.2)), *pair("fwd", 512, (2.0, 1.8, 2.2), share=1.25, tflops=0.25)]
    another = [*pair("fwd", 1024, (2.0, 1.8, 2.2), share=0.25, tflops=0.1)]  # of a process whose peak was 0.4
    assert peak_shares(busy + another) == [None] * 4 + [0.25, None]
    assert "busy" not in summary(another)


COMMITTED = [*results.ROOT.glob("*/*.csv"), *results.ROOT.glob("*/*.json*")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_is_committed_is_told(path):
    """By its section: tables, panels, and what is compared."""
    if path.suffix == ".csv":
        records = results.load(path)
        section = report.SECTIONS[records[0].benchmark]
    else:
        section, (records, _) = report.JSON_SECTIONS[report.of(path)], report.read_json(path)
    assert section.text(records)
    assert all(panel.lines for panel in section.panels(records))
    assert all(comparison.ratios for comparison in section.compare(records))


def test_fits_a_phone_and_needs_nothing(made):
    """Every table scrolls by itself or folds, every figure and table has a title, nothing is fetched."""
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in made
    assert "prefers-color-scheme: dark" in made
    title = "<figure><figcaption>[^<]+</figcaption>"
    tables = re.findall(f"({title}<div class=.wide.[^>]*>)?(?:{title})?<table( class=.said.)?", made)
    assert tables
    assert all(titled or said for titled, said in tables)
    svgs = re.findall(f"({title})?<svg ", made)
    assert len(svgs) == 2
    assert all(svgs)
    assert not re.search(r"https?:|src=|@import|url\((?!#)", made)
    ids = re.findall(r'id="([^"]*)"', made)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', made)) <= set(ids)


DOT = Point(2.0, 1.0, 3.0)
BELOW = Panel("Title", "ms", ("a", "b, c"), {"ours": (DOT, "oom"), "jax": (Point(4.0), None)}, one="jax")
ALONG = Panel("Title", "ms", (1024, 2048), {"ours": (DOT, Point(5.0, 4.0, 6.0)), "xla": ("oom", None)})


@pytest.mark.parametrize("panel", [BELOW, ALONG], ids=["below", "along"])
def test_dots_and_whiskers(panel):
    """On a log axis stand dots with whiskers and no bar; a point without a time is its status."""
    axes = Figure().subplots()
    plots.draw(panel, axes)
    assert (axes.get_yscale() if panel.along else axes.get_xscale()) == "log"
    assert not axes.patches
    assert not axes.containers
    points = [p for line in panel.lines.values() for p in line if isinstance(p, Point)]
    ends = [segment[:, int(panel.along)] for c in axes.collections for segment in c.get_segments()]
    assert sorted(map(tuple, ends)) == sorted((p.low or p.middle, p.high or p.middle) for p in points)
    said = axes.get_xlabel() if panel.along else axes.texts[0].get_text()
    assert said.endswith("xla: 1k oom" if panel.along else "ours: oom")
    assert axes.get_title(loc="left") == "Title"


def test_svg():
    """It takes its ink from the page, and no id of another."""
    one, other = (plots.svg(BELOW, name) for name in ("one", "other"))
    assert 'aria-label="Title"' in one
    assert "currentColor" in one
    assert "#0a0b0c" not in one
    assert not {*re.findall(r'id="([^"]*)"', one)} & {*re.findall(r'id="([^"]*)"', other)}
    assert plots.svg(BELOW, "one") == one


def test_one_scale_for_one_ratio():
    more = Panel("", "ms", ("a",), {"ours": (Point(9.0),)}, one="jax")
    alone = Panel("", "ms", ("a",), {"ours": (Point(99.0),)})
    assert [p.extent for p in plots.together([BELOW, more, alone])] == [(1.0, 9.0), (1.0, 9.0), None]


@pytest.mark.parametrize("most", [1.05, 1.3, 2.0, 4.0, 11.0, 60.0, 3e3, 1e6, 1e9])
@pytest.mark.parametrize("least", [0.013, 0.99, 17.0])
def test_ticks(least, most):
    found = plots.ticks(least, least * most)
    assert (1 if most < 1.1 else 2) <= len(found) <= 6 or most == 1.05
    assert all(0.999 * least <= x <= 1.001 * least * most for x in found)


def test_one_look_for_one_provider():
    """Who does the same looks the same; what meets on a panel does not; all of it is seen on both grounds."""
    assert len({looks.look(name) for name in ("ours", "flash-tuned", "tuned")}) == 1
    assert len({looks.look(name) for name in ("jax", "xla", "jax.nn")}) == 1
    assert looks.look("jax-cudnn") == looks.look("cudnn")
    panels = (
        tuple(p for p in mha.LINES), tuple(attention_mask.BUILDERS), (*components.STAGES, "layer"), gpu.PROVIDERS,
        ("ours", *sdpa.OTHERS), sdpa.RUNGS, ("o", "dq", "dk", "dv"), ("ours", "paged", "jax.nn"), gpu_decode.OF_SPLITS,
        ("sparse", "dense", "broadcast", "triangle"), ("block-mask", "option"), ("eager-cached", "eager-flash"),
    )  # fmt: skip
    for names in panels:
        assert len({looks.look(name) for name in names}) == len(names), names
    for colour, marker in {looks.look(name) for names in panels for name in names} | {looks.look("a new one")}:
        assert marker in looks.MARKERS
        assert all(contrast(colour, ground) >= 3 for ground in ("#ffffff", "#12161b")), colour


def contrast(one, other):
    """As WCAG has it."""
    linear = lambda x: x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
    light = sorted(
        sum(a * linear(x) for a, x in zip((0.2126, 0.7152, 0.0722), to_rgb(c), strict=True)) for c in (one, other)
    )
    return (light[1] + 0.05) / (light[0] + 0.05)


def test_tables_are_read_back():
    """What the benchmarks print, cell by cell, whatever stands around it."""
    rows = [["case", "", "ms", "x"], ["B1 a full", "ours", "12.50", "-"], ["", "jax.nn", "3", "1.20"]]
    text = f"First\n{table(rows, left=2)}\nskipped: B9 S64 full: no room\n\nSecond:\n{table([['a', 'b'], ['1', '2']])}"
    first, said, second = page.parts(text)
    assert (first.title, first.rows, first.right) == ("First", rows, [False, False, True, True])
    assert said == "skipped: B9 S64 full: no room"
    assert (second.title, second.rows) == ("Second", [["a", "b"], ["1", "2"]])
    assert "<figcaption>All: Second</figcaption>" in page.tables(text, "All")
    read = {"ms": 1.4, "gb_per_s": 7.1}
    records = [{"title": "B8", "providers": {"read": read}}, {"title": "B9", "skipped": "no"}]
    first, said = page.parts(decode.tables(records))
    assert first.rows[1][:3] == ["B8", "read", "1.4"]
    assert said == "skipped: B9: no"


def test_verdicts():
    """Four turns of five decide, not the median; and a comparison says its least, its largest and its losses."""
    won, lost, even = Ratio("a", 2.0, 1.01, 3.0, 9), Ratio("b", 0.5, 0.4, 0.99, 7), Ratio("c", 1.5, 0.9, 2.0, 9)
    assert [r.verdict for r in (won, lost, even)] == [FASTER, SLOWER, UNDECIDED]
    both = Comparison("Attention", "ours", "theirs", (won, lost))
    assert both.typical == pytest.approx(1)
    assert both.range == (lost, won)
    assert both.sure.startswith("7 to 9 turns; p20 to p80 spans ")
    assert Comparison("", "", "", (Ratio("", 2, 2, 2, 3),)).sure.startswith("only 3 turns; all of them span")
    assert headline([both]).endswith("Slower: Attention (1 of 2).")
    assert "Slower" not in headline([Comparison("", "", "", (won,))])
    assert "Nothing" in headline([Comparison("", "", "", (won,), rival=False)])


def test_between():
    """As it was timed by turns, whichever of the two was the baseline; else from the ends that are furthest apart."""
    faster = {"times_faster": 0.5, "times_faster_p20": 0.4, "times_faster_p80": 0.8}
    ours, theirs = record("seqlen=8", "ours", 2.0), record("seqlen=8", "jax", 4.0, baseline="ours", **faster)
    assert between([ours, theirs], "ours", "jax") == (Ratio("", 2.0, 1.25, 2.5, 30),)
    (apart,) = between([ours, record("seqlen=8", "cudnn", 4.0)], "ours", "cudnn")
    assert (apart.middle, apart.turns) == (2.0, None)
    assert (apart.low, apart.high) == (pytest.approx(3.6 / 2.4), pytest.approx(4.8 / 1.8))
    assert between([ours, Record("mha", "seqlen=8", "jax", Status.OOM)], "ours", "jax") == ()


def test_labels():
    """What differs, unless it is what most have."""
    cases = [{"seqlen": str(t), "batch": "1", "causal": "True", "heads": "8"} for t in (64, 128, 128)]
    cases.append({"seqlen": "128", "batch": "1", "causal": "False", "heads": "8"})
    assert labels(cases) == ["length 64", "length 128", "length 128", "length 128, full"]
    assert unsaid("Title", cases) == "Title (causal where nothing else is said)"
    assert unsaid("Title", cases[:1]) == "Title"


def test_spread():
    assert spread([3.0, 1.0]) == Point(2.0, 1.0, 3.0)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Point(3.5, 2.0, 5.0)


def test_cold_start_loses(tmp_path):
    """JSON files conclude, too: twice the time to compile is a loss in all processes."""
    run = lambda seconds: {"trace": seconds, "lower": seconds, "compile": seconds}
    records = [
        {"what": "compile", "option": "causal", "provider": p, "runs": [run(s), run(1.1 * s)], "median": run(s)}
        for p, s in (("ours", 2.0), ("jax.nn", 1.0))
    ]
    (tmp_path / "cpu-x").mkdir()
    (tmp_path / "cpu-x" / "cold_start.json").write_text(json.dumps({"machine": {"cores": 2}, "results": records}))
    text = report.build(tmp_path)
    assert "Slower: Trace, lower and compile (1 of 1)." in text
    assert "causal 0.50 (0.50 to 0.50)" in text
