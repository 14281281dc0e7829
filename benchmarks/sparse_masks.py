"""Masks of weights as lists of entries or as dense arrays: what is faster, and is that the package's default.

    python -m benchmarks sparse_masks
    python -m benchmarks sparse_masks --quick --check      # exit status 1 if a default is beaten

The operations of `Mask` under jit on B1 H32 Q1 K32768 (decoding over a long context), 10 to 99.5 percent of the weights
0, each mask in the representation that its mode reads ("sparse": `to_indices`, "dense": an array) beforehand. Then the
maskers, called as one calls them: windows of a 64th and of half of the keys, and 16 sinks; first from an empty mask,
then each after another one, whose mask is held as entries for "sparse" and as an array for the rest.

A default holds if its times, multiplied over the cases that it is for, are the least, or within a tenth of the least.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn2.masks import LocalMasker, Mask, SinkMasker
from jax_flash_attn2.masks import mask as mask_module

from .problem import Group, Work
from .results import Record, parse_case
from .sweep import Sweep, milliseconds, parser, table

SHAPE = (1, 32, 1, 32768)
SPARSITIES = (10, 50, 90, 99.5)
OPERATIONS = ("apply", "apply_inverse", "merge")
SIZES = {"small": (2, 8, 128, 512), "medium": (4, 16, 256, 1024), "large": (8, 32, 512, 2048)}
SINKS, WINDOW_SHARES = 16, {"local": 64, "wide": 2}
PROVIDERS = {
    **dict.fromkeys(OPERATIONS, get_args(mask_module.Mode)),
    **dict.fromkeys(WINDOW_SHARES, LocalMasker.implementations),
    "sink": SinkMasker.implementations,
}
_TIE = 1.1


def problem(operation: str, sparsity: float | None = None, size: str | None = None, previous: str = "") -> Any:
    """The problem of a case."""
    if sparsity is not None:
        return Operation(operation, sparsity)
    assert size is not None
    return Masker(operation, SIZES[size], previous)


class Operation:
    """A `worker.Problem`: one method of `Mask`."""

    tolerance, flops, dtype = 1e-5, None, "float32"

    def __init__(self, operation: str, sparsity: float):
        rng = np.random.default_rng(0)

        def weights() -> np.ndarray:
            kept = rng.random(SHAPE) >= sparsity / 100
            return np.where(kept, rng.uniform(0.25, 1, SHAPE), 0).astype(np.float32)

        self.operation, self.a, self.b = operation, weights(), weights()
        self.x = rng.standard_normal(SHAPE).astype(np.float32)

    def work(self, provider: str) -> Work:
        def held(weights: np.ndarray) -> Mask:
            made = Mask.from_dense(jnp.asarray(weights))
            return made.to_indices() if provider == "sparse" else made

        if self.operation == "merge":
            merge = jax.jit(lambda a, b: a.merge(b, provider))
            return Work(merge, (held(self.a), held(self.b)), view=lambda result: result.to_dense())
        method = getattr(Mask, self.operation)
        return Work(jax.jit(lambda mask, x: method(mask, x, provider)), (held(self.a), jnp.asarray(self.x)))

    def expected(self, provider: str) -> np.ndarray:
        if self.operation == "merge":
            return np.minimum(self.a + self.b, 1)
        if self.operation == "apply":
            return self.x * self.a
        return np.where(self.a > 0, self.x / np.where(self.a > 0, self.a, 1), 0)


class Masker:
    """A `worker.Problem`: a masker on an empty mask, or on what the other masker made."""

    tolerance, flops, dtype = 0.0, None, "float32"

    def __init__(self, name: str, shape: tuple[int, int, int, int], previous: str):
        self.windows = {name: shape[3] // share for name, share in WINDOW_SHARES.items()}
        self.maskers: dict[str, Callable] = {name: LocalMasker(keys) for name, keys in self.windows.items()}
        self.maskers["sink"] = SinkMasker(SINKS)
        self.name, self.shape, self.previous = name, shape, previous

    def work(self, provider: str) -> Work:
        masker, previous = self.maskers[self.name], Mask.empty(self.shape)
        if self.previous != "empty":
            held = "sparse" if provider == "sparse" else None
            previous = self.maskers[self.previous](previous, implementation=held)
            previous = previous if held else Mask.from_dense(previous.to_dense())
        return Work(lambda: masker(previous, implementation=provider), (), view=lambda result: result.to_dense())

    def expected(self, provider: str) -> np.ndarray:
        rows, keys = self.shape[2:]
        ahead = np.arange(rows)[:, None] + keys - rows - np.arange(keys)
        by_name = {name: ahead < window for name, window in self.windows.items()}
        by_name |= {"sink": np.arange(keys) < SINKS, "empty": False}
        shown = (ahead >= 0) & (by_name[self.name] | by_name[self.previous])
        return np.broadcast_to(shown.astype(np.float32), self.shape)


def groups(sizes: tuple[str, ...]) -> list[Group]:
    """All points."""
    cases = [{"operation": operation, "sparsity": s} for operation in OPERATIONS for s in SPARSITIES]
    for name, other in (("local", "sink"), ("wide", "sink"), ("sink", "local")):
        cases += [{"operation": name, "size": size, "previous": p} for p in ("empty", other) for size in sizes]
    return [_group(case) for case in cases]


def _group(case: dict[str, Any]) -> Group:
    providers = PROVIDERS[case["operation"]]
    baselines = {p: providers[0] for p in providers[1:]}  # "sparse"
    return Group("benchmarks.sparse_masks:problem", case, providers, baselines)


def tables(records: list[Record]) -> str:
    """Milliseconds, the winner and its gain over "sparse", or over the next best where that wins; one table each."""
    parts = []
    for operation, providers in PROVIDERS.items():
        rows = [["case", *(f"{p} ms" for p in providers), "winner", "x the next best"]]
        for case, line in _by_case(records, operation).items():
            ok = sorted((r for r in line.values() if r.ok and r.ms), key=lambda r: r.ms or 0.0)
            gain = f"{(ok[1].ms or 0) / (ok[0].ms or 1):.2f}" if len(ok) > 1 else "-"
            rows.append(
                [_title(case), *(milliseconds(line.get(p)) for p in providers), ok[0].provider if ok else "-", gain]
            )
        if len(rows) > 1:
            parts.append(f"{operation}\n{table(rows)}\n")
    return "\n".join(parts)


def _by_case(records: list[Record], operation: str) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for r in records:
        if parse_case(r.case)["operation"] == operation:
            found.setdefault(r.case, {})[r.provider] = r
    return found


def _title(case: str) -> str:
    parsed = parse_case(case)
    if "sparsity" in parsed:
        return f"{parsed['sparsity']}% zeros"
    b, h, q, k = SIZES[parsed["size"]]
    return f"{parsed['size']} B{b} H{h} {q}x{k} after {parsed['previous']}"


def verdicts(records: list[Record]) -> tuple[list[str], bool]:
    """One line for each default: what was fastest over all cases that it is for; and whether all defaults hold."""
    lines, good, rules = [], True, {}
    for operation, providers in PROVIDERS.items():
        for case, found in _by_case(records, operation).items():
            if all(p in found and found[p].ok for p in providers):
                rule = operation, parse_case(case).get("previous", "") == "empty"
                rules.setdefault(rule, []).append(found)
    for (operation, empty), complete in rules.items():
        providers = PROVIDERS[operation]
        means = {p: math.exp(sum(math.log(x[p].ms or 1.0) for x in complete) / len(complete)) for p in providers}
        best, default = min(means, key=lambda p: means[p]), default_of(operation, empty)
        holds = means[default] <= _TIE * means[best]
        good &= holds
        behind = f"; the default takes {means[default] / means[best]:.2f} times as long" if default != best else ""
        verdict = "the default holds" if holds else "THE DEFAULT IS BEATEN"
        where = "" if operation in OPERATIONS else " into an empty mask" if empty else " into another mask"
        lines.append(f"{operation}{where}: recommended {best!r}, default {default!r}: {verdict}{behind}")
    return lines, good


def default_of(operation: str, empty: bool) -> str:
    """The provider that runs where nobody says; empty: of masks that are empty before."""
    if operation in OPERATIONS:
        return mask_module.DEFAULT_MODE
    few = empty and operation != "wide"
    return PROVIDERS[operation][0 if few else 1]


def main(argv: list[str] | None = None) -> int:
    made = parser("sparse_masks", __doc__ or "", seconds=1.0, quick_seconds=0.4)
    made.add_argument("--check", action="store_true", help="exit with 1 if a default is beaten")
    options = made.parse_args(argv)
    with Sweep(options) as sweep:
        records = sweep.measure_all(sweep.select(groups(("small", "medium") if options.quick else tuple(SIZES))))
        sweep.close_bar()
        lines, good = verdicts(records)
        print("\n".join([tables(records), *lines, "", sweep.closing()]))
    return 1 if options.check and not good else 0
