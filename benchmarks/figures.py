"""The panels of each benchmark, of its records."""

import collections
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from . import attention_mask, components, gpu, mha, sdpa, sparse_masks
from .plots import Panel, Point
from .results import Record, parse_case
from .status import Status

Case = dict[str, str]
BACKENDS = {"xla": "XLA path", "triton": "Triton kernels"}
PASSES = {"fwd": "forward", "bwd": "forward and backward"}
_SAID = {
    ("causal", "True"): "causal", ("causal", "False"): "full",
    ("bias", "True"): "bias", ("bias", "False"): "no bias",
    ("jit", "True"): "jit", ("jit", "False"): "no jit",
    ("padding", "True"): "padded", ("padding", "False"): "not padded",
}  # fmt: skip
_BARE = ("size", "mask", "filled", "dtype")
"""Keys whose values say what they are."""
_WORDS = {
    "seqlen": "length {}",
    "sparsity": "{}% zeros",
    "previous": "after {}",
    "headdim": "width {}",
    "head_dim": "width {}",
    "blocksize_q": "blocks of {}",
    "blocksize_k": "by {}",
    "heads": "{} heads",
    "kv_heads": "key heads {}",
}


def labels(cases: Sequence[Case]) -> list[str]:
    """What tells cases apart, each in a few words; "" of a single one. What is usual (`unsaid`) goes without saying."""
    usual = _usual(cases)
    differs = [key for key in dict.fromkeys(k for c in cases for k in c) if len({c.get(key) for c in cases}) > 1]
    return [
        ", ".join(filter(None, (_word(k, c[k]) for k in differs if k in c and c[k] != usual.get(k)))) for c in cases
    ]


def unsaid(title: str, cases: Sequence[Case]) -> str:
    """A title, and what `labels` leaves out."""
    words = [_word(key, value) for key, value in _usual(cases).items()]
    return f"{title} ({', '.join(words)} where nothing else is said)" if words else title


def _usual(cases: Sequence[Case]) -> Case:
    """Of what differs, the values that more than 60% of the cases have; but of lengths, sizes and masks."""
    usual = {}
    for key in dict.fromkeys(k for c in cases for k in c if k not in ("seqlen", "size", "mask")):
        value, n = collections.Counter(c.get(key) for c in cases).most_common(1)[0]
        if value is not None and 0.6 * len(cases) < n < len(cases):
            usual[key] = value
    return usual


def _word(key: str, value: str) -> str:
    return _SAID.get((key, value)) or (value if key in _BARE else _WORDS.get(key, f"{key} {{}}").format(value))


# From a record to a point.


def ms(r: Record) -> Point | None:
    return None if r.ms is None else Point(r.ms, r.ms_p20, r.ms_p80)


def times_faster(r: Record) -> Point | None:
    return None if r.times_faster is None else Point(r.times_faster, r.times_faster_p20, r.times_faster_p80)


def times_as_long(r: Record) -> Point | None:
    """As its baseline: `times_faster` upside down."""
    return _divided(1.0, times_faster(r))


def per_second(r: Record) -> Point | None:
    return _divided(1000.0, ms(r))


def tflops(r: Record) -> Point | None:
    return None if r.tflops is None or r.ms is None else _divided(r.tflops * r.ms, ms(r))


def _divided(number: float, point: Point | None) -> Point | None:
    if point is None:
        return None
    low, high = (None if not x else number / x for x in (point.high, point.low))
    return Point(number / point.middle, low, high)


