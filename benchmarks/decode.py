"""Decoding on this machine's CPU: one or a few query rows over a long cache, against `jax.nn` and a mere reading.

    python -m benchmarks decode                      # a table
    python -m benchmarks decode --quick              # small caches
    python -m benchmarks decode --json FILE          # and everything that was measured
    python -m benchmarks decode --only "S8192 H32:8" # cases whose name holds this

A cache is allotted for S tokens of each of B sequences, and filled whole ("full"), to a quarter, or from an eighth to
all of it ("mixed"). By turns, in one process:

  ours     `flash_attention(q, k, v, kv_lengths=lengths)`
  paged    `paged_attention`, the same content in pages of 64 tokens, in no order
  jax.nn   `jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)`; of latent attention, which it has
           not, the plain computation ("plain")
  read     the live keys and values read once: a product with ones of their 32-bit words, as they lie

A ratio is the median of the ratios of neighbours, with its 20th and 80th percentile: "x faster" than jax.nn (plain),
and "x read", how many times as long as the reading. GB/s are of the live keys and values, whatever else was read;
"temporary" is the memory that XLA planned beside arguments and results, in % of the whole cache. A result has agreed
with fp32's, sequence by sequence, before anything is timed. What does not fit into memory is skipped, and said to be.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from . import decoding, timing
from .attention import TOLERANCE
from .decoding import FILLS, Cache
from .measure import disagreement
from .results import machine, write_json
from .sweep import table
from .timing import Effort, Prepared

PAGE_SIZE = 64
DTYPES = ("float32", "bfloat16")
LENGTHS = (4096, 8192, 16384, 32768)
_SPARE = 1.2
"""What is needed, times this, must be free: planned memory is not all there is."""

Case = tuple[Cache, str]
"""A cache, and one of `FILLS`."""


def cases() -> list[Case]:
    """All that is measured; what one cache holds comes together."""
    made = [(Cache(8, s, dtype=dtype), filled) for dtype in DTYPES for s in LENGTHS for filled in FILLS]
    made += [(Cache(1, s, dtype=dtype), "full") for dtype in DTYPES for s in (64, 256, 1024, 32768)]
    made += [(Cache(8, 4096, 32, 32), "full"), (Cache(8, 32768, 64, 1), "full"), (Cache(8, 8192, rows=4), "full")]
    latent = [Cache(8, 8192, heads, 1, 576, 512, dtype) for dtype in DTYPES for heads in (16, 128)]
    return made + [(cache, filled) for cache in latent for filled in ("full", "quarter")]


def quick_cases() -> list[Case]:
    """Of each kind one, and small."""
    made = [(Cache(8, s, dtype=dtype), filled) for dtype in DTYPES for s in (512, 2048) for filled in FILLS]
    made += [(Cache(1, 256, dtype=dtype), "full") for dtype in DTYPES]
    others = (Cache(8, 512, 32, 32), Cache(8, 4096, 64, 1), Cache(8, 1024, rows=4), Cache(8, 1024, 16, 1, 576, 512))
    return made + [(cache, "full") for cache in others]


def title(case: Case) -> str:
    """What `--only` looks at."""
    return f"{case[0].title} {case[1]}"


# What runs.


def arrays(cache: Cache) -> dict[str, Array]:
    """Everything that some provider takes."""
    made, page_table = decoding.dense(cache), decoding.table(cache, PAGE_SIZE)
    made |= {f"{name}_pages": decoding.pages(made[name], page_table) for name in {"k", "v"} & made.keys()}
    return made | {"page_table": jnp.asarray(page_table), "lengths": jnp.asarray(cache.lengths("full"))}


def providers(cache: Cache) -> dict[str, tuple[Callable[..., Array], tuple[str, ...]]]:
    """What attends to the cache: functions, and the arrays that they take."""
    if cache.v_dim:
        latent = functools.partial(decoding.paged, v_pages=None, head_dim_v=cache.v_dim)
        return {
            "paged": (latent, ("q", "k_pages", "page_table", "lengths")),
            "plain": (decoding.baseline(cache), ("q", "k", "lengths")),
        }
    dense = ("q", "k", "v", "lengths")
    return {
        "ours": (decoding.ours, dense),
        "paged": (decoding.paged, ("q", "k_pages", "v_pages", "page_table", "lengths")),
        "jax.nn": (decoding.baseline(cache), dense),
    }


class Programs:
    """Compiled functions for one cache, made without any of its arrays; and the bytes that they need."""

    def __init__(self, cache: Cache):
        self.cache = cache
        shapes = jax.eval_shape(functools.partial(arrays, cache))
        compiled = lambda function, *positional, **named: jax.jit(function).lower(*positional, **named).compile()
        self.make = compiled(functools.partial(arrays, cache))
        self.attend = {
            name: compiled(function, **{x: shapes[x] for x in takes})
            for name, (function, takes) in providers(cache).items()
        }
        names = {"q", "k", "v", "lengths"} & shapes.keys()
        self.reference = compiled(decoding.of_sequence(cache), jnp.int32(0), **{x: shapes[x] for x in names})
        self.dense = names
        held = sum(x.size * x.dtype.itemsize for x in shapes.values())
        self.needed = held + max(map(_temporary, (self.make, self.reference, *self.attend.values())))

    def calls(self, made: Mapping[str, Array]) -> dict[str, Callable[[], Array]]:
        """Each provider, with its arrays."""
        takes = {name: {x: made[x] for x in takes} for name, (_, takes) in providers(self.cache).items()}
        return {name: functools.partial(program, **takes[name]) for name, program in self.attend.items()}

    def wrong(self, got: Array, made: Mapping[str, Array]) -> str:
        """How a result differs from the reference in one of its sequences; "" if in none."""
        for b in range(self.cache.batch):
            want = self.reference(jnp.int32(b), **{x: made[x] for x in self.dense})
            if said := disagreement(got[b : b + 1], want, TOLERANCE[self.cache.dtype]):
                return f"sequence {b}: {said}"
        return ""


def _temporary(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def reading(caches: list[Array], lengths: np.ndarray) -> Callable[[], list[Array]]:
    """Reads the first `lengths[b]` tokens of each sequence b once.

    As fp32, whatever they are: 32-bit words of any two bfloat16 are numbers, too, and those of random ones as harmless.
    A product of a matrix and a vector is what reads fastest here; XLA's sums and NumPy's are at most as fast.
    """
    parts = []
    for x in map(np.asarray, caches):  # views, here and below
        for sequence, n in zip(x, lengths, strict=True):
            words = sequence[:n].reshape(-1).view(np.uint8).view(np.float32)
            parts.append(jax.device_put(words.reshape(-1, 8 * words.size // n), may_alias=True))
    sums = jax.jit(lambda parts: [x @ jnp.ones(x.shape[1]) for x in parts]).lower(parts).compile()
    return lambda: sums(parts)


def measure(cache: Cache, fills: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """One record for each of `fills`: of each provider the milliseconds, by turns, and what follows from them."""
    head = {**dataclasses.asdict(cache), "cache_bytes": cache.batch * cache.seqlen * cache.token_bytes}
    programs = Programs(cache)
    needed, free = round(_SPARE * programs.needed), available()
    if free is not None and needed > free:
        why = f"needs {needed / 2**30:.1f} GiB, where {free / 2**30:.1f} are free"
        yield from ({**head, "title": title((cache, f)), "filled": f, "skipped": why} for f in fills)
        return
    made = programs.make()
    for filled in fills:
        lengths = cache.lengths(filled)
        made["lengths"] = jnp.asarray(lengths)
        calls, wrong = programs.calls(made), {}
        for name, call in calls.items():
            if said := programs.wrong(call(), made):
                wrong[name] = {"wrong": said}
        calls["read"] = reading([made[name] for name in ("k", "v") if name in made], lengths)
        each = {name: Prepared(calls[name], None, None) for name in _order(calls) if name not in wrong}
        times = timing.by_turns(each, Effort(seconds / len(each), most=10**6, warmup=0))  # compared: warm
        live_bytes, baseline = int(lengths.sum()) * cache.token_bytes, list(programs.attend)[-1]
        found = {name: _found(name, times, baseline, live_bytes) for name in calls if name in times}
        for name in found.keys() & programs.attend.keys():
            found[name]["temporary"] = _rounded(_temporary(programs.attend[name]) / head["cache_bytes"])
        yield {
            **head, "title": title((cache, filled)), "filled": filled, "live_bytes": live_bytes, "baseline": baseline,
            "turns": len(times["read"].samples), "providers": wrong | found,
        }  # fmt: skip


def _order(names: Iterable[str]) -> list[str]:
    """Whose turn is when: "read" comes second, right behind what may have left keys in the processor's cache, so that
    nothing that is compared with it has that from it."""
    first, *others = (name for name in names if name != "read")
    return [first, "read", *others]


def _found(name: str, times: dict[str, timing.Times], baseline: str, live_bytes: int) -> dict[str, Any]:
    """What the times of one provider, and of its neighbours, say."""
    ms = times[name].median
    made: dict[str, Any] = {"ms": _rounded(ms), "gb_per_s": _rounded(live_bytes / ms / 1e6)}
    if name != "read":
        made["times_reading"] = [*map(_rounded, timing.ratios(times["read"], times[name]))]
        if name != baseline and baseline in times:
            made["times_faster"] = [*map(_rounded, timing.ratios(times[name], times[baseline]))]
    return made


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def available() -> int | None:
    """Bytes of memory that can be had on this machine; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def tables(records: list[dict[str, Any]]) -> str:
    """A line for each case and provider; what was skipped, and what was wrong."""
    rows = [["case", "", "ms", "x faster", "p20 to p80", "x read", "p20 to p80", "GB/s", "temporary"]]
    said = [f"skipped: {r['title']}: {r['skipped']}" for r in records if "skipped" in r]
    for r in (r for r in records if "skipped" not in r):
        case = r["title"]
        for name, x in r["providers"].items():
            if "wrong" in x:
                said.append(f"wrong: {r['title']} {name}: {x['wrong']}")
                continue
            share = f"{100 * x['temporary']:.3g}%" if "temporary" in x else "-"
            ratios = (*_spread(x.get("times_faster")), *_spread(x.get("times_reading")))
            rows.append([case, name, f"{x['ms']:.4g}", *ratios, f"{x['gb_per_s']:.3g}", share])
            case = ""
    return "\n".join([table(rows, left=2), *said])


