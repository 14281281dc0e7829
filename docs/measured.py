"""Tables of what was measured, from `benchmarks/results/`, in their places on the pages that quote it.

    python docs/measured.py    # writes them anew

A place is `<!-- name -->` to `<!-- end -->`. A test holds the pages to the results.
"""

import csv
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "how.md")


def places() -> dict[str, str]:
    """Tables by name: of each file, one for each machine that has it."""
    tables = {
        "xla_path": (xla_path, "xla_path.json"),
        "decode": (decode, "decode.json"),
        "decode-dense": (decode_dense, "decode.json"),
        "mha": (mha, "mha-quick.csv"),
        "numerics": (numerics, "numerics.json"),
        "numerics-long": (numerics, "numerics-long.json"),
        "numerics-kernels": (numerics, "numerics-kernels.json"),
        "numerics-kernels-wide": (functools.partial(numerics, plain="plain, wide"), "numerics-kernels.json"),
        "numerics-training": (training, "numerics-training.json"),
        "block_masks": (block_masks, "block_masks-quick.csv"),
    }
    return {
        f"{name} {path.parent.name}": table((_results if path.suffix == ".json" else _records)(path))
        for name, (table, file) in tables.items()
        for path in sorted(RESULTS.glob(f"*/{file}"))
    }


def filled_in(page: str) -> str:
    """A page with tables in whatever places it has."""
    made = places()

    def table_of(found: re.Match) -> str:
        return f"{found[1]}{made[found[2]]}\n{found[3]}" if found[2] in made else found[0]

    return re.sub(r"(<!-- ([\w-]+ [\w-]+) -->\n).*?(<!-- end -->)", table_of, page, flags=re.DOTALL)


def xla_path(results: list[dict[str, Any]]) -> str:
    """Times faster than jax.nn; one batch of 8 heads of 64 in float32 but where a row says otherwise."""
    found: dict[str, dict[tuple[bool, str], float]] = {}
    for r in results:
        what = [str(r["seqlen"])]
        what += [f"{r['batch']} batches"] * (r["batch"] != 1)
        what += [f"{r['heads']} heads"] * (r["heads"] != 8)
        what += [f"{r['kv_heads']} key heads"] * (r["kv_heads"] != r["heads"])
        what += [_dtype(r)] * (r["dtype"] != "float32")
        found.setdefault(", ".join(what), {})[r["causal"], r["pass"]] = r["times_faster"]
    ways = [(causal, of) for causal in (True, False) for of in ("forward", "forward and backward")]
    rows = ([name, *(_ratio(x[way]) if way in x else "—" for way in ways)] for name, x in found.items())
    return _table(["length", "causal: forward", "with backward", "full: forward", "with backward"], rows)


def decode(results: list[dict[str, Any]]) -> str:
    """Times faster than jax.nn, and times as long as reading: of a dense cache, and of one in pages."""

    def rows() -> Iterator[list[str]]:
        for r in _decoding(results):
            cells = [r["providers"][name] for name in ("ours", "paged")]
            ratios = [_ratio(x[of][0]) for of in ("times_faster", "times_reading") for x in cells]
            yield [_dtype(r), str(r["seqlen"]), r["filled"], *ratios]

    return _table(["dtype", "length", "filled", "x faster: dense", "in pages", "x reading: dense", "in pages"], rows())


def decode_dense(results: list[dict[str, Any]]) -> str:
    """The same of a dense cache alone, in fewer lines."""
    found = {(_dtype(r), r["filled"], r["seqlen"]): r["providers"]["ours"] for r in _decoding(results)}
    lengths = sorted({seqlen for *_, seqlen in found})

    def rows() -> Iterator[list[str]]:
        for dtype, filled in dict.fromkeys(key[:2] for key in found):
            ways = [found[dtype, filled, n][of][0] for of in ("times_faster", "times_reading") for n in lengths]
            yield [dtype, filled, *map(_ratio, ways)]

    titles = [f"x {of}, {n}" for of in ("faster", "reading") for n in lengths]
    return _table(["dtype", "filled", *titles], rows())


