"""Which kernels are compiled: the rows of the tuning table, and what is chosen where a call has more, or odd shapes."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash_attn2.base.config import Config, Tuned
from jax_flash_attn2.base.operands import mask_arrays, score_arrays
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.functions.trace import trace, trace_mask
from jax_flash_attn2.gpu import short, tuning
from jax_flash_attn2.gpu.target import Target


@dataclasses.dataclass(frozen=True)
class Extra:
    """What a call may have besides: how it is compiled here."""

    rules: dict[str, Any] = dataclasses.field(default_factory=dict)
    operands: dict[str, tuple] = dataclasses.field(default_factory=dict)
    """By name: the four axes ("b", "h", "q", "k" or a length) and the dtype (None: that of q)."""
    seqlen: int = 1024
    rows: int | None = None
    """Query rows, if they are fewer than keys."""
    batch: int = 2
    heads: int = 8
    kv_heads: int = 8
    page_size: int = 0
    """Keys of a page; 0: they lie in order."""
    cache: str | None = None
    """The dtype of k and v, if it is another than q's."""
    widths: tuple[int, int] | None = None
    """Of q and k, and of v; else both are the row's."""
    dtype: str = "bfloat16"
    score: str | None = None
    """One of `_SCORES`."""
    mask: str | None = None
    """One of `_MASKS`, in place of the bits of a block mask."""
    dlse: bool = False
    wanted: tuple[str, ...] = ()
    """The operands whose gradients are wanted."""
    mixes: bool = False
    """Whether more is loaded, drawn or computed in a loop than without."""

    @property
    def decodes(self) -> bool:
        """Whether this is a decoding kernel's."""
        return self.rows is not None


