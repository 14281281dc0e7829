"""Decoding, as its benchmarks have it: a query row or a few of each sequence over a long cache, dense or in pages."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_flash_attn2 import flash_attention, paged_attention

from . import attention

FILLS = ("full", "quarter", "mixed")
"""What the sequences have of the length that is allotted for each: all, a quarter, from an eighth to all."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """What is attended to: q `[batch, rows, heads, head_dim]` over keys `[batch, seqlen, kv_heads, head_dim]`."""

    batch: int
    seqlen: int
    """Tokens that are allotted for a sequence."""
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    v_dim: int = 0
    """The values are the first so many columns of the keys (multi-head latent attention); 0: values of their own."""
    dtype: str = "float32"
    rows: int = 1

    @property
    def title(self) -> str:
        """All of it in a line."""
        widths = f"D{self.head_dim}" + (f":{self.v_dim}" if self.v_dim else "")
        rows = f" R{self.rows}" if self.rows > 1 else ""
        return f"B{self.batch} S{self.seqlen} H{self.heads}:{self.kv_heads} {widths}{rows} {self.dtype}"

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize * (1 if self.v_dim else 2)

    def lengths(self, filled: str) -> np.ndarray:
        """int32 `[batch]`: the tokens of each sequence, by one of `FILLS`."""
        if filled == "mixed":
            lengths = np.linspace(self.seqlen / 8, self.seqlen, self.batch) // 16 * 16
            return np.random.default_rng(0).permutation(lengths).astype(np.int32)
        return np.full(self.batch, self.seqlen // {"full": 1, "quarter": 4}[filled], np.int32)


def numbers(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Uniform numbers of variance 1. They are hashes of the index: random bits would take longer than what is timed."""
    x = jax.lax.iota(jnp.uint32, int(np.prod(shape))) + jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * jnp.uint32(factor)
    unit = (x >> 8).astype(jnp.float32) * 2.0**-23 - 1
    return (unit * 3**0.5).astype(dtype).reshape(shape)


def dense(cache: Cache) -> dict[str, Array]:
    """q, k and v; no v where it is part of k."""
    keys = (cache.batch, cache.seqlen, cache.kv_heads, cache.head_dim)
    shapes = {"q": (cache.batch, cache.rows, cache.heads, cache.head_dim), "k": keys} | (
        {} if cache.v_dim else {"v": keys}
    )
    return {name: numbers(seed, shape, cache.dtype) for seed, (name, shape) in enumerate(shapes.items())}


def table(cache: Cache, page_size: int) -> np.ndarray:
    """The page table of a cache whose pages lie in no order, int32 `[batch, pages of a sequence]`."""
    each = cache.seqlen // page_size
    numbers = np.random.default_rng(1).permutation(cache.batch * each)
    return numbers.reshape(cache.batch, each).astype(np.int32)


def pages(x: Array, table: np.ndarray) -> Array:
    """k or v as the table says that it lies: `[pages, page_size, kv_heads, D]`."""
    in_order = x.reshape(table.size, -1, *x.shape[2:])
    return in_order[np.argsort(table, axis=None)]


# What can attend, under the names of the arrays that it takes.


def ours(q: Array, k: Array, v: Array, lengths: Array, **options) -> Array:
    """`flash_attention` over a dense cache."""
    return flash_attention(q, k, v, kv_lengths=lengths, **options)


def paged(q: Array, k_pages: Array, v_pages: Array | None, page_table: Array, lengths: Array, **options) -> Array:
    """`paged_attention`; not causal among a few rows, which `jax.nn` cannot be where lengths differ."""
    return paged_attention(q, k_pages, v_pages, page_table, lengths, causal=q.shape[1] == 1, **options)


def library(q: Array, k: Array, v: Array, lengths: Array, implementation: str = "xla") -> Array:
    """`jax.nn.dot_product_attention` over a dense cache."""
    return attention.library(implementation).attend(q, k, v, key_value_seq_lengths=lengths)


def plain(q: Array, k: Array, lengths: Array, v_dim: int) -> Array:
    """Latent attention as one writes it first: all logits at once, in the dtype of the cache but for the softmax."""
    c = k[:, :, 0]
    s = jnp.einsum("bqhd,bkd->bhqk", q, c).astype(jnp.float32) * q.shape[-1] ** -0.5
    s = jnp.where(jnp.arange(c.shape[1], dtype=jnp.int32) < lengths[:, None, None, None], s, -jnp.inf)
    return jnp.einsum("bhqk,bkd->bqhd", jax.nn.softmax(s, -1).astype(q.dtype), c[..., :v_dim])


def baseline(cache: Cache) -> Callable[..., Array]:
    """What others have for such a cache."""
    return functools.partial(plain, v_dim=cache.v_dim) if cache.v_dim else library


def of_sequence(cache: Cache) -> Callable[..., Array]:
    """`(b, q, k, v, lengths)` -> o of sequence b, as the baseline has it in fp32."""

    def function(b, lengths, **dense):
        one = {name: jax.lax.dynamic_slice_in_dim(x, b, 1).astype(jnp.float32) for name, x in dense.items()}
        with jax.default_matmul_precision("highest"):
            return baseline(cache)(**one, lengths=jax.lax.dynamic_slice_in_dim(lengths, b, 1))

    return function
