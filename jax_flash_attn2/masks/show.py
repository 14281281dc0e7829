"""Pictures of masks: text for a terminal, and matplotlib.

Both draw what is too large reduced: a cell is blank only if nothing in it is seen, and solid only if all of it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_SHADES = " ░▒▓█"  # nothing | up to a third of it | up to two thirds | more | all
_TILES = " ░█"  # nothing | some | all
_LEAST = 8  # rows and columns that a lopsided mask is drawn with, if it has them
_GRID = 40  # up to so many cells a side there are lines between them
_EMPTY, _PARTIAL, _FULL = "#f7f7f5", "#f2a541", "#1f4e79"  # also apart in print, and to the colour-blind


@dataclasses.dataclass(frozen=True)
class _Picture:
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
        return f"{self.name} {list(self.shape)}: {self.share}"

    @property
    def seqlens(self) -> tuple[int, int]:
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
        count = int(np.prod(self.leading))
        return f"{count - shown} of {count} planes are not shown" if count > shown else ""


def show(mask: Any, *, width: int = 64, height: int | None = None, planes: int = 4) -> str:
    """A mask as text, queries downwards and keys to the right; `print` it.

    A character is as high as two of them are wide, and so is what it stands for; small masks have two characters for an
    element. Blank: nothing there is seen; █: all; ░ ▒ ▓ in between: up to a third (of the mean weight), up to two
    thirds, more. Of a `BlockMask` ░ is whatever is partial or mixed.

    Args:
      mask: an array `[..., Sq, Sk]` of booleans or of weights in [0, 1]; a `Mask`; or a `BlockMask`, of which only the
        tiles are looked at, so that its lengths may be any.
      width: at most so many columns.
      height: at most so many rows for each plane; None: half of width.
      planes: at most so many batches and heads, the first ones; the last line says how many are left out.

    Returns:
      Lines of text, the first with the shape and how much is seen.

    Raises:
      TypeError, ValueError: what is no mask, has less than two axes, or is traced; sizes below 1.
    """
    for name, n in (("width", width), ("height", width if height is None else height), ("planes", planes)):
        _check_count(name, n)
    picture = _picture(mask)
    rows, cols = _text_grid(*picture.seqlens, width, max(width // 2, 1) if height is None else height)
    lines = [", ".join(part for part in (picture.heading, picture.details) if part)]
    indices = picture.indices(planes)
    for index in indices:
        title = picture.title(index)
        lines += [title] if title else []
        lines += ["┌" + "─" * cols + "┐"]
        lines += [f"│{line}│" for line in _characters(picture, index, rows, cols)]
        lines += ["└" + "─" * cols + "┘"]
    out = picture.left_out(len(indices))
    return "\n".join([*lines, *([out] if out else [])])


def plot_mask(
    mask: Any,
    ax: Any = None,
    *,
    batch: int | None = None,
    head: int | None = None,
    planes: int = 4,
    resolution: int = 1024,
    title: str | None = None,
) -> Any:
    """A mask drawn by matplotlib: keys from left to right, queries downwards, one panel for a batch and head.

    Booleans are blue where seen, weights a grey scale. A `BlockMask` shows its tiles: full ones blue, partial ones
    orange, empty ones blank. More than `resolution` elements or tiles a side are averaged.

    Args:
      mask: as for `show`.
      ax: the axes to draw in; None: a new figure.
      batch, head: draw this one only (of a mask with four axes). Of several planes `ax` has room for one: the first.
      planes: at most so many panels; the figure says how many are left out.
      resolution: at most so many cells a side.
      title: in place of the shape and how much is seen; "" for none.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: as for `show`; a batch or head that there is not.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"plot_mask needs matplotlib ({error}): pip install matplotlib; show needs nothing"
        ) from error
    _check_count("planes", planes)
    _check_count("resolution", resolution)
    picture = _picture(mask)
    chosen = _chosen(picture, batch, head)
    indices = [chosen] if chosen is not None else picture.indices(1 if ax is not None else planes)
    if ax is None:
        figure, panels = _panels(plt, picture, len(indices))
    else:
        figure, panels = ax.figure, [ax]
    heading = picture.heading if title is None else title
    out = "" if chosen is not None else picture.left_out(len(indices))
    if ax is None:
        lines = heading, picture.details if title is None else "", out
        figure.suptitle("\n".join(line for line in lines if line), fontsize="medium")
    images = []
    for panel, index in zip(panels, indices, strict=True):
        own = picture.title(index)
        if ax is not None:  # the figure is the caller's, so all that there is to say goes over the panel
            own = "\n".join(line for line in (heading, own, out) if line)
        images.append(_draw(panel, picture, index, resolution))
        if own:
            panel.set_title(own, fontsize="small")
    if picture.tiled:
        _tile_legend(panels[0] if ax is not None else figure, inside=ax is not None)
    elif picture.weighted:
        figure.colorbar(images[0], ax=panels, shrink=0.8, label="weight")
    return figure


