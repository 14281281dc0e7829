"""Which of each benchmark's numbers are compared, for the report's conclusions: ours with others, and our choices."""

import dataclasses
from collections.abc import Callable
from typing import Any

from . import attention_mask, gpu, gpu_decode, sdpa, sparse_masks
from .figures import PASSES, labels, shapes, spread
from .results import Record, parse_case
from .verdicts import Comparison, Ratio, between, compare

Comparisons = tuple[Comparison, ...]


def of_mha(records: list[Record]) -> Comparisons:
    made: Comparisons = ()
    for mode, title in PASSES.items():
        for other, name in (("jax", "jax.nn on XLA"), ("jax-cudnn", "jax.nn on cuDNN")):
            ratios = between(records, "flash-tuned", other, lambda c, m=mode: c["mode"] == m)
            made += compare(f"Attention, {title}", "flash_attention", name, ratios)
    return made


def of_attention_mask(records: list[Record]) -> Comparisons:
    own, *others = attention_mask.BUILDERS
    made: Comparisons = ()
    for other in others:
        made += compare("Building causal masks", own, other, between(records, own, other), rival=False)
    return made


def of_sparse_masks(records: list[Record]) -> Comparisons:
    """Each default with each other mode."""
    made: Comparisons = ()
    kinds = dict.fromkeys((c["operation"], c.get("previous", "")) for c in (parse_case(r.case) for r in records))
    for operation, previous in kinds:
        default = sparse_masks.default_of(operation, previous == "empty")
        for other in (p for p in sparse_masks.PROVIDERS[operation] if p != default):
            keep = lambda c, o=operation, before=previous: (c["operation"], c.get("previous", "")) == (o, before)
            what = f"Mask.{operation}" if operation in sparse_masks.OPERATIONS else f"The {operation} masker"
            what += f", after {previous}" if previous else ""
            made += compare(what, f"{default} (default)", other, between(records, default, other, keep), rival=False)
    return made


def of_block_masks(records: list[Record]) -> Comparisons:
    made: Comparisons = ()
    for mode, title in PASSES.items():
        keep = lambda c, m=mode: c["mode"] == m
        for other, name in (("causal", "dense causal attention"), ("option", "the option that says the same")):
            ratios = between(records, "block-mask", other, keep)
            made += compare(f"Masked attention, {title}", "a block mask", name, ratios, rival=False)
    return made


def of_components(records: list[Record]) -> Comparisons:
    flash = between(records, "attention-flash", "attention")
    cached, alone = (between(records, f"{what}-cached", f"{what}-built") for what in ("eager", "mask"))
    return (
        *compare("Causal attention under jit", "flash_attention", "plain jnp", flash),
        *compare("Dense attention without jit", "the mask cached", "the mask built anew", cached, rival=False),
        *compare("A causal mask alone", "cached", "built anew", alone, rival=False),
    )


def of_sdpa(records: list[Record]) -> Comparisons:
    names = {"jax": "jax.nn on XLA", "jax-cudnn": "jax.nn on cuDNN", "naive": "plain jnp"}
    made: Comparisons = ()
    for other in sdpa.OTHERS:
        made += compare("Attention, batch 4", "flash_attention", names[other], between(records, "ours", other))
    switched = [
        dataclasses.replace(ratio, case=f"{rung}, {ratio.case}")
        for rung in sdpa.RUNGS
        for ratio in between(records, "ours", rung)
    ]
    return made + compare("Attention, batch 4", "all optimisations", "one of them switched off", switched, rival=False)


def of_gpu(records: list[Record]) -> Comparisons:
    made: Comparisons = ()
    usual = gpu.usual_points(records)
    decoding = [r for r in records if gpu_decode.is_point(r)]
    for other, name in (("xla", "jax.nn on XLA"), ("cudnn", "jax.nn on cuDNN"), ("plain", "plain jnp")):
        for mode, title in PASSES.items():
            ratios = between(usual, "flash-tuned", other, lambda c, m=mode: c["mode"] == m)
            made += compare(f"Attention, {title}", "flash_attention", name, ratios)
        made += compare("Decoding", "tuned", name, between(decoding, "tuned", other))
    return made


def of_xla_path(made: list[dict[str, Any]]) -> Comparisons:
    found: Comparisons = ()
    for name in dict.fromkeys(r["pass"] for r in made):
        some = [r for r in made if r["pass"] == name]
        ratios = [
            Ratio(title, r["times_faster"], r["p20"], r["p80"], r["pairs"])
            for r, title in zip(some, labels(shapes(some)), strict=True)
        ]
        found += compare(f"Attention, {name}", "the XLA path", "jax.nn", ratios)
    return found


def of_decode(made: list[dict[str, Any]]) -> Comparisons:
    some = [r for r in made if "skipped" not in r]
    titles, found = labels(shapes(some)), ()
    pairs = {(name, r["baseline"]): None for r in some for name, x in r["providers"].items() if "times_faster" in x}
    for name, other in pairs:
        ratios = [
            Ratio(title, *r["providers"][name]["times_faster"], r["turns"])
            for r, title in zip(some, titles, strict=True)
            if r["baseline"] == other and "times_faster" in r["providers"].get(name, {})
        ]
        what = "Decoding, latent" if other == "plain" else "Decoding"
        ours = {"ours": "flash_attention", "paged": "paged_attention"}.get(name, name)
        found += compare(what, ours, "plain jnp" if other == "plain" else other, ratios)
    return found


def of_cold_start(made: list[dict[str, Any]]) -> Comparisons:
    kinds: dict[str, tuple[str, str, Callable[[dict[str, float]], float]]] = {
        "compiling": ("compile", "Trace, lower and compile", lambda run: sum(run.values())),
        "forward": ("eager", "A later call without jit", lambda run: run["forward later"]),
        "gradient": ("eager", "A later gradient without jit", lambda run: run["gradient later"]),
    }
    found: Comparisons = ()
    for what, title, number in kinds.values():
        runs = {(r["option"], r["provider"]): r["runs"] for r in made if r["what"] == what}
        ratios = []
        for option in (o for o, p in runs if p == "ours" and (o, "jax.nn") in runs):
            pairs = zip(runs[option, "ours"], runs[option, "jax.nn"], strict=True)
            point = spread([number(other) / number(own) for own, other in pairs])
            ratios.append(Ratio(option, point.middle, point.low or 0.0, point.high or 0.0, len(runs[option, "ours"])))
        found += compare(title, "flash_attention", "jax.nn", ratios)
    return found
