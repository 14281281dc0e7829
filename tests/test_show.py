"""Pictures of masks: what the text says, and what matplotlib is given."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2.masks import Mask, causal, evaluate, plot_mask, show, sliding_window


class Tiles:
    """As much of a `BlockMask` as a picture looks at."""

    def __init__(self, tiles, shape, block_m, block_n):
        self._tiles, self.shape, self.block_m, self.block_n = np.asarray(tiles, np.int8), shape, block_m, block_n

    def tiles(self):
        return self._tiles


class Weights:
    def __init__(self, weights):
        self.weights, self.shape = weights, weights.shape

    def to_dense(self):
        return self.weights


def dense(predicate, n):
    one, rows = np.arange(1), np.arange(n)
    return evaluate(predicate, one, one, rows, rows)


TRIANGLE = np.tril(np.ones((4, 4), bool))
LONG = Tiles(np.where(np.tri(256, k=-1), 1, 2 * np.eye(256))[None, None], (2, 8, 32768, 32768), 128, 128)


def test_small():
    """Two characters for an element; that is all there is to it."""
    want = """\
mask [4, 4]: 62.5% seen
┌────────┐
│██      │
│████    │
│██████  │
│████████│
└────────┘"""
    assert show(TRIANGLE) == want
    assert show(jnp.asarray(TRIANGLE)) == want
    assert show(TRIANGLE.astype(int)) == want
    assert show(TRIANGLE[None, None]) == want.replace("[4, 4]", "[1, 1, 4, 4]")


def test_reduced():
    """A cell is blank where nothing is seen and solid where all is; others say how much."""
    window = np.asarray(dense(causal() & sliding_window(15), 48))
    lines = show(window, width=12).splitlines()[2:-1]
    mean = window.reshape(6, 8, 12, 4).mean((1, 3))
    assert {0, 1} < set(mean.ravel())
    level = np.where(mean == 1, 4, np.ceil(mean * 3).astype(int))
    assert lines == ["│" + "".join(" ░▒▓█"[n] for n in row) + "│" for row in level]
    one = np.zeros((1000, 1000), bool)
    one[700, 300] = True
    text = show(one)
    assert text.count("░") == 1
    assert not set(text.splitlines()[2]) & set("░▒▓█")
    assert "less than 0.01% seen" in text
    text = show(~one)
    assert text.count("▓") == 1
    assert " " not in "".join(text.splitlines()[1:])
    assert "more than 99.99% seen" in text


@pytest.mark.parametrize("width", [1, 7, 20, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 500), (100, 100), (13, 9), (0, 4), (4, 0), (0, 0)])
def test_sizes(shape, width):
    """Never wider than asked for nor higher than half of that; few rows stay apart from each other."""
    *_, top = lines = show(np.ones(shape, bool), width=width).splitlines()[1:]
    assert len(top) - 2 == len(lines[0]) - 2 <= width
    assert len(lines) - 2 <= max(width // 2, 1)
    assert all(len(line) == len(top) for line in lines)
    assert len(lines) - 2 >= min(shape[0], 3, max(width // 2, 1))
    assert len(show(np.ones(shape, bool), width=width, height=3).splitlines()) <= 3 + 3


def test_planes():
    """Batches and heads follow each other, and what is left out is said."""
    mask = np.stack([TRIANGLE, ~TRIANGLE, TRIANGLE.T])[None].repeat(2, 0)
    text = show(mask, planes=2)
    assert text.startswith("mask [2, 3, 4, 4]: 54.17% seen\nbatch 0, head 0\n┌")
    assert "batch 0, head 1" in text
    assert text.endswith("┘\n4 of 6 planes are not shown")
    assert "not shown" not in show(mask, planes=6)
    assert "\nbatch 1, head 2\n" in show(mask, planes=6)
    assert show(mask[:, :1]).splitlines()[1] == "batch 0"
    assert show(mask[:1], planes=1).splitlines()[1] == "head 0"
    assert show(mask[0], planes=1).splitlines()[1] == "axis 0 0"


def test_weights():
    weights = np.array([[0, 0.1, 0.5, 0.9, 1]], np.float32)
    assert show(weights) == "mask [1, 5]: 80% seen, mean weight 0.5\n┌──────────┐\n│  ░░▒▒▓▓██│\n└──────────┘"
    text = show(Weights(jnp.asarray(weights, jnp.bfloat16)[None, None]))
    assert text.startswith("Weights [1, 1, 1, 5]: 80% seen, mean weight 0.5")
    text = show(Mask.from_dense(jnp.asarray(weights)[None, None]))
    assert text == show(weights).replace("mask [1, 5]", "Mask [1, 1, 1, 5]")


def test_block_mask():
    """Tiles as they are: full, partial, empty; a plane that all batches or heads share is drawn once."""
    tiles = Tiles([[[[2, 0, 0], [1, 2, 0], [1, 1, 2]]]], (2, 3, 90, 90), 32, 32)
    text = show(tiles, width=60)
    assert text.startswith("Tiles [2, 3, 90, 90]: 66.67% of the tiles visited, 3 full and 3 partial of 9, 32x32 each")
    assert text.splitlines()[1] == "every batch, every head"
    # 60 columns of 1.5 keys: the first 32 keys are 21 of them and a third of the next, which shows what both tiles are
    assert text.splitlines()[3] == "│" + "░" * 22 + " " * 38 + "│"
    assert text.splitlines()[-2] == "│" + "█" * 42 + "░" * 18 + "│"
    each = show(Tiles(np.ones((2, 1, 1, 1)), (2, 3, 30, 30), 32, 32))
    assert "batch 0, every head" in each
    assert "batch 1, every head" in each
    lines = show(LONG).splitlines()
    assert len(lines) == 4 + 32
    assert lines[3] == "│░░" + " " * 62 + "│"
    assert lines[-2] == "│" + "█" * 62 + "░░│"


def test_ragged_tiles():
    """The last tiles stick out of the mask; what is drawn is the mask."""
    tiles = Tiles([[[[1, 0]]]], (1, 1, 4, 40), 16, 32)  # of 40 keys the first 32
    assert show(tiles, width=40).splitlines()[2:-1] == ["│" + "█" * 32 + " " * 8 + "│"] * 4


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (3, TypeError, r"mask must be an array \[..., Sq, Sk\], a Mask or a BlockMask, got int"),
        (causal(), TypeError, "evaluate it, or make a BlockMask of it"),
        (np.ones(3), ValueError, r"at least the axes \[Sq, Sk\], got shape \(3,\)"),
        (np.array([["x"]]), TypeError, "booleans or weights"),
        (np.array([[0, -np.inf]]), ValueError, "draw bias > -inf"),
        (np.array([[0, np.nan]]), ValueError, r"weights in \[0, 1\]"),
        (np.array([[0, 2]]), ValueError, r"weights in \[0, 1\], got values from 0.0 to 2.0"),
    ],
)
def test_refused(mask, error, message):
    for draw in (show, plot_mask):
        with pytest.raises(error, match=message):
            draw(mask)


def test_refused_sizes():
    for options in ({"width": 0}, {"height": 0}, {"planes": 0}, {"width": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer of at least 1"):
            show(TRIANGLE, **options)
    with pytest.raises(TypeError, match="draw it outside of jit"):
        jax.jit(show)(TRIANGLE)


# matplotlib.


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def texts(figure):
    """All that a figure says."""
    suptitle = [] if figure._suptitle is None else [figure._suptitle.get_text()]
    return "\n".join([*suptitle, *(ax.get_title() for ax in figure.axes)])


def test_plot(plt):
    """Keys along the top, queries downwards, rows as they are."""
    figure = plot_mask(dense(causal(), 50))
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim(), ax.get_ylim()) == ("keys", "queries", (0, 50), (50, 0))
    assert ax.xaxis.get_label_position() == "top"
    np.testing.assert_array_equal(ax.images[0].get_array(), np.tri(50))
    assert ax.images[0].get_extent() == [0, 50, 50, 0]
    assert texts(figure) == "mask [1, 1, 50, 50]: 51% seen\n"
    assert not ax.lines  # no grid: too many
    assert plot_mask(TRIANGLE).axes[0].lines
    assert texts(plot_mask(TRIANGLE, title="")) == "\n"


def test_plot_panels(plt):
    mask = np.stack([TRIANGLE, ~TRIANGLE, TRIANGLE.T])[None].repeat(2, 0)
    figure = plot_mask(mask, planes=5)
    assert [ax.get_title() for ax in figure.axes] == [f"batch {n // 3}, head {n % 3}" for n in range(5)]
    assert "1 of 6 planes are not shown" in texts(figure)
    figure = plot_mask(mask, batch=1, head=2)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), TRIANGLE.T)
    assert figure.axes[0].get_title() == "batch 1, head 2"
    assert "not shown" not in texts(figure)
    own, ax = plt.subplots()
    assert plot_mask(mask, ax) is own
    assert ax.get_title() == "mask [2, 3, 4, 4]: 54.17% seen\nbatch 0, head 0\n5 of 6 planes are not shown"
    plot_mask(mask, ax, head=1)
    assert ax.get_title() == "mask [2, 3, 4, 4]: 54.17% seen\nbatch 0, head 1"
    for choice, message in (
        ({"batch": 2}, "batch must be an integer from 0 to 1, got 2"),
        ({"head": -1}, "head must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_mask(mask, **choice)
    with pytest.raises(ValueError, match=r"choose from a mask \[B, H, Sq, Sk\]"):
        plot_mask(TRIANGLE, head=0)
    with pytest.raises(ValueError, match="head must be an integer from 0 to 2, got True"):
        plot_mask(mask, head=True)


def test_plot_block_mask(plt):
    """Three colours and what they mean; the axes end where the mask does."""
    figure = plot_mask(Tiles([[[[2, 0], [1, 2]]]], (1, 4, 100, 60), 64, 32))
    figure.draw_without_rendering()
    (ax,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["full", "partial", "empty"]
    full, partial, empty = (patch.get_facecolor()[:3] for patch in legend.get_patches())
    np.testing.assert_allclose(ax.images[0].get_array(), [[partial, empty], [full, partial]], atol=1e-6)
    assert ax.images[0].get_extent() == [0, 64, 128, 0]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 60), (100, 0))
    assert "75% of the tiles visited\n1 full and 2 partial of 4, 64x32 each" in texts(figure)
    own, ax = plt.subplots()
    plot_mask(LONG, ax, resolution=32)  # reduced: colours mix
    assert ax.images[0].get_array().shape == (32, 32, 3)
    assert ax.images[0].get_extent() == [0, 32768, 32768, 0]
    np.testing.assert_allclose(ax.images[0].get_array()[0, -1], empty, atol=1e-6)
    np.testing.assert_allclose(ax.images[0].get_array()[-1, 0], full, atol=1e-6)
    assert ax.get_legend() is not None
    own.draw_without_rendering()


@pytest.mark.parametrize("kind", ["elements", "weights", "tiles", "full tiles"])
def test_few_columns_stay_to_be_seen(plt, kind):
    """64 keys among 32768 that all see, and 64 that nobody does: neither is averaged away, and the picture says so."""
    mask = np.zeros((8, 32768), bool)
    mask[:, :64] = mask[:, 16384:] = True
    mask[:, 20000:20064] = False
    tiles = np.zeros((1, 1, 1, 256), np.int8)
    tiles[..., 0], tiles[..., 128:], tiles[..., 156] = 2 if kind == "tiles" else 1, 1, 0
    drawn = {"elements": mask, "weights": np.where(mask, 0.5, 0)}.get(kind, Tiles(tiles, (1, 1, 128, 32768), 128, 128))
    figure = plot_mask(drawn, resolution=16 if "tiles" in kind else 100)
    (image,) = figure.axes[0].images
    shades = np.abs(image.get_array() - image.get_array()[0, 1]).reshape(-1, *image.get_array().shape[1:])[0]
    shades = shades if shades.ndim == 1 else shades.sum(-1)
    full = shades.max()
    assert shades[0] >= 0.249 * (full if kind != "tiles" else 0.5 * full)  # as far from what is blank
    if kind != "weights":
        assert (shades[len(shades) // 2 :] < 0.76 * full).any()
    assert "shaded a quarter at least" in texts(figure)
    assert all(spine.get_position() == ("outward", 2) for spine in figure.axes[0].spines.values())
    assert show(drawn).splitlines()[-2][1] == "░"


def test_as_many_cells_as_can_be_told_apart(plt):
    """Elements or tiles as they are while they are pixels, and then cells of two pixels."""
    for n, most in ((256, 256), (4096, 300)):
        (image,) = plot_mask(np.tri(n, dtype=bool)).axes[0].images
        assert image.get_array().shape[0] <= most
    assert image.get_array().shape[0] >= 100


def test_plot_weights(plt):
    weights = np.random.default_rng(0).random((1, 2, 1, 3000)).astype(np.float32)
    figure = plot_mask(Weights(weights), resolution=500)
    figure.draw_without_rendering()
    assert figure.axes[-1].get_ylabel() == "weight"  # a colour bar
    np.testing.assert_allclose(
        figure.axes[1].images[0].get_array(), weights[0, 1].reshape(1, 500, 6).mean(-1), rtol=1e-6
    )
    plot_mask(np.zeros((0, 3))).draw_without_rendering()


def test_matplotlib_is_optional(monkeypatch):
    """Without it everything but plot_mask works, and that says what is missing."""
    present = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return present(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"plot_mask needs matplotlib .*: pip install matplotlib"):
        plot_mask(TRIANGLE)
    assert show(TRIANGLE)
