"""Two dozen kinds of attention, each a line or two of JAX, beside its plain definition, checked against it.

    python examples/attention_gallery.py                           # the XLA path; writes the page and its pictures
    TRITON_INTERPRET=1 python examples/attention_gallery.py --implementation triton --block-ptr 1 --no-page

`attention_variants.py` has them. Values and the gradients of q, k, v and of every floating array that one reads are
compared; the script exits with 1 if one of them is off. On a GPU the same command runs the Triton kernels.
"""

import argparse
import inspect
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from attention_variants import VARIANTS, B, D, H, S, Variant
from tqdm import tqdm

from jax_flash_attn2 import Config, flash_attention

matplotlib.use("agg")
from matplotlib import pyplot as plt

PAGE = Path(__file__).with_name("attention_gallery")
TOLERANCE = 2e-5
"""Of the largest element: fp32 sums in another order."""


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
