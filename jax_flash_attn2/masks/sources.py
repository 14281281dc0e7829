"""Where a block mask's elements come from: source(b, h, rows, cols) -> `[rows, cols]`, booleans or weights.

Indices past the end of the sequences may be asked for; what comes is ignored.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base.spec import next_power_of_two
from . import evaluation
from .combining import Predicate
from .mask import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfPredicate:
    """A predicate's."""

    predicate: Predicate

    def __call__(self, b, h, rows, cols):
        """What the source is: see the top of this file."""
        return evaluation.evaluate(self.predicate, b[None], h[None], rows, cols)[0, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfArray:
    """A dense array's."""

    array: Array  # [B, H, Sq, Sk]

    def __call__(self, b, h, rows, cols):
        """What the source is: see the top of this file."""
        plane = self.array[b % self.array.shape[0], h % self.array.shape[1]]
        return plane.at[rows].get(mode="clip").at[:, cols].get(mode="clip")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfIndices:
    """Those of a sparse `Mask`."""

    mask: Mask
    longest: int = dataclasses.field(metadata={"static": True})
    """The entries of the rows that are asked for together, at most."""

    def __call__(self, b, h, rows, cols):
        """What the source is: see the top of this file."""
        _, heads, seqlen_q, _ = self.mask.shape
        ptr = self.mask.ptr
        first = (b * heads + h) * seqlen_q + jnp.minimum(rows, seqlen_q)  # ptr's row; rows past the end are empty
        begin, end = ptr[first[0]], ptr[jnp.minimum(first[-1] + 1, (b * heads + h + 1) * seqlen_q)]
        place = begin + jnp.arange(self.longest, dtype=jnp.int32)
        row = jnp.searchsorted(ptr[first], place, side="right") - 1
        col = self.mask.indices.at[place].get(mode="fill", fill_value=-1) - cols[0]
        inside = (place < end) & (col >= 0) & (col < cols.shape[0])
        data = self.mask.data.at[place].get(mode="fill", fill_value=0)
        tile = jnp.zeros((rows.shape[0], cols.shape[0]), jnp.float32)
        tile = tile.at[row, jnp.where(inside, col, cols.shape[0])].add(data.astype(jnp.float32), mode="drop")
        tile = jnp.minimum(tile, 1)
        return tile != 0 if self.mask.dtype == jnp.bool_ else tile


def of_sparse(mask: Mask, block_m: int) -> OfIndices:
    """The source of a sparse mask whose values are known."""
    ptr = np.asarray(mask.ptr)
    planes, seqlen_q = mask.shape[0] * mask.shape[1], mask.shape[2]
    starts = np.arange(0, seqlen_q, block_m)
    first = np.arange(planes)[:, None] * seqlen_q
    counts = ptr[first + np.minimum(starts + block_m, seqlen_q)] - ptr[first + starts]
    return OfIndices(mask, next_power_of_two(max(int(counts.max(initial=0)), 1)))  # few sizes to compile for