# Masks as pictures.


def _picture(mask: Any) -> _Picture:
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
    return _Picture(
        name, dense.shape, dense.shape[:-2], lambda index: dense[index], share, details, (1, 1), False, weighted
    )


def _of_tiles(mask: Any) -> _Picture:
    tiles = mask.tiles()
    _check_known(tiles)
    tiles = np.asarray(tiles)
    shape = tuple(mask.shape)
    empty, full, partial = (int(np.count_nonzero(tiles == state)) for state in (0, 1, 2))
    share = f"{_percent(tiles.size - empty, tiles.size)} of the tiles visited"
    details = f"{full} full and {partial} partial of {tiles.size}, {mask.block_m}x{mask.block_n} each"
    levels, block = np.array([0, 1, 0.5], np.float32), (mask.block_m, mask.block_n)
    name, leading = type(mask).__name__, tiles.shape[:-2]
    return _Picture(name, shape, leading, lambda index: levels[tiles[index]], share, details, block, True, False)


def _percent(part: Any, whole: int) -> str:
    """Never 0 or 100 where that is not so."""
    share = 100 * part / max(whole, 1)
    if part > 0 and share < 0.01:
        return "less than 0.01%"
    if part < whole and share > 99.99:
        return "more than 99.99%"
    return f"{share:.4g}%"


def _resampled(picture: _Picture, plane: np.ndarray, rows: int, cols: int) -> tuple[np.ndarray, ...]:
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


# Text.


