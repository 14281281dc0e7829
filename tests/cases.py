"""The one list of test inputs: the XLA path, the interpreter, lowering and the GPU tests all take theirs from it."""

import dataclasses
import itertools
import random
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies
from reference import kept

ARRAYS = (
    *("mask", "weights", "q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions", "q_lengths", "kv_lengths"),
    *("sinks", "alibi_slopes", "read"),
)
"""The options of `flash_attention` that are arrays, the weights that a mask may have, and what a score function reads;
in a case's `inputs`, or None there."""


MASKS = ("block", "block_weights", "weights", "function")
"""A `BlockMask`, one of weights, a `Mask` of weights, a function that reads an array, which is traced."""


_FOLDS = 7
SCORES = {
    "slopes": lambda x: lambda s, b, h, i, j: s - x[h] * jnp.abs(i - j).astype(s.dtype),
    "table": lambda x: lambda s, b, h, i, j: s + x[h, jnp.clip(i - j, -9, 9) + 9].astype(s.dtype),
    "rows": lambda x: lambda s, b, h, i, j: jnp.where((i + b) % 3 == j % 3, -jnp.inf, s * x[b, i]),
    "folds": lambda x: lambda s, b, h, i, j: 3 * jnp.tanh(s / 3 + x[i // 3 % _FOLDS, j % _FOLDS]) * x[0, 0],
    "undefined": lambda x: lambda s, b, h, i, j: s - jnp.log((i - j + 1).astype(s.dtype)) * x[j],
}
"""Score functions, of an array: one element for each head, by distance for each head (half precision), by row, which
also hides; by row and key in no simple way, through a tanh; NaN where a later key is seen."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `flash_attention`, by its shapes and options."""

    name: str
    seqlen_q: int = 64
    seqlen_k: int = 64
    batch: tuple[int, ...] = (1,)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    v_dim: int | None = None
    causal: bool = False
    bias: str = ""
    """The axes of `bhqk` (batch, head, query, key) that the bias has; "-" has none of them, "" is no bias."""
    dtype: str = "float32"
    scale: float | None = None
    block: tuple[int | None, int | None] = (32, 32)
    """Small, so that several tiles meet in few elements."""
    alignment: str = "top_left"
    window: int | tuple[int | None, int | None] | None = None
    mask: str = ""
    """Its axes, as the bias's. What comes before a colon is what it is held as (`MASKS`), else an array."""
    segments: str = ""
    """"packed": documents in order, each batch its own; "shared": in order, then padding, without a batch axis;
    "mixed": in no order, padding between."""
    positions: str = ""
    """"zigzag": the first and the last, the second and the last but one, ...; "ring": the keys are a buffer that was
    written over, each batch from another place on, and the rows the newest; "mixed": any, some of them twice."""
    lengths: str = ""
    """"q", "k" or "qk": whose lengths are given. One of three or more is 0."""
    soft_cap: float | None = None
    sinks: bool = False
    alibi: str = ""
    """The axes of the slopes: "h" or "bh"."""
    dropout: float = 0.0
    score: str = ""
    """One of `SCORES`."""
    lse: bool = True
    """Whether lse is a result, and something depends on it."""
    max_logits: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def static(self) -> dict[str, Any]:
        """The options that are not arrays, for `flash_attention`."""
        options = {
            "causal": self.causal,
            "causal_alignment": self.alignment,
            "window_size": self.window,
            "logits_soft_cap": self.soft_cap,
            "dropout_rate": self.dropout,
        }
        return options | ({"dropout_seed": self.seed} if self.dropout else {})

    @property
    def mask_kind(self) -> str:
        """One of `MASKS`, or ""."""
        return self.mask.rpartition(":")[0]

    @property
    def mask_axes(self) -> str:
        """As in `mask`."""
        return self.mask.rpartition(":")[2]

    @property
    def seed(self) -> int:
        """Of 64 bits."""
        return zlib.crc32(self.name.encode()) * 0x9E3779B1

    @property
    def offset(self) -> int:
        """What a row's position is ahead of its index."""
        return self.seqlen_k - self.seqlen_q if self.alignment == "bottom_right" else 0

    @property
    def results(self) -> tuple[str, ...]:
        """What `flash_attention` returns, in order."""
        return ("o", *["lse"] * self.lse, *["max_logits"] * self.max_logits)

    def axes(self, names: str) -> tuple[int, ...]:
        """The shape of what has only these of the axes `bhqk` of the logits."""
        full = {"b": self.batch, "h": (self.heads,), "q": (self.seqlen_q,), "k": (self.seqlen_k,)}
        return tuple(n if axis in names else 1 for axis in "bhqk" for n in full[axis])

    def inputs(self) -> dict[str, np.ndarray | None]:
        """q, k, v, bias, the cotangents do and dlse, and `ARRAYS`, drawn from the case's name; what dropout keeps."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        v_dim = self.v_dim or self.head_dim
        own_dtype = "float32" if self.dtype == "float64" else self.dtype

        def draw(*shape, dtype=self.dtype):
            return rng.standard_normal(shape).astype(jnp.dtype(dtype))

        x = {
            "q": draw(*self.batch, self.seqlen_q, self.heads, self.head_dim),
            "k": draw(*self.batch, self.seqlen_k, self.kv_heads, self.head_dim),
            "v": draw(*self.batch, self.seqlen_k, self.kv_heads, v_dim),
            "bias": draw(*self.axes(self.bias), dtype=own_dtype) if self.bias else None,
            "do": draw(*self.batch, self.seqlen_q, self.heads, v_dim),
            "dlse": draw(*self.batch, self.heads, self.seqlen_q, dtype="float32"),
        }
        x |= dict.fromkeys((*ARRAYS, "keep"))
        if self.mask:
            x["mask"] = _mask(rng, self.axes(self.mask_axes))
        if "weights" in self.mask_kind:
            x["weights"] = _weights(rng, x["mask"])
        if self.segments:
            x["q_segment_ids"] = _segments(rng, self.segments, self.batch, self.seqlen_q)
            if self.seqlen_k != self.seqlen_q or self.segments == "mixed":  # else kv's are q's
                x["kv_segment_ids"] = _segments(rng, self.segments, self.batch, self.seqlen_k)
        if self.positions:
            x |= _positions(rng, self.positions, self.batch, self.seqlen_q, self.seqlen_k)
        if "q" in self.lengths:
            x["q_lengths"] = _lengths(rng, self.batch, self.seqlen_q)
        if "k" in self.lengths:
            x["kv_lengths"] = _lengths(rng, self.batch, self.seqlen_k)
        if self.sinks:
            x["sinks"] = draw(self.heads, dtype=own_dtype)
        if self.alibi:
            shape = (*self.batch, self.heads) if self.alibi == "bh" else (self.heads,)
            x["alibi_slopes"] = rng.uniform(0.01, 0.5, shape).astype(np.float32)
        if self.score:
            flat = int(np.prod(self.batch))
            shapes = {"slopes": (self.heads,), "table": (self.heads, 19), "rows": (flat, self.seqlen_q)}
            shapes |= {"folds": (_FOLDS, _FOLDS), "undefined": (self.seqlen_k,)}
            read = rng.uniform(0.1, 0.6, shapes[self.score])
            x["read"] = read.astype(jnp.bfloat16 if self.score == "table" else np.float32)
        if self.dropout:
            shape = self.batch, self.heads, self.seqlen_q, self.seqlen_k
            x["keep"] = kept(self.seed, *shape, self.dropout, self.offset)
        return x


def _mask(rng, shape) -> np.ndarray:
    """Three of four True; and a block of all True and one of all False, for the tiles that fall into them."""
    mask = rng.random(shape) < 0.75
    for value in (False, True) if shape[-2:] != (1, 1) else (True,):
        firsts = [rng.integers(0, n // 2 + 1) for n in shape[-2:]]
        block = [slice(first, first + (n + 1) // 2) for first, n in zip(firsts, shape[-2:], strict=True)]
        mask[*(rng.integers(0, n) for n in shape[:-2]), *block] = value
    return mask


def _weights(rng, mask) -> np.ndarray:
    """What a mask lets through counts 1, or less in every third place."""
    return np.where(rng.random(mask.shape) < 1 / 3, rng.uniform(0.05, 1, mask.shape), 1).astype(np.float32) * mask


def _segments(rng, kind: str, batch, seqlen: int) -> np.ndarray:
    """Ids of a few documents."""
    documents = 2 if seqlen < 48 else 3
    if kind == "mixed":
        ids = rng.integers(0, documents, (*batch, seqlen))
        ids[rng.random(ids.shape) < 0.1] = -1
        return ids.astype(np.int32)
    ends = np.arange(1, documents) / documents + rng.uniform(-0.15, 0.15, (*batch, 1, documents - 1))
    ids = (np.arange(seqlen)[:, None] >= ends * seqlen).sum(-1, dtype=np.int32)
    if kind == "shared":
        ids = ids[(0,) * len(batch)]
        ids[seqlen - seqlen // 8 :] = -1
    return ids


def _positions(rng, kind: str, batch, seqlen_q: int, seqlen_k: int) -> dict[str, np.ndarray]:
    """Of rows and keys; those of a zigzag are the same for every batch."""
    if kind == "zigzag":
        sides = [np.arange(n).reshape(1, -1) for n in (seqlen_q, seqlen_k)]
        sides = [np.stack([x[0], x[0, ::-1]], 1).ravel()[: x.size].reshape((1,) * len(batch) + (-1,)) for x in sides]
    elif kind == "ring":
        newest = seqlen_k + rng.integers(0, 3 * seqlen_k, (*batch, 1))
        slots = np.arange(seqlen_k)
        sides = [newest - np.arange(seqlen_q)[::-1], newest - (newest - slots) % seqlen_k]
    else:
        sides = [rng.integers(-3, seqlen_k + 3, (*batch, n)) for n in (seqlen_q, seqlen_k)]
    return {f"{name}_positions": x.astype(np.int32) for name, x in zip(("q", "kv"), sides, strict=True)}


def _lengths(rng, batch, seqlen: int) -> np.ndarray:
    """At least half of what there is; but of three or more, one is 0."""
    lengths = rng.integers((seqlen + 1) // 2, seqlen + 1, batch)
    if lengths.size > 2:
        lengths.flat[rng.integers(lengths.size)] = 0
    return np.asarray(lengths, np.int32)


def _biases() -> list[Case]:
    """Every broadcast shape, causal or not by turns, on lengths that no block divides."""
    shapes = ["".join(c) or "-" for n in range(5) for c in itertools.combinations("bhqk", n)]
    return [
        Case(f"bias_{s}", 50, 70, batch=(2,), heads=2, kv_heads=1, head_dim=16, causal=i % 2 == 0, bias=s)
        for i, s in enumerate(shapes)
    ]


def _options() -> list[Case]:
    """Each option alone, and those that are used together."""

    def case(name, seqlen_q=40, seqlen_k=40, **options):
        small = {"heads": 1, "kv_heads": 1, "head_dim": 16, "block": (16, 16)}
        return Case(name, seqlen_q, seqlen_k, **small | options)

    low, two = {"alignment": "bottom_right"}, {"batch": (2,), "heads": 2}
    return [
        case("bottom_right_few_rows", 20, 50, causal=True, **low),
        case("bottom_right_many_rows", 50, 20, causal=True, **low),  # the first see nothing
        case("window_both", 70, 50, window=(20, 5)),
        case("window_causal", 70, 70, window=(20, 5), causal=True, block=(32, 16)),
        case("window_zero", window=0),
        case("window_bottom_right", 20, 50, window=(9, 3), **low),
        case("window_bottom_right_many_rows", 50, 20, window=(9, 3), **low),
        *(case(f"mask_{axes}", 50, 40, mask=axes, **two) for axes in ("-", "hq", "bk", "h")),
        case("block_mask", 70, 100, mask="block:qk", **two),
        case("block_mask_past_the_rows", 16, 70, mask="block:qk", **two),  # a half of a tile, where blocks are halves
        case("block_mask_past_the_keys", 70, 48, mask="block:qk", **two),
        case("block_mask_by_head", 100, 70, mask="block:hqk", heads=4, kv_heads=2, batch=(2, 1), block=(32, 16)),
        case("block_mask_weights", 50, 70, mask="block_weights:bqk", causal=True, **two),
        case("mask_weights", 40, 50, mask="weights:hqk", bias="q", **two),
        case("mask_function", 50, 70, mask="function:hqk", causal=True, **two),
        case("mask_function_score", 50, 40, mask="function:bk", score="table", lengths="qk", batch=(2, 2), heads=2),
        case("segments_packed", 60, 60, segments="packed", batch=(2,)),
        case("segments_packed_causal", 60, 60, segments="packed", causal=True),
        case("segments_mixed", 40, 50, segments="mixed", batch=(2,)),
        case("zigzag", 60, 60, positions="zigzag", causal=True, batch=(2,), heads=2),
        case("ring", 20, 50, positions="ring", causal=True, window=(30, 0), batch=(3,), block=(16, 16)),
        case("positions_mixed", 40, 50, positions="mixed", window=(9, 4), alibi="h", dropout=0.2, **two),
        case("lengths_qk", 50, 50, lengths="qk", batch=(4,)),
        case("one_key_hidden", 20, 1, lengths="k", batch=(3,)),
        case("one_key_hidden_by_head", 20, 1, mask="block:h", **two),
        case("lengths_bottom_right", 30, 50, lengths="qk", batch=(4,), causal=True, **low),
        case("soft_cap", soft_cap=2.0),
        case("soft_cap_flat", 40, 50, soft_cap=5.0, scale=4.0, causal=True, bias="hk"),
        case("soft_cap_wide", soft_cap=1000.0, dtype="float16"),
        case("sinks", 50, 40, sinks=True, max_logits=True, **two),
        case("sinks_hidden_rows", 40, 50, sinks=True, mask="bq", lengths="q", **two),
        case("alibi", alibi="h", causal=True, heads=2),
        case("alibi_by_batch", 40, 60, alibi="bh", **two, **low),
        case("alibi_many_rows", 70, 20, alibi="h", heads=2),
        case("dropout", 40, 50, dropout=0.3, **two),
        case("dropout_much", dropout=0.9, causal=True, bias="qk", block=(32, 16)),
        case("dropout_bottom_right", 50, 30, dropout=0.3, causal=True, dtype="float16", **low),
        case("score_slopes", 40, 50, score="slopes", causal=True, **two, **low),
        case("score_table", 50, 70, score="table", heads=4, kv_heads=2, batch=(2, 2), block=(32, 16)),
        case("score_rows", 50, 40, score="rows", lengths="qk", sinks=True, batch=(3,)),
        case("score_folds", 40, 50, score="folds", soft_cap=3.0, bias="hk", dropout=0.2, **two),
        case("score_undefined", 40, 50, score="undefined", causal=True, max_logits=True, **two),
        case("max_logits_only", scale=-0.3, lse=False, max_logits=True),
        # Models: Mistral, Gemma 2, gpt-oss, DeepSeek's MLA over packed documents, a BERT with padding, decoding.
        case("sliding", 70, 70, window=(24, 0), causal=True, heads=2, dtype="bfloat16"),
        case("gemma", 60, 60, window=(20, 0), causal=True, soft_cap=5.0, heads=2, dtype="float16"),
        case("gpt_oss", 50, 50, window=(20, 0), causal=True, sinks=True, heads=4, kv_heads=2, dtype="bfloat16"),
        case(
            "mla", head_dim=192, v_dim=128, kv_heads=2, causal=True, segments="packed", dtype="bfloat16", **two,
        ),
        case("padded", lengths="qk", dropout=0.1, batch=(3,)),
        case("decode", 1, 70, causal=True, lengths="k", heads=4, kv_heads=1, batch=(3,), **low),
        case(
            "no_batch_options", segments="packed", lengths="qk", alibi="bh", mask="hqk", sinks=True, batch=(), heads=2,
            max_logits=True,
        ),
        case(
            "three_batch_axes_options", 30, 30, segments="packed", lengths="k", alibi="bh", mask="bk", dropout=0.2,
            batch=(2, 1, 2), block=(32, 32),
        ),
        case(
            "everything", 30, 40, causal=True, window=(30, 5), mask="qk", segments="packed", lengths="qk", soft_cap=3.0,
            sinks=True, alibi="bh", dropout=0.2, bias="hqk", max_logits=True, **two, **low,
        ),
    ]  # fmt: skip


FACTORS: dict[str, tuple] = {
    "seqlens": ((33, 33), (20, 45), (45, 20)),
    "many_heads": ((2, 1), (2, 2), (1, 1)),
    "head_dim": (16, 40),
    "dtype": ("float32", "float16", "bfloat16"),
    "block": ((16, 16), (32, 16), (16, 32)),
    "causal": (False, True),
    "alignment": ("top_left", "bottom_right"),
    "window": (None, (8, None), (None, 8), (20, 6)),
    "mask": ("", "qk", "bhqk", "block:qk", "block:bhqk", "block_weights:bhk", "weights:q", "function:bq"),
    "segments": ("", "packed", "mixed", "shared"),
    "positions": ("", "mixed"),
    "lengths": ("", "q", "k", "qk"),
    "soft_cap": (None, 2.0),
    "sinks": (False, True),
    "score": ("", "table", "rows", "folds"),
    "alibi": ("", "h", "bh"),
    "dropout": (0.0, 0.3),
    "bias": ("", "hqk", "bk", "q", "bhqk"),
    "lse": (True, False),
    "max_logits": (False, True),
}
"""What a case may be, the plainest first: every two values of any two of them meet in one of the `PAIRS`."""


def from_factors(name: str, seqlens, many_heads, **options) -> Case:
    if not possible(options.items()):  # drawn
        options["alignment"] = "top_left"
    return Case(name, *seqlens, (2,), *many_heads, **options)


BOUNDS = ("seqlens", "causal", "alignment", "window")
"""Of these, which make one interval together, every three values meet."""


def possible(values) -> bool:
    """Whether these pairs of factor and value go together: positions say what an alignment would."""
    return not {("positions", "mixed"), ("alignment", "bottom_right")} <= set(values)


def _pairs() -> list[Case]:
    """Few cases in which all meet that shall: grown greedily, value by value, plain ones where nothing is missing."""
    names, rng = list(FACTORS), random.Random(0)
    missing = {
        frozenset(zip(some, values, strict=True))
        for some in (*itertools.combinations(names, 2), *itertools.combinations(BOUNDS, 3))
        for values in itertools.product(*(FACTORS[name] for name in some))
        if possible(zip(some, values, strict=True))
    }
    cases = []
    while missing:
        chosen = set(rng.choice(sorted(missing, key=lambda some: repr(sorted(some, key=repr)))))
        rest = [name for name in names if name not in dict(chosen)]
        rng.shuffle(rest)
        for name in rest:
            new = [chosen | {(name, value)} for value in FACTORS[name]]
            chosen = max(filter(possible, new), key=lambda some: sum(m <= some for m in missing))  # the first of equals
        missing = {m for m in missing if not m <= chosen}
        cases.append(from_factors(f"pair_{len(cases):02}", **dict(chosen)))
    return cases


def drawn() -> strategies.SearchStrategy[Case]:
    """Any case that `FACTORS` allow, on any short lengths."""
    length = strategies.integers(1, 40)
    factors = {name: strategies.sampled_from(values) for name, values in FACTORS.items()}
    factors["seqlens"] = strategies.tuples(length, length)
    factors["v_dim"] = strategies.sampled_from((None, 24))
    return strategies.fixed_dictionaries(factors).map(lambda options: from_factors("drawn", **options))


PAIRS = _pairs()
OPTIONS = _options()
CASES = [
    Case("plain", 128, 128),
    Case("causal", 128, 128, causal=True),
    Case("wide_keys", 96, 96, causal=True, block=(16, 64)),
    Case("wide_rows", 96, 96, causal=True, block=(64, 16)),
    Case("one_tile", 17, 17, causal=True, block=(64, 64)),
    Case("one_row", 1, 127, heads=4, kv_heads=1),
    Case("one_row_causal", 1, 33, causal=True),
    Case("one_key", 127, 1),
    Case("one_by_one", 1, 1, causal=True),
    Case("more_keys", 17, 127, causal=True),
    Case("more_rows", 127, 17, causal=True),
    Case("ragged", 127, 100),
    Case("ragged_causal", 100, 127, batch=(2,), causal=True),
    Case("thousand", 1000, 1000, heads=1, kv_heads=1, causal=True, block=(128, 64)),
    Case("thousand_keys", 17, 1000, heads=1, kv_heads=1, block=(16, 128)),
    Case("gqa_8_1", 64, 64, heads=8, kv_heads=1, causal=True),
    Case("gqa_6_2", 50, 40, batch=(2,), heads=6, kv_heads=2),
    Case("no_batch", 40, 40, batch=(), causal=True),
    Case("three_batch_axes", 20, 20, batch=(2, 1, 2), causal=True, bias="bk"),
    Case("head_dim_1", 40, 40, head_dim=1),
    Case("head_dim_40", 50, 50, head_dim=40, causal=True),
    Case("head_dim_59", 50, 50, head_dim=59, causal=True),
    Case("head_dim_80", 50, 50, head_dim=80),
    Case("head_dim_96", 50, 50, head_dim=96, causal=True),
    Case("head_dim_192", 40, 40, head_dim=192, v_dim=128, causal=True),
    Case("head_dim_256", 40, 40, head_dim=256, heads=1, kv_heads=1, block=(16, 16)),
    Case("narrow_v", 50, 50, head_dim=64, v_dim=24),
    Case("wide_v", 50, 50, head_dim=24, v_dim=72, causal=True),
    Case("scale_large", 64, 64, scale=3.0),
    Case("products_cancel_in_fp32", 1, 1, batch=(), heads=1, kv_heads=1, head_dim=59, max_logits=True, block=(16, 16)),
    Case("saturated_cap_b", 10, 25, (), 1, 1, scale=400.0, causal=True, soft_cap=2.0, score="rows"),
    Case("scale_zero", 40, 50, scale=0.0, causal=True),
    Case("scale_zero_bias", 40, 50, scale=0.0, causal=True, bias="bhqk", mask="k"),
    Case("scale_negative", 40, 50, scale=-0.4, causal=True),
    Case("float16", 100, 127, dtype="float16", causal=True, heads=4, kv_heads=2),
    Case("float16_bias", 70, 50, dtype="float16", bias="hqk", causal=True),
    Case("float16_one_row", 1, 127, dtype="float16"),
    Case("bfloat16", 100, 127, dtype="bfloat16", causal=True, heads=4, kv_heads=2),
    Case("bfloat16_bias", 70, 50, dtype="bfloat16", bias="bk"),
    Case("bfloat16_head_dim_80", 64, 64, dtype="bfloat16", head_dim=80),
    *_biases(),
    *OPTIONS,
    *PAIRS,
]


def with_score(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays, a score function in place of what it reads."""
    if not case.score:
        return arrays
    arrays = dict(arrays)
    return arrays | {"score_mod": SCORES[case.score](arrays.pop("read"))}
