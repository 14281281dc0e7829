"""Paged problems, drawn: small ones, for the XLA path and for the interpreter, and the rule that their results obey."""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import QUICK, ROUNDINGS, TIMES
from reference import paged

from jax_flash_attn2 import paged_attention

NO_PAGES = (-1, 2**30)
"""What a table may have where nobody looks."""


def numbers(default: int, step: int = 1) -> list[Any]:
    """Which problems are drawn, `step` in a test: as many as DRAWN in the environment says, or `default`, of which
    `make test` runs the first test's."""
    count = int(os.environ.get("DRAWN", default))
    return [
        pytest.param(range(n, min(n + step, count)), id=f"from_{n}", marks=[pytest.mark.thorough] if n else [])
        for n in range(0, count, step)
    ]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of `paged_attention`."""

    name: str
    arrays: dict[str, np.ndarray]
    """Its arrays, by its names for them; all numbers are finite, all pages there."""
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def rows(self) -> np.ndarray:
        """How many rows each sequence has."""
        if "cu_q_lens" in self.arrays:
            return np.diff(self.arrays["cu_q_lens"])
        q = self.arrays["q"]
        return np.full(len(q), 1 if q.ndim == 3 else q.shape[1])

    @property
    def live(self) -> tuple[np.ndarray, np.ndarray]:
        """The first page that a row of each sequence sees, and the one behind the last."""
        lengths, size, window = self.arrays["lengths"], self.arrays["k_pages"].shape[1], self.options["window_size"]
        left = window[0] if isinstance(window, tuple) else window
        first = 0 * lengths if left is None else np.maximum(lengths - self.rows - left, 0) // size
        return first, np.where(self.rows > 0, -(-lengths // size), 0)

    @property
    def dirty(self) -> dict[str, np.ndarray]:
        """The arrays, with NaN in keys that no sequence has and in rows that are nobody's, and no page's number in the
        table where nobody looks."""
        x = {name: a.copy() for name, a in self.arrays.items()}
        pages, size = x["k_pages"].shape[:2]
        keys = np.zeros((pages, size), bool)
        for b, (first, end) in enumerate(zip(*self.live, strict=True)):
            for n in range(x["page_table"].shape[1]):
                if first <= n < end:
                    keys[x["page_table"][b, n], : max(x["lengths"][b] - n * size, 0)] = True
                else:
                    x["page_table"][b, n] = NO_PAGES[n % 2]
        for name in {"k_pages", "v_pages"} & x.keys():
            x[name][~keys] = 127 if x[name].dtype == np.int8 else np.nan
        for name in {"k_scale", "v_scale"} & x.keys():
            if x[name].ndim:
                x[name][~keys.any(1)] = np.nan
        if "cu_q_lens" in x:
            x["q"][x["cu_q_lens"][-1] :] = np.nan
        return x


def draw(seed: int) -> Problem:
    """A problem of a few hundred keys: any of the options, any tables, lengths and rows."""
    rng = np.random.default_rng([seed, 12])
    pick = lambda *values: values[rng.integers(len(values))]
    chance = lambda share: rng.random() < share
    heads, kv_heads = pick((1, 1), (4, 1), (7, 1), (2, 2), (6, 2), (8, 2))
    latent, size, batch = chance(0.15), pick(16, 16, 32, 64, 128, 256), int(rng.integers(1, 6))
    kv_heads, head_dim = (1 if latent else kv_heads), pick(16, 32, 40, 64)
    dtype = pick("float32", "float32", "bfloat16", "float16")
    cache = pick(dtype, dtype, "float32", "bfloat16", "int8", "int8", "float8_e4m3fn", "float8_e5m2")

    # Who has how many rows and keys: new ones are among the keys, but a length may lie.
    how = pick("one", "one", "few", "many", "ragged", "ragged")
    most = {"one": 1, "few": 5, "many": 40, "ragged": 40}[how]
    rows = np.full(batch, rng.integers(1 if how == "one" else 2, most + 1))
    if how == "ragged":
        rows = np.array([pick(0, 1, 1, 1, 2, int(rng.integers(3, most))) for _ in range(batch)])
    lengths = np.where(rng.random(batch) < 0.8, rows, 0) + rng.integers(0, pick(20, 150, 300), batch)
    lengths = np.where(rng.random(batch) < 0.15, 0, lengths).astype(np.int32)

    # Pages in no order, some of them nobody's, some shared from the beginning on.
    needed = -(-lengths // size)
    width, pages = int(needed.max()) + int(rng.integers(0, 3)) or 1, int(needed.sum()) + int(rng.integers(1, 4))
    table, free = rng.integers(0, pages, (batch, width)), rng.permutation(pages)
    for b, n in enumerate(needed):
        table[b, :n], free = free[:n], free[n:]
        if b and chance(0.3):
            shared = rng.integers(0, min(n, needed[b - 1]) + 1)
            table[b, :shared] = table[b - 1, :shared]

    total = int(rows.sum()) + int(rng.integers(0, 3))
    shape = {"one": (batch,), "ragged": (max(total, 1),)}.get(how, (batch, rows[0]))
    x: dict[str, np.ndarray] = {"q": _numbers(rng, (*shape, heads, head_dim), dtype)}
    x["k_pages"] = _numbers(rng, (pages, size, kv_heads, head_dim), cache)
    v_dim = pick(16, head_dim) if latent else pick(head_dim, head_dim, 24)
    x |= {} if latent else {"v_pages": _numbers(rng, (pages, size, kv_heads, v_dim), cache)}
    x |= {"page_table": table.astype(np.int32), "lengths": lengths}
    if how == "ragged":
        x["cu_q_lens"] = np.append(0, np.cumsum(rows)).astype(np.int32)
    for name in ("k_scale", "v_scale"):
        if cache == "int8" or chance(0.6 if cache.startswith("float8") else 0.1):
            unit = 1 / 40 if cache == "int8" else 1
            x[name] = np.asarray(unit * rng.uniform(0.5, 1.5, pick((pages, kv_heads), ())), np.float32)
    if latent:
        x.pop("v_scale", None)
    if chance(0.25):
        x["sinks"] = _numbers(rng, (heads,), "float32")
    if chance(0.25):
        x["alibi_slopes"] = rng.uniform(0, 0.2, heads).astype(np.float32)
    window = pick(None, None, None, 0, 5, 70, (int(rng.integers(0, 100)), 0), (30, None), (None, 2), (0, 3))
    options = {
        "causal": chance(0.8), "window_size": window, "logits_soft_cap": pick(None, None, 3.0),
        "softmax_scale": pick(None, None, 0.2, -0.1), "splits": pick(None, None, 1, 2, 3, 7),
        "head_dim_v": v_dim if latent else None,
    }  # fmt: skip
    name = f"{seed}-{how}-{dtype}-{cache}-{heads}x{kv_heads}-{head_dim}-pages{size}{'-latent' * latent}"
    return Problem(name, x, options)


def _numbers(rng, shape, dtype: str) -> np.ndarray:
    x = rng.standard_normal(shape)
    return np.clip(np.round(40 * x), -127, 127).astype(np.int8) if dtype == "int8" else x.astype(jnp.dtype(dtype))


def attend(x: dict[str, np.ndarray], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """o and lse of arrays that are known to nobody until they run."""
    function = lambda x: paged_attention(**{"v_pages": None} | x, **options, return_lse=True)
    return jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK)(x))


def defined(problem: Problem, **precision: Any) -> tuple[np.ndarray, np.ndarray]:
    """o and lse as `reference.paged` has them; in precision's if there is some."""
    x = {"v_pages": None} | problem.arrays
    tables = {name: x.pop(name) for name in ("k_pages", "v_pages", "page_table", "lengths")}
    tables |= {name: x.pop(name) for name in ("cu_q_lens", "k_scale", "v_scale") if name in x}
    options = {name: value for name, value in problem.options.items() if name != "splits"}
    one = x["q"].ndim == 3 and "cu_q_lens" not in tables

    def function(x):
        q = x["q"][:, None] if one else x["q"]
        o, lse = paged(**x | {"q": q}, **tables, **options, **precision)
        return (o[:, 0], lse[..., 0]) if one else (o, lse)

    with jax.enable_x64(True):
        inner = {name: jnp.asarray(a, jnp.float64) for name, a in x.items()}
        return jax.tree.map(np.asarray, jax.jit(function, compiler_options=QUICK)(inner))


