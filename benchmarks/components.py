"""Where the time of an attention layer goes, and what keeping the causal mask saves.

    python -m benchmarks components

Hidden size 4096, 32 heads of 128, float32, batch 1. Each stage is a jitted function of random arrays; its share is of
the sum of the stages, so shares add to 100%. What the whole takes is measured beside it: `attention` (scores, mask,
softmax and output compiled together) and `layer` (all stages together), which XLA fuses into less than the sum.

The mask is what an eager caller pays for, made at each call; beside it, by turns, `mask-built` (the same again) and
`mask-cached`, which looks it up (`causal_mask_cache`). What that saves end to end is measured, not estimated:
`dense_attention` called without jit, with and without the cache by turns; and `flash_attention`, which needs no mask,
beside them.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.masks import causal_mask_cache, dense_attention
from jax_flash_attn2.masks.cache import build_window

from .attention import TOLERANCE, reference
from .problem import Group, Work
from .results import Record, parse_case
from .sweep import Sweep, milliseconds, parser, ratio, table

HIDDEN, HEADS = 4096, 32
HEAD_DIM = HIDDEN // HEADS
LENGTHS = (1, 8, 32, 128, 512)
STAGES = ("projection", "rope", "scores", "mask", "softmax", "output")
"""Of a layer, in order: what the shares are of."""
BASELINES = {
    "mask-cached": "mask-built",
    "eager-cached": "eager-built",
    "eager-flash": "eager-built",
    "attention-flash": "attention",
}
TURNS = (
    (*STAGES, "layer"),
    ("mask-built", "mask-cached"),
    ("eager-built", "eager-cached", "eager-flash"),
    ("attention", "attention-flash"),
)
"""What runs by turns. What is compared stands alone: what a big neighbour leaves in the caches is no part of it."""
PROVIDERS = tuple(itertools.chain(*TURNS))


def rope(x: Array) -> Array:
    """Rotary position embedding of `[B, T, H, D]`, interleaved pairs (Su et al., arXiv:2104.09864)."""
    length, width = x.shape[1], x.shape[3]
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * 10000.0 ** (-jnp.arange(0.0, width, 2) / width)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # [T, 1, D / 2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def project(x: Array, w: Array) -> tuple[Array, Array, Array]:
    """x `[B, T, hidden]` times w `[hidden, 3 hidden]`: q, k and v `[B, T, H, D]`."""
    q, k, v = jnp.split(x @ w, 3, -1)
    return tuple(y.reshape(*y.shape[:2], HEADS, HEAD_DIM) for y in (q, k, v))


def scores(q: Array, k: Array) -> Array:
    """q kᵀ / sqrt(D): `[B, H, T, T]`."""
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5


def softmax(s: Array, seen: Array) -> Array:
    """Of the logits that are seen."""
    return jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)


def output(p: Array, v: Array) -> Array:
    """p v: `[B, T, H, D]`."""
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Scores, mask, softmax and output."""
    length = q.shape[1]
    return output(softmax(scores(q, k), jnp.tril(jnp.ones((length, length), bool))), v)


def layer(x: Array, w: Array) -> Array:
    """All stages."""
    q, k, v = project(x, w)
    return attention(rope(q), rope(k), v)


@functools.cache
def _weights() -> Array:
    """`[hidden, 3 hidden]`, for all lengths: 200 MB."""
    return jax.random.normal(jax.random.key(1), (HIDDEN, 3 * HIDDEN)) * HIDDEN**-0.5


def problem(seqlen: int) -> "Components":
    """The problem of a case."""
    return Components(seqlen)


class Components:
    """A `worker.Problem`: the stages of a layer, and ways to do some of them together."""

    tolerance, flops, dtype = TOLERANCE["float32"], None, "float32"

    def __init__(self, seqlen: int):
        self.seqlen = seqlen
        self.x = jax.random.normal(jax.random.key(0), (1, seqlen, HIDDEN))
        self.q, self.k, self.v = (
            jax.random.normal(key, (1, seqlen, HEADS, HEAD_DIM)) for key in jax.random.split(jax.random.key(2), 3)
        )
        self.s = jax.random.normal(jax.random.key(3), (1, HEADS, seqlen, seqlen))
        self.seen = jnp.tril(jnp.ones((1, 1, seqlen, seqlen), bool))

    def work(self, provider: str) -> Work:
        qkv = self.q, self.k, self.v
        eager = functools.partial(dense_attention, causal=True)
        functions: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "projection": (jax.jit(project), (self.x, _weights())),
            "rope": (jax.jit(lambda q, k: (rope(q), rope(k))), qkv[:2]),
            "scores": (jax.jit(scores), qkv[:2]),
            "mask": (lambda: build_window(self.seqlen, window=(None, 0)), ()),
            "mask-built": (lambda: build_window(self.seqlen, window=(None, 0)), ()),
            "mask-cached": (lambda: causal_mask_cache.causal(self.seqlen), ()),
            "softmax": (jax.jit(softmax), (self.s, self.seen)),
            "output": (jax.jit(output), (self.s, self.v)),
            "attention": (jax.jit(attention), qkv),
            "attention-flash": (jax.jit(functools.partial(flash_attention, causal=True)), qkv),
            "layer": (jax.jit(layer), (self.x, _weights())),
            "eager-built": (functools.partial(eager, cache=None), qkv),
            "eager-cached": (functools.partial(eager, cache=causal_mask_cache), qkv),
            "eager-flash": (functools.partial(flash_attention, causal=True), qkv),
        }
        return Work(*functions[provider])

    def expected(self, provider: str) -> Any:
        with jax.default_matmul_precision("highest"):
            if provider.startswith("mask"):
                return self.seen
            if provider == "rope":
                return _rotated(self.q), _rotated(self.k)
            if provider in ("projection", "layer"):
                q, k, v = (y.reshape(1, self.seqlen, HEADS, HEAD_DIM) for y in jnp.split(self.x @ _weights(), 3, -1))
                return (q, k, v) if provider == "projection" else self._attended(_rotated(q), _rotated(k), v)
            if provider == "scores":
                return jnp.einsum("bqhd,bkhd->bhqk", self.q, self.k) / HEAD_DIM**0.5
            if provider == "softmax":
                e = jnp.where(self.seen, jnp.exp(self.s), 0)
                return e / e.sum(-1, keepdims=True)
            if provider == "output":
                return jnp.swapaxes(self.s @ jnp.swapaxes(self.v, 1, 2), 1, 2)
            return self._attended(self.q, self.k, self.v)

    def _attended(self, q: Array, k: Array, v: Array) -> Array:
        return reference(q, k, v, causal=True)