def _text_grid(seqlen_q: int, seqlen_k: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of characters."""
    exact = 2 * seqlen_k <= width
    cols = 2 * seqlen_k if exact else min(seqlen_k, width)
    rows = seqlen_q if exact else max(round(cols * seqlen_q / seqlen_k / 2), min(seqlen_q, _LEAST))
    if rows > height:  # narrower too, to stay in proportion
        cols = min(max(round(2 * height * seqlen_k / seqlen_q), min(seqlen_k, _LEAST)), cols)
        rows = height
    return rows, cols


def _characters(picture: _Picture, index: tuple[int, ...], rows: int, cols: int) -> list[str]:
    mean, least, most = _resampled(picture, picture.plane(index), rows, cols)
    shades = _TILES if picture.tiled else _SHADES
    levels = 1 + np.clip(np.ceil(mean * (len(shades) - 2)) - 1, 0, len(shades) - 3).astype(int)
    levels = np.where(least == 1, len(shades) - 1, np.where(most > 0, levels, 0))
    return ["".join(shades[level] for level in line) for line in levels]


# matplotlib.


def _panels(plt: Any, picture: _Picture, count: int) -> tuple[Any, list[Any]]:
    """A figure with a panel for each plane, in proportion unless that would be a thread."""
    seqlen_q, seqlen_k = (max(n, 1) for n in picture.seqlens)
    across = min(count, 4) if count != 4 else 2
    down = -(-count // max(across, 1))
    side = 4.5 if count == 1 else 3.0
    shape = np.clip(seqlen_q / seqlen_k, 0.25, 3)
    wide, high = side / max(shape, 1) ** 0.5, side * min(shape, 1) * max(shape, 1) ** 0.5
    bar = 1.0 if picture.weighted else 0.0
    size = max(across * (wide + 0.8) + bar, 4.0), down * (high + 0.7) + 0.6 + 0.3 * picture.tiled
    figure, panels = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[count:]:
        panel.remove()
    return figure, list(panels.flat[:count])


def _draw(ax: Any, picture: _Picture, index: tuple[int, ...], resolution: int) -> Any:
    """One plane in one panel; the image that a colour bar needs."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.ticker import MaxNLocator

    seqlen_q, seqlen_k = (max(n, 1) for n in picture.seqlens)
    plane = picture.plane(index)
    rows, cols = (min(max(n, 1), resolution) for n in plane.shape)
    block_m, block_n = picture.block
    extent = 0, plane.shape[1] * block_n, plane.shape[0] * block_m, 0  # the last tiles may stick out of the mask
    if (rows, cols) != plane.shape:
        extent = 0, seqlen_k, seqlen_q, 0

    def reduced(x):
        return x if x.shape == (rows, cols) else _resampled(picture, x, rows, cols)[0]

    if picture.tiled:  # colours are mixed, as full and empty tiles do not make partial ones
        colours = (0, _EMPTY), (0.5, _PARTIAL), (1, _FULL)
        image = sum(reduced(plane == state)[..., None] * np.array(to_rgb(colour)) for state, colour in colours)
        drawn = ax.imshow(image, extent=extent)
    else:
        shades = "Greys" if picture.weighted else LinearSegmentedColormap.from_list("seen", [_EMPTY, _FULL])
        drawn = ax.imshow(reduced(plane), extent=extent, vmin=0, vmax=1, cmap=shades)
    for n, block, line in ((cols, block_n, ax.axvline), (rows, block_m, ax.axhline)):
        if max(rows, cols) <= _GRID:
            for at in range(1, n):
                line(at * block, color="white", linewidth=0.8)
    ax.set(xlim=(0, seqlen_k), ylim=(seqlen_q, 0), xlabel="keys", ylabel="queries")
    ax.set_aspect("equal" if 1 / 4 <= seqlen_q / seqlen_k <= 3 else "auto")
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 10]))
    ax.tick_params(labelsize="small")
    return drawn


def _tile_legend(where: Any, inside: bool) -> None:
    """What the colours of tiles mean: below the panel, or below all of them."""
    from matplotlib.patches import Patch

    colours = ("full", _FULL), ("partial", _PARTIAL), ("empty", _EMPTY)
    patches = [Patch(facecolor=colour, edgecolor="#888888", label=label) for label, colour in colours]
    options = {
        "handles": patches,
        "ncols": 3,
        "frameon": False,
        "fontsize": "small",
        "handlelength": 1.2,
        "columnspacing": 1.0,
    }
    if inside:
        where.legend(**options, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=0.2)
    else:
        where.legend(**options, loc="outside lower center")


# One argument each.


def _chosen(picture: _Picture, batch: Any, head: Any) -> tuple[int, ...] | None:
    """The plane of a batch and head; None if neither is given."""
    if batch is None and head is None:
        return None
    if len(picture.leading) != 2:
        raise ValueError(f"batch and head choose from a mask [B, H, Sq, Sk], got shape {picture.shape}; index it")
    index = []
    for name, at, own, n in zip(("batch", "head"), (batch, head), picture.leading, picture.shape[:2], strict=True):
        at = 0 if at is None else at
        if not isinstance(at, int | np.integer) or not 0 <= at < n:
            raise ValueError(f"{name} must be an integer from 0 to {n - 1}, got {at!r}")
        index.append(int(at) if own > 1 else 0)
    return tuple(index)


def _check_known(x: Any) -> None:
    if isinstance(x, jax.core.Tracer):
        raise TypeError("mask must be known to be drawn, got a traced one; draw it outside of jit")


def _check_count(name: str, n: Any) -> None:
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