def _spread(ratio: list[float] | None) -> tuple[str, str]:
    return ("-", "-") if ratio is None else (f"{ratio[0]:.2f}", f"{ratio[1]:.2f} to {ratio[2]:.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases: under 3 minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything that was measured is written")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of timed runs of a case (default 4; 0.5 with --quick)"
    )
    options = parser.parse_args(argv)
    if jax.default_backend() != "cpu":
        parser.error("this is of CPUs (JAX_PLATFORMS=cpu); on a GPU: python -m benchmarks gpu --what decode")
    chosen = [case for case in (quick_cases() if options.quick else cases()) if options.only in title(case)]
    if not chosen:
        parser.error(f"--only {options.only!r} leaves no case")
    seconds = options.seconds if options.seconds is not None else 0.5 if options.quick else 4.0
    records = []
    with tqdm(total=len(chosen), unit="case", dynamic_ncols=True) as bar:
        for cache, same in itertools.groupby(chosen, key=lambda case: case[0]):
            bar.set_postfix_str(cache.title)
            for record in measure(cache, [filled for _, filled in same], seconds):
                records.append(record)
                bar.update()
    print(tables(records))
    if options.json:
        write_json(options.json, machine(), records)
    return 1 if any("wrong" in x for r in records for x in r.get("providers", {}).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
