"""Functions of a score and of where it is, as people write them; and a kernel that puts scores through one."""

import dataclasses
import os
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from checks import QUICK
from jax import lax

B, H, M, N = 2, 3, 16, 32
RNG = np.random.default_rng(0)
SCORES = (3 * RNG.standard_normal((B, H, M, N))).astype(np.float32)
TABLE = jnp.asarray(RNG.standard_normal((H, 2 * M + 1)), jnp.float32)
SLOPES = jnp.asarray(RNG.uniform(0.1, 1, H), jnp.float32)
DOCUMENTS = jnp.asarray(np.sort(RNG.integers(0, 3, (B, N)), 1), jnp.int32)
HALF = jnp.asarray(RNG.standard_normal(5), jnp.bfloat16)
SEEN = jnp.asarray(RNG.random((M, N)) < 0.5)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the kernel is compiled with."""

    function: Any
    heads: int = H
    small_logits: bool = False


@triton.jit
def apply_kernel(scores, x, out, SPEC: tl.constexpr, CFG: tl.constexpr):
    """One plane of scores, each put through the function."""
    plane = tl.program_id(0)
    i, j = tl.arange(0, CFG.block_m)[:, None], tl.arange(0, CFG.block_n)[None, :]
    at = (plane * CFG.block_m + i) * CFG.block_n + j
    made = SPEC.function(tl.load(scores + at), plane // SPEC.heads, plane % SPEC.heads, i, j, x)
    tl.store(out + at, made + tl.zeros([CFG.block_m, CFG.block_n], tl.float32))


def unsigned(x):
    return x.astype(jnp.uint32)


def mixed(i, j):
    """A number below 1000 that looks random."""
    x = (unsigned(i) * jnp.uint32(2654435769)) ^ (unsigned(j) << 7)
    return ((x ^ (x >> 15)) % jnp.uint32(1000)).astype(jnp.float32)


FUNCTIONS = {
    "alibi": lambda s, b, h, i, j: s - SLOPES[h] * jnp.abs(i - j),
    "soft_cap": lambda s, b, h, i, j: 5 * jnp.tanh(s / 5),
    "causal": lambda s, b, h, i, j: jnp.where(i >= j, s, -jnp.inf),
    "relative": lambda s, b, h, i, j: s + TABLE[h, jnp.clip(i - j, -M, M) + M],
    "documents": lambda s, b, h, i, j: jnp.where(DOCUMENTS[b, i] == DOCUMENTS[b, j], s, -jnp.inf),
    "a mask": lambda s, b, h, i, j: jnp.where(SEEN[i, j], s, 0),
    "half": lambda s, b, h, i, j: s * HALF[i % 5].astype(jnp.float32),
    "wraps": lambda s, b, h, i, j: s + SLOPES[h - 3] + TABLE[-1, i - 5],
    "out of range": lambda s, b, h, i, j: s + SLOPES[i] + TABLE[h, 10 * i],
    "filled": lambda s, b, h, i, j: s + jnp.take(SLOPES, i - 1, mode="fill", fill_value=7.0),
    "of an axis": lambda s, b, h, i, j: s + SLOPES[h[None]][0] + jnp.take(TABLE[0], i[None, None])[0, 0],
    "computed before": lambda s, b, h, i, j: s * jnp.exp(TABLE).sum(1)[h],
    "rounding": lambda s, b, h, i, j: jnp.round(s) + jnp.round(s * 2) / 2 + jnp.floor(s) - jnp.ceil(s) + jnp.trunc(s),
    "integers": lambda s, b, h, i, j: s + (i - 7) // 3 + (i - 7) % 3 + lax.div(i - 7, 3) + lax.rem(i - 7, j - 9),
    "a hash": lambda s, b, h, i, j: s + mixed(i, j) + (lax.div(unsigned(i), unsigned(j % 5)) & 255).astype(s.dtype),
    "remainder": lambda s, b, h, i, j: s % 1.5 + jnp.fmod(s, 1.5) + s // 0.75,
    "bits": lambda s, b, h, i, j: s + ((i ^ j) & 5) + (i << 2) + ((i - 8) >> 1) + (~j),
    "signs": lambda s, b, h, i, j: jnp.sign(s) + jnp.sign(i - j) + jnp.negative(jnp.abs(s)),
    "small": lambda s, b, h, i, j: jnp.expm1(s * 1e-5) + jnp.log1p(jnp.abs(s) * 1e-5),
    "tails": lambda s, b, h, i, j: 1e9 * lax.erfc(4 + jnp.abs(s)) + lax.erfc(-s),
    "places": lambda s, b, h, i, j: jnp.float32(1.0) * jnp.argmax(jnp.stack([s, jnp.where(i == 3, jnp.nan, 0.5), 1.0])),
    "powers": lambda s, b, h, i, j: s**3 + jnp.abs(s) ** 0.5 + jnp.abs(s) ** -2 + jnp.power(s, 3.0) + 2.0**s,
    "trigonometry": lambda s, b, h, i, j: jnp.sin(s) + jnp.cos(s) + lax.erf(s) + jax.nn.sigmoid(s) + jax.nn.gelu(s),
    "a branch": lambda s, b, h, i, j: lax.cond(i > j, lambda s: s * 2, lambda s: s - 1, s),
    "a switch": lambda s, b, h, i, j: lax.switch(h, [lambda s: s, lambda s: -s, lambda s: s * s], s),
    "jitted": lambda s, b, h, i, j: jax.jit(lambda s: jax.nn.softplus(s))(s) + jax.nn.relu(s),
    "exponents": lambda s, b, h, i, j: (lax.bitcast_convert_type(s, jnp.int32) >> 23 & 255).astype(jnp.float32),
    "several conditions": lambda s, b, h, i, j: jnp.select([i < j, i == j], [s, s + 1], s - 1),
    "nan and inf": lambda s, b, h, i, j: jnp.where(
        jnp.isfinite(jnp.where(i == 3, jnp.nan, s)), jnp.maximum(s, jnp.inf), s
    ),
    "constant": lambda s, b, h, i, j: jnp.float32(1.5),
    "tree": lambda s, b, h, i, j: jnp.where((i // 4 == j // 4) & ((i & j) == j), s, -jnp.inf),
}


def value_of(function):
    """A traced function, as one of its arrays too."""
    return lambda score, b, h, i, j, *arrays: function.bound(arrays, False, False).value(score, b, h, i, j)


DRAWN = [
    pytest.param(range(n, n + 6), id=f"from_{n}", marks=[pytest.mark.thorough] if n else [])
    for n in range(0, int(os.environ.get("DRAWN", "24")), 6)
]
"""Which are drawn: six in `make test`, 24 in `make test-all`, 300 in `make test-drawn`."""


def drawn_attention(number):
    """The text of a score function, drawn; and of q, k, v and the arrays that it may read: a function that attends with
    it, by `attend(q, k, v, score_mod)`."""
    rng = random.Random(number)
    text = drawn(rng, rng.randint(1, 4))
    if rng.random() < 0.3:  # hides
        text = f"jnp.where({drawn(rng, 2, real=False)} % 3 != 1, {text}, -jnp.inf)"

    def function(attend, q, k, v, table, slopes):
        names = {**globals(), "TABLE": table, "SLOPES": slopes}
        return attend(q, k, v, eval(f"lambda s, b, h, i, j: {text} + 0.0 * s", names))

    return text, function


def assert_drawn_agree(numbers, ours, definition):
    """Values and all gradients of attention with drawn score functions, by `ours` and by the definition."""
    rng = np.random.default_rng(0)
    q, k, v, w = (rng.standard_normal((B, n, H, 16)).astype(np.float32) for n in (M, N, N, M))
    for number in numbers:
        text, function = drawn_attention(number)
        results = []
        for attend in (ours, definition):
            loss = lambda *args, attend=attend, function=function: (function(attend, *args) * w).sum()
            grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)), compiler_options=QUICK)
            results.append(jax.tree.leaves(grad(q, k, v, TABLE, SLOPES)))
        for name, got, want in zip(("o", "dq", "dk", "dv", "dtable", "dslopes"), *results, strict=True):
            assert np.abs(got - want).max() <= 1e-4 * max(1, np.abs(want).max()), f"{number}: {text}: {name}"


def drawn(rng, depth, real=True):
    """A function of (score, b, h, i, j), as a tree of what a person might write; the text of it, to be read."""
    if real:
        if depth == 0:
            return rng.choice(
                ["s", "s", "1.5", "0.25", "SLOPES[h]", "TABLE[h, i]", "TABLE[h, jnp.clip(i - j, -9, 9) + 9]"]
            )
        a, b = drawn(rng, depth - 1), drawn(rng, depth - 1)
        n = drawn(rng, depth - 1, real=False)
        ways = [
            "({a} + {b})",
            "({a} - {b})",
            "({a} * 0.5 * {b})",
            "jnp.tanh({a})",
            "jnp.maximum({a}, {b})",
            "jnp.abs({a})",
        ]
        ways += [
            "jnp.where({n} > 2, {a}, {b})",
            "({a} / (2.0 + jnp.abs({b})))",
            "({a} + {n})",
            "jnp.exp(-jnp.abs({a}))",
        ]
        ways += ["jnp.sin({a})", "jnp.log1p(jnp.abs({a}))", "jnp.where({a} < {b}, {a}, 0.0)", "TABLE[h, {n} % 20]"]
    else:
        if depth == 0:
            return rng.choice(["i", "j", "b", "h", "(i - j)", "3", "DOCUMENTS[b, j]"])
        a, b, n = (drawn(rng, depth - 1, real=False) for _ in range(3))
        ways = ["({a} + {b})", "({a} - {b})", "({a} // 3)", "({a} % 5)", "jnp.minimum({a}, {b})", "jnp.abs({a})"]
        ways += ["jnp.where({a} <= {b}, {a}, {n})", "({a} & 7)"]
    return rng.choice(ways).format(a=a, b=b, n=n)
