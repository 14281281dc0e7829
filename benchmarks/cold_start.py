"""What a new process pays: tracing, lowering and compiling of each option, and the first calls without jit.

    python -m benchmarks cold_start                  # tables
    python -m benchmarks cold_start --quick          # fewer options, one process each
    python -m benchmarks cold_start --only dropout   # options whose name holds this
    python -m benchmarks cold_start --json FILE      # and everything that was measured

Each line is a process of its own on the CPU, with JAX's cache of compiled programs off; the median of a few. Compiling
is counted in CPU-seconds (user and system, all threads, without imports), which other work on the machine changes
little, of forward and backward as one jitted function. Calls without jit are counted in milliseconds of wall time: the
first, and the median of those that follow. Where jax.nn has no such option, there is nothing to compare with. What a
process computed must agree with the definition, or there are no numbers.

Where Triton is installed: CUDA lowering of forward and backward for an H100, in a first process and in a second, which
finds the kernels that the first has kept on disk.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .results import machine, write_json
from .sweep import table

SHAPE = {"batch": 1, "seqlen": 1024, "heads": 4, "head_dim": 64}
OPTIONS = ("causal", "segments", "lengths", "window", "bias", "mask", "dropout", "predicate", "all options")
QUICK = ("causal", "segments", "dropout")
THEIRS = ("causal", "segments", "lengths", "window", "bias", "mask")
"""What jax.nn has too."""
STAGES = ("trace", "lower", "compile")
WINDOW, SINKS, CAP, RATE, SEED, DOCUMENTS = 256, 64, 30.0, 0.1, 3, 4
TOLERANCE = 1e-3


# What is called. Imports of JAX wait until the process that measures has begun.


def operands(seqlen: int, batch: int, heads: int, head_dim: int) -> dict[str, Any]:
    """All arrays that an option may take."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal((batch, seqlen, heads, head_dim), np.float32) for name in "qkv"}
    made["bias"] = rng.standard_normal((1, heads, seqlen, seqlen), np.float32)
    made["sinks"] = rng.standard_normal(heads, np.float32)
    made["slopes"] = np.float32(0.5) ** np.arange(1, heads + 1, dtype=np.float32)
    made["ids"] = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), seqlen // DOCUMENTS)[None].repeat(batch, 0)
    made["lengths"] = np.full(batch, seqlen - seqlen // 10, np.int32)
    made["mask"] = rng.random((1, 1, seqlen, seqlen)) < 0.9
    made["seed"] = np.int32(SEED)
    return {name: jnp.asarray(x) for name, x in made.items()}


TAKES: dict[str, tuple[str, ...]] = {
    "segments": ("ids",),
    "lengths": ("lengths",),
    "bias": ("bias",),
    "mask": ("mask",),
    "dropout": ("seed",),
    "all options": ("bias", "ids", "lengths", "sinks", "slopes", "seed"),
}
"""The operands of each option besides q, k and v."""


def ours(option: str) -> Callable:
    """`(q, k, v, *operands) -> o` of this package."""
    from jax_flash_attn2 import flash_attention as attend
    from jax_flash_attn2 import masks

    predicate = masks.causal() & (masks.sliding_window(WINDOW) | masks.sinks(SINKS))

    def everything(q, k, v, bias, ids, lengths, sinks, slopes, seed):
        more = {"logits_soft_cap": CAP, "dropout_rate": RATE, "dropout_seed": seed, "window_size": (WINDOW, 0)}
        more |= {"q_segment_ids": ids, "kv_lengths": lengths, "sinks": sinks, "alibi_slopes": slopes}
        return attend(q, k, v, bias, causal=True, **more)

    return {
        "causal": lambda q, k, v: attend(q, k, v, causal=True),
        "segments": lambda q, k, v, ids: attend(q, k, v, causal=True, q_segment_ids=ids),
        "lengths": lambda q, k, v, lengths: attend(q, k, v, kv_lengths=lengths),
        "window": lambda q, k, v: attend(q, k, v, causal=True, window_size=(WINDOW, 0)),
        "bias": lambda q, k, v, bias: attend(q, k, v, bias),
        "mask": lambda q, k, v, mask: attend(q, k, v, mask=mask),
        "dropout": lambda q, k, v, seed: attend(q, k, v, causal=True, dropout_rate=RATE, dropout_seed=seed),
        "predicate": lambda q, k, v: attend(q, k, v, mask=predicate),
        "all options": everything,
    }[option]


def theirs(option: str) -> Callable:
    """The same of `jax.nn`."""
    from jax.nn import dot_product_attention as attend

    def segments(q, k, v, ids):
        return attend(q, k, v, is_causal=True, mask=ids[:, None, :, None] == ids[:, None, None, :])

    return {
        "causal": lambda q, k, v: attend(q, k, v, is_causal=True),
        "segments": segments,
        "lengths": lambda q, k, v, lengths: attend(q, k, v, key_value_seq_lengths=lengths),
        "window": lambda q, k, v: attend(q, k, v, is_causal=True, local_window_size=(WINDOW, 0)),
        "bias": lambda q, k, v, bias: attend(q, k, v, bias),
        "mask": lambda q, k, v, mask: attend(q, k, v, mask=mask),
    }[option]


def definition(option: str) -> Callable:
    """The same in so many words, for the results to be compared with."""
    import jax
    import jax.numpy as jnp

    from jax_flash_attn2.base import dropout

    @jax.numpy_rank_promotion("allow")
    def attend(q, k, v, *given):
        x = dict(zip(TAKES.get(option, ()), given, strict=True))
        rows, cols = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[3] ** -0.5
        if option == "all options":
            s = CAP * jnp.tanh(s / CAP) - x["slopes"][:, None, None] * abs(rows - cols).astype(s.dtype)
        s = s + x.get("bias", 0)
        seen = x.get("mask", jnp.array(True))
        if option not in ("lengths", "bias", "mask"):
            seen = seen & (rows >= cols)
        if option in ("window", "all options"):
            seen = seen & (rows - cols <= WINDOW)
        if option == "predicate":
            seen = seen & ((rows - cols <= WINDOW) | (cols < SINKS))
        if "ids" in x:
            seen = seen & (x["ids"][:, None, :, None] == x["ids"][:, None, None, :])
        if "lengths" in x:
            seen = seen & (cols < x["lengths"][:, None, None, None])
        s = jnp.where(seen, s, -jnp.inf)
        if "sinks" in x:
            sinks = jnp.broadcast_to(x["sinks"][:, None, None], (*s.shape[:3], 1))
            s = jnp.concatenate([s, sinks], -1)
        lowest = jnp.finfo(s.dtype).min  # so that a row that sees nothing gives 0
        p = jnp.exp(s - jax.lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), lowest)))
        total = p.sum(-1, keepdims=True)
        p = p[..., : k.shape[1]] / jnp.where(total > 0, total, 1)
        if "seed" in x:
            keys = dropout.keys((x["seed"].astype(jnp.uint32), 0), q.shape[0], q.shape[2])
            kept = dropout.keep(*keys, rows.astype(jnp.int32), cols.astype(jnp.int32), round(RATE * 2**32))
            p = jnp.where(kept, p / (1 - RATE), 0)
        return jnp.einsum("bhqk,bkhd->bqhd", p, v, precision="highest")

    return attend


