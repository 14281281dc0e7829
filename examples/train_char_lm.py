"""Train a small character-level Transformer twice: with flash attention and with Flax's own.

    python examples/train_char_lm.py            # or, from a fresh checkout: make demo

The text is the language manual inside every CPython, `pydoc_data.topics`: half a million characters, nothing
to download. The model is Flax NNX, its attention `nnx.MultiHeadAttention(attention_fn=...)`, and the two runs
differ in that argument alone: same initial weights, same batches, a step each in turn on the same machine. So
the loss curves must agree, and the script exits with 1 if they do not; what may differ is the time and the
memory of a step, which it prints and plots. On a GPU the same command runs the Triton kernels.
"""

import argparse
import dataclasses
import functools
import os
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from char_lm import ROPE, Transformer, load_text, windows
from flax import nnx
from matplotlib import pyplot as plt
from tqdm import tqdm

from jax_flash_attn2.flax import make_attention_fn

# How far apart the curves may be at any step, in nats per character. Flash attention against itself, from
# weights moved by one rounding, ends 2e-6 apart in fp32 and 1.5e-2 in bf16. Flaws put in on purpose (fp32):
# 1% of the gradient of k lost, 1.5e-3; a softmax scale 1% off, 1e-2; one key of 1024 not seen, 6e-2.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

ATTENTION = {
    "flash": make_attention_fn(rope=ROPE),
    "flax": functools.partial(nnx.dot_product_attention_with_rope, rope=ROPE),
}
TITLE = {"flash": "flash_attention", "flax": "Flax attention"}
COLOR = {"flash": "#d95f02", "flax": "#386cb0"}


@dataclasses.dataclass
class Run:
    """A model in training: what it is, its state, and what was measured."""

    model: nnx.GraphDef
    loss: jax.stages.Wrapped
    step: jax.stages.Compiled
    compile_s: float
    params: nnx.State
    opt_state: optax.OptState
    losses: list[float] = dataclasses.field(default_factory=list)
    step_ms: list[float] = dataclasses.field(default_factory=list)
    held_out: float = float("nan")

    @property
    def memory_mib(self):
        """What a step needs at its peak beyond weights, optimizer state and batch."""
        return self.step.memory_analysis().temp_size_in_bytes / 2**20


