"""An hour of mixed calls in one process: what grows?

    python -m benchmarks soak --minutes 60 --json FILE    # and FILE.png, the curves
    python -m benchmarks soak --quick                     # two minutes

Calls follow each other at random: of lengths from a pool, with and without jit, forward and backward, with masks and
functions that are new objects each time, pages that are written and read. Once each has been met, nothing may grow: not
the memory of the process, not what the package's caches hold, not the number of programs. What is traced anew at each
call by design (functions that are new objects, outside jit) is traced at a steady rate. All results of a call are the
same bits each time, or the run ends there.

CPU only: the memory is the resident memory of the process.
"""

import argparse
import collections
import gc
import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_flash_attn2 import flash_attention, masks, paged_attention, varlen_attention, write_pages
from jax_flash_attn2.masks.cache import causal_mask_cache

from .results import machine, write_json
from .sweep import table

LENGTHS = (17, 64, 100, 128, 200, 333)
HEADS, WIDTH, PAGES, PAGE = 4, 32, 64, 16
WARM = 1 / 4
"""The share of the time after which nothing may grow."""


def calls() -> dict[str, Callable[[int], Any]]:
    """By name: functions of a number that decides lengths and numbers, one of `POOL`."""
    step = jax.jit(jax.value_and_grad(_loss), static_argnames=("causal", "window_size"))
    twice = jax.jit(jax.vmap(lambda x: flash_attention(x, x, x, causal=True)))
    decode = jax.jit(lambda q, pages, *where: paged_attention(q, pages, pages, *where))
    ragged = jax.jit(lambda x, starts: varlen_attention(x, x, x, starts, starts, causal=True))
    write = jax.jit(lambda pages, x, *where: write_pages(pages, pages, x, x, *where)[0])

    def serving(n: int) -> Any:
        """One more token of two sequences, written and read."""
        pages = _numbers(n, (PAGES, PAGE, HEADS, WIDTH))
        tables = jnp.asarray(np.random.default_rng(n).permutation(PAGES).reshape(2, -1), jnp.int32)
        lengths = jnp.asarray([5 * n + 1, 400 - n], jnp.int32)
        new = _numbers(n + 1, (2, HEADS, WIDTH))
        return decode(new, write(pages, new, tables, lengths), tables, lengths)

    def from_dense(n: int) -> Any:
        """A block mask of what is known only now."""
        x = _of(128, n)
        shown = np.random.default_rng(n).random((1, 1, 128, 128)) < 0.5
        mask = masks.BlockMask.from_mask(shown, block_m=32, block_n=32, max_tiles=16, max_parts=16)
        return flash_attention(x, x, x, mask=mask)

    def packed(n: int) -> Any:
        ends = np.sort(np.random.default_rng(n).integers(0, 200, 6))
        return ragged(_of(200, n)[0], jnp.asarray([0, *ends, 200], jnp.int32))

    return {
        "jit, training": lambda n: step(_of(_length(n), n), causal=True),
        "jit, a window": lambda n: step(_of(_length(n), n), window_size=9 + n % 3),
        "no jit": lambda n: flash_attention(*(_of(_length(n), n),) * 3, causal=True, kv_lengths=jnp.asarray([9 + n])),
        "no jit, gradient": lambda n: jax.grad(_loss)(_of(_length(n), n), dropout_rate=0.1, dropout_seed=n),
        "a mask function": lambda n: _loss(_of(200, n), mask=lambda b, h, i, j: (i + j) % (2 + n % 5) > 0),
        "a score function": lambda n: _loss(_of(128, n), score_mod=lambda s, b, h, i, j: s * (1 + n % 3) - abs(i - j)),
        "predicates": lambda n: _loss(_of(333, n), mask=masks.causal() & masks.sliding_window(20 + n)),
        "a block mask": from_dense,
        "dense masks, kept": lambda n: _loss(_of(_length(n), n), mask=masks.causal_mask(_length(n), window=n + 1)),
        "vmap": lambda n: twice(jnp.stack([_of(100, n)] * 2)),
        "pages": serving,
        "ragged rows": packed,
    }


POOL = 24
"""How many numbers a call may be given."""


def _loss(x: jax.Array, **options: Any) -> jax.Array:
    return (flash_attention(x, x, x, **options) ** 2).sum()


def _length(n: int) -> int:
    return LENGTHS[n % len(LENGTHS)]


def _of(length: int, n: int) -> jax.Array:
    return _numbers(n, (1, length, HEADS, WIDTH))


def _numbers(n: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(n).standard_normal(shape), jnp.float32)


