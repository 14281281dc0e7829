"""Two dozen kinds of attention, each a line or two of JAX, beside its plain definition, checked against it.

    python examples/attention_gallery.py                           # the XLA path; writes the page and its pictures
    TRITON_INTERPRET=1 python examples/attention_gallery.py --implementation triton --block-ptr 1 --no-page

A variant says what `flash_attention` is given (`ours`), and what it means on the whole `[B, H, Sq, Sk]` of logits
(`plain`). Values and the gradients of q, k, v and of every floating array that it reads are compared; the script exits
with 1 if one of them is off. On a GPU the same command runs the Triton kernels.
"""

import argparse
import dataclasses
import inspect
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

from jax_flash_attn2 import Config, flash_attention

matplotlib.use("agg")
from matplotlib import pyplot as plt

B, S, H, D = 2, 64, 4, 16
SIDE = 8
"""S tokens as an image of SIDE by SIDE."""
I, J = jnp.arange(S)[:, None], jnp.arange(S)[None, :]
"""Rows and keys of the plain definitions."""
PAGE = Path(__file__).with_name("attention_gallery")
TOLERANCE = 2e-5
"""Of the largest element: fp32 sums in another order."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of attention."""

    ours: Callable[[dict[str, Any]], dict[str, Any]]
    """Of its arrays, the options of `flash_attention`."""
    plain: Callable[[Any, dict[str, Any]], Any]
    """Of scaled products `[B, H, S, S]` and its arrays, the logits; -inf hides."""
    arrays: Callable[[np.random.Generator], dict[str, Any]] = lambda rng: {}
    """What it reads."""


def hide(s, seen):
    """Logits, -inf where nothing is seen."""
    return jnp.where(seen, s, -jnp.inf)


# Masks: functions of (b, h, i, j). Tiles that are empty are never visited.


def causal():
    """Each token sees itself and those before it."""
    return Variant(
        ours=lambda x: {"causal": True},
        plain=lambda s, x: hide(s, J <= I),
    )


def sliding_window():
    """Each token sees the 15 before it."""
    return Variant(
        ours=lambda x: {"window_size": (15, 0)},
        plain=lambda s, x: hide(s, (J <= I) & (I - J <= 15)),
    )


def prefix_lm():
    """A prompt sees all of itself, what follows is causal; each batch has a prompt of its own length."""
    return Variant(
        arrays=lambda rng: {"prompt": rng.integers(8, 32, B)},
        ours=lambda x: {"mask": lambda b, h, i, j: (j <= i) | (j < x["prompt"][b])},
        plain=lambda s, x: hide(s, (J <= I) | (x["prompt"][:, None, None, None] > J)),
    )


def documents():
    """Tokens of several documents in one row: each sees its own."""
    return Variant(
        arrays=lambda rng: {"id": np.sort(rng.integers(0, 4, (B, S)), 1)},
        ours=lambda x: {"q_segment_ids": x["id"]},
        plain=lambda s, x: hide(s, (x["id"][:, :, None] == x["id"][:, None, :])[:, None]),
    )


def causal_documents():
    """The same, as a function that reads the ids, and causal."""
    return Variant(
        arrays=lambda rng: {"id": np.sort(rng.integers(0, 4, (B, S)), 1)},
        ours=lambda x: {"mask": lambda b, h, i, j: (x["id"][b, i] == x["id"][b, j]) & (j <= i)},
        plain=lambda s, x: hide(s, ((x["id"][:, :, None] == x["id"][:, None, :]) & (J <= I))[:, None]),
    )


def dilated_window():
    """Every fourth token of the last 32."""
    return Variant(
        ours=lambda x: {"mask": lambda b, h, i, j: (j <= i) & (i - j < 32) & ((i - j) % 4 == 0)},
        plain=lambda s, x: hide(s, (J <= I) & (I - J < 32) & ((I - J) % 4 == 0)),
    )