def panel(
    title: str,
    value: str,
    records: Sequence[Record],
    providers: Sequence[str],
    point: Callable[[Record], Point | None],
    keep: Callable[[Case], bool] = lambda case: True,
    **more: Any,
) -> list[Panel]:
    """One panel of the cases that are kept; none where no provider has a point in them.

    Args:
      title: of the panel.
      value: see `Panel`.
      records: of one benchmark.
      providers: in this order.
      point: of a record that has a time.
      keep: of a case.
      **more: other fields of `Panel`.
    """
    found = {r.key: r for r in records}
    cases = [c for c in dict.fromkeys(r.case for r in records) if keep(parse_case(c))]
    lines = {p: [_seen(found.get((c, p)), point) for c in cases] for p in providers}
    lines = {p: line for p, line in lines.items() if any(x is not None for x in line)}
    if not any(isinstance(x, Point) for line in lines.values() for x in line):
        return []
    some = [i for i in range(len(cases)) if any(line[i] is not None for line in lines.values())]
    parsed = [parse_case(cases[i]) for i in some]
    lines = {p: [line[i] for i in some] for p, line in lines.items()}
    return [Panel(unsaid(title, parsed), value, labels(parsed), lines, **more)]


def _seen(record: Record | None, point: Callable[[Record], Point | None]) -> Point | str | None:
    if record is None or record.status is Status.UNSUPPORTED:
        return None
    return point(record) if record.ok else str(record.status)


# Of each benchmark.


def of_mha(records: list[Record]) -> list[Panel]:
    free = [r for r in records if "blocksize_q" not in parse_case(r.case)]
    return [
        made
        for mode, title in PASSES.items()
        for made in panel(f"Against jax.nn, {title}", "times faster than jax.nn on XLA", free,
                          ("flash-tuned", "jax-cudnn"), times_faster, lambda c, m=mode: c["mode"] == m, one="jax.nn")
    ]  # fmt: skip


def of_block_sizes(records: list[Record]) -> list[Panel]:
    """Of `mha`: one panel for each shape, all block sizes in it."""
    bound = [r for r in records if "blocksize_q" in parse_case(r.case)]
    shape = lambda c: tuple((k, v) for k, v in c.items() if k not in ("seqlen", "blocksize_q", "blocksize_k"))
    made = []
    for kind in dict.fromkeys(shape(parse_case(r.case)) for r in bound):
        case = dict(kind)
        title = (
            f"Block sizes: {PASSES[case['mode']]}, batch {case['batch']}, {case['heads']} heads of {case['headdim']}, "
            f"{_word('bias', case['bias'])}"
        )
        made += panel(title, "times faster than jax.nn on XLA", bound, mha.BY_BLOCKS, times_faster,
                      lambda c, k=kind: shape(c) == k, one="jax.nn")  # fmt: skip
    return made


def of_attention_mask(records: list[Record]) -> list[Panel]:
    return [
        made
        for jit, how in (("True", "under jit"), ("False", "without jit"))
        for padding, what in (("False", "no padding"), ("True", "half of the sequences padded"))
        for made in panel(f"Building a causal mask {how}, {what}", "ms", records, tuple(attention_mask.BUILDERS), ms,
                          lambda c, j=jit, p=padding: (c["jit"], c["padding"]) == (j, p))
    ]  # fmt: skip


def of_sparse_masks(records: list[Record]) -> list[Panel]:
    return [
        made
        for operation, providers in sparse_masks.PROVIDERS.items()
        for made in panel(f"Mask.{operation}" if operation in sparse_masks.OPERATIONS else f"The {operation} masker",
                          "ms", records, providers, ms, lambda c, o=operation: c["operation"] == o)
    ]  # fmt: skip


def of_block_masks(records: list[Record]) -> list[Panel]:
    return [
        made
        for mode, title in PASSES.items()
        for made in panel(f"Against causal attention, {title}", "times faster than causal attention", records,
                          ("block-mask", "option"), times_faster, lambda c, m=mode: c["mode"] == m, one="causal")
    ]  # fmt: skip


