"""Masks as data: predicates and builders, a cache, masks of weights, maskers, and block masks that the kernels read."""

from .block import BlockMask, block_mask_cache
from .builders import causal_mask_comparison, causal_mask_tril, make_causal_mask
from .cache import CacheInfo, MaskCache, causal_mask, causal_mask_cache
from .dense import dense_attention
from .mask import Mask
from .maskers import LocalMasker, SinkMasker, TopKMasker
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
from .show import plot_mask, show

__all__ = [
    "BlockMask",
    "CacheInfo",
    "LocalMasker",
    "Mask",
    "MaskCache",
    "Predicate",
    "SinkMasker",
    "TopKMasker",
    "all_of",
    "any_of",
    "block_mask_cache",
    "causal",
    "causal_mask",
    "causal_mask_cache",
    "causal_mask_comparison",
    "causal_mask_tril",
    "dense_attention",
    "dilated",
    "documents",
    "evaluate",
    "from_dense",
    "make_causal_mask",
    "negate",
    "padding",
    "plot_mask",
    "prefix_lm",
    "show",
    "sinks",
    "sliding_window",
]
