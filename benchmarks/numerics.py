"""How far results are from fp64, against the plain implementation in the same precision.

    python -m benchmarks numerics                       # T to 8192, every kind of logits and dtype
    python -m benchmarks numerics --seqlen 65536 --kinds normal --dtypes float32,bfloat16
    TRITON_INTERPRET=1 python -m benchmarks numerics --backend triton --seqlen 256
    python -m benchmarks numerics --what training       # a small language model, ours and Flax's, three seeds each
    python -m benchmarks numerics --json FILE           # and all numbers

The plain implementation is what `jax.nn.dot_product_attention` does on XLA: all logits of a row at once, softmax in
fp32, probabilities rounded to the dtype; its gradients are JAX's of that. (In pieces of rows, so that 65536 rows fit;
the gradients of k and v are summed over the pieces in fp32.) What the kernels are compared with has the gradients of
logits rounded to the dtype too, as all that tensor cores multiply; records also have the other ("plain, wide"). fp64 is
NumPy, of some rows and keys, of the very numbers that the others are given. An error is the root of the mean of
squares, over what is looked at, divided by that of the exact results.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from jax_flash_attn2 import Config, flash_attention

from .results import machine, write_json
from .sweep import table

HEAD_DIM = 64
LOOKED_AT = 128
"""Rows, and keys, whose results are compared."""
PIECE = 1024
DTYPES = ("float32", "bfloat16", "float16")
RESULTS = ("o", "dq", "dk", "dv")
Arrays = dict[str, np.ndarray]


# Inputs: q, k, v, do, `[T, D]` each, before they are rounded to a dtype.


def _normal(rng: np.random.Generator, seqlen: int) -> Arrays:
    return {name: rng.standard_normal((seqlen, HEAD_DIM)) for name in ("q", "k", "v", "do")}


def _large(rng: np.random.Generator, seqlen: int) -> Arrays:
    """Logits of a standard deviation of 30: most rows see one key."""
    x = _normal(rng, seqlen)
    return x | {"q": 30 * x["q"]}


def _flat(rng: np.random.Generator, seqlen: int) -> Arrays:
    """Probabilities that are nearly equal, and values with a mean: what is summed does not cancel."""
    x = _normal(rng, seqlen)
    return x | {"q": 1e-2 * x["q"], "v": x["v"] + 1}


def _shifted(rng: np.random.Generator, seqlen: int) -> Arrays:
    """Keys with a large part in common: logits of some hundreds that differ by little."""
    x = _normal(rng, seqlen)
    return x | {"k": x["k"] + 20 * rng.standard_normal(HEAD_DIM)}


def _sink(rng: np.random.Generator, seqlen: int) -> Arrays:
    """A first key that has nearly all of the attention, and a value of nothing, as trained models have it."""
    x = _normal(rng, seqlen)
    x["q"][:, 0], x["k"][:, 0], x["k"][0, 0], x["v"][0] = 8, 0, 10 + np.log(seqlen), 0
    return x


KINDS: dict[str, Callable[[np.random.Generator, int], Arrays]] = {
    "normal": _normal,
    "large": _large,
    "flat": _flat,
    "shifted": _shifted,
    "sink": _sink,
}


# Results: o, dq, dk, dv `[T, D]` of causal attention.


def ours(x: Arrays, **options: Any) -> dict[str, Array]:
    """Of `flash_attention`."""
    arrays = {name: jnp.asarray(a)[None, :, None] for name, a in x.items()}

    @jax.jit
    def run(q, k, v, do):
        o, vjp = jax.vjp(lambda q, k, v: flash_attention(q, k, v, causal=True, **options), q, k, v)
        return dict(zip(RESULTS, (y[0, :, 0] for y in (o, *vjp(do))), strict=True))

    return run(**arrays)


@jax.custom_vjp
def _rounded_backward(x: Array, like: Array) -> Array:
    """x, whose gradient is rounded to the dtype of `like`."""
    return x


_rounded_backward.defvjp(
    lambda x, like: (x, like), lambda like, dx: (dx.astype(like.dtype).astype(dx.dtype), jnp.zeros_like(like))
)


def plain(x: Arrays, *, narrow: bool = False) -> dict[str, Array]:
    """Of the plain implementation, in pieces of rows. narrow: all that products take is in the dtype, as tensor cores
    have it: the gradient of logits too."""
    seqlen = len(x["q"])

    def attend(start, q, k, v):
        s = jnp.einsum("md,nd->mn", q, k, preferred_element_type=jnp.float32) * jnp.float32(HEAD_DIM**-0.5)
        s = _rounded_backward(s, q) if narrow else s
        rows, cols = start + jnp.arange(len(q))[:, None], jnp.arange(seqlen)
        p = jax.nn.softmax(jnp.where(cols <= rows, s, -jnp.inf)).astype(q.dtype)
        return jnp.einsum("mn,nd->md", p, v, preferred_element_type=jnp.float32).astype(q.dtype)

    @jax.jit
    def piece(start, q, k, v, do):
        o, vjp = jax.vjp(functools.partial(attend, start), q, k, v)
        return o, *vjp(do)

    x = {name: jnp.asarray(a) for name, a in x.items()}
    made = []
    sums = [jnp.zeros((seqlen, HEAD_DIM), jnp.float32) for _ in "kv"]
    for start in range(0, seqlen, PIECE):
        own = {name: x[name][start : start + PIECE] for name in ("q", "do")}
        o, dq, *dkv = piece(start, own["q"], x["k"], x["v"], own["do"])
        made.append((o, dq))
        sums = [total + new.astype(jnp.float32) for total, new in zip(sums, dkv, strict=True)]
    o, dq = (jnp.concatenate(parts) for parts in zip(*made, strict=True))
    dk, dv = (total.astype(o.dtype) for total in sums)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def exact(x: Arrays, at: np.ndarray) -> Arrays:
    """In fp64: o and dq of the rows `at`, dk and dv of the keys `at`."""
    q, k, v, do = (x[name].astype(np.float64) for name in ("q", "k", "v", "do"))
    scale, seqlen = HEAD_DIM**-0.5, len(q)
    results = {name: np.zeros((len(at), HEAD_DIM)) for name in RESULTS}
    for start in range(0, seqlen, PIECE):
        rows = np.arange(start, min(start + PIECE, seqlen))
        end = rows[-1] + 1
        s = q[rows] @ k[:end].T * scale
        s[np.arange(end) > rows[:, None]] = -np.inf
        p = np.exp(s - s.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        o, dp = p @ v[:end], do[rows] @ v[:end].T
        ds = p * (dp - (do[rows] * o).sum(1)[:, None])
        here, keys = np.isin(at, rows), at < end
        own = at[here] - start
        results["o"][here], results["dq"][here] = o[own], ds[own] @ k[:end] * scale
        results["dk"][keys] += ds[:, at[keys]].T @ q[rows] * scale
        results["dv"][keys] += p[:, at[keys]].T @ do[rows]
    return results


def error(got: Array, want: np.ndarray, at: np.ndarray) -> float:
    """Relative to what it should be, in the mean of squares."""
    return float(np.sqrt(np.mean((np.asarray(got[at], np.float64) - want) ** 2) / np.mean(want**2)))


def compare(kind: str, dtype: str, seqlen: int, backend: str) -> dict[str, Any]:
    """The record of one point."""
    rng = np.random.default_rng([seqlen, *kind.encode()])
    x = {name: np.asarray(jnp.asarray(a, jnp.dtype(dtype))) for name, a in KINDS[kind](rng, seqlen).items()}
    at = np.unique(np.concatenate([[0, seqlen - 1], rng.integers(0, seqlen, LOOKED_AT)]))
    want, options = exact(x, at), {"implementation": backend}
    if backend == "triton":
        options["config"] = Config(64, 64)
    made = {"ours": ours(x, **options), "plain": plain(x, narrow=backend == "triton")}
    if backend == "triton":
        made["plain, wide"] = plain(x)
    errors = {who: {name: error(results[name], want[name], at) for name in RESULTS} for who, results in made.items()}
    return {"backend": backend, "dtype": dtype, "seqlen": seqlen, "logits": kind, "errors": errors}


def training(seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """The held-out loss of the language model of `examples/`, by attention and seed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import train_char_lm as lm

    jax.config.update("jax_default_matmul_precision", "float32")
    tokens, held_out, characters = lm.load_text()
    for seed in range(seeds):
        args = argparse.Namespace(
            steps=steps, context=256, width=128, layers=2, heads=4, batch=2, lr=4e-3, dtype="float32", seed=seed
        )
        runs = {name: lm.start(name, len(characters), args) for name in lm.ATTENTION}
        lm.train(runs, tokens, args)
        test = lm.windows(held_out, range(0, len(held_out) - args.context, args.context)[:32], args.context)
        losses = {name: float(run.loss(run.params, test)) for name, run in runs.items()}
        yield {"what": "training", "seed": seed, "steps": steps, "held_out": losses}


