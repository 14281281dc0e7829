"""The pictures of how.md. `python docs/pictures.py` draws them anew."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

from jax_flash_attn2 import masks, sequence_order

DOCS = Path(__file__).resolve().parent
EMPTY, PARTIAL, FULL, LINE = "#f7f7f5", "#f2a541", "#1f4e79", "#c9c9c4"
DEVICES = ("#1f4e79", "#f2a541", "#4b9c79", "#b5557a")


def tiles():
    """Four masks of 2048 tokens, by tiles of 128."""
    ids = jnp.asarray(np.repeat(np.arange(4), (300, 900, 500, 348)))
    rules = {
        "causal": masks.causal(),
        "a window of 384": masks.causal() & masks.sliding_window(383),
        "documents": masks.causal() & masks.documents(ids),
        "a window and 64 sinks": masks.causal() & (masks.sliding_window(383) | masks.sinks(64)),
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 9.2), layout="constrained")
    for ax, (name, rule) in zip(axes.flat, rules.items(), strict=True):
        block = masks.BlockMask.from_predicate(rule, (1, 1, 2048, 2048))
        met = np.asarray(block.tiles())[0, 0]
        masks.plot_mask(block, ax, title="")
        ax.set(title=f"{name}\n{(met != 0).sum()} of {met.size} tiles, {(met == 2).sum()} through the mask")
        ax.title.set_size(10)
        ax.xaxis.set_label_position("bottom")
        ax.set(xlabel="keys", ylabel="rows", xticks=[], yticks=[])
        if ax.get_legend():
            ax.get_legend().remove()
    figure.get_layout_engine().set(hspace=0.05)
    names = {"seen whole": FULL, "looks at elements": PARTIAL, "not visited": EMPTY}
    patches = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor=LINE, label=name) for name, color in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    return figure


def walk(size=8):
    """Which tiles one program meets."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    titles = "forward: o, lse; backward: dq (of a block of rows)", "backward: dk, dv (of a block of keys)"
    for ax, title, of_keys in zip(axes, titles, (False, True), strict=True):
        for row in range(size):
            for key in range(size):
                color = FULL if key < row else PARTIAL if key == row else EMPTY
                mine = key == 2 if of_keys else row == 5
                ax.add_patch(Rectangle((key, row), 1, 1, facecolor=color, alpha=1 if mine else 0.25, edgecolor="white"))
        start, end = ((2.5, 2.2), (2.5, size - 0.2)) if of_keys else ((0.2, 5.5), (5.8, 5.5))
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color="white", lw=2))
        ax.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xticks=[], yticks=[], xlabel="keys", ylabel="rows")
        ax.set_title(title, size=10)
        for side in ax.spines.values():
            side.set_color(LINE)
    return figure


def orders(length=64, devices=4):
    """Whose work each visible pair of row and key is."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    seen = np.tril(np.ones((length, length), bool))
    for ax, order in zip(axes, ("contiguous", "zigzag"), strict=True):
        whose = np.empty(length, int)
        whose[sequence_order(length, devices, order)] = np.repeat(np.arange(devices), length // devices)
        colors = np.array([matplotlib.colors.to_rgb(c) for c in DEVICES])[whose]
        picture = np.where(seen[..., None], colors[:, None, :], matplotlib.colors.to_rgb(EMPTY))
        ax.imshow(picture, interpolation="nearest", aspect="equal")
        shares = [100 * seen[whose == d].sum() / seen.sum() for d in range(devices)]
        ax.set_title(f"{order}: {', '.join(f'{share:.0f}%' for share in shares)} of the work", size=10)
        ax.set(xlabel="keys", ylabel="rows", xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_color(LINE)
    return figure


if __name__ == "__main__":
    for draw in (tiles, walk, orders):
        path = DOCS / f"{draw.__name__}.png"
        draw().savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
        print(f"wrote {path.relative_to(DOCS.parent)}")
