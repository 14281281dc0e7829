"""Random calls against the definition, in batches that are each a process of their own.

    python tests/fuzz.py --draws 10000            # goes on where the last run stopped; `make fuzz`
    python tests/fuzz.py --report                 # what has been found so far
    python tests/fuzz.py --batch 17 --shrink      # one batch by itself, and the smallest call that fails (minutes)

Batch n draws the same calls wherever it runs (`fuzzing.draws`, seeded by n). Results are kept in `.cache/fuzz.jsonl`; a
batch that failed, or whose process died or hung, runs again next time, from its first call to its first failure. What
a failure shrinks to belongs into `cases.py`, under a name, once it is understood.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".cache" / "fuzz.jsonl"
SIZE = 50
"""Draws of a batch."""
LIMIT = 3600
"""Seconds that a batch may take."""
DEVICES = "--xla_force_host_platform_device_count=4"


def batch(seed: int, size: int, *, shrink: bool = False) -> dict[str, object]:
    """Runs one here: how many calls, of which kinds, and the first that failed, or the smallest that one shrinks to."""
    import hypothesis
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    from fuzzing import check, draws

    counted, last = collections.Counter(), []

    phases = [hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * shrink]
    settings = {"deadline": None, "database": None, "suppress_health_check": [*hypothesis.HealthCheck]}

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=size, phases=phases, **settings)
    @hypothesis.given(draws())
    def one(draw):
        counted.update((draw.way, draw.values))
        last[:] = [draw]
        check(draw)
        if sum(counted.values()) % 40 == 0:
            jax.clear_caches()  # programs are never met again

    started, failure = time.perf_counter(), None
    try:
        one()
    except Exception as error:  # whatever it is: that is what is looked for
        failure = {"draw": repr(last[0]), "error": f"{type(error).__name__}: {error}"[:2000]}
    seconds = time.perf_counter() - started
    return {"seed": seed, "size": size, "seconds": round(seconds, 1), "counted": counted, "failure": failure}


def in_a_process(seed: int, size: int) -> dict[str, object]:
    """The same, of a process that may die or hang."""
    command = [sys.executable, __file__, "--batch", str(seed), "--size", str(size), "--json"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=env, check=False)
        return json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"no end after {LIMIT} s"
    except (IndexError, json.JSONDecodeError):
        error = f"the process ended with {run.returncode}: {run.stderr[-1500:]}"
    return {"seed": seed, "size": size, "seconds": 0, "counted": {}, "failure": {"draw": "", "error": error}}


def kept() -> dict[int, dict]:
    """The last result of each batch."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return {result["seed"]: result for result in map(json.loads, lines)}


def left(found: dict[int, dict], draws: int, size: int) -> list[int]:
    """The batches that have not run without a fault."""
    return [seed for seed in range(-(-draws // size)) if seed not in found or found[seed]["failure"]]


def report(found: dict[int, dict]) -> int:
    """Prints what is known; how many batches failed."""
    counted = collections.Counter()
    for result in found.values():
        counted.update(result["counted"])
    failed = [result for result in found.values() if result["failure"]]
    draws = sum(result["size"] for result in found.values() if not result["failure"])
    print(f"{draws} draws without a fault in {len(found) - len(failed)} batches; {len(failed)} batches with one")
    print("  " + ", ".join(f"{name} {count}" for name, count in counted.most_common()))
    for result in failed:
        print(f"batch {result['seed']}:\n  {result['failure']['draw']}\n  {result['failure']['error']}")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="how many in all (default 10000)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"draws of a batch (default {SIZE})")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="print what has been found, and run nothing")
    parser.add_argument("--batch", type=int, metavar="N", help="run batch N alone, here")
    parser.add_argument("--shrink", action="store_true", help="with --batch: look for the smallest call that fails")
    parser.add_argument("--json", action="store_true", help="print a batch's result as it is kept")
    args = parser.parse_args()
    if args.batch is not None:
        result = batch(args.batch, args.size, shrink=args.shrink)
        print(json.dumps(result) if args.json else json.dumps(result, indent=1))
        return int(result["failure"] is not None)
    found = kept()
    if not args.report:
        from tqdm import tqdm

        seeds = left(found, args.draws, args.size)
        KEPT.parent.mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool, KEPT.open("a") as out, tqdm(total=len(seeds), unit="batch") as bar:
            for result in pool.map(lambda seed: in_a_process(seed, args.size), seeds):
                print(json.dumps(result), file=out, flush=True)
                bar.update()
                if result["failure"]:
                    bar.write(f"batch {result['seed']}: {result['failure']['error'].splitlines()[0]}")
        found = kept()
    return int(report(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
