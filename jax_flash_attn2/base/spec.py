"""What a call computes: `Rules`, whatever its shapes, and `Spec`, all that is static about it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .config import Tuned
from .layout import Layout
from .operands import BLOCK_LISTS, OPERANDS


def alters_logits(rules: "Rules", names: Iterable[str]) -> bool:
    """Whether logits are more than scale * q kᵀ, with operands of these names: then the scale cannot wait for the
    exponential, and a maximum may be so large that log2 of the sum is lost beside it; or whether they are to be treated
    as if they were."""
    logits = rules.soft_cap is not None or rules.score is not None or rules.precise
    return logits or not _ADDED.isdisjoint(names)


_ADDED = {"bias", "slopes", "tile_weights"}
"""The operands that are added to logits."""


def _whole(multiple: int, lengths: Any, *tiles: int) -> int:
    """The largest of these for which tiles of that many rows end where the sequence does, else 1."""
    return max((rows for rows in tiles if multiple >= rows), default=1) if lengths is None else 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a call computes, whatever its shapes: the part that vmap and sharding leave alone."""

    left: int | None = None
    """A row at position i sees keys j >= i - left; None: no bound."""
    right: int | None = None
    """It sees keys j <= i + right; None: no bound; 0: causal."""
    soft_cap: float | None = None
    """Logits become c * tanh(logits / c)."""
    dropout_rate: float = 0.0
    """The probability that a key is dropped from a row."""
    score: Any = None
    """What a score function makes of scaled products: a `functions.function.Function`."""
    mask: Any = None
    """Whether row i sees key j, as a function says it: one of these too, of booleans. Under a block mask in its partial
    tiles, in place of bits."""
    max_logits: bool = False
    """Whether each row's largest logit is a result."""
    precise: bool = False
    """Whether the backward pass gets m and l of every row, which it is most exact with, and not lse, which is less."""
    lost: bool = False
    """Whether what o loses when it is rounded is a result too, if it is, and the backward pass reads it. Of a row's
    do * o all gradients of its logits have the same error, which does not average out (arXiv:2510.04212)."""
    wide: bool = False
    """Whether o and all gradients come in fp32 (fp64), to be summed with those of other keys."""
    latent: int | None = None
    """v is k, and its rows are as many of the first columns of k's (multi-head latent attention)."""
    tiles: tuple[int, int] | None = None
    """The rows and keys of a tile of the block mask, if there is one: powers of two, at least 32 keys."""

    def result(self, dtype: Any) -> np.dtype:
        """The dtype of a result that would have this one, but for `wide`."""
        return np.dtype(np.float32) if self.wide and np.dtype(dtype).itemsize < 4 else np.dtype(dtype)

    @property
    def gives_lost(self) -> bool:
        """Whether the forward pass gives what o lost: a wide one is not rounded."""
        return self.lost and not self.wide

    def v_dim(self, v: Any) -> int:
        """The width of the rows of v."""
        return v.shape[-1] if self.latent is None else self.latent

    @property
    def own_batch(self) -> int:
        """How many batches the call had as it was written, before `vmap`, if that matters to its functions; else 1."""
        return next((f.batch for f in (self.score, self.mask) if f is not None), 1)


@dataclasses.dataclass(frozen=True)
class Operand:
    """Where one of `OPERANDS` is found, and along which axes it varies."""

    at: int
    """Its place among those that the call has."""
    batch: int
    """The length n of its batch axis, batch b reading `b % n`; 0 if that is B, so that a kernel fits every B."""
    heads: bool
    rows: bool
    cols: bool


def sequences(q: Any, operands: Mapping[str, Any]) -> int:
    """How many sequences the rows of q belong to: B."""
    return operands["cu_q_lens"].shape[3] - 1 if "cu_q_lens" in operands else q.shape[0]