def run(minutes: float, every: float) -> Iterator[dict[str, Any]]:
    """Calls at random, and what was looked at every so many seconds.

    Raises:
      ValueError: a call gave other bits than it did before.
    """
    counts = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **more: counts.update([name]))
    rng, known, made = np.random.default_rng(0), {}, calls()
    names, done, start = [*made], 0, time.monotonic()
    looked = start
    while (now := time.monotonic()) < start + 60 * minutes:
        name, number = names[rng.integers(len(names))], int(rng.integers(POOL))
        bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(made[name](number)))).digest()
        if known.setdefault((name, number), bits) != bits:
            raise ValueError(f"{name} of {number} gave other bits than before, after {done} calls")
        done += 1
        if now - looked >= every:
            looked = now
            gc.collect()
            yield {"seconds": now - start, "calls": done, **_look(counts)}


def _look(counts: collections.Counter) -> dict[str, int]:
    block, causal = masks.block_mask_cache.info(), causal_mask_cache.info()
    return {
        "resident_bytes": _resident(),
        "programs": counts["/jax/core/compile/backend_compile_duration"],
        "traces": counts["/jax/core/compile/jaxpr_trace_duration"],
        "block_masks": block.currsize,
        "causal_masks": causal.currsize,
        "mask_bytes": block.nbytes + causal.nbytes,
        "arrays": len(jax.live_arrays()),
        "objects": len(gc.get_objects()),
    }


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # elsewhere there is but the most that there ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def grown(records: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of each thing counted: what there was when the run was warm, and at its end (the mean of a tenth of it each)."""
    warm = int(len(records) * WARM)
    few = max(len(records) // 10, 1)
    mean = lambda some, name: sum(x[name] for x in some) / len(some)
    names = [name for name in records[0] if name not in ("seconds", "calls", "traces")]
    return {name: (mean(records[warm : warm + few], name), mean(records[-few:], name)) for name in names}


def tables(records: list[dict[str, Any]]) -> str:
    """What there was when the run was warm and at its end; how often functions were traced."""
    rows = [["", "warm", "at the end", "grown by"]]
    for name, (first, last) in grown(records).items():
        unit, what = (2**20, "MiB") if name.endswith("bytes") else (1, "")
        title = f"{name.removesuffix('_bytes').replace('_', ' ')} {what}".strip()
        rows.append([title, f"{first / unit:.1f}", f"{last / unit:.1f}", f"{100 * (last / max(first, 1) - 1):.2f}%"])
    first, last = records[int(len(records) * WARM)], records[-1]
    rate = (last["traces"] - first["traces"]) / max(last["calls"] - first["calls"], 1)
    said = f"{last['calls']} calls in {last['seconds'] / 60:.1f} minutes; {rate:.1f} functions traced for each"
    return f"{table(rows)}\n{said}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """The curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [x["seconds"] / 60 for x in records]
    panels = [
        ("Resident memory, MiB", {"": [x["resident_bytes"] / 2**20 for x in records]}),
        ("Programs compiled so far", {"": [x["programs"] for x in records]}),
        ("In the package's caches", {name: [x[name] for x in records] for name in ("block_masks", "causal_masks")}),
        ("Thousands of Python objects", {"": [x["objects"] / 1000 for x in records]}),
    ]
    figure, every = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axes, (title, lines) in zip(every.flat, panels, strict=True):
        for name, line in lines.items():
            axes.plot(minutes, line, lw=1.2, label=name.replace("_", " "))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(0, 1.15 * max(max(line) for line in lines.values()) or 1)
        axes.axvspan(0, minutes[-1] * WARM, color="0.93", lw=0)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, loc="lower right")
    for axes in every[1]:
        axes.set_xlabel("minutes")
    figure.suptitle(f"{records[-1]['calls']} mixed calls in one process (grey: warming up)", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--minutes", type=float, help="default 60; 2 with --quick")
    parser.add_argument("--every", type=float, help="seconds from look to look (default 10; 2 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all that was seen is written; a PNG beside it")
    options = parser.parse_args(argv)
    if jax.default_backend() != "cpu":
        parser.error("this is of CPUs (JAX_PLATFORMS=cpu)")
    minutes = options.minutes or (2 if options.quick else 60)
    records = []
    with tqdm(total=round(60 * minutes), unit="s", dynamic_ncols=True) as bar:
        for record in run(minutes, options.every or (2 if options.quick else 10)):
            records.append(record)
            bar.update(round(record["seconds"]) - bar.n)
            bar.set_postfix_str(f"{record['resident_bytes'] / 2**20:.0f} MiB, {record['programs']} programs")
    print(tables(records))
    if options.json:
        write_json(options.json, machine(), records)
        draw(records, options.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