def of_components(records: list[Record]) -> list[Panel]:
    """Each stage over the lengths; what needs no mask, and what keeps it."""
    found = components.by_length(records)
    lengths = sorted(found, key=int)
    stages = {s: [_seen(found[t].get(s), ms) for t in lengths] for s in (*components.STAGES, "layer")}
    stages = {s: line for s, line in stages.items() if any(isinstance(x, Point) for x in line)}
    made = []
    if stages:
        made.append(Panel("The stages of a layer", "ms", [*map(int, lengths)], stages, place="length"))
    eager = ("eager-cached", "eager-flash")
    return [
        *made,
        *panel("Attention called without jit", "times faster than with the mask built anew", records, eager,
               times_faster, one="built"),
        *panel("Attention under jit", "times faster than plain attention", records, ("attention-flash",),
               times_faster, one="plain"),
    ]  # fmt: skip


def of_sdpa(records: list[Record]) -> list[Panel]:
    """The rates; and a row for each optimisation, forms of it in each size."""
    made = panel("Iterations per second", "iterations per second", records, ("ours", *sdpa.OTHERS), per_second)
    for causal, what in (("True", "causal"), ("False", "full")):
        some = [r for r in records if parse_case(r.case)["causal"] == causal and r.provider in sdpa.RUNGS]
        some = [r for rung in sdpa.RUNGS for r in some if r.provider == rung and r.ok and r.times_faster]
        if some:
            places = [f"{r.provider}, {parse_case(r.case)['size']}" for r in some]
            lines = {
                rung: [times_as_long(r) if r.provider == rung else None for r in some]
                for rung in dict.fromkeys(r.provider for r in some)
            }
            value = "times as long without it"
            made.append(Panel(f"With one optimisation switched off, {what}", value, places, lines, one="ours"))
    return made


def of_gpu(records: list[Record]) -> list[Panel]:
    """TFLOP/s over length, one panel for each pass, width and mask."""
    points = [(parse_case(r.case), r) for r in gpu.usual_points(records)]
    special = ("kv_heads", "bias")
    points = [(c, r) for c, r in points if not any(key in c for key in special)]
    made = []
    for kind in dict.fromkeys((c["mode"], c["headdim"], c["causal"]) for c, _ in points):
        some = [(c, r) for c, r in points if (c["mode"], c["headdim"], c["causal"]) == kind]
        lengths = sorted({int(c["seqlen"]) for c, _ in some})
        found = {(int(c["seqlen"]), r.provider): r for c, r in some}
        lines = {p: [_seen(found.get((n, p)), tflops) for n in lengths] for p in gpu.PROVIDERS}
        lines = {p: line for p, line in lines.items() if any(x is not None for x in line)}
        if any(isinstance(x, Point) for line in lines.values() for x in line):
            title = f"{PASSES[kind[0]].capitalize()}, width {kind[1]}, {_word('causal', kind[2])}"
            made.append(Panel(title, "TFLOP/s", lengths, lines, place="length", log=False))
    return made


def of_xla_path(made: list[dict[str, Any]]) -> list[Panel]:
    panels = []
    for name in dict.fromkeys(r["pass"] for r in made):
        some = [r for r in made if r["pass"] == name]
        cases, points = shapes(some), [Point(r["times_faster"], r["p20"], r["p80"]) for r in some]
        title = unsaid(f"The XLA path against jax.nn, {name}", cases)
        panels.append(Panel(title, "times faster than jax.nn", labels(cases), {"ours": points}, one="jax.nn"))
    return panels


def shapes(made: Sequence[dict[str, Any]]) -> list[Case]:
    """The cases of records that hold their shapes as numbers."""
    keys = ("seqlen", "causal", "batch", "heads", "kv_heads", "head_dim", "dtype", "filled", "rows")
    return [{key: str(r[key]) for key in keys if key in r} for r in made]


