"""Masks as data: predicates and builders, a cache, masks of weights, maskers, and block masks that the kernels read."""

from .predicates import (
    Predicate,
    all_of,
    any_of,
    causal,
    dilated,
    documents,
    evaluate,
    from_dense,
    negate,
    padding,
    prefix_lm,
    sinks,
    sliding_window,
)

__all__ = [
    "Predicate",
    "all_of",
    "any_of",
    "causal",
    "dilated",
    "documents",
    "evaluate",
    "from_dense",
    "negate",
    "padding",
    "prefix_lm",
    "sinks",
    "sliding_window",
]
