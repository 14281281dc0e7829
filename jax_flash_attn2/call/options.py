"""The options of `flash_attention` as types, for checkers: what they mean is in its docstring."""

from collections.abc import Mapping
from typing import TypedDict

from ..base.arguments import Alignment, AnyArray, Implementation, WindowSize
from ..base.config import Config
from ..functions.trace import ScoreFunction
from ..masks.block import BlockMask
from ..masks.mask import Mask
from ..masks.predicates import ElementPredicate

AnyMask = AnyArray | Mask | BlockMask | ElementPredicate
"""Whatever may say who sees whom."""


class RowOptions(TypedDict, total=False):
    """Those that a call on rows of many sequences has too."""

    causal: bool
    window_size: WindowSize | None
    logits_soft_cap: float | None
    sinks: AnyArray | None
    alibi_slopes: AnyArray | None
    softmax_scale: float | AnyArray | None
    dropout_rate: float
    dropout_seed: AnyArray | int | None
    score_mod: ScoreFunction | None
    implementation: Implementation | None
    block_ptr: bool | None
    config: Config | Mapping[str, Config] | None
    higher_order: bool


class Options(RowOptions, total=False):
    """All but `return_lse` and `return_max_logits`, which decide what a call returns."""

    causal_alignment: Alignment
    mask: AnyMask | None
    q_segment_ids: AnyArray | None
    kv_segment_ids: AnyArray | None
    q_positions: AnyArray | None
    kv_positions: AnyArray | None
    q_lengths: AnyArray | int | None
    kv_lengths: AnyArray | int | None