_BLOCKS = {
    **{f"{side}_ends": (1, 1, 8, 3, "int32") for side in ("row", "col")},
    **{f"{side}_tiles": (1, 1, 64, 2, "int32") for side in ("row", "col")},
    "tile_bits": (1, 1, 64, 128 * 128 // 32, "int32"),
}
_LISTS = {name: axes for name, axes in _BLOCKS.items() if name != "tile_bits"}
_BIAS = {"bias": ("b", "h", "q", "k", None)}
_SCORES = {
    "score-softcap": lambda _: lambda score, b, h, i, j: 30.0 * jnp.tanh(score / 30.0),
    "score-alibi": lambda slopes: lambda score, b, h, i, j: score - slopes[h] * jnp.abs(i - j).astype(jnp.float32),
    "score-table": lambda table: lambda score, b, h, i, j: score + table[h, jnp.clip(i - j, -128, 128) + 128],
}
_MASKS = {
    "blocks-documents": lambda ids: lambda b, h, i, j: ids[b, i] == ids[b, j],
}
_READS = {"score-alibi": (8,), "score-table": (32, 257), "blocks-documents": (2, 1024)}
_ONE_ROW = {"rows": 1, "batch": 1, "heads": 32, "kv_heads": 8, "seqlen": 32768, "mixes": True}
_PAGED = {**_ONE_ROW, "batch": 8, "page_size": 64, "operands": {
    "kv_lengths": ("b", 1, 1, 1, "int32"), "offset": ("b", 1, 1, 1, "int32"), "page_table": ("b", 1, 1, 512, "int32")
}}  # fmt: skip
_SCALES = {f"{side}_scale": (4096, 8, 1, 1, "float32") for side in "kv"}
_RAGGED = {**_PAGED["operands"], "cu_q_lens": (1, 1, 1, 9, "int32")}
DECODING = {
    "decode": Extra({"right": None}, **{**_ONE_ROW, "operands": {"kv_lengths": ("b", 1, 1, 1, "int32")}}),
    "decode-rows": Extra(**{**_ONE_ROW, "rows": 8, "operands": {"offset": (1, 1, 1, 1, "int32")}}),
    "decode-fp32": Extra({"right": None}, **_ONE_ROW, dtype="float32"),
    "decode-options": Extra(
        {"left": 4096, "soft_cap": 30.0},
        **{
            **_ONE_ROW,
            "operands": {
                "kv_lengths": ("b", 1, 1, 1, "int32"),
                "offset": ("b", 1, 1, 1, "int32"),
                "sinks": (1, "h", 1, 1, "float32"),
                "slopes": (1, "h", 1, 1, "float32"),
            },
        },
    ),
    "decode-table": Extra({"right": None}, **_ONE_ROW, score="score-table"),
    "decode-blocks": Extra({"tiles": (128, 128), "right": None}, **{**_ONE_ROW, "operands": _BLOCKS}),
    "paged": Extra(**_PAGED),
    "paged-16": Extra(**{**_PAGED, "page_size": 16}),
    "paged-int8": Extra(**{**_PAGED, "operands": _PAGED["operands"] | _SCALES}, cache="int8"),
    "paged-fp8": Extra(**_PAGED, cache="float8_e4m3fn"),
    "ragged": Extra(**{**_PAGED, "operands": _RAGGED, "rows": 512}),
    "latent": Extra({"latent": 512}, **{**_PAGED, "kv_heads": 1, "heads": 128}, widths=(576, 576)),
}
"""Few rows against many keys, by the name that a point has it by."""
EXTRAS = {
    "": Extra(),
    "bias": Extra(operands=_BIAS, mixes=True),
    "mask": Extra(operands={"mask": ("b", 1, "q", "k", "bool")}, mixes=True),
    "segments": Extra(
        operands={"q_segments": ("b", 1, "q", 1, "int32"), "kv_segments": ("b", 1, 1, "k", "int32")}, mixes=True
    ),
    "positions": Extra(
        operands={"q_positions": ("b", 1, "q", 1, "int32"), "kv_positions": ("b", 1, 1, "k", "int32")}, mixes=True
    ),
    "lengths": Extra(operands={name: ("b", 1, 1, 1, "int32") for name in ("q_lengths", "kv_lengths")}, mixes=True),
    "window": Extra({"left": 256}, mixes=True),
    "softcap": Extra({"soft_cap": 30.0}, mixes=True),
    "alibi": Extra(operands={"slopes": (1, "h", 1, 1, "float32")}, mixes=True),
    "dropout": Extra(
        {"dropout_rate": 0.1},
        {name: ("b", "h", 1, 1, "uint32") for name in ("dropout_key0", "dropout_key1")},
        mixes=True,
    ),
    "blocks": Extra({"tiles": (128, 128), "right": None}, _BLOCKS, mixes=True),
    "weights": Extra(
        {"tiles": (128, 128), "right": None}, {**_BLOCKS, "tile_weights": (1, 1, 64, 128 * 128, "float32")}, mixes=True
    ),
    "odd": Extra(seqlen=1000),
    "grouped": Extra(kv_heads=2),
    "odd-grouped": Extra(seqlen=1000, kv_heads=2),
    "dlse": Extra(dlse=True),
    "dbias": Extra(operands={"bias": (1, "h", "q", "k", None)}, wanted=("bias",), mixes=True),
    "ds": Extra(operands=_BIAS, wanted=("bias",), mixes=True),
    "fp16": Extra(dtype="float16"),
    "fp32": Extra(dtype="float32", mixes=True),
    "mla": Extra(widths=(192, 128)),
    **{name: Extra(score=name, mixes=True) for name in _SCORES},
    **{name: Extra({"tiles": (128, 128), "right": None}, _LISTS, mask=name, mixes=True) for name in _MASKS},
    "dtable": Extra(score="score-table", wanted=("score_array_0",), mixes=True),
    **DECODING,
}
"""By the name that a point has it by."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One kernel to compile."""

    arch: int
    name: str
    head_dim: int
    causal: bool
    config: Tuned
    extra: str = ""
    """One of `EXTRAS`."""

    @property
    def title(self) -> str:
        """What is computed, for which chip, and how."""
        extra = f" {self.extra}" if self.extra else ""
        what = f"sm_{self.arch} {self.name:5} hd{self.head_dim:<3} {'causal' if self.causal else 'full  '}{extra}"
        return f"{what} {written(self.config)}"


def written(config: Tuned) -> str:
    """A config in one word: 128x64-w8-s2-ptr; with all that there is, 128x64-w8-s2-r168-block-overlaps-specialized."""
    registers = f"-r{config.maxnreg}" if config.maxnreg else ""
    how = "block" if config.block_ptr else "ptr"
    how += "-overlaps" * config.overlaps + "-specialized" * config.warp_specialize
    how += f"-split{config.num_splits}" if config.num_splits > 1 else ""
    return f"{config.block_m}x{config.block_n}-w{config.num_warps}-s{config.num_stages}{registers}-{how}"


def read(text: str) -> Tuned:
    """The inverse of `written`.

    Raises:
      ValueError: the text is none.
    """
    sizes = r"(\d+)x(\d+)-w(\d+)-s(\d+)(?:-r(\d+))?"
    found = re.fullmatch(sizes + r"-(block|ptr)(-overlaps)?(-specialized)?(?:-split(\d+))?", text)
    if found is None:
        raise ValueError(f"a config is written like 128x64-w8-s2-ptr or 128x64-w8-s2-r168-block, got {text!r}")
    m, n, warps, stages = map(int, found.groups()[:4])
    how = {"block_ptr": found[6] == "block", "overlaps": bool(found[7]), "warp_specialize": bool(found[8])}
    how["num_splits"] = int(found[9] or 1)
    return Tuned(m, n, warps, stages, int(found[5]) if found[5] else None, **how)


def points() -> list[Point]:
    """Every row of the table, causal and not, and what is chosen for each extra on some chips."""
    plain = [
        Point(r.arch, r.name, r.width, causal, r.config, "mla" if r.v_width else "")
        for r in tuning.ROWS
        if r.name != "dbias"
        for causal in ((True,) if r.arch == 89 else (False, True))  # sm_89 gets sm_86's code
    ]
    plain += [_tuned(r.arch, r.name, r.width, True, "dbias") for r in tuning.ROWS if r.name == "dbias"]
    tuned = list(dict.fromkeys((p.arch, p.name, p.head_dim) for p in plain if not p.extra))
    chips = {"bias": (80, 86, 90, 100), "blocks": (80, 86, 90, 100)}
    apart = ("fp32", "dbias", "ds", "dtable", *DECODING)
    options = [name for name, extra in EXTRAS.items() if extra.mixes and name not in apart]
    chosen = [
        (*key, True, extra)
        for key in tuned
        for extra in options
        if key[0] in chips.get(extra, (80, 90)) and (extra in chips or key[2] == 128)
    ]
    for arch, name, width in tuned:
        if arch not in (80, 90) or width == 256:
            continue
        chosen += [(arch, name, width, causal, "odd") for causal in (False, True)]
        if name == "dkdv":  # the others have one query head each, whatever its keys are shared with
            chosen += [(arch, name, width, causal, e) for causal in (False, True) for e in ("grouped", "odd-grouped")]
        if name == "dq":
            chosen.append((arch, name, width, True, "dlse"))
    chosen += [(arch, "dq", width, True, "ds") for arch in (80, 90, 100) for width in (64, 128)]
    chosen += [(arch, "dbias", 128, True, "dtable") for arch in (80, 90, 100)]
    chosen += [(arch, "fwd", width, True, "fp16") for arch in (80, 90, 100) for width in (64, 128)]
    chosen += [(arch, name, 64, True, "fp32") for arch in (80, 90) for name in ("fwd", "dq", "dkdv")]
    chosen += [(arch, name, 256, True, "mla") for arch in (80, 90, 100) for name in ("fwd", "dq", "dkdv")]
    chosen += [(120, name, width, True, "") for width in (64, 128) for name in ("fwd", "dq", "dkdv")]
    chosen += [(*key, True, extra) for *key, extra in _decoding()]
    by_pointers = [(arch, "fwd", 128, True, name, Config(block_ptr=False)) for arch in (90, 100) for name in _VARIANTS]
    return list(dict.fromkeys(plain + [_tuned(*key) for key in (*chosen, *by_pointers)]))


_VARIANTS = ("decode", "decode-rows", "paged", "paged-int8")
"""What also comes through pointers where a chip has descriptors of its own."""


def _decoding() -> list[tuple[int, str, int, str]]:
    """Chip, kernel, width and extra of the decoding kernels."""
    chips = (80, 86, 90, 100)
    found = [(arch, "fwd", width, "decode") for arch in chips for width in (64, 128, 256)]
    found += [(arch, "fwd", 128, extra) for arch in chips for extra in ("decode-rows", "paged", "ragged")]
    others = ("decode-fp32", "decode-options", "decode-table", "decode-blocks", "paged-16", "paged-int8", "latent")
    found += [(arch, "fwd", 128, extra) for arch in (80, 90) for extra in others]
    found += [(arch, "fwd", 128, extra) for arch, extra in ((90, "paged-fp8"), (100, "paged-fp8"), (100, "latent"))]
    return found + [(arch, "combine", 128, extra) for arch in (80, 90) for extra in ("decode", "decode-options")]


def _tuned(arch: int, name: str, head_dim: int, causal: bool, extra: str, wanted: Config | None = None) -> Point:
    made, wanted = Point(arch, name, head_dim, causal, Tuned(0, 0, 0, 0), extra), wanted or Config()
    rules, q, k, v, operands = arrays(made)
    spec = Spec.of(rules, q, k, v, operands)
    if name in ("fwd", "combine"):
        _, config = short.choose(spec, q, k, operands, Target(arch), wanted)
    else:
        config = tuning.choose(name, spec, q.dtype, Target(arch), wanted)
    return dataclasses.replace(made, causal=spec.causal, config=config)


def arrays(point: Point) -> tuple:
    """Rules, q, k, v and operands to compile for."""
    extra = EXTRAS[point.extra]
    width, v_width = extra.widths or (point.head_dim, point.head_dim)
    rows = extra.rows or extra.seqlen
    sizes = {"b": extra.batch, "h": extra.heads, "q": rows, "k": extra.seqlen}
    dtype = jnp.dtype(extra.dtype)
    q = jax.ShapeDtypeStruct((1 if "cu_q_lens" in extra.operands else extra.batch, rows, extra.heads, width), dtype)
    held = (4096, extra.page_size) if extra.page_size else (extra.batch, extra.seqlen)
    kept = jnp.dtype(extra.cache or dtype)
    k, v = (jax.ShapeDtypeStruct((*held, extra.kv_heads, d), kept) for d in (width, v_width))
    operands = {"scale": jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)}
    for name, (*axes, kind) in extra.operands.items():
        operands[name] = jax.ShapeDtypeStruct([sizes.get(axis, axis) for axis in axes], kind or dtype)
    rules = {"right": 0 if point.causal else None, "precise": dtype == jnp.float32} | extra.rules
    rules["lost"] = dtype.itemsize == 2 and not extra.decodes
    if extra.score is not None:
        rules["score"], shapes = _traced(extra.score)
        operands |= dict(zip(score_arrays(len(shapes)), shapes, strict=True))
    if extra.mask is not None:
        rules["mask"], shapes = _traced(extra.mask)
        operands |= dict(zip(mask_arrays(len(shapes)), shapes, strict=True))
    return Rules(**rules), q, k, v, operands


@functools.cache
def _traced(name: str) -> tuple[Any, list[Any]]:
    """A score or mask function, and the arrays of a call that it reads; on no device, so that processes may be
    forked."""
    found = []

    def look(array: Any) -> None:
        if name in _MASKS:
            traced, arrays = trace_mask(_MASKS[name](array), "mask")
        else:
            traced, arrays = trace(_SCORES[name](array), "score_mod", jnp.float32)
        shapes = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in arrays]
        found.append((dataclasses.replace(traced, batch=2), shapes))

    jax.eval_shape(look, jax.ShapeDtypeStruct(_READS.get(name, ()), jnp.int32 if name in _MASKS else jnp.float32))
    return found[0]