def _decoding(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each of eight sequences, 32 query heads over 8 key heads of 128; in the shortest and longest cache."""
    asked = {"batch": 8, "heads": 32, "kv_heads": 8, "head_dim": 128, "v_dim": 0, "rows": 1}
    found = [r for r in results if "skipped" not in r and all(r[name] == n for name, n in asked.items())]
    ends = {of(r["seqlen"] for r in found) for of in (min, max)}
    return [r for r in found if r["seqlen"] in ends]


def mha(records: list[dict[str, str]]) -> str:
    """Times faster than jax.nn, by length."""
    ours = [r for r in records if r["provider"] == "flash-tuned" and r["status"] == "ok"]
    found = {tuple(_case(r)[name] for name in ("seqlen", "mode", "bias")): r["times_faster"] for r in ours}
    lengths = sorted({int(seqlen) for seqlen, *_ in found})
    ways = [(mode, bias) for bias in ("False", "True") for mode in ("fwd", "bwd")]
    rows = ([str(n), *(_ratio(float(found[str(n), *way])) for way in ways)] for n in lengths)
    return _table(["length", "forward", "with backward", "with a bias: forward", "with backward"], rows)


def numerics(results: list[dict[str, Any]], plain: str = "plain") -> str:
    """Errors over those of a plain implementation: the least and the largest of all kinds of logits. Of another than
    "plain" where it differs, in half precision."""

    def rows() -> Iterator[list[str]]:
        some = [r for r in results if plain == "plain" or r["dtype"] != "float32"]
        for dtype, seqlen in dict.fromkeys((r["dtype"], r["seqlen"]) for r in some):
            errors = [r["errors"] for r in results if (r["dtype"], r["seqlen"]) == (dtype, seqlen)]
            times = [[x["ours"][name] / x[plain][name] for x in errors] for name in ("o", "dq", "dk", "dv")]
            yield [dtype, str(seqlen), *(f"{min(x):.2f} to {max(x):.2f}" for x in times)]

    return _table(["dtype", "length", "o", "dq", "dk", "dv"], rows())


def training(results: list[dict[str, Any]]) -> str:
    """The held-out loss of each seed."""
    names = list(results[0]["held_out"])
    rows = ([str(r["seed"]), *(f"{r['held_out'][name]:.4f}" for name in names)] for r in results)
    return _table(["seed", *names], iter(rows))


def block_masks(records: list[dict[str, str]]) -> str:
    """Times faster than causal attention."""
    found = {(*(_case(r)[name] for name in ("mask", "seqlen", "mode")), r["provider"]): r for r in records}
    masks = dict.fromkeys((mask, seqlen) for mask, seqlen, mode, _ in found if mode == "fwd")

    def faster(mask: str, seqlen: str, mode: str, provider: str) -> str:
        r = found.get((mask, seqlen, mode, provider))
        return "—" if r is None or r["status"] != "ok" else _ratio(float(r["times_faster"]))

    ways = [(mode, provider) for provider in ("block-mask", "option") for mode in ("fwd", "bwd")]
    rows = ([mask[0], mask[1], *(faster(*mask, *way) for way in ways)] for mask in masks)
    titles = ["mask", "length", "block mask: forward", "with backward", "as an option: forward", "with backward"]
    return _table(titles, rows)


def _results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


def _records(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _case(record: dict[str, str]) -> dict[str, str]:
    return dict(part.split("=") for part in record["case"].split(","))


def _dtype(record: dict[str, Any]) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[record["dtype"]]


def _ratio(x: float) -> str:
    return f"{x:.2f}" if x < 2 else f"{x:.1f}" if x < 10 else f"{x:.0f}"


def _table(titles: list[str], rows: Iterator[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        text = filled_in(page.read_text())
        page.write_text(text)
        print(f"wrote {page.relative_to(ROOT)}")