def length_of_keys(k: Any, operands: Mapping[str, Any]) -> int:
    """Sk: as many keys as a sequence may have."""
    return k.shape[1] * operands["page_table"].shape[3] if "page_table" in operands else k.shape[1]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is computed: all that is static about one attention call.

    One `Spec` is handed whole to every kernel as a compile-time constant, so a field read inside a kernel costs
    nothing at run time. It is made where a pass is lowered (`Spec.of`), from the shapes that are met there.
    """

    heads: int
    """Query heads, H."""
    kv_heads: int
    """Key and value heads, Hkv; divides `heads`."""
    head_dim: int
    """Width of a query or key row, D."""
    v_dim: int
    """Width of a value or output row, Dv."""
    rules: Rules = Rules()
    operands: tuple[tuple[str, Operand], ...] = ()
    """Those of `OPERANDS` that the call has, in their order."""
    multiple_q: int = 1
    """The largest power of two up to 128, or to a tile of the block mask, that divides Sq: tells a kernel which edges
    cannot be ragged."""
    multiple_k: int = 1
    """The same for Sk; also the alignment of a bias row."""
    dbias: Operand | None = None
    """The axes of what a kernel writes of the bias gradient, if it does."""
    dlse: bool = False
    """Whether something depends on lse."""
    padded: int = 1
    """What the backward kernels tell each other of rows is as long as a multiple of this: of a tile of each kernel, and
    of a block mask's."""
    score: Any = None
    """In kernels, the score function as Triton has it (`gpu.functions.Source`); the rules have none then."""
    mask_function: Any = None
    """Likewise the mask function."""
    short: bool = False
    """Whether rows are few, or keys in pages: then one launch does without a table of spans where bounds are all that
    decides."""
    packed: int = 1
    """Consecutive rows of a tile that are the same query row, of `packed` query heads of one group: a power of two."""
    page_size: int = 0
    """The keys of a page, if they lie in pages (`operands.SERVED`)."""
    one_head: bool = False
    """Whether dk and dv are of one query head each, to be summed over those of a group afterwards."""

    @classmethod
    def of(cls, rules: Rules, q: Any, k: Any, v: Any, operands: Mapping[str, Any]) -> "Spec":
        """The spec of arrays q `[B, Sq, H, D]`, k, v and operands."""
        batch = sequences(q, operands)
        present = [(name, operands[name].shape) for name in OPERANDS if name in operands]
        where = tuple(
            (name, Operand(i, 0 if 1 < s[0] == batch else s[0], *(n > 1 for n in s[1:])))
            for i, (name, s) in enumerate(present)
        )
        return cls(
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            v_dim=rules.v_dim(v),
            rules=rules,
            operands=where,
            multiple_q=1 if "cu_q_lens" in operands else math.gcd(q.shape[1], max((128, *(rules.tiles or ())))),
            multiple_k=math.gcd(length_of_keys(k, operands), max((128, *(rules.tiles or ())))),
            page_size=k.shape[1] if "page_table" in operands else 0,
        )

    def told_apart(self, config: Tuned) -> "Spec":
        """The same, with only as much of `multiple_q` and `multiple_k` as kernels with these tiles ask about: two specs
        that make the same code become equal, and it is compiled once.

        They ask whether an edge can be ragged (not where lengths cut it anyway), and how a row of an operand is
        aligned: a load is 16 bytes at most, so beyond 16 elements it makes no difference.
        """
        axes = [operand for name, operand in self.operands if name not in BLOCK_LISTS] + [self.dbias]
        multiple_q = _whole(self.multiple_q, self.q_lengths, config.block_m // self.packed, self.tile_rows)
        multiple_k = _whole(self.multiple_k, self.kv_lengths, config.block_n, self.tile_keys)
        if any(operand is not None and operand.cols for operand in axes):
            multiple_k = max(multiple_k, min(self.multiple_k, 16))
        return dataclasses.replace(self, multiple_q=multiple_q, multiple_k=multiple_k)

    def _operand(self, name: str) -> Operand | None:
        return next((operand for n, operand in self.operands if n == name), None)

    scale = property(lambda self: self._operand("scale"))
    bias = property(lambda self: self._operand("bias"))
    mask = property(lambda self: self._operand("mask"))
    q_segments = property(lambda self: self._operand("q_segments"))
    kv_segments = property(lambda self: self._operand("kv_segments"))
    q_lengths = property(lambda self: self._operand("q_lengths"))
    kv_lengths = property(lambda self: self._operand("kv_lengths"))
    q_positions = property(lambda self: self._operand("q_positions"))
    kv_positions = property(lambda self: self._operand("kv_positions"))
    q_index = property(lambda self: self._operand("q_index"))
    kv_index = property(lambda self: self._operand("kv_index"))
    offset = property(lambda self: self._operand("offset"))
    sinks = property(lambda self: self._operand("sinks"))
    slopes = property(lambda self: self._operand("slopes"))
    page_table = property(lambda self: self._operand("page_table"))
    cu_q_lens = property(lambda self: self._operand("cu_q_lens"))
    k_scale = property(lambda self: self._operand("k_scale"))
    v_scale = property(lambda self: self._operand("v_scale"))
    dropout_key0 = property(lambda self: self._operand("dropout_key0"))
    dropout_key1 = property(lambda self: self._operand("dropout_key1"))
    row_ends = property(lambda self: self._operand("row_ends"))
    row_tiles = property(lambda self: self._operand("row_tiles"))
    col_ends = property(lambda self: self._operand("col_ends"))
    col_tiles = property(lambda self: self._operand("col_tiles"))
    origin = property(lambda self: self._operand("origin"))
    tile_bits = property(lambda self: self._operand("tile_bits"))
    tile_weights = property(lambda self: self._operand("tile_weights"))

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def causal(self) -> bool:
        """Whether later rows see more keys."""
        return self.rules.right is not None

    @property
    def bounded(self) -> bool:
        """Whether data or bounds besides causality and a block mask decide who sees whom."""
        names = ("mask", "q_segments", "q_lengths", "kv_lengths", "q_positions", "offset")
        if self.by_function and not self.listed:
            return True
        return self.rules.left is not None or self.rules.right not in (None, 0) or any(map(self._operand, names))

    @property
    def listed(self) -> bool:
        """Whether the tiles that a block meets are a list (`block_lists.py`)."""
        return self.rules.tiles is not None

    @property
    def spans(self) -> bool:
        """Whether the tiles that a block meets are a span of them that is looked up (`spans.py`).

        Else, and if they are not listed, they follow from the block's number: all tiles, or all up to the diagonal.
        """
        return self.bounded and not self.listed

    @property
    def reckons(self) -> bool:
        """Whether a program reckons its span for itself."""
        other = ("mask", "q_segments", "q_lengths", "q_positions")
        return self.short and self.spans and not self.by_function and not any(map(self._operand, other))

    @property
    def looks_up(self) -> bool:
        """Whether there is a table of spans."""
        return self.spans and not self.reckons

    @property
    def tile_rows(self) -> int:
        """The rows of a tile of the block mask."""
        return self.rules.tiles[0] if self.rules.tiles else 0

    @property
    def tile_keys(self) -> int:
        """The keys of a tile of the block mask."""
        return self.rules.tiles[1] if self.rules.tiles else 0

    @property
    def masks(self) -> bool:
        """Whether some tiles need the mask, whatever the lengths."""
        return self.causal or self.bounded or self.listed

    @property
    def span_heads(self) -> bool:
        """Whether the spans differ from head to head."""
        return self.mask is not None and self.mask.heads

    @property
    def hides(self) -> bool:
        """Whether a row may see no key in a tile that it meets."""
        return self.spans or self.listed or self.bias is not None or self.scores

    @property
    def alters_logits(self) -> bool:
        """`alters_logits` of this call."""
        return self.score is not None or alters_logits(self.rules, [name for name, _ in self.operands])

    @property
    def small_logits(self) -> bool:
        """Whether a soft cap keeps logits so small that it does not matter how kernels round them."""
        alone = _ADDED.isdisjoint(name for name, _ in self.operands)
        return self.rules.soft_cap is not None and self.rules.soft_cap < 2**16 and alone

    @property
    def by_function(self) -> bool:
        """Whether a function says who sees whom."""
        return self.rules.mask is not None or self.mask_function is not None

    @property
    def scores(self) -> bool:
        """Whether there is a score function."""
        return self.rules.score is not None or self.score is not None

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.dropout_key0 is not None

    @property
    def drop_threshold(self) -> int:
        """A key is dropped where 32 random bits are below this."""
        return min(round(self.rules.dropout_rate * 2**32), 2**32 - 1)

    @property
    def keep_scale(self) -> float:
        """What a key that is kept counts."""
        return 1 / (1 - self.rules.dropout_rate)

    @property
    def latent(self) -> bool:
        """Whether values are the first columns of keys."""
        return self.rules.latent is not None

    @property
    def heads_packed(self) -> int:
        """How many query heads a program has rows of."""
        return min(self.packed, self.group)

    @property
    def blocks_at(self) -> int:
        """Where the kernels find the table of blocks of ragged rows, behind the operands."""
        return len(self.operands)

    @property
    def spans_at(self) -> int:
        """Where the kernels find the table of spans, behind the operands."""
        return len(self.operands)

    @property
    def constants(self) -> int:
        """How many numbers the backward kernels tell each other of a row."""
        return 3 if self.alters_logits else 2

    @property
    def summed(self) -> int:
        """How many query heads one program sums dk and dv of."""
        return 1 if self.one_head else self.group

    @property
    def block_d(self) -> int:
        """`head_dim` as a tile width."""
        return self.q_rows.cols

    @property
    def block_dv(self) -> int:
        """`v_dim` as a tile width."""
        return self.o_rows.cols

    @property
    def q_rows(self) -> Layout:
        """Those of q; in latent attention, of their first columns."""
        return Layout(self.heads, self.head_dim, self.packed, self.heads_packed, columns=self.rules.latent or 0)

    @property
    def rest(self) -> Layout | None:
        """In latent attention, of the other columns of q, if there are any."""
        first = self.rules.latent
        if first is None or first == self.head_dim:
            return None
        return dataclasses.replace(self.q_rows, first=first, columns=self.head_dim - first)

    @property
    def k_rows(self) -> Layout:
        """Those of k; in latent attention, of the columns that are values."""
        return Layout(self.kv_heads, self.head_dim, page=self.page_size, columns=self.rules.latent or 0)

    @property
    def v_rows(self) -> Layout:
        """Those of v; in latent attention, of the other columns of k."""
        if self.rest is not None:
            return dataclasses.replace(self.k_rows, first=self.rest.first, columns=self.rest.columns)
        return Layout(self.kv_heads, self.v_dim, page=self.page_size)

    @property
    def o_rows(self) -> Layout:
        """Those of o."""
        return Layout(self.heads, self.v_dim, self.packed, self.heads_packed)

    dk_rows = property(lambda self: Layout(self.heads // self.summed, self.head_dim))
    dv_rows = property(lambda self: Layout(self.heads // self.summed, self.v_dim))
