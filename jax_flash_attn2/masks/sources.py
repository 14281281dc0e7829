"""Where a block mask's elements come from, be they known or traced.

A source whose arrays are known has a `band` of them:

  source.band(b, h, start, rows, width): rows from `start` on, at most `rows` of them and at least those that there are,
  in NumPy. Booleans come as words, uint32 `[rows, width / 32]`, lowest bit first; weights as they are, `[rows, width]`.
  Keys past the end are 0.

One whose arrays are traced is a pytree, and is called:

  source(b, h, rows, cols): `[rows, cols]` elements on the device, booleans or weights. What is past the end of the
  sequences may be asked for; what comes for it is ignored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import evaluation
from .programs import Program

AT_ONCE = 2**22
"""How many elements of a known mask are looked at together: as weights, of 4 bytes, they are 16 MiB."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfPredicate:
    """A predicate's."""

    program: Program
    """Of `evaluation.trace`."""
    seqlen_k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, b, h, rows, cols):
        """What is seen, as above."""
        return evaluation.over(self.program, rows, cols)(b, h)

    def band(self, b, h, start, rows, width):
        """Words, as above."""
        cols = max(min(AT_ONCE // rows // 32 * 32, width), 32)
        places = [jax.device_put(np.array([b, h, start, first], np.int32)) for first in range(0, width, cols)]
        words = [jax.device_get(_words(self, at, rows, cols)) for at in places]
        return np.concatenate(words, 1)[:, : width // 32]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _words(source: OfPredicate, at: Array, rows: int, cols: int) -> Array:
    b, h, row, col = at
    col = col + jnp.arange(cols, dtype=jnp.int32)
    seen = source(b, h, row + jnp.arange(rows, dtype=jnp.int32), col) & (col < source.seqlen_k)
    return lax.bitcast_convert_type(packed(seen), jnp.uint32).reshape(rows, -1)


def packed(x: Array) -> Array:
    """Booleans `[..]` as int32 words, lowest bit first."""
    words = x.reshape(-1, 32).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words.sum(1, dtype=jnp.uint32), jnp.int32)


def packed_here(x: np.ndarray) -> np.ndarray:
    """The same in NumPy: booleans `[rows, n]`, n a multiple of 32, as uint32 `[rows, n / 32]`."""
    return np.packbits(x, axis=1, bitorder="little").view(np.dtype("<u4")).astype(np.uint32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfTraced:
    """A traced array's."""

    array: Array  # [B, H, Sq, Sk]

    def __call__(self, b, h, rows, cols):
        """Its elements, on the device."""
        plane = self.array[b, h]
        return plane.at[rows].get(mode="clip").at[:, cols].get(mode="clip")


@dataclasses.dataclass(frozen=True)
class OfArray:
    """A dense array's, in NumPy."""

    array: np.ndarray  # [B, H, Sq, Sk]

    def band(self, b, h, start, rows, width):
        """Its elements."""
        return _band(self.array[b, h, start : start + rows], width)


@dataclasses.dataclass(frozen=True)
class OfIndices:
    """Those of a sparse `Mask`, in NumPy."""

    shape: tuple[int, int, int, int]
    indices: np.ndarray
    ptr: np.ndarray
    data: np.ndarray

    def band(self, b, h, start, rows, width):
        """Its entries."""
        _, heads, seqlen_q, _ = self.shape
        first, count = (b * heads + h) * seqlen_q + start, min(rows, seqlen_q - start)
        ends = self.ptr[first : first + count + 1]
        x = np.zeros((count, width), self.data.dtype)
        own = slice(ends[0], ends[-1])
        x[np.repeat(np.arange(count), np.diff(ends)), self.indices[own]] = self.data[own]
        return _band(x, width)


def _band(x: np.ndarray, width: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, width - x.shape[1])))
    return packed_here(x) if x.dtype == bool else x
