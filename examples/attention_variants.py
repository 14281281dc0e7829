"""Two dozen kinds of attention, each a line or two of JAX, beside its plain definition (`attention_gallery.py`).

A variant says what `flash_attention` is given (`ours`), and what it means on the whole `[B, H, Sq, Sk]` of logits
(`plain`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

B, S, H, D = 2, 64, 4, 16
SIDE = 8
"""S tokens as an image of SIDE by SIDE."""
I, J = jnp.arange(S)[:, None], jnp.arange(S)[None, :]
"""Rows and keys of the plain definitions."""


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