# What a process measures.


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """One task, in the process that calls this, which should be new: seconds or milliseconds by name."""
    if task["what"] == "cuda":
        return lower_for_cuda()
    import jax

    x = operands(**task["shape"])
    arguments = [x[name] for name in ("q", "k", "v", *TAKES.get(task["option"], ()))]
    attend = {"ours": ours, "jax.nn": theirs}[task["provider"]](task["option"])
    function, check = _passes(attend), _passes(definition(task["option"]))
    if task["what"] == "compile":
        clock = [_cpu()]
        traced = jax.jit(function["gradient"]).trace(*arguments)
        clock.append(_cpu())
        lowered = traced.lower()
        clock.append(_cpu())
        compiled = lowered.compile()
        clock.append(_cpu())
        measured = dict(zip(STAGES, (b - a for a, b in itertools.pairwise(clock)), strict=True))
        results = {"gradient": compiled(*arguments)}
    else:
        measured, results = {}, {}
        for name, call in function.items():
            times = []
            for _ in range(task["calls"]):
                start = time.perf_counter()
                results[name] = jax.block_until_ready(call(*arguments))
                times.append(1e3 * (time.perf_counter() - start))
            measured |= {f"{name} first": times[0], f"{name} later": statistics.median(times[1:])}
    for name, got in results.items():
        _compare(got, jax.jit(check[name])(*arguments))
    return measured


def _passes(attend: Callable) -> dict[str, Callable]:
    import jax

    def loss(q, k, v, *more):
        return (attend(q, k, v, *more) ** 2).sum()

    return {"forward": attend, "gradient": jax.value_and_grad(loss, (0, 1, 2))}


def _compare(got: Any, want: Any) -> None:
    """Raises ValueError where the largest error is not small against the largest number."""
    import jax
    import numpy as np

    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error, largest = float(np.abs(np.asarray(x) - np.asarray(y)).max()), float(np.abs(np.asarray(y)).max())
        if not error <= TOLERANCE * largest:
            raise ValueError(f"wrong: off by {error:.3g}, where the largest number is {largest:.3g}")