def dilated_by_head():
    """Each head looks back in steps of its own (LongNet)."""
    return Variant(
        ours=lambda x: {"mask": lambda b, h, i, j: (j <= i) & ((i - j) % (1 << h) == 0)},
        plain=lambda s, x: hide(s, (J <= I) & ((I - J) % (1 << jnp.arange(H))[:, None, None] == 0)),
    )


def neighbourhood():
    """An image: each pixel sees those at most two rows and columns away (NATTEN)."""

    def near(i, j):
        return (abs(i // SIDE - j // SIDE) <= 2) & (abs(i % SIDE - j % SIDE) <= 2)

    return Variant(ours=lambda x: {"mask": lambda b, h, i, j: near(i, j)}, plain=lambda s, x: hide(s, near(I, J)))


def image_tiles():
    """An image in tiles of four by four: each pixel sees its tile (Swin)."""

    def tile(i):
        return i // SIDE // 4 * (SIDE // 4) + i % SIDE // 4

    return Variant(
        ours=lambda x: {"mask": lambda b, h, i, j: tile(i) == tile(j)}, plain=lambda s, x: hide(s, tile(I) == tile(J))
    )


def tree():
    """A tree of drafts (speculative decoding): each node sees the way from the root to it. `first` and `after` number
    a node's descendants in a walk through the tree."""

    def walk(rng):
        parent = [0] + [int(rng.integers(max(0, n - 6), n)) for n in range(1, S)]
        below = [[n for n in range(1, S) if parent[n] == p] for p in range(S)]
        first, after, clock = [0] * S, [0] * S, 0

        def visit(n):
            nonlocal clock
            first[n], clock = clock, clock + 1
            for child in below[n]:
                visit(child)
            after[n] = clock

        visit(0)
        return {"first": np.asarray(first), "after": np.asarray(after)}

    def above(first, after, i, j):
        return (first[j] <= first[i]) & (first[i] < after[j])

    return Variant(
        arrays=walk,
        ours=lambda x: {"mask": lambda b, h, i, j: above(x["first"], x["after"], i, j)},
        plain=lambda s, x: hide(s, above(x["first"], x["after"], I, J)),
    )


def images_in_text():
    """Keys are images of 16 tokens; each word sees the last image before it (Flamingo)."""
    return Variant(
        arrays=lambda rng: {"image": np.sort(rng.integers(0, 4, (B, S)), 1)},
        ours=lambda x: {"mask": lambda b, h, i, j: x["image"][b, i] == j // 16},
        plain=lambda s, x: hide(s, (x["image"][:, :, None] == J // 16)[:, None]),
    )


def text_and_images():
    """Text is causal, the pixels of an image see each other (Transfusion). `image` is 0 in text."""

    def seen(image_i, image_j, i, j):
        return (j <= i) | ((image_i == image_j) & (image_i > 0))

    return Variant(
        arrays=lambda rng: {"image": np.repeat(np.array([[0, 1, 0, 2], [1, 0, 2, 3]]), S // 4, 1)},
        ours=lambda x: {"mask": lambda b, h, i, j: seen(x["image"][b, i], x["image"][b, j], i, j)},
        plain=lambda s, x: hide(s, seen(x["image"][:, :, None], x["image"][:, None, :], I, J)[:, None]),
    )


def global_and_local():
    """A window, and four tokens that all see and that see all (Longformer, BigBird)."""
    seen = lambda i, j: (abs(i - j) <= 6) | (i < 4) | (j < 4)
    return Variant(ours=lambda x: {"mask": lambda b, h, i, j: seen(i, j)}, plain=lambda s, x: hide(s, seen(I, J)))


# Scores: functions of (score, b, h, i, j). The arrays that they read have gradients.


def alibi():
    """Less for what is further away, in each head by its own slope (ALiBi); the slopes are learned here."""
    return Variant(
        arrays=lambda rng: {"slope": np.float32(0.5) ** np.arange(1, H + 1, dtype=np.float32)},
        ours=lambda x: {"score_mod": lambda score, b, h, i, j: score - x["slope"][h] * jnp.abs(i - j)},
        plain=lambda s, x: s - x["slope"][:, None, None] * jnp.abs(I - J),
    )


def soft_cap():
    """Logits stay within 2 (Gemma 2)."""
    return Variant(
        ours=lambda x: {"score_mod": lambda score, b, h, i, j: 2 * jnp.tanh(score / 2)},
        plain=lambda s, x: 2 * jnp.tanh(s / 2),
    )


def soft_cap_approximately():
    """The same by a quotient of polynomials, which takes no exponential."""

    def roughly_tanh(y):
        y = jnp.clip(y, -3, 3)
        return y * (27 + y * y) / (27 + 9 * y * y)

    return Variant(
        ours=lambda x: {"score_mod": lambda score, b, h, i, j: 2 * roughly_tanh(score / 2)},
        plain=lambda s, x: 2 * roughly_tanh(s / 2),
    )


def relative_table():
    """A learned number for each distance up to 16, in each head (Shaw et al.)."""
    return Variant(
        arrays=lambda rng: {"table": rng.standard_normal((H, 33), np.float32)},
        ours=lambda x: {"score_mod": lambda s, b, h, i, j: s + x["table"][h, jnp.clip(i - j, -16, 16) + 16]},
        plain=lambda s, x: s + x["table"][:, jnp.clip(I - J, -16, 16) + 16],
    )


def t5_buckets():
    """A learned number for each of 32 buckets of distances, wider the further away (T5)."""

    def bucket(ahead):
        far = 8 + (jnp.log(jnp.maximum(jnp.abs(ahead), 1) / 8) / np.log(128 / 8) * 8).astype(jnp.int32)
        return jnp.where(ahead > 0, 16, 0) + jnp.where(jnp.abs(ahead) < 8, jnp.abs(ahead), jnp.minimum(far, 15))

    return Variant(
        arrays=lambda rng: {"table": rng.standard_normal((32, H), np.float32)},
        ours=lambda x: {"score_mod": lambda score, b, h, i, j: score + x["table"][bucket(j - i), h]},
        plain=lambda s, x: s + x["table"][bucket(J - I)].transpose(2, 0, 1),
    )


def table_of_two_dimensions():
    """A learned number for each distance in rows and columns of an image, in each head (Swin)."""

    def offset(i, j):
        return i // SIDE - j // SIDE + SIDE - 1, i % SIDE - j % SIDE + SIDE - 1

    def indexed(table, h, i, j):
        down, right = offset(i, j)
        return table[h, down, right]

    return Variant(
        arrays=lambda rng: {"table": rng.standard_normal((H, 2 * SIDE - 1, 2 * SIDE - 1), np.float32)},
        ours=lambda x: {"score_mod": lambda score, b, h, i, j: score + indexed(x["table"], h, i, j)},
        plain=lambda s, x: s + indexed(x["table"], slice(None), I, J),
    )


def temperature_by_head():
    """Each head has a learned temperature."""
    return Variant(
        arrays=lambda rng: {"log_t": rng.standard_normal(H, np.float32) / 2},
        ours=lambda x: {"score_mod": lambda score, b, h, i, j: score * jnp.exp(-x["log_t"])[h]},
        plain=lambda s, x: s * jnp.exp(-x["log_t"])[:, None, None],
    )


def logarithmic_penalty():
    """Less for what is further away, by a logarithm with learned weight and reach (KERPLE)."""
    return Variant(
        arrays=lambda rng: {"r": rng.uniform(0.5, 2, (2, H)).astype(np.float32)},
        ours=lambda x: {
            "causal": True,
            "score_mod": lambda score, b, h, i, j: score - x["r"][0, h] * jnp.log1p(x["r"][1, h] * (i - j)),
        },
        plain=lambda s, x: hide(
            s - x["r"][0, :, None, None] * jnp.log1p(x["r"][1, :, None, None] * abs(I - J)), J <= I
        ),
    )


def forgetting():
    """Each token says how much of what was before it is forgotten: sums of learned gates (Forgetting Transformer)."""
    return Variant(
        arrays=lambda rng: {"gate": rng.standard_normal((B, H, S), np.float32)},
        ours=lambda x: (
            lambda kept: {
                "causal": True,
                "score_mod": lambda score, b, h, i, j: score + kept[b, h, i] - kept[b, h, j],
            }
        )(jnp.cumsum(jax.nn.log_sigmoid(x["gate"]), -1)),
        plain=lambda s, x: (
            lambda kept: hide(s + kept[..., :, None] - kept[..., None, :], J <= I)
        )(jnp.cumsum(jax.nn.log_sigmoid(x["gate"]), -1)),
    )  # fmt: skip


def capped_window():
    """A soft cap, a table and a window at once, between documents: options and functions combine."""
    return Variant(
        arrays=lambda rng: {
            "table": rng.standard_normal((H, 16), np.float32), "id": np.sort(rng.integers(0, 3, (B, S)), 1),
        },
        ours=lambda x: {
            "window_size": (15, 0), "q_segment_ids": x["id"], "logits_soft_cap": 3.0,
            "score_mod": lambda score, b, h, i, j: score + x["table"][h, jnp.clip(i - j, 0, 15)],
        },
        plain=lambda s, x: hide(
            3 * jnp.tanh((s + x["table"][:, jnp.clip(I - J, 0, 15)]) / 3),
            (J <= I) & (I - J <= 15) & (x["id"][:, :, None] == x["id"][:, None, :])[:, None],
        ),
    )  # fmt: skip


VARIANTS = (
    *(causal, sliding_window, prefix_lm, documents, causal_documents, dilated_window, dilated_by_head, neighbourhood),
    *(image_tiles, tree, images_in_text, text_and_images, global_and_local, alibi, soft_cap, soft_cap_approximately),
    *(relative_table, t5_buckets, table_of_two_dimensions, temperature_by_head, logarithmic_penalty, forgetting),
    *(capped_window,),
)


# What is done with them.


def inputs(variant: Variant):
    """q, k, v, a cotangent, and the variant's arrays: floating ones, and others."""
    rng = np.random.default_rng(0)
    qkvw = [jnp.asarray(rng.standard_normal((B, S, H, D), np.float32)) for _ in range(4)]
    arrays = {name: jnp.asarray(x) for name, x in variant.arrays(rng).items()}
    floats = {name: x for name, x in arrays.items() if x.dtype == jnp.float32}
    return qkvw, floats, {name: x for name, x in arrays.items() if name not in floats}


def attend_plainly(variant: Variant, q, k, v, arrays):
    """By definition, with all logits at once."""
    s = variant.plain(jnp.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5, arrays)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.broadcast_to(s, (B, H, S, S))), v)


def results(attend, variant: Variant):
    """o and all gradients."""
    (q, k, v, w), floats, others = inputs(variant)

    def loss(q, k, v, floats):
        o = attend(q, k, v, floats | others)
        return (o * w).sum(), o

    grads, o = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, floats)
    return o, grads


def check(variant: Variant, **options) -> float:
    """The largest error of a value or gradient, in parts of its largest element."""
    ours = lambda q, k, v, x: flash_attention(q, k, v, **variant.ours(x), **options)
    got, want = (results(f, variant) for f in (ours, lambda *args: attend_plainly(variant, *args)))
    pairs = zip(*map(jax.tree.leaves, (got, want)), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3)) for a, b in pairs)


def draw(variant: Variant, title: str, path: Path) -> None:
    """The logits that each head makes of scores of 0, hidden ones grey; where no place differs from another, what it
    makes of scores from -4 to 4."""
    _, floats, others = inputs(variant)
    made = lambda s: np.asarray(
        jnp.broadcast_to(variant.plain(jnp.full((B, H, S, S), s), floats | others)[0], (H, S, S))
    )
    logits = made(0.0)
    heads = range(1 if np.array_equal(logits, np.broadcast_to(logits[0], logits.shape)) else H)
    if np.ptp(logits) == 0:
        scores = np.linspace(-4, 4, 41, dtype=np.float32)
        curves = np.stack([made(s)[:, 0, 0] for s in scores], 1)
        figure, ax = plt.subplots(figsize=(2.6, 2.6))
        for h, curve in enumerate(curves[: 1 if np.ptp(curves, 0).max() == 0 else H]):
            ax.plot(scores, curve, label=f"head {h}")
        ax.set(xlabel="score", ylabel="logit", xlim=(-4, 4), ylim=(-5, 5))
        if len(ax.lines) > 1:
            ax.legend(fontsize=6, frameon=False)
    else:
        figure, axes = plt.subplots(1, len(heads), figsize=(2.4 * len(heads) + 0.2, 2.6), squeeze=False)
        shown = np.ma.masked_invalid(logits)
        for h, ax in zip(heads, axes[0], strict=True):
            ax.set_facecolor("#e8e8e8")
            ax.imshow(shown[h], cmap="viridis", vmin=min(shown.min(), -1e-3), vmax=shown.max(), interpolation="nearest")
            ax.set(xlabel="key", ylabel="row" if h == heads[0] else None, xticks=(0, 32, 63), yticks=(0, 32, 63))
            ax.set_title(f"head {h}" if len(heads) > 1 else "", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=64)
    plt.close(figure)


def write_page(errors: dict[str, float], how: str) -> None:
    """The page: each variant's text, code and picture."""
    PAGE.mkdir(exist_ok=True)
    lines = ["# A gallery of attention", "", f"Made by `examples/attention_gallery.py`, which checked each: {how}.", ""]
    for make in VARIANTS:
        title = make.__name__.replace("_", " ")
        draw(make(), title, PAGE / f"{make.__name__}.png")
        code = textwrap.dedent(inspect.getsource(make))
        lines += [f"## {title}", "", f"![{title}]({make.__name__}.png)", "", "```python", code.rstrip(), "```", ""]
        lines += [f"Largest error of a value or gradient: {errors[make.__name__]:.1e} of its largest element.", ""]
    (PAGE / "README.md").write_text("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=("xla", "triton"), help="default: what this machine runs")
    parser.add_argument("--block-ptr", type=int, choices=(0, 1), help="tensor descriptors, or pointers (triton)")
    parser.add_argument("--only", help="the variants whose names contain this")
    parser.add_argument("--no-page", action="store_true", help="check only")
    args = parser.parse_args()
    options: dict[str, Any] = {"implementation": args.implementation, "config": Config(block_m=32, block_n=32)}
    if args.block_ptr is not None:
        options["block_ptr"] = bool(args.block_ptr)
    errors, chosen = {}, [make for make in VARIANTS if (args.only or "") in make.__name__]
    for make in tqdm(chosen, unit="variant", disable=None):
        began = time.perf_counter()
        errors[make.__name__] = check(make(), **options)
        took, off = time.perf_counter() - began, "" if errors[make.__name__] <= TOLERANCE else "  OFF"
        tqdm.write(f"{make.__name__:24} error {errors[make.__name__]:.1e}  {took:5.1f} s{off}")
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]
    print(f"{len(errors)} variants, {len(wrong)} off by more than {TOLERANCE}")
    if not args.no_page and not args.only:
        write_page(errors, f"values and all gradients, {args.implementation or jax.default_backend()}")
        print(f"wrote {PAGE / 'README.md'}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
