"""Masks as data: predicates and builders, a cache, masks of weights, maskers, block masks that the kernels read, and
sequences of many lengths.
"""

from .block import BlockMask, block_mask_cache
from .builders import causal_mask_comparison, causal_mask_tril, make_causal_mask
from .cache import CacheInfo, MaskCache, causal_mask, causal_mask_cache
from .dense import dense_attention
from .mask import Mask
from .maskers import LocalMasker, SinkMasker, TopKMasker
from .plot import plot_mask
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
from .ragged import cu_lens, lengths_from, pack, positions, segment_ids, unpack
from .text import show

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
    "cu_lens",
    "dense_attention",
    "dilated",
    "documents",
    "evaluate",
    "from_dense",
    "lengths_from",
    "make_causal_mask",
    "negate",
    "pack",
    "padding",
    "plot_mask",
    "positions",
    "prefix_lm",
    "segment_ids",
    "show",
    "sinks",
    "sliding_window",
    "unpack",
]