def of_decode(made: list[dict[str, Any]]) -> list[Panel]:
    """Times of a reading over the length of the cache, for each dtype and filling; the other shapes against jax.nn."""
    made = [r for r in made if "skipped" not in r]
    kind = lambda r: (r["batch"], r["heads"], r["kv_heads"], r["head_dim"], r["v_dim"], r["rows"])
    kinds = collections.Counter(kind(r) for r in {(kind(r), r["seqlen"]): r for r in made}.values())
    shown = kinds.most_common(1)[0][0] if kinds else None
    usual = sorted((r for r in made if kind(r) == shown), key=lambda r: r["seqlen"])
    panels = []
    for dtype, filled in dict.fromkeys((r["dtype"], r["filled"]) for r in usual):
        some = [r for r in usual if (r["dtype"], r["filled"]) == (dtype, filled)]
        batch, heads, kv_heads, head_dim, *_ = kind(some[0])
        title = f"Decoding, {dtype}, {filled}: batch {batch}, {heads} query and {kv_heads} key heads of {head_dim}"
        lines = _ratios(some, "times_reading")
        panels.append(Panel(title, "times the reading", [r["seqlen"] for r in some], lines, "tokens allotted",
                            one="reading"))  # fmt: skip
    for latent, title in ((False, "Decoding, other shapes"), (True, "Decoding, latent attention")):
        others = [r for r in made if kind(r) != shown and bool(r["v_dim"]) == latent]
        lines = _ratios(others, "times_faster")
        if lines:
            than = "the plain computation" if latent else "jax.nn"
            cases = shapes(others)
            panels.append(Panel(unsaid(title, cases), f"times faster than {than}", labels(cases), lines, one=than))
    return panels


def _ratios(records: list[dict[str, Any]], name: str) -> dict[str, list[Point | str | None]]:
    """A ratio of each provider that has it anywhere."""
    lines: dict[str, list[Point | str | None]] = {}
    for provider in dict.fromkeys(p for r in records for p in r["providers"]):
        found = [r["providers"].get(provider, {}) for r in records]
        if any(name in x for x in found):
            lines[provider] = [Point(*x[name]) if name in x else "wrong" if "wrong" in x else None for x in found]
    return lines


def of_cold_start(made: list[dict[str, Any]]) -> list[Panel]:
    """Compiling, and a later call without jit; whiskers over the processes."""
    kinds = {
        "compile": ("Trace, lower and compile forward and backward", "CPU-seconds", lambda run: sum(run.values())),
        "eager": ("A later gradient without jit", "ms", lambda run: run["gradient later"]),
    }
    panels = []
    for what, (title, value, number) in kinds.items():
        found = {(r["option"], r["provider"]): r["runs"] for r in made if r["what"] == what}
        options = list(dict.fromkeys(option for option, _ in found))
        lines = {
            p: [spread([number(run) for run in found[o, p]]) if (o, p) in found else None for o in options]
            for p in dict.fromkeys(p for _, p in found)
        }
        if lines:
            panels.append(Panel(title, value, options, lines))
    return panels


def of_numerics(made: list[dict[str, Any]]) -> list[Panel]:
    """Errors over those of the plain implementation, for each backend and dtype."""
    made, panels = [r for r in made if "errors" in r], []
    for backend, dtype in dict.fromkeys((r["backend"], r["dtype"]) for r in made):
        some = [r for r in made if (r["backend"], r["dtype"]) == (backend, dtype)]
        times = lambda r, name: Point(r["errors"]["ours"][name] / r["errors"]["plain"][name])
        lines = {name: [times(r, name) for r in some] for name in some[0]["errors"]["ours"]}
        title = f"Errors, {BACKENDS[backend]}, {dtype}"
        panels.append(Panel(title, "times the error of the plain implementation",
                            [f"{r['logits']}, {r['seqlen']}" for r in some], lines, one="plain"))  # fmt: skip
    return panels


def spread(numbers: Sequence[float]) -> Point:
    """Median, 20th and 80th percentile; of fewer than five the least and the largest in place of these."""
    if len(numbers) < 5:
        return Point(statistics.median(numbers), min(numbers), max(numbers))
    low, *_, high = statistics.quantiles(numbers, n=5, method="inclusive")
    return Point(statistics.median(numbers), low, high)