def plain(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The same maths in the precision of q: keys, values and p rounded to its dtype, products summed in fp32."""
    x, dtype = dict(problem.arrays), problem.arrays["q"].dtype
    for name in {"k_pages", "v_pages"} & x.keys():
        scale = np.broadcast_to(x.pop(f"{name[0]}_scale", np.float32(1)), x[name].shape[::2][:2])
        x[name] = (x[name].astype(np.float32) * scale[:, None, :, None]).astype(dtype)
    o, lse = defined(dataclasses.replace(problem, arrays=x), compute=jnp.float32, round_p=dtype)
    return o.astype(dtype), lse


@functools.lru_cache(maxsize=512)
def _exact(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return defined(draw(seed))


def check(problem: Problem | int, implementation: str | None = None, **options: Any) -> None:
    """Raises unless `paged_attention` is as near to the definition as `checks` has it: its error at most twice that of
    `plain`, plus some roundings. It is given the arrays with NaN wherever nobody may look."""
    want = _exact(problem) if isinstance(problem, int) else defined(problem)
    problem = draw(problem) if isinstance(problem, int) else problem
    got = attend(problem.dirty, {**problem.options, "implementation": implementation, **options})
    rough = None
    eps32 = float(jnp.finfo(jnp.float32).eps)
    for n, (name, x, exact) in enumerate(zip(("o", "lse"), got, want, strict=True)):
        assert x.shape == exact.shape, f"{problem} {name}: {x.shape}, not {exact.shape}"
        assert x.dtype == (problem.arrays["q"].dtype if name == "o" else np.float32), f"{problem} {name}: {x.dtype}"
        error, size = _error(x, exact), float(np.max(np.abs(exact[np.isfinite(exact)]), initial=1))
        band = (ROUNDINGS * float(jnp.finfo(x.dtype).eps) + _largest_logit(problem) * eps32) * size
        if error <= band:
            continue  # whatever the plain error, which takes as long to learn
        rough = rough or plain(problem)
        plain_error = _error(rough[n], exact)
        assert error <= TIMES * plain_error + band, (
            f"{problem} {name}: error {error:.3g}, plain {plain_error:.3g}, band {band:.3g}"
        )


def _error(x: np.ndarray, want: np.ndarray) -> float:
    x = x.astype(np.float64)
    same = np.isneginf(x) & np.isneginf(want)
    error = np.abs(np.where(same, 0, x) - np.where(same, 0, want))
    return float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))


def _largest_logit(problem: Problem) -> float:
    """No base-2 logit is larger."""
    x, norm = problem.arrays, lambda a: float(np.linalg.norm(a.astype(np.float64), axis=-1).max())
    scale = problem.options["softmax_scale"]
    scale = x["q"].shape[-1] ** -0.5 if scale is None else abs(scale)
    products = scale * norm(x["q"]) * norm(x["k_pages"]) * float(np.max(x.get("k_scale", 1)))
    return (products + float(np.max(x.get("alibi_slopes", 0)) * x["lengths"].max())) * math.log2(math.e)
