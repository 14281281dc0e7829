"""Random calls against the definition, in batches that are each a process of their own.

    python tests/fuzz.py --draws 10000            # goes on where the last run stopped; `make fuzz`
    python tests/fuzz.py --report                 # what has been found so far
    python tests/fuzz.py --batch 17 --shrink      # one batch by itself, and the smallest call that fails (minutes)

Batch n draws the same calls wherever it runs (`fuzzing.draws`, seeded by 1000 n, 1000 n + 1, ...). Results are kept in
`.cache/fuzz.jsonl`, each as it comes. Next time a batch that failed runs what failed again, and then what it had not
come to; one whose process died or hung begins anew. What a failure shrinks to belongs into `cases.py`, under a name,
once it is understood.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".cache" / "fuzz.jsonl"
SIZE = 100
"""Draws of a batch. One is a call: a function that is compiled is called with up to four kinds of values."""
LIMIT = 3600
"""Seconds that a batch may take."""
MOST = 5
"""Failures after which a batch ends."""
INTERPRETED = 20
"""One of so many batches is of kernels, in Triton's interpreter: they take five times as long."""
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
"""See `conftest.OLDER_EMITTERS`."""


def batch(seed: int, size: int, *, before: dict | None = None, shrink: bool = False) -> dict[str, object]:
    """Runs one here: how many calls, of which kinds, those that failed (or the smallest that they shrink to), and the
    first draw that it did not come to. before: what it came to last time."""
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", True)

    before = before or {"counted": {}, "failures": [], "next": 1000 * seed, "seconds": 0}
    counted, failures, following = collections.Counter(before["counted"]), [], before["next"]
    again, started = [failure["number"] for failure in before["failures"]], time.perf_counter()
    while again or (counted.total() < size and len(failures) < MOST):
        number = again.pop(0) if again else following
        following = max(following, number + 1)
        failures += one(number, counted, shrink=shrink)
        jax.clear_caches()  # programs are never met again
    seconds = round(before["seconds"] + time.perf_counter() - started, 1)
    found = {"counted": counted, "failures": failures, "next": following}
    return {"seed": seed, "size": size, "seconds": seconds, **found}


def one(number: int, counted: collections.Counter, *, shrink: bool = False) -> list[dict[str, object]]:
    """Runs one draw, and counts its calls; how it failed, if it did, or what the smallest that fails is."""
    import hypothesis
    from fuzzing import draws

    last, plainest = [], [True]
    phases = [hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * shrink]
    settings = {"deadline": None, "database": None, "suppress_health_check": [*hypothesis.HealthCheck]}

    @hypothesis.seed(number)
    @hypothesis.settings(max_examples=1, phases=phases, **settings)
    @hypothesis.given(draws())
    def run(draw):
        if plainest.pop() if plainest else False:
            hypothesis.reject()  # with which every run begins
        last[:] = [draw]
        draw.check()
        counted.update(draw.kinds)

    try:
        run()
    except Exception as error:  # whatever it is: that is what is looked for
        return [{"number": number, "draw": repr(last[0]), "error": f"{type(error).__name__}: {error}"[:2000]}]
    return []


def in_a_process(seed: int, size: int) -> dict[str, object]:
    """The same, of a process that may die or hang, and that goes on from what is kept of the batch."""
    command = [sys.executable, __file__, "--batch", str(seed), "--size", str(size), "--json"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"}
    env["TRITON_INTERPRET"] = str(int(seed % INTERPRETED == INTERPRETED - 1))
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=env, check=False)
        return json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"no end after {LIMIT} s"
    except (IndexError, json.JSONDecodeError):
        error = f"the process ended with {run.returncode}: {run.stderr[-1500:]}"
    return {
        "seed": seed,
        "size": size,
        "seconds": 0,
        "counted": {},
        "failures": [{"number": 1000 * seed, "draw": "", "error": error}],
    }


def kept() -> dict[int, dict]:
    """The last result of each batch."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return {result["seed"]: result for result in map(json.loads, lines)}


def left(found: dict[int, dict], draws: int, size: int) -> list[int]:
    """The batches that have not run without a fault."""
    return [seed for seed in range(-(-draws // size)) if seed not in found or found[seed]["failures"]]


def report(found: dict[int, dict]) -> int:
    """Prints what is known; how many batches failed."""
    counted = collections.Counter()
    for result in found.values():
        counted.update(result["counted"])
    failed = [result for result in found.values() if result["failures"]]
    draws = sum(sum(result["counted"].values()) for result in found.values())
    print(f"{draws} draws in {len(found)} batches, {len(failed)} of them with a fault")
    for place in (0, -1):  # ways, values
        some = collections.Counter()
        for kind, count in counted.items():
            some[kind.split(", ")[place]] += count
        print("  " + ", ".join(f"{name} {count}" for name, count in some.most_common()))
    for result in failed:
        for failure in result["failures"]:
            print(f"batch {result['seed']}, {failure['number']}:\n  {failure['draw']}\n  {failure['error']}")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="how many in all (default 10000)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"draws of a batch (default {SIZE})")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="print what has been found, and run nothing")
    parser.add_argument("--batch", type=int, metavar="N", help="run batch N alone, here")
    parser.add_argument("--shrink", action="store_true", help="with --batch: look for the smallest call that fails")
    parser.add_argument("--json", action="store_true", help="with --batch: go on, and print what is to be kept")
    args = parser.parse_args()
    if args.batch is not None:
        before = kept().get(args.batch) if args.json else None
        before = before if before and "next" in before else None
        result = batch(args.batch, args.size, before=before, shrink=args.shrink)
        print(json.dumps(result) if args.json else json.dumps(result, indent=1))
        return int(result["failures"] != [])
    found = kept()
    if not args.report:
        from tqdm import tqdm

        seeds = left(found, args.draws, args.size)
        KEPT.parent.mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool, KEPT.open("a") as out, tqdm(total=len(seeds), unit="batch") as bar:
            for done in as_completed([pool.submit(in_a_process, seed, args.size) for seed in seeds]):
                result = done.result()
                print(json.dumps(result), file=out, flush=True)
                bar.update()
                for failure in result["failures"]:
                    bar.write(f"{failure['number']}: {' '.join(failure['error'].split())[:200]}")
        found = kept()
    return int(report(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
