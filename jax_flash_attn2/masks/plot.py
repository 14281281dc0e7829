"""Pictures of masks by matplotlib.

What is too large is drawn reduced, as the text of `show` is: nothing that is seen, or hidden, vanishes by it.
"""

from typing import Any

import numpy as np

from ..base import arguments
from .pictures import Picture, check_count, picture_of, resampled

_GRID = 40  # up to so many cells a side there are lines between them
_FAINT = 0.25  # the least that is drawn of a cell in which anything is seen, and the least that is left of one it hides
_MOST_CELLS = 1024
_EMPTY, _PARTIAL, _FULL = "#f7f7f5", "#f2a541", "#1f4e79"  # also apart in print, and to the colour-blind


def plot_mask(
    mask: Any,
    ax: Any = None,
    *,
    batch: int | None = None,
    head: int | None = None,
    planes: int = 4,
    resolution: int | None = None,
    title: str | None = None,
) -> Any:
    """A mask drawn by matplotlib: keys from left to right, queries downwards, one panel for a batch and head.

    Booleans are blue where seen, weights a grey scale. A `BlockMask` shows its tiles: full ones blue, partial ones
    orange, empty ones blank. More than `resolution` elements or tiles a side are drawn reduced, and the picture says
    so: a cell has the mean shade of what is in it, but a quarter of the darkest at least, so that a few columns stay to
    be seen among thousands; and never all of it where something is hidden.

    Args:
      mask: as for `show`.
      ax: the axes to draw in; None: a new figure.
      batch, head: draw this one only (of a mask with four axes). Of several planes `ax` has room for one: the first.
      planes: at most so many panels; the figure says how many are left out.
      resolution: at most so many cells a side; None: one for every other pixel of a panel, 1024 at most, or for each
        element or tile if they are no more than pixels.
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
    check_count("planes", planes)
    if resolution is not None:
        check_count("resolution", resolution)
    picture = picture_of(mask)
    chosen = _index_of(picture, batch, head)
    indices = [chosen] if chosen is not None else picture.indices(1 if ax is not None else planes)
    if ax is None:
        figure, panels = _panels(plt, picture, len(indices))
    else:
        figure, panels = ax.figure, [ax]
    cells = _cells(picture, panels, resolution)
    heading = picture.heading if title is None else title
    reduced = "" if cells is None else _reduced_by(picture, cells)
    out = "" if chosen is not None else picture.left_out(len(indices))
    if ax is None:
        lines = heading, picture.details if title is None else "", reduced, out
        figure.suptitle("\n".join(line for line in lines if line), fontsize="medium")
    images = []
    for panel, index in zip(panels, indices, strict=True):
        own = picture.title(index)
        if ax is not None:  # the figure is the caller's, so all that there is to say goes over the panel
            own = "\n".join(line for line in (heading, own, reduced, out) if line)
        images.append(_draw(panel, picture, index, cells))
        if own:
            panel.set_title(own, fontsize="small")
    if picture.tiled:
        _tile_legend(panels[0] if ax is not None else figure, inside=ax is not None)
    elif picture.weighted:
        figure.colorbar(images[0], ax=panels, shrink=0.8, label="weight")
    return figure


def _panels(plt: Any, picture: Picture, count: int) -> tuple[Any, list[Any]]:
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


def _cells(picture: Picture, panels: list[Any], resolution: int | None) -> tuple[int, int] | None:
    """Rows and columns of cells that a plane is reduced to; None if it is not."""
    (seqlen_q, seqlen_k), (block_m, block_n) = picture.seqlens, picture.block
    plane = max(-(-seqlen_q // block_m), 1), max(-(-seqlen_k // block_n), 1)
    if resolution is None:
        where = panels[0].get_window_extent()
        pixels = max(int(where.width), int(where.height), _GRID)
        resolution = pixels if max(plane) <= pixels else min(pixels // 2, _MOST_CELLS)  # a pixel is soon overlooked
    return None if max(plane) <= resolution else (min(plane[0], resolution), min(plane[1], resolution))


def _reduced_by(picture: Picture, cells: tuple[int, int]) -> str:
    """What is said of a picture that is reduced."""
    rows, keys = (f"{n / cell:.3g}" for n, cell in zip(picture.seqlens, cells, strict=True))
    return f"cells of {rows} x {keys}, shaded a quarter at least"


def _draw(ax: Any, picture: Picture, index: tuple[int, ...], cells: tuple[int, int] | None) -> Any:
    """One plane in one panel; the image that a colour bar needs. cells: as `_cells` says."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.ticker import MaxNLocator

    seqlen_q, seqlen_k = (max(n, 1) for n in picture.seqlens)
    plane = picture.plane(index)
    plane = plane if plane.size else np.zeros([max(n, 1) for n in plane.shape])
    rows, cols = plane.shape if cells is None else cells
    block_m, block_n = picture.block
    extent = 0, cols * block_n, rows * block_m, 0  # the last tiles may stick out of the mask
    if cells is not None:
        extent = 0, seqlen_k, seqlen_q, 0

    if picture.tiled:  # colours are mixed, as full and empty tiles do not make partial ones
        states = [plane == state for state in (0, 0.5, 1)]
        if cells is not None:
            states = _shares(*(resampled(picture, state, rows, cols)[0] for state in states))
        colours = (np.array(to_rgb(colour)) for colour in (_EMPTY, _PARTIAL, _FULL))
        image = sum(state[..., None] * colour for state, colour in zip(states, colours, strict=True))
        drawn = ax.imshow(image, extent=extent)
    else:
        if cells is not None:
            mean, least, most = resampled(picture, plane, rows, cols)
            holes = 0 if picture.weighted else least == 0
            plane = np.clip(mean, _FAINT * most, 1 - _FAINT * holes)
        shades = "Greys" if picture.weighted else LinearSegmentedColormap.from_list("seen", [_EMPTY, _FULL])
        drawn = ax.imshow(plane, extent=extent, vmin=0, vmax=1, cmap=shades)
    for n, block, line in ((cols, block_n, ax.axvline), (rows, block_m, ax.axhline)):
        if max(rows, cols) <= _GRID:
            for at in range(1, n):
                line(at * block, color="white", linewidth=0.8)
    ax.set(xlim=(0, seqlen_k), ylim=(seqlen_q, 0), xlabel="keys", ylabel="queries")
    for spine in ax.spines.values():  # on the first keys it would hide them
        spine.set_position(("outward", 2))
        spine.set(edgecolor="#888888", linewidth=0.6)
    ax.set_aspect("equal" if 1 / 4 <= seqlen_q / seqlen_k <= 3 else "auto")
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 4, 5, 10]))
    ax.tick_params(labelsize="small")
    return drawn


