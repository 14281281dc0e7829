"""How the forward kernel runs where query rows are few and keys are many, or lie in pages: decoding.

Reading the keys once is then all the work there is. So the rows of the query heads that share a key head are one tile
(`Spec.packed`), and if that leaves programs too few to keep a chip busy, several share the keys of a tile
(`Tuned.num_splits`), and `kernels/combine.py` makes one result of theirs. Both follow from shapes and the chip alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..base.config import Config, Tuned
from ..base.layout import next_power_of_two
from ..base.operands import BLOCK_LISTS
from ..base.spec import Spec, length_of_keys, sequences
from . import tuning
from .target import Target

ROWS = 16
"""Up to how many query rows of a head are few."""

_LARGEST_SPLITS = 64
_TILES_EACH = 4
"""Tiles of keys that a split has at the least: with fewer, what splits tell each other is as much as what they read."""


# Of keys as wide as this. None of them has been timed on a GPU yet: they pass `benchmarks.codegen --check` (no spills,
# no loads of less than 16 bytes) and leave room for two programs or more on a multiprocessor, which hide each other's
# waits.
_TILES = {
    64: Tuned(64, 128, 4, 3),
    128: Tuned(64, 64, 4, 3),
    256: Tuned(32, 32, 4, 3),
    512: Tuned(32, 32, 8, 2),
    1024: Tuned(16, 16, 8, 2),
}
_OF_FP32 = {width: Tuned(16, 32 if width <= 128 else 16, 8, 2) for width in _TILES}
_AMPLE = 128 * 1024
"""Bytes of shared memory that hold a third stage beside those of another program."""


def choose(
    spec: Spec, q: Any, k: Any, operands: Mapping[str, Any], target: Target, wanted: Config
) -> tuple[Spec, Tuned]:
    """The spec and the config of the forward pass, for few rows or many.

    Args:
      spec: what is computed.
      q: `[B, Sq, H, D]`.
      k: `[B, Sk, Hkv, D]`, or pages.
      operands: of the call.
      target: the GPU.
      wanted: what the caller fixed.

    Raises:
      ValueError: see `tuning.fixed`.
    """
    few = q.shape[1] <= ROWS or bool(spec.page_size)
    if not few:
        config = tuning.choose("fwd", spec, q.dtype, target, wanted)
        return spec, dataclasses.replace(config, num_splits=wanted.num_splits or 1)
    spec = dataclasses.replace(spec, short=True)
    row = _row(spec, q, k, target, wanted)
    spec = dataclasses.replace(spec, packed=_packed(spec, row.block_m))
    rows = 16 if spec.cu_q_lens is not None else q.shape[1]
    if wanted.block_m is None:
        needed = max(next_power_of_two(rows * spec.packed), 16)
        row = dataclasses.replace(row, block_m=min(row.block_m, needed))
    config = tuning.fixed("fwd", spec, q.dtype, target, row, wanted)
    splits = wanted.num_splits or _splits(spec, config, q, k, operands, target)
    return spec, dataclasses.replace(config, num_splits=splits)


def _row(spec: Spec, q: Any, k: Any, target: Target, wanted: Config) -> Tuned:
    """The largest tile that rows and keys are given, however few there are."""
    width = max(spec.block_d, spec.block_dv, 64)
    row = (_OF_FP32 if q.dtype.itemsize == 4 else _TILES)[width]
    block_ptr = target.has_tma and not spec.latent and q.dtype.itemsize == 2  # the others would spill
    one_page = not spec.page_size or spec.page_size >= row.block_n  # has a descriptor's tile
    block_ptr = block_ptr and one_page and tuning.suit_descriptors(spec, k.dtype.itemsize)
    block_ptr = block_ptr if wanted.block_ptr is None else wanted.block_ptr
    if target.shared_memory < _AMPLE:
        row = dataclasses.replace(row, num_stages=2)
    elif spec.page_size and not block_ptr and width <= 256:
        row = dataclasses.replace(row, num_stages=5)  # two of which wait for the page table
    row = dataclasses.replace(row, block_ptr=block_ptr)
    if spec.page_size and block_ptr:
        row = dataclasses.replace(row, block_n=min(row.block_n, spec.page_size))
    row = tuning.within_mask(spec, row)
    return dataclasses.replace(row, block_m=wanted.block_m or row.block_m)


def _packed(spec: Spec, block_m: int) -> int:
    """How many rows of a tile are one row: as many heads of a group as it holds, unless what is looked up for all of a
    tile differs from head to head."""
    of_lists = any(operand.heads for name, operand in spec.operands if name in BLOCK_LISTS)
    if spec.group == 1 or of_lists or (spec.spans and spec.span_heads):
        return 1
    whole = next_power_of_two(spec.group)
    if whole <= block_m:
        return whole
    return int(np.gcd(spec.group, block_m))


def _splits(spec: Spec, config: Tuned, q: Any, k: Any, operands: Mapping[str, Any], target: Target) -> int:
    """As many as give each multiprocessor two programs, but none too few tiles."""
    keys = length_of_keys(k, operands)
    left, right = spec.rules.left, spec.rules.right
    if spec.page_size and right is None:  # rows are a sequence's last ones
        right = 0
    if left is not None and right is not None and spec.q_positions is None:
        keys = min(keys, left + right + config.block_m)
    tiles = -(-keys // config.block_n)
    wanted = -(-tuning.PROGRAMS_EACH * target.multiprocessors // programs(spec, config, q, operands))
    return max(min(wanted, tiles // _TILES_EACH, _LARGEST_SPLITS), 1)


def programs(spec: Spec, config: Tuned, q: Any, operands: Mapping[str, Any]) -> int:
    """How many programs have all keys of a tile of rows."""
    rows = config.block_m // spec.packed
    blocks = -(-q.shape[1] // rows) + (sequences(q, operands) + 1 if spec.cu_q_lens is not None else 0)
    return blocks * (spec.heads // spec.heads_packed) * q.shape[0]
