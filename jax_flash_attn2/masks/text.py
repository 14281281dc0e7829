"""Pictures of masks as text, for a terminal.

What is too large is drawn reduced: a cell is blank only if nothing in it is seen, and solid only if all of it is.
"""

from typing import Any

import numpy as np

from .pictures import Picture, check_count, picture_of, resampled

_SHADES = " ░▒▓█"  # nothing | up to a third of it | up to two thirds | more | all
_TILES = " ░█"  # nothing | some | all
_LEAST = 8  # rows and columns that a lopsided mask is drawn with, if it has them


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

    Examples:
      >>> print(show(jnp.tril(jnp.ones((3, 3), bool))))
      mask [3, 3]: ...
      ┌──────┐
      │██    │
      │████  │
      │██████│
      └──────┘
    """
    for name, n in (("width", width), ("height", width if height is None else height), ("planes", planes)):
        check_count(name, n)
    picture = picture_of(mask)
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


def _text_grid(seqlen_q: int, seqlen_k: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of characters."""
    exact = 2 * seqlen_k <= width
    cols = 2 * seqlen_k if exact else min(seqlen_k, width)
    rows = seqlen_q if exact else max(round(cols * seqlen_q / seqlen_k / 2), min(seqlen_q, _LEAST))
    if rows > height:  # narrower too, to stay in proportion
        cols = min(max(round(2 * height * seqlen_k / seqlen_q), min(seqlen_k, _LEAST)), cols)
        rows = height
    return rows, cols


def _characters(picture: Picture, index: tuple[int, ...], rows: int, cols: int) -> list[str]:
    mean, least, most = resampled(picture, picture.plane(index), rows, cols)
    shades = _TILES if picture.tiled else _SHADES
    levels = 1 + np.clip(np.ceil(mean * (len(shades) - 2)) - 1, 0, len(shades) - 3).astype(int)
    levels = np.where(least == 1, len(shades) - 1, np.where(most > 0, levels, 0))
    return ["".join(shades[level] for level in line) for line in levels]
