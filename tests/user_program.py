"""A user's program: its types are what mypy and pyright say of it."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_flash_attn2 as fa
from jax_flash_attn2 import Config, flash_attention, masks

q = jnp.ones((2, 256, 4, 64))
on_host = np.ones((2, 256, 4, 64), np.float32)
ids = np.zeros((2, 256), np.int32)
starts = np.array([0, 100, 256], np.int32)

assert_type(flash_attention(q, q, q), Array)
assert_type(flash_attention(on_host, on_host, on_host, np.zeros((256, 256), np.float32)), Array)
assert_type(flash_attention(q, q, q, causal=True, q_segment_ids=ids, return_lse=True), tuple[Array, Array])
assert_type(flash_attention(q, q, q, return_max_logits=True), tuple[Array, Array])
assert_type(flash_attention(q, q, q, return_lse=True, return_max_logits=True), tuple[Array, Array, Array])
assert_type(flash_attention(q, q, q, mask=masks.causal() & masks.documents(ids), config=Config(block_m=64)), Array)
assert_type(flash_attention(q, q, q, mask=lambda b, h, i, j: i >= j, score_mod=lambda s, b, h, i, j: s), Array)


def either(lse: bool) -> Array:
    made = flash_attention(q, q, q, return_lse=lse)
    return made[0] if isinstance(made, tuple) else made


def loss(x: Array) -> Array:
    return (flash_attention(x, x, x, causal=True) ** 2).sum()


grad: Array = jax.grad(loss)(q)
assert_type(fa.dot_product_attention(q, q, q, mask=masks.causal()), Array)
assert_type(
    fa.dot_product_attention(on_host, on_host, on_host, is_causal=True, return_residual=True), tuple[Array, Array]
)
assert_type(fa.get_cached_flash_attention(64, 64)(q, on_host, q), Array)
assert_type(fa.varlen_attention(q[0], q[0], q[0], starts, causal=True), Array)
assert_type(fa.varlen_attention(q[0], q[0], q[0], starts, return_lse=True), tuple[Array, Array])

pages = jnp.zeros((8, 16, 4, 64))
table, lengths = np.arange(8, dtype=np.int32).reshape(2, 4), np.array([5, 9], np.int32)
k_pages, v_pages = fa.write_pages(pages, pages, q[:, 0], q[:, 0], table, lengths)
assert_type(fa.paged_attention(q[:, 0], k_pages, v_pages, table, lengths), Array)
assert_type(fa.paged_attention(q[:, 0], k_pages, v_pages, table, lengths, return_lse=True), tuple[Array, Array])

attend = fa.flax.make_attention_fn(window_size=(128, 0), mask=masks.causal())
assert_type(fa.flax.attention_fn(q, q, q, is_causal=True), Array)
text = str(fa.explain(q, q, q, causal=True))
works: bool = fa.supported(q, q, q)
block = masks.BlockMask.from_predicate(masks.causal(), (1, 1, 256, 256))
assert_type(flash_attention(q, q, q, mask=block), Array)

# What checkers have to find: each line that says so, and no other.
flash_attention(q, q, q, is_causal=True)  # wrong
flash_attention(q, q, q, causal_alignment="left")  # wrong
flash_attention(q, q, q, return_lse=True).sum()  # wrong
fa.dot_product_attention(q, q, q, causal=True)  # wrong
fa.paged_attention(q[:, 0], k_pages, v_pages, table)  # wrong
fa.varlen_attention(q[0], q[0], q[0], starts, q_lengths=lengths)  # wrong