def tables(records: list[dict[str, Any]]) -> str:
    """Errors of ours and times those of the plain implementation; held-out losses."""
    rows = [["backend", "dtype", "T", "logits", *(f"{name}, times plain" for name in RESULTS)]]
    for r in (r for r in records if "errors" in r):
        errors = [(r["errors"]["ours"][name], r["errors"]["plain"][name]) for name in RESULTS]
        rows.append([r["backend"], r["dtype"], str(r["seqlen"]), r["logits"],
                     *(f"{a:.1e}, {a / b:.2f}" for a, b in errors)])  # fmt: skip
    trained = [r for r in records if "held_out" in r]
    parts = [f"Relative errors\n{table(rows, left=4)}"] if len(rows) > 1 else []
    if trained:
        names = list(trained[0]["held_out"])
        losses = [["seed", *names]] + [[str(r["seed"]), *(f"{r['held_out'][n]:.5f}" for n in names)] for r in trained]
        parts.append(f"Held-out loss after {trained[0]['steps']} steps, nats per character\n{table(losses)}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = lambda of: lambda text: [of(x) for x in text.split(",")]
    parser.add_argument("--what", choices=["errors", "training"], default="errors")
    parser.add_argument("--seqlen", type=several(int), default=[1024, 8192], help="lengths (default 1024,8192)")
    parser.add_argument("--kinds", type=several(str), default=[*KINDS], help=f"of logits: {','.join(KINDS)}")
    parser.add_argument("--dtypes", type=several(str), default=[*DTYPES], help=",".join(DTYPES))
    parser.add_argument("--backend", choices=["xla", "triton"], default="xla")
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers are written")
    options = parser.parse_args(argv)
    if options.what == "training":
        records = [*training(options.seeds, options.steps)]
    else:
        points = [(k, d, t) for t in options.seqlen for d in options.dtypes for k in options.kinds]
        records = [compare(*point, options.backend) for point in tqdm(points, unit="point", dynamic_ncols=True)]
    print(tables(records))
    if options.json:
        write_json(options.json, machine(), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