def _shares(empty: np.ndarray, partial: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, ...]:
    """How much of each kind of tiles is drawn of cells: of what is visited a quarter, if there is any, and likewise of
    what is not, and of what is divided."""
    visited = partial + full
    drawn = np.where(visited > 0, np.clip(visited, _FAINT, np.where(empty > 0, 1 - _FAINT, 1)), 0)
    of_it = np.where(visited > 0, partial / np.where(visited > 0, visited, 1), 0)
    of_it = np.where(partial > 0, np.clip(of_it, _FAINT, np.where(full > 0, 1 - _FAINT, 1)), 0)
    return 1 - drawn, drawn * of_it, drawn * (1 - of_it)


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


def _index_of(picture: Picture, batch: Any, head: Any) -> tuple[int, ...] | None:
    """The plane of a batch and head; None if neither is given."""
    if batch is None and head is None:
        return None
    if len(picture.leading) != 2:
        raise ValueError(f"batch and head choose from a mask [B, H, Sq, Sk], got shape {picture.shape}; index it")
    index = []
    for name, at, own, n in zip(("batch", "head"), (batch, head), picture.leading, picture.shape[:2], strict=True):
        at = 0 if at is None else at
        if not arguments.is_integer(at) or not 0 <= at < n:
            raise ValueError(f"{name} must be an integer from 0 to {n - 1}, got {at!r}")
        index.append(int(at) if own > 1 else 0)
    return tuple(index)
