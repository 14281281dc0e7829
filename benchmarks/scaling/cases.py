"""A call of `context_parallel_attention` whose arrays need not be there."""

import dataclasses
import functools

import numpy as np

from jax_flash_attn2.base.spec import Rules
from jax_flash_attn2.context.choosing import Facts, groups_of
from jax_flash_attn2.context.hops import Way
from jax_flash_attn2.context.orders import Order
from jax_flash_attn2.context.spread import Spread

METHODS = ("ring", "all_gather", "ulysses")


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch of a causal layer, by default one of Llama 3 8B (arXiv:2407.21783, table 3), in bfloat16."""

    tokens: int
    devices: int
    method: str
    order: Order = "zigzag"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    causal: bool = True
    window: int | None = None
    """How many keys before its own a row sees; None: all."""
    document: int | None = None
    """The mean length of packed documents; None: one sequence."""
    head_groups: int | None = None

    @property
    def share(self) -> int:
        """Tokens of a device."""
        return self.tokens // self.devices

    @property
    def usable(self) -> bool:
        """Whether the method can divide this call so."""
        parts = self.devices * (2 if self.order == "zigzag" else 1)
        return self.tokens % parts == 0 and (self.method != "ulysses" or self.heads % self.devices == 0)

    @property
    def facts(self) -> Facts:
        """The same, as the package decides by it."""
        return Facts(
            Spread("context", self.devices, self.order, self.share, self.share),
            batch=1, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, v_dim=self.head_dim,
            itemsize=self.itemsize, rules=Rules(self.window, 0 if self.causal else None), ahead=0, implied=True,
            segments=self.document is not None, lists=False, functions=False,
        )  # fmt: skip

    @property
    def runs(self) -> tuple[Way, ...]:
        """The way round of a ring."""
        return _runs(self.devices, self.order, self.share, self.causal, self.window)

    @property
    def groups(self) -> int:
        """In how many groups all_gather meets the key heads."""
        return groups_of(self.head_groups, self.facts)

    @property
    def pairs(self) -> int:
        """How many pairs of a row and a key that it sees there are, in each head."""
        return _pairs(self.tokens, self.causal, self.window, self.document)


@functools.lru_cache(64)
def _runs(devices: int, order: Order, share: int, causal: bool, window: int | None) -> tuple[Way, ...]:
    return Case(devices * share, devices, "ring", order, causal=causal, window=window).facts.ways


@functools.lru_cache(64)
def _pairs(tokens: int, causal: bool, window: int | None, document: int | None) -> int:
    if window is None and document is None:
        return tokens * (tokens + 1) // 2 if causal else tokens**2
    if not causal:
        raise NotImplementedError("windows and documents are counted under causality alone")
    return int((np.arange(1, tokens + 1) - first_seen(tokens, window, document)).sum())


@functools.lru_cache(8)
def first_seen(tokens: int, window: int | None, document: int | None) -> np.ndarray:
    """int64 `[tokens]`: the first token that each one sees."""
    token = np.arange(tokens, dtype=np.int64)
    first = np.zeros(tokens, np.int64) if window is None else np.maximum(token - window, 0)
    return first if document is None else np.maximum(first, _starts(tokens, document)[token])


@functools.lru_cache(8)
def _starts(tokens: int, document: int) -> np.ndarray:
    """Where each token's document starts: lengths are drawn, exponentially distributed, always the same."""
    drawn = np.random.default_rng(0).exponential(document, 4 * tokens // document + 64)
    ends = np.cumsum(np.maximum(drawn.astype(np.int64), 1))
    starts = np.concatenate([[0], ends])
    return starts[np.searchsorted(ends, np.arange(tokens), side="right")]


def segment_ids(tokens: int, document: int) -> np.ndarray:
    """The same documents, numbered: int32 `[tokens]`."""
    starts = _starts(tokens, document)
    return np.cumsum(np.diff(starts, prepend=0) > 0).astype(np.int32)
