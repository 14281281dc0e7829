"""What a call may carry besides q, k and v: by what names, in what order, with what axes."""

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax import Array

OPERANDS = (
    "scale",
    "bias",
    "mask",
    "q_segments",
    "kv_segments",
    "q_lengths",
    "kv_lengths",
    "q_positions",
    "kv_positions",
    "q_index",
    "kv_index",
    "offset",
    "sinks",
    "slopes",
    "dropout_key0",
    "dropout_key1",
    "origin",
    "page_table",
    "cu_q_lens",
    "k_scale",
    "v_scale",
    "row_ends",
    "row_tiles",
    "col_ends",
    "col_tiles",
    "tile_bits",
    "tile_weights",
)
"""All that a call may carry besides q, k and v, in the order in which kernels take them.

Each has the four axes `[B, H, Sq, Sk]`, of length 1 where it does not vary, so that one rule serves them all under
vmap, under sharding and in memory. A batch axis may also have a length n that divides B: batch b reads `b % n`.

scale: `[n, 1, 1, 1]` fp32 (fp64 for fp64), at least 0. bias: any axes, floating. mask: any axes, bool, True = seen.
q_segments `[n, 1, Sq, 1]`, kv_segments `[n, 1, 1, Sk]`: int32, seen where equal; negative is padding. q_lengths,
kv_lengths `[n, 1, 1, 1]`: int32. q_positions `[n, 1, Sq, 1]`, kv_positions `[n, 1, 1, Sk]`: int32, both or neither.
q_index `[1, 1, Sq, 1]`, kv_index `[1, 1, 1, Sk]`: int32, by which number dropout and functions count rows and keys,
where it is not their place in the array. offset `[n, 1, 1, 1]`: int32, what is added to a row's index to give its
position among the keys, where positions are not given. sinks `[n, H, 1, 1]`, slopes `[n, H, 1, 1]`: fp32 (fp64).
dropout_key0 and 1 `[n, 1|H, 1, 1]`: uint32. origin `[1, 1, 1, 3]`: int32, the batch, head and row that a score function
shall count from: those of a device.

page_table, cu_q_lens, k_scale and v_scale say where the keys and values of a paged cache are, and the rows of ragged
sequences (`serving`). k and v are then pages `[pages, page_size, Hkv, D]`, in no order. page_table `[B, 1, 1, n]`:
int32, which pages have the keys of a sequence, in their order; a number that is no page's may be read as any page.
k_scale, v_scale `[1|pages, 1|Hkv, 1, 1]`: fp32, what a page's numbers count. cu_q_lens `[1, 1, 1, B + 1]`: int32, where
the rows of each sequence begin, and the last end, among those of q `[1, T, H, D]`; B is then the batch of the other
operands, and of what functions are told.

The last six are a block mask (`block_lists.py`). Their last two axes are no sequences, the first two are as above.
"""

SERVED = ("page_table", "cu_q_lens", "k_scale", "v_scale")
"""Those of a paged cache and of ragged sequences."""

BLOCK_LISTS = OPERANDS[-6:]
"""The operands of a block mask."""

HIDING = (
    *("mask", "q_segments", "kv_segments", "q_lengths", "kv_lengths", "q_positions", "kv_positions", "offset"),
    *BLOCK_LISTS,
)
"""Those that decide which tiles are met."""

DIFFERENTIABLE = ("scale", "bias", "sinks", "slopes")
"""Which of them have a gradient."""

_SCORE_ARRAY, _MASK_ARRAY = "score_array_", "mask_array_"


def score_arrays(count: int) -> tuple[str, ...]:
    """The names of the arrays `[n, ...]` that a score function reads, which a call carries behind `OPERANDS`. Floating
    ones have a gradient. n divides the number of calls whose batches these are (`functions.function`)."""
    return tuple(f"{_SCORE_ARRAY}{n}" for n in range(count))


def mask_arrays(count: int) -> tuple[str, ...]:
    """The names of those that a mask function reads, likewise. They have no gradient."""
    return tuple(f"{_MASK_ARRAY}{n}" for n in range(count))


def is_score_array(name: str) -> bool:
    """Whether an operand is one of `score_arrays`."""
    return name.startswith(_SCORE_ARRAY)


def is_read(name: str) -> bool:
    """Whether an operand is one of `score_arrays` or `mask_arrays`."""
    return name.startswith((_SCORE_ARRAY, _MASK_ARRAY))


def names_of(operands: Collection[str]) -> tuple[str, ...]:
    """Their names, in order."""
    of_scores = sum(map(is_score_array, operands))
    of_masks = sum(map(is_read, operands)) - of_scores
    return (*(name for name in OPERANDS if name in operands), *score_arrays(of_scores), *mask_arrays(of_masks))


def for_every_batch(x: Array, batch: int) -> Array:
    """`[n, ...]` -> `[1|B, ...]`: batch b reads b % n."""
    return x if x.shape[0] in (1, batch) else jnp.tile(x, (batch // x.shape[0], *(1,) * (x.ndim - 1)))


def summed_to(x: Array, shape: Sequence[int], groups: int) -> Array:
    """The gradient of an operand of this shape, `[groups * n, 1|H, 1|M, 1|N]`, of what each batch and head gives to it,
    `[B, H, M, N]`: summed over the axes that it lacks, and over the batches, seen as (groups, rest, n)."""
    lacks = [axis for axis in (1, 2, 3) if shape[axis] == 1]
    if x.shape[0] == groups * shape[0]:
        return x.sum(lacks, keepdims=True)
    x = x.reshape(groups, -1, shape[0], *x.shape[1:]).sum([1, *(axis + 2 for axis in lacks)], keepdims=True)
    return x.reshape(groups * shape[0], *x.shape[3:])
