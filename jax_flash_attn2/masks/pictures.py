"""Masks as they are drawn: planes of numbers, and these in fewer cells."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments
from ..tiles.kinds import EMPTY, FULL, PARTIAL


@dataclasses.dataclass(frozen=True)
class Picture:
    """A mask as it is drawn: planes of numbers in [0, 1], each the weight of an element or the state of a tile."""

    name: str
    shape: tuple[int, ...]
    """`[..., Sq, Sk]`, as the mask says."""
    leading: tuple[int, ...]
    """Axes of which there are planes: shape's first ones, 1 where all are the same."""
    plane: Callable[[tuple[int, ...]], np.ndarray]
    """The plane at an index of `leading`: `[rows, cols]`, 0.5 for a partial tile."""
    share: str
    """How much of it is seen."""
    details: str
    """What else there is to say; may be empty."""
    block: tuple[int, int]
    """Queries and keys that a number of a plane stands for."""
    tiled: bool
    weighted: bool
    """Whether there are weights between 0 and 1."""

    @property
    def heading(self) -> str:
        """What it is, and how much of it is seen."""
        return f"{self.name} {list(self.shape)}: {self.share}"

    @property
    def seqlens(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.shape[-2], self.shape[-1]

    def indices(self, most: int) -> list[tuple[int, ...]]:
        """Of the first planes."""
        count = min(most, int(np.prod(self.leading)))
        return [tuple(int(n) for n in np.unravel_index(at, self.leading)) for at in range(count)]

    def title(self, index: tuple[int, ...]) -> str:
        """What is in that plane; empty if there is only one."""
        names = ("batch", "head") if len(self.leading) == 2 else tuple(f"axis {n}" for n in range(len(self.leading)))
        parts = [
            f"{name} {at}" if own > 1 else f"every {name}"
            for name, at, own, n in zip(names, index, self.leading, self.shape[:-2], strict=True)
            if n > 1
        ]
        return ", ".join(parts)

    def left_out(self, shown: int) -> str:
        """What is said where only the first planes are shown; empty if those are all."""
        count = int(np.prod(self.leading))
        return f"{count - shown} of {count} planes are not shown" if count > shown else ""


def picture_of(mask: Any) -> Picture:
    """The picture of whatever `show` takes."""
    if hasattr(mask, "tiles"):
        return _of_tiles(mask)
    name = "mask" if isinstance(mask, Array | np.ndarray) else type(mask).__name__
    dense = mask.to_dense() if hasattr(mask, "to_dense") else mask
    if not isinstance(dense, Array | np.ndarray):
        how = "; evaluate it, or make a BlockMask of it" if callable(mask) else ""
        raise TypeError(f"mask must be an array [..., Sq, Sk], a Mask or a BlockMask, got {type(mask).__name__}{how}")
    _check_known(dense)
    if dense.ndim < 2:
        raise ValueError(f"mask must have at least the axes [Sq, Sk], got shape {dense.shape}")
    if not (dense.dtype == jnp.bool_ or jnp.issubdtype(dense.dtype, jnp.number)):
        raise TypeError(f"mask must hold booleans or weights in [0, 1], got dtype {dense.dtype.name}")
    dense = np.asarray(dense)
    dense = dense if dense.dtype == np.bool_ else dense.astype(np.float32)
    if dense.dtype != np.bool_ and not ((dense >= 0) & (dense <= 1)).all():
        raise ValueError(
            f"mask must hold weights in [0, 1], got values from {dense.min()} to {dense.max()}; of what is added to "
            f"logits, draw bias > -inf"
        )
    weighted = dense.dtype != np.bool_ and bool(((dense > 0) & (dense < 1)).any())
    share = f"{_percent(np.count_nonzero(dense), dense.size)} seen"
    details = f"mean weight {dense.mean():.3g}" if weighted else ""
    return Picture(
        name, dense.shape, dense.shape[:-2], lambda index: dense[index], share, details, (1, 1), False, weighted
    )


def _of_tiles(mask: Any) -> Picture:
    tiles = mask.tiles()
    _check_known(tiles)
    tiles = np.asarray(tiles)
    shape = tuple(mask.shape)
    empty, full, partial = (int(np.count_nonzero(tiles == kind)) for kind in (EMPTY, FULL, PARTIAL))
    share = f"{_percent(tiles.size - empty, tiles.size)} of the tiles visited"
    details = f"{full} full and {partial} partial of {tiles.size}, {mask.block_m}x{mask.block_n} each"
    levels, block = np.array([0, 1, 0.5], np.float32), (mask.block_m, mask.block_n)  # of each kind, in their order
    name, leading = type(mask).__name__, tiles.shape[:-2]
    return Picture(name, shape, leading, lambda index: levels[tiles[index]], share, details, block, True, False)


def _percent(part: Any, whole: int) -> str:
    """Never 0 or 100 where that is not so."""
    share = 100 * part / max(whole, 1)
    if part > 0 and share < 0.01:
        return "less than 0.01%"
    if part < whole and share > 99.99:
        return "more than 99.99%"
    return f"{share:.4g}%"


def resampled(picture: Picture, plane: np.ndarray, rows: int, cols: int) -> tuple[np.ndarray, ...]:
    """A plane in `[rows, cols]` cells: the mean, the least and the most of what a cell lies on.

    Where the numbers do not divide, neighbours share what lies on their border.
    """
    if plane.size == 0:
        return tuple(np.zeros((rows, cols)) for _ in range(3))
    tops, bottoms = _edges(picture.seqlens[0], picture.block[0], rows)
    lefts, rights = _edges(picture.seqlens[1], picture.block[1], cols)
    spans = np.stack([lefts, rights], -1).ravel()  # reduceat takes starts: every other result is of a cell

    def over_cells(function, line):
        return function.reduceat(np.append(line, line[-1]), spans)[::2]

    mean, least, most = (np.empty((rows, cols), np.float64) for _ in range(3))
    for row, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):  # all of it in float64 might not fit
        part = plane[top:bottom]
        mean[row] = over_cells(np.add, part.mean(0, dtype=np.float64)) / (rights - lefts)
        least[row] = over_cells(np.minimum, part.min(0).astype(np.float32))
        most[row] = over_cells(np.maximum, part.max(0).astype(np.float32))
    return mean, least, most


def _edges(seqlen: int, block: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks each cell lies on: the first, and the one after the last."""
    at = np.arange(cells)
    first, end = at * seqlen // cells, -(-(at + 1) * seqlen // cells)
    return first // block, np.maximum(-(-end // block), first // block + 1)


def _check_known(x: Any) -> None:
    if isinstance(x, jax.core.Tracer):
        raise TypeError("mask must be known to be drawn, got a traced one; draw it outside of jit")


def check_count(name: str, n: Any) -> None:
    """Raises unless it is a number of things."""
    if not arguments.is_integer(n) or n < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