def _rotated(x: Array) -> Array:
    """`rope` by complex numbers."""
    pairs = jax.lax.complex(x[..., 0::2], x[..., 1::2])
    angle = jnp.arange(float(x.shape[1]))[:, None] * 10000.0 ** (-jnp.arange(0.0, x.shape[3], 2) / x.shape[3])
    turned = pairs * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))[:, None]
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def groups() -> list[Group]:
    """All points."""
    return [
        Group("benchmarks.components:problem", {"seqlen": n}, providers, BASELINES)
        for n, providers in itertools.product(LENGTHS, TURNS)
    ]


def percentages(parts: list[float]) -> list[str]:
    """Shares of the sum, to a tenth of a percent, that add to exactly 100.0: the largest remainders are rounded up."""
    total = sum(parts)
    exact = [1000 * x / total for x in parts]
    rounded = [int(x) for x in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: rounded[i] - exact[i])
    for i in by_remainder[: 1000 - sum(rounded)]:
        rounded[i] += 1
    return [f"{x / 10:.1f}%" for x in rounded]


def by_length(records: list[Record]) -> dict[str, dict[str, Record]]:
    """{seqlen: {provider: record}}."""
    found: dict[str, dict[str, Record]] = {}
    for r in records:
        found.setdefault(parse_case(r.case)["seqlen"], {})[r.provider] = r
    return found


def stage_table(records: list[Record]) -> str:
    """Times and shares, one column of each for every length; only lengths of which all stages were measured."""
    complete = {t: line for t, line in by_length(records).items() if all(s in line and line[s].ok for s in STAGES)}
    rows = [["stage", *(head for t in complete for head in (f"T={t} ms", "share"))]]
    shares = {t: percentages([line[s].ms or 0.0 for s in STAGES]) for t, line in complete.items()}
    for i, stage in enumerate(STAGES):
        rows.append([stage, *(x for t, line in complete.items() for x in (milliseconds(line[stage]), shares[t][i]))])
    sums = {t: sum(line[s].ms or 0.0 for s in STAGES) for t, line in complete.items()}
    rows.append(["sum of the stages", *(x for t in complete for x in (f"{sums[t]:.3f}", "100.0%"))])
    for name, what in (("attention", "attention, compiled together"), ("layer", "layer, compiled together")):
        rows.append([what, *(x for line in complete.values() for x in (milliseconds(line.get(name)), ""))])
    return table(rows)


def cache_table(records: list[Record]) -> str:
    """What the mask cache saves: of the mask alone, and of attention called without jit."""
    rows = [
        [
            "seqlen",
            "mask built ms",
            "cached ms",
            "x",
            "attention built ms",
            "cached ms",
            "x (p20 to p80)",
            "flash ms",
            "x",
        ]
    ]
    for t, line in by_length(records).items():
        cached = line.get("eager-cached")
        spread = ratio(cached)
        if cached is not None and cached.times_faster is not None:
            spread += f" ({cached.times_faster_p20:.2f} to {cached.times_faster_p80:.2f})"
        rows.append(
            [
                t,
                *(milliseconds(line.get(p)) for p in ("mask-built", "mask-cached")),
                ratio(line.get("mask-cached")),
                *(milliseconds(line.get(p)) for p in ("eager-built", "eager-cached")),
                spread,
                milliseconds(line.get("eager-flash")),
                ratio(line.get("eager-flash")),
            ]
        )
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    options = parser("components", __doc__ or "", seconds=1.0, quick_seconds=0.3).parse_args(argv)
    with Sweep(options) as sweep:
        records = sweep.measure_all(sweep.select(groups()))
        sweep.close_bar()
        print(f"{stage_table(records)}\n\nThe mask cache, attention called without jit:\n{cache_table(records)}\n")
        print(sweep.closing())
    return 0