def lower_for_cuda() -> dict[str, float]:
    """CPU-seconds to lower forward and backward for an H100."""
    import jax
    import jax.numpy as jnp

    from jax_flash_attn2 import flash_attention, gpu_target

    x = jax.ShapeDtypeStruct((1, 1024, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        return flash_attention(q, k, v, causal=True).astype(jnp.float32).sum()

    start = _cpu()
    with gpu_target(compute_capability=90):
        jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",))
    return {"lower": _cpu() - start}


def _cpu() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def in_new_process(task: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`measure` of a task in a process of its own.

    Raises:
      RuntimeError: it failed; the last line that it wrote.
    """
    settings = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", **(environment or {})}
    command = [sys.executable, "-m", "benchmarks.cold_start", "--task", json.dumps(task)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# The tables.


def run(options: tuple[str, ...], repeat: int, calls: int, shape: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every task, by turns: one record each, with the medians and what each process measured."""
    from tqdm import tqdm

    tasks = [
        {"what": what, "option": option, "provider": provider, "shape": dict(shape), "calls": calls}
        for what in ("compile", "eager")
        for option in options
        for provider in ("ours", *(("jax.nn",) if option in THEIRS else ()))
    ]
    runs: list[list[dict[str, Any]]] = [[] for _ in tasks]
    with tqdm(total=repeat * len(tasks), unit="process") as bar:
        for _ in range(repeat):
            for task, measured in zip(tasks, runs, strict=True):
                measured.append(in_new_process(task))
                bar.update()
    return [task | {"runs": made, "median": _medians(made)} for task, made in zip(tasks, runs, strict=True)]


def run_cuda(repeat: int) -> list[dict[str, Any]]:
    """First and second processes; nothing without Triton."""
    try:
        import jax_triton  # noqa: F401
        import triton  # noqa: F401
    except ImportError:
        return []
    runs: dict[str, list] = {"first": [], "second": []}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            for made in runs.values():
                made.append(in_new_process({"what": "cuda"}, {"JAX_FLASH_ATTN2_CACHE": folder}))
    return [{"what": "cuda", "process": name, "runs": x, "median": _medians(x)} for name, x in runs.items()]


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def tables(records: list[dict[str, Any]]) -> str:
    """CPU-seconds of compiling, milliseconds of calls without jit, and what the cache of kernels saves."""
    found = {(r["what"], r.get("option"), r.get("provider")): r["median"] for r in records}
    names = list(dict.fromkeys(r["option"] for r in records if "option" in r))
    compiling = [["option", *STAGES, "in all", "jax.nn", "times jax.nn's"]]
    for name in names:
        own, other = (found.get(("compile", name, provider)) for provider in ("ours", "jax.nn"))
        if own is not None:
            total, more = sum(own.values()), ["-", "-"]
            if other is not None:
                more = [f"{sum(other.values()):.2f}", f"{total / sum(other.values()):.2f}"]
            compiling.append([name, *(f"{own[stage]:.2f}" for stage in STAGES), f"{total:.2f}", *more])
    calls = [f"{name} {which}" for name in ("forward", "gradient") for which in ("first", "later")]
    eager = [["option", *calls]]
    for name in names:
        own, other = (found.get(("eager", name, provider)) for provider in ("ours", "jax.nn"))
        if own is not None:
            texts = [f"{own[call]:.1f} / {f'{other[call]:.1f}' if other else '-'}" for call in calls]
            eager.append([name, *texts])
    parts = [
        f"CPU-seconds to trace, lower and compile forward and backward\n{table(compiling)}",
        f"Milliseconds of calls without jit, ours / jax.nn\n{table(eager)}",
    ]
    cuda = [[r["process"], f"{r['median']['lower']:.2f}"] for r in records if r["what"] == "cuda"]
    if cuda:
        parts.append(f"CPU-seconds to lower forward and backward for sm_90\n{table([['process', 'lower'], *cuda])}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; one process each")
    made.add_argument("--only", default="", help="options whose name holds this")
    made.add_argument("--repeat", type=int, help="processes for each median (default 3, quick 1)")
    made.add_argument("--seqlen", type=int, default=SHAPE["seqlen"], help=f"default {SHAPE['seqlen']}")
    made.add_argument("--json", type=Path, metavar="FILE", help="where everything that was measured is written")
    made.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.task is not None:
        print(json.dumps(measure(options.task)))
        return 0
    chosen = tuple(name for name in (QUICK if options.quick else OPTIONS) if options.only in name)
    repeat = options.repeat or (1 if options.quick else 3)
    records = run(chosen, repeat, 5 if options.quick else 20, SHAPE | {"seqlen": options.seqlen}) + run_cuda(repeat)
    print(tables(records))
    if options.json:
        write_json(options.json, machine(), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
