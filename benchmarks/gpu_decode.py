"""Decoding on a GPU, as points of `gpu`: what is read of a cache in how long, ours in all ways against `jax.nn`.

    python -m benchmarks gpu --what decode --out DIR

A row of each sequence, bf16, caches of 4k to 128k tokens for 1 to 64 sequences; 32 heads over 8, 64 over 1, and latent
attention, where "tuned" is in pages of 64. "copy" writes half of what the others read anew, and so moves as many bytes:
what the memory of the chip allows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_flash_attn2 import Config

from . import decoding
from .attention import TOLERANCE, need_gpu
from .decoding import Cache
from .problem import Group, Work
from .results import Record, parse_case
from .sweep import milliseconds, ratio, table

SPLITS, PAGE_SIZES = (1, 4, 16, 64), (16, 64, 256)
OF_PAGES = tuple(f"paged-{size}" for size in PAGE_SIZES)
OF_SPLITS = tuple(f"splits-{n}" for n in SPLITS)
PROVIDERS = ("tuned", *OF_PAGES, "int8", "block-ptr", "ptr-block", *OF_SPLITS, "xla", "cudnn", "copy")
LATENT = ("tuned", *(p for p in OF_PAGES if p != "paged-64"), *OF_SPLITS, "plain", "copy")
"""Of latent attention: its kernels have one memory variant, and `jax.nn` has none."""
_OF_ONE = 3**0.5 / 127
"""What 1 of an int8 cache counts: `decoding.numbers` are at most the root of 3."""


def problem(filled: str, headdim: int, **shape: Any) -> "Decoding":
    """The problem of a case."""
    return Decoding(Cache(head_dim=headdim, **shape), filled)


class Decoding:
    """A `worker.Problem`: a cache, and all that attends to it or copies it."""

    flops = None

    def __init__(self, cache: Cache, filled: str):
        self.cache, self.dtype, self.tolerance = cache, cache.dtype, TOLERANCE[cache.dtype]
        self.arrays = jax.block_until_ready(jax.jit(functools.partial(decoding.dense, cache))())
        self.lengths = jnp.asarray(cache.lengths(filled))
        self.mean = math.ceil(self.lengths.mean())

    def work(self, provider: str) -> Work:
        kind, _, number = provider.partition("-")
        if provider == "copy":
            return Work(jax.jit(self._copy), (self.arrays["k"],), view=lambda got: got[:, -1])
        if provider in ("xla", "cudnn", "plain"):
            own = {} if provider == "plain" else {"implementation": provider}
            return self._attending(functools.partial(decoding.baseline(self.cache), **own), self.arrays)
        if kind == "paged":
            return self._paged(int(number))
        if provider == "int8":
            return self._paged(64, narrow=True, k_scale=_OF_ONE, v_scale=_OF_ONE)
        if provider == "tuned":
            return self._paged(64) if self.cache.v_dim else self._attending(decoding.ours, self.arrays)
        need_gpu("the Triton kernels")
        if self.cache.v_dim:
            return self._paged(64, splits=int(number))
        how = {"block_ptr": kind == "block"}
        if kind == "splits":
            how = {"config": {"fwd": Config(num_splits=int(number))}}
        return self._attending(functools.partial(decoding.ours, **how), self.arrays)

    def _attending(self, function: Callable[..., Array], arrays: dict[str, Array]) -> Work:
        """Each sequence is judged by its own size."""
        call = jax.jit(lambda arrays, lengths: function(**arrays, lengths=lengths))
        return Work(call, (arrays, self.lengths), view=list)

    def _paged(self, page_size: int, narrow: bool = False, **options: Any) -> Work:
        in_order = decoding.table(self.cache, page_size)

        @jax.jit
        def laid(x):
            x = jnp.round(x.astype(jnp.float32) / _OF_ONE).astype(jnp.int8) if narrow else x
            return decoding.pages(x, in_order)

        made = {f"{name}_pages": laid(self.arrays[name]) for name in {"k", "v"} & self.arrays.keys()}
        own = {"v_pages": None, "head_dim_v": self.cache.v_dim} if self.cache.v_dim else {}
        arrays = {"q": self.arrays["q"], "page_table": jnp.asarray(in_order), **made}
        return self._attending(functools.partial(decoding.paged, **own, **options), arrays)

    def _copy(self, k: Array) -> Array:
        """As many bytes as the live keys and values have, half of them read and half written."""
        return -k[:, : self.mean // (2 if self.cache.v_dim else 1)]

    def expected(self, provider: str) -> Any:
        return self._copy(self.arrays["k"])[:, -1] if provider == "copy" else self._attended

    @functools.cached_property
    def _attended(self) -> list[Array]:
        function = jax.jit(decoding.of_sequence(self.cache))
        batch = range(self.cache.batch)
        return [function(jnp.int32(b), lengths=self.lengths, **self.arrays)[0] for b in batch]


def groups(tiny: bool) -> list[Group]:
    """The points, the most telling first."""
    usual, single = {"heads": 32, "kv_heads": 8, "headdim": 128}, {"heads": 64, "kv_heads": 1, "headdim": 128}
    latent = {"kv_heads": 1, "headdim": 576, "v_dim": 512}
    cases = [
        _case(1, 32768, usual), _case(8, 32768, usual), _case(64, 4096, usual), _case(1, 4096, usual),
        _case(8, 32768, usual, "quarter"), _case(8, 32768, latent | {"heads": 128}), _case(1, 32768, single),
        _case(1, 131072, usual), _case(64, 16384, usual, "mixed"), _case(64, 4096, latent | {"heads": 16}),
        _case(8, 4096, usual), _case(8, 131072, usual), _case(64, 16384, usual), _case(1, 4096, single),
        _case(64, 32768, single), _case(8, 131072, single), _case(1, 131072, latent | {"heads": 128}),
    ]  # fmt: skip
    if tiny:
        small = {"heads": 4, "kv_heads": 2, "headdim": 16}
        cases = [_case(2, 256, small, "mixed"), _case(1, 256, small | {"kv_heads": 1, "headdim": 48, "v_dim": 32})]
    return [_group(case) for case in cases]


def _case(batch: int, seqlen: int, heads: dict[str, int], filled: str = "full") -> dict[str, Any]:
    return {"filled": filled, "batch": batch, "seqlen": seqlen, **heads, "dtype": "bfloat16"}


def _group(case: dict[str, Any]) -> Group:
    names, base = (LATENT, "plain") if "v_dim" in case else (PROVIDERS, "xla")
    return Group("benchmarks.gpu_decode:problem", case, names, {name: base for name in names if name != base})


def is_point(record: Record) -> bool:
    """Whether it is one of these."""
    return "filled" in parse_case(record.case)


def tables(records: list[Record]) -> str:
    """A line for each point: how many times faster than `jax.nn` on XLA ("plain"), how many times as long as the copy
    (of medians), and the bytes of live keys and values in a second."""
    copies = {r.case: r for r in records if r.provider == "copy"}
    rows = [["case", "", "ms", "x faster", "x copy", "GB/s", "compile s"]]
    last = ""
    for r in records:
        cache, filled = _read(r.case)
        live = int(cache.lengths(filled).sum()) * cache.token_bytes
        live = live // jnp.dtype(cache.dtype).itemsize if r.provider == "int8" else live
        copy = copies.get(r.case)
        slower = f"{r.ms / copy.ms:.2f}" if r.ms and copy is not None and copy.ms else "-"
        speed, compiled = (f"{live / r.ms / 1e6:.3g}" if r.ms else "-"), f"{(r.compile_ms or 0) / 1e3:.1f}"
        title = f"{cache.title} {filled}" if r.case != last else ""
        rows.append([title, r.provider, milliseconds(r), ratio(r), slower, speed, compiled])
        last = r.case
    return table(rows, left=2)


def _read(case: str) -> tuple[Cache, str]:
    """The cache of a case, and how it is filled."""
    fields: dict[str, Any] = {k: v if k in ("dtype", "filled") else int(v) for k, v in parse_case(case).items()}
    filled = fields.pop("filled")
    return Cache(head_dim=fields.pop("headdim"), **fields), filled