def start(name, vocabulary, args):
    """Build a model and compile its training step."""
    model, params = nnx.split(Transformer(vocabulary, args, ATTENTION[name]), nnx.Param)
    rate = optax.warmup_cosine_decay_schedule(0, args.lr, args.steps // 10, max(args.steps, 2), args.lr / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    def loss(params, batch):
        logits = nnx.merge(model, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = jax.jit(optimizer.init)(params)
    batch = jax.ShapeDtypeStruct((args.batch, args.context + 1), jnp.int32)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, batch).compile()
    return Run(model, jax.jit(loss), compiled, time.perf_counter() - began, params, opt_state)


def train(runs, tokens, args):
    """The same batches for every run, a step each in turn, so that their times can be compared."""
    rng = np.random.default_rng(args.seed)
    often = 0.2 if sys.stderr.isatty() else 15
    bars = {name: tqdm(total=args.steps, desc=f"{TITLE[name]:>15}", ncols=100, mininterval=often) for name in runs}
    for i in range(args.steps):
        batch = windows(tokens, rng.integers(len(tokens) - args.context, size=args.batch), args.context)
        for name in list(runs)[:: 1 if i % 2 else -1]:
            run = runs[name]
            began = time.perf_counter()
            run.params, run.opt_state, loss = run.step(run.params, run.opt_state, batch)
            run.losses.append(float(loss))  # waits for the step
            run.step_ms.append((time.perf_counter() - began) * 1e3)
            bars[name].set_postfix_str(f"loss {run.losses[-1]:.3f}, {run.step_ms[-1]:.0f} ms/step", refresh=False)
            bars[name].update()
    for bar in bars.values():
        bar.close()


def write(run, characters, prompt, count, seed):
    """Let the model continue `prompt` by `count` characters."""

    @jax.jit
    def generate(params, text, key):
        def put_next(i, text):
            logits = nnx.merge(run.model, params)(text[None])[0, i - 1]
            return text.at[i].set(jax.random.categorical(jax.random.fold_in(key, i), logits / 0.7))

        return jax.lax.fori_loop(len(prompt), len(text), put_next, text)

    text = jnp.array([characters.index(c) for c in prompt] + [0] * count)
    return "".join(characters[i] for i in generate(run.params, text, jax.random.key(seed)))


def percentiles(values):
    """p20, median and p80, without the first tenth, in which caches and clocks settle."""
    return np.percentile(values[len(values) // 10 :], [20, 50, 80])


def print_table(runs):
    rows = {
        "training loss, last 10 steps (nats/char)": lambda run: f"{np.mean(run.losses[-10:]):.4f}",
        "held-out loss (nats/char)": lambda run: f"{run.held_out:.4f}",
        "step time, median (ms)": lambda run: "{1:.1f}".format(*percentiles(run.step_ms)),
        "step time, p20 to p80 (ms)": lambda run: "{0:.1f} to {2:.1f}".format(*percentiles(run.step_ms)),
        "temporary memory of a step (MiB)": lambda run: f"{run.memory_mib:.0f}",
        "tracing and compiling the step (s)": lambda run: f"{run.compile_s:.1f}",
    }
    print(f"\n{'':40}" + "".join(f"{TITLE[name]:>18}" for name in runs))
    for label, cell in rows.items():
        print(f"{label:40}" + "".join(f"{cell(run):>18}" for run in runs.values()))


def compare(flash, flax, args):
    """Print how the two runs compare; True if they agree."""
    low, median, high = percentiles(np.divide(flax.step_ms, flash.step_ms))
    curves = np.abs(np.subtract(flash.losses, flax.losses))
    agree = bool(curves.max() <= TOLERANCE[args.dtype])
    print(
        f"\nFlax attention takes {median:.2f} times as long per step (p20 to p80: {low:.2f} to {high:.2f})\n"
        f"and {flax.memory_mib / flash.memory_mib:.1f} times the temporary memory. The loss curves "
        f"{'agree' if agree else 'DISAGREE'}:\nlargest difference {curves.max():.1e} nats, at step "
        f"{curves.argmax() + 1}; tolerance {TOLERANCE[args.dtype]:g}."
    )
    return agree


def plot(runs, args):
    device = jax.devices()[0]
    machine = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, (curves, times, memory) = plt.subplots(
        ncols=3, figsize=(11, 4), width_ratios=[2.2, 1, 1], layout="constrained"
    )
    for (name, run), width in zip(runs.items(), (5, 1.2), strict=False):  # the second drawn upon the first
        color = COLOR[name]
        curves.plot(run.losses, color=color, label=TITLE[name], lw=width, alpha=0.5 if width > 2 else 1)
        low, median, high = percentiles(run.step_ms)
        bars = times.bar(name, median, 0.6, yerr=[[median - low], [high - median]], color=color, capsize=6)
        times.bar_label(bars, [f"{median:.3g}"], label_type="center", color="white", weight="bold")
        bars = memory.bar(name, run.memory_mib, 0.6, color=color)
        memory.bar_label(bars, fmt="{:.0f}", label_type="center", color="white", weight="bold")
    curves.set(title="Training loss", xlabel="step", ylabel="nats per character")
    curves.legend()
    times.set(title="Time of a step", ylabel="ms (median; whiskers: p20 to p80)")
    memory.set(title="Temporary memory", ylabel="MiB")
    figure.suptitle(
        f"One Transformer, two attentions: {args.layers} layers, width {args.width}, {args.heads} heads, "
        f"context {args.context}, batch {args.batch}, {args.dtype}; {machine}, jax {jax.__version__}"
    )
    figure.savefig(args.plot, dpi=150)
    print(f"\nPlot: {args.plot}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--attention", choices=["flash", "flax", "both"], default="both")
    option("--steps", type=int, default=240)
    option("--context", type=int, default=1024, help="how many characters the model sees")
    option("--width", type=int, default=128)
    option("--layers", type=int, default=2)
    option("--heads", type=int, default=4)
    option("--batch", type=int, default=2)
    option("--lr", type=float, default=4e-3, help="highest learning rate")
    option("--dtype", choices=list(TOLERANCE), default="float32", help="of the computation")
    option("--seed", type=int, default=0)
    option("--plot", type=Path, default=Path(__file__).with_suffix(".png"), metavar="FILE")
    args = parser.parse_args()
    matplotlib.use("Agg")
    jax.config.update("jax_default_matmul_precision", "float32")  # else a GPU multiplies in TF32, each its own way

    tokens, held_out, characters = load_text()
    names = list(ATTENTION) if args.attention == "both" else [args.attention]
    runs = {name: start(name, len(characters), args) for name in names}
    size = sum(x.size for x in jax.tree.leaves(runs[names[0]].params))
    print(f"{len(tokens):,} characters of text, {size:,} weights, context {args.context}, on {jax.devices()[0]}")
    train(runs, tokens, args)

    test = windows(held_out, range(0, len(held_out) - args.context, args.context)[:8], args.context)
    for run in runs.values():
        run.held_out = float(run.loss(run.params, test))
    print_table(runs)
    agree = compare(runs["flash"], runs["flax"], args) if len(runs) == 2 else True
    prompt = "When a function is called, "
    print(f"\nThe {names[0]} model writes, given {prompt!r}:")
    print(textwrap.indent(write(runs[names[0]], characters, prompt, 230, args.seed), "  | ", lambda line: True))
    plot(runs, args)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
