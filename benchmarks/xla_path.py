"""The XLA path against `jax.nn.dot_product_attention` on this machine's CPU, as ratios.

    python -m benchmarks.xla_path                 # a table
    python -m benchmarks.xla_path --json FILE     # and every time that was measured
    python -m benchmarks.xla_path --only 1024     # cases whose name holds "1024"

The two are timed by turns in one process (A B A B ...), each call waited for; a ratio is the median of the ratios
of neighbours, with its 20th and 80th percentile. Results are compared before anything is timed.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_flash_attn2 import flash_attention

from .results import write_json
from .timing import Effort, compare, ratios


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is attended to; lengths in tokens."""

    batch: int = 1
    seqlen: int = 1024
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    causal: bool = True
    dtype: str = "float32"

    @property
    def title(self) -> str:
        heads = f"H{self.heads}" + (f":{self.kv_heads}" if self.kv_heads != self.heads else "")
        mask = "causal" if self.causal else "full"
        return f"B{self.batch} T{self.seqlen} {heads} D{self.head_dim} {self.dtype} {mask}"


SHAPES = [Shape(seqlen=t, causal=c) for t in (128, 256, 512, 1024, 2048, 4096) for c in (True, False)]
SHAPES += [
    Shape(batch=4, seqlen=512, heads=12, kv_heads=12),
    Shape(heads=8, kv_heads=2),
    Shape(dtype="bfloat16"),
    Shape(seqlen=1009),
]


def functions(attend, shape: Shape):
    """Forward, and forward and backward, jitted."""
    forward = jax.jit(lambda q, k, v, do: attend(q, k, v))

    def both(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return {"forward": forward, "forward and backward": jax.jit(both)}


def measure(shape: Shape, seconds: float):
    """One record per pass: milliseconds of both, by turns."""
    rng = np.random.default_rng(0)
    q, do = (
        jnp.asarray(rng.standard_normal((shape.batch, shape.seqlen, shape.heads, shape.head_dim)), shape.dtype)
        for _ in "qo"
    )
    k, v = (
        jnp.asarray(rng.standard_normal((shape.batch, shape.seqlen, shape.kv_heads, shape.head_dim)), shape.dtype)
        for _ in "kv"
    )
    ours = functions(lambda *x: flash_attention(*x, causal=shape.causal), shape)
    theirs = functions(lambda *x: jax.nn.dot_product_attention(*x, is_causal=shape.causal), shape)
    for name in ours:
        pair = (ours[name], theirs[name])
        one, other = (jax.block_until_ready(f(q, k, v, do)) for f in pair)
        tolerance = 2e-4 if shape.dtype == "float32" else 3e-2
        jax.tree.map(
            lambda a, b, t=tolerance: np.testing.assert_allclose(
                *(np.asarray(x, np.float32) for x in (a, b)), rtol=t, atol=t
            ),
            one,
            other,
        )
        times = compare(
            {"ours": pair[0], "theirs": pair[1]}, q, k, v, do, effort=Effort(seconds / 2, most=10**6, warmup=0)
        )
        ratio, low, high = (round(x, 3) for x in ratios(times["ours"], times["theirs"]))
        yield {
            **dataclasses.asdict(shape), "title": shape.title, "pass": name,
            "times_faster": ratio, "p20": low, "p80": high,
            "ms": [round(x.median, 4) for x in times.values()], "pairs": len(times["ours"].samples),
        }  # fmt: skip


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [x.split(": ")[1] for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xla_path", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case and pass")
    options = parser.parse_args(argv)
    shapes = [s for s in SHAPES if options.only in s.title]
    records = [r for shape in tqdm(shapes, unit="case") for r in measure(shape, options.seconds)]
    print(f"{'':36} {'':22} times faster than jax.nn (p20 to p80)    ms, ours and theirs")
    for r in records:
        print(
            f"{r['title']:36} {r['pass']:22} {r['times_faster']:6.2f} ({r['p20']:.2f} to {r['p80']:.2f}) "
            f"{r['ms'][0]:20.2f} {r['ms'][1]:9.2f}"
        )
    if options.json:
        write_json(options.json, machine(), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
