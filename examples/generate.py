"""Serve a small character-level Transformer: prefill, decoding with caches, and continuous batching over paged ones.

    python examples/generate.py

The model of `make demo` is trained for a few seconds, and then continues prompts of different lengths, each by as many
characters as it was asked for, always taking the likeliest. Four ways, timed by turns on the same machine:

    recompute  every step runs the whole text through the model
    jax.nn     keys and values are kept, padded to the longest: jax.nn.dot_product_attention(key_value_seq_lengths=...)
    dense      the same cache, with flash_attention(kv_lengths=...)
    paged      keys and values lie in pages. A prompt joins as soon as a place is free and leaves when it is done; a
               step takes one row of each sequence that decodes and chunks of prompts that are still being read, all in
               one call: write_pages and paged_attention with cu_q_lens

The first three start together and go on until the last prompt has all it wants. All must write the same text, character
for character; the script exits with 1 if they do not.
"""

import argparse
import collections
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from char_lm import ROPE, Transformer, load_text, windows
from flax import nnx
from tqdm import tqdm

from jax_flash_attn2 import flash_attention, masks, paged_attention, write_pages

ROTATE = jax.vmap(ROPE, (-2, None), -2)  # by the positions of tokens, the same for all heads
ROTATE_EACH = jax.vmap(ROTATE)  # and others in each row of a batch


class Attention:
    """For `nnx.MultiHeadAttention`: whatever the pass that is being traced wants done with queries, keys and values."""

    def __init__(self):
        self.attend = causal

    def __call__(self, query, key, value, **rest):  # the rest is of masks and dropout: there are none here
        return self.attend(query, key, value)


def causal(q, k, v):
    at = jnp.arange(q.shape[1], dtype=jnp.int32)
    return flash_attention(ROTATE(q, at), ROTATE(k, at), v, causal=True)


class Model:
    """The Transformer, apart from its weights."""

    def __init__(self, vocabulary, args):
        self.attention = Attention()
        self.graph, self.first = nnx.split(Transformer(vocabulary, args, self.attention), nnx.Param)
        self.layers, self.heads, self.width = args.layers, args.heads, args.width // args.heads

    def __call__(self, params, tokens, before=None, attend=causal):
        """Logits; attend: what each layer does."""
        self.attention.attend = attend
        return nnx.merge(self.graph, params)(tokens, before)


def train(model, tokens, args):
    """Weights after a few seconds."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.lr, b2=0.98))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(
            model(params, batch[:, :-1]), batch[:, 1:]
        ).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, rng = model.first, np.random.default_rng(args.seed)
    state = jax.jit(optimizer.init)(params)
    bar = tqdm(range(args.steps), desc="training", ncols=100, mininterval=0.2 if sys.stderr.isatty() else 15)
    for _ in bar:
        batch = windows(tokens, rng.integers(len(tokens) - args.context, size=args.batch), args.context)
        params, state, loss = step(params, state, batch)
        bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
    return params


# All prompts at once, padded: text [B, S], of which lengths [B] are known.


def put_next(text, lengths, logits):
    """The likeliest character after each row."""
    rows = jnp.arange(len(text), dtype=jnp.int32)
    return text.at[rows, lengths].set(logits.argmax(-1).astype(text.dtype), mode="drop"), lengths + 1


def together(prompts, counts, capacity):
    text = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(text), jnp.asarray([len(p) for p in prompts], jnp.int32), max(counts)


def written(text, prompts, counts):
    text = np.asarray(text)
    return [text[i, len(p) : len(p) + n].tolist() for i, (p, n) in enumerate(zip(prompts, counts, strict=True))]


def recomputing(model, params, args):
    @jax.jit
    def step(text, lengths):
        logits = model(params, text)
        return put_next(text, lengths, jnp.take_along_axis(logits, (lengths - 1)[:, None, None], 1)[:, 0])

    def generate(prompts, counts):
        text, lengths, steps = together(prompts, counts, args.capacity)
        for _ in range(steps):
            text, lengths = step(text, lengths)
        return written(text, prompts, counts)

    return generate


def with_dense_cache(model, params, args, attention):
    """attention(q, k, v, lengths): of one row each, over a cache of which lengths are in use."""

    @functools.partial(jax.jit, static_argnums=2)
    def prefill(text, lengths, longest):
        caches = []

        def attend(q, k, v):
            room = ((0, 0), (0, args.capacity - longest), (0, 0), (0, 0))
            at = jnp.arange(longest, dtype=jnp.int32)
            caches.append((jnp.pad(ROTATE(k, at), room), jnp.pad(v, room)))
            return causal(q, k, v)

        logits = model(params, text[:, :longest], attend=attend)
        return caches, *put_next(text, lengths, jnp.take_along_axis(logits, (lengths - 1)[:, None, None], 1)[:, 0])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(caches, text, lengths):
        old, new, rows = iter(caches), [], jnp.arange(len(text), dtype=jnp.int32)
        at = lengths - 1  # where the newest token stands

        def attend(q, k, v):
            put = lambda cache, x: cache.at[rows, at].set(x[:, 0], mode="drop")
            k_cache, v_cache = next(old)
            new.append((put(k_cache, ROTATE_EACH(k, at[:, None])), put(v_cache, v)))
            return attention(ROTATE_EACH(q, at[:, None]), *new[-1], lengths)

        newest, before = (jnp.take_along_axis(text, (lengths - n)[:, None], 1) for n in (1, 2))
        logits = model(params, newest, before, attend)
        return new, *put_next(text, lengths, logits[:, 0])

    def generate(prompts, counts):
        text, lengths, steps = together(prompts, counts, args.capacity)
        caches, text, lengths = prefill(text, lengths, max(map(len, prompts)))
        for _ in range(steps - 1):
            caches, text, lengths = step(caches, text, lengths)
        return written(text, prompts, counts)

    return generate


def by_flash(q, k, v, lengths):
    """The row stands where its sequence ends: positions make causality bottom-right in each, as in a chunk of rows."""
    at = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    where = {"q_positions": (lengths - 1)[:, None], "kv_positions": at, "kv_lengths": lengths}
    return flash_attention(q, k, v, causal=True, **where)


def by_jax_nn(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


# Prompts that join and leave.


class Sequence:
    """A prompt, what has been written after it, and its pages."""

    def __init__(self, number, prompt, count, pages):
        self.number, self.prompt, self.text, self.end = number, len(prompt), prompt.tolist(), len(prompt) + count
        self.pages, self.cached = pages, 0

    @property
    def reads(self):
        """Whether it has not come to the end of its prompt."""
        return self.cached < self.prompt


class Scheduler:
    """Who is in which slot, which pages are whose, and which tokens go into the next step."""

    def __init__(self, prompts, counts, args):
        self.waiting = collections.deque(enumerate(zip(prompts, counts, strict=True)))
        self.slots, self.done, self.args = [None] * args.slots, {}, args
        self.free = list(range(args.slots * args.pages))
        self.table = np.full((args.slots, args.pages), -1, np.int32)

    def join(self):
        """Whoever waits, while there are a slot and the pages that it may come to need."""
        for slot, it in enumerate(self.slots):
            if it is None and self.waiting:
                number, (prompt, count) = self.waiting[0]
                need = -(-(len(prompt) + count) // self.args.page_size)
                if need > len(self.free):
                    return
                self.waiting.popleft()
                self.slots[slot] = Sequence(number, prompt, count, [self.free.pop() for _ in range(need)])
                self.table[slot, :need] = self.slots[slot].pages

    def batch(self):
        """The tokens of the next step and those before them `[2, T]`, where each slot's begin, and how many are cached:
        one of each that decodes, and of those that read what fits into the chunk."""
        rows, budget = np.zeros(len(self.slots) + 1, np.int32), self.args.chunk
        lengths = np.zeros(len(self.slots), np.int32)
        tokens = []
        for slot, it in enumerate(self.slots):
            if it is None:
                continue
            rows[slot + 1] = n = min(it.prompt - it.cached, budget) if it.reads else 1
            budget -= n if it.reads else 0
            tokens += zip(it.text[it.cached : it.cached + n], [0, *it.text][it.cached :], strict=False)
            it.cached += n
            lengths[slot] = it.cached
        # Two programs: with room for a chunk, and without.
        size = len(self.slots) + (self.args.chunk if len(tokens) > len(self.slots) else 0)
        padded = np.zeros((2, size), np.int32)
        padded[:, : len(tokens)] = np.transpose(tokens)
        return padded, np.cumsum(rows, dtype=np.int32), lengths

    def take(self, following):
        """What the step says comes next in each slot. Who is done leaves, and frees the pages."""
        for slot, it in enumerate(self.slots):
            if it is None or it.reads:
                continue
            it.text.append(int(following[slot]))
            if len(it.text) == it.end:
                self.done[it.number] = it.text[it.prompt :]
                self.free += it.pages
                self.table[slot], self.slots[slot] = -1, None

    @property
    def busy(self):
        return bool(self.waiting) or any(self.slots)


def with_pages(model, params, args):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(caches, tokens, before, cu_q_lens, page_table, lengths):
        """tokens [T], those of one slot behind those of another: what comes next in each, `[slots]`."""
        old, new = iter(caches), []
        rows = jnp.diff(cu_q_lens)
        ids = masks.segment_ids(rows, len(tokens))
        at = masks.positions(rows, len(tokens)) + (lengths - rows)[ids]
        where = {"page_table": page_table, "lengths": lengths, "cu_q_lens": cu_q_lens}

        def attend(q, k, v):
            new.append(write_pages(*next(old), ROTATE(k, at)[0], v[0], **where))
            return paged_attention(ROTATE(q, at)[0], *new[-1], **where)[None]

        logits = model(params, tokens[None], before[None], attend)[0]
        return new, logits[cu_q_lens[1:] - 1].argmax(-1)

    def generate(prompts, counts):
        shape = args.slots * args.pages, args.page_size, model.heads, model.width
        caches = [tuple(jnp.zeros(shape, args.dtype) for _ in "kv") for _ in range(model.layers)]
        them = Scheduler(prompts, counts, args)
        while them.busy:
            them.join()
            (tokens, before), starts, lengths = them.batch()
            caches, following = step(caches, tokens, before, starts, them.table.copy(), lengths)
            them.take(np.asarray(following))
        return [them.done[i] for i in range(len(prompts))]

    return generate


def drawn(tokens, args):
    """Prompts of the held-out text, of many lengths, and how much each is to be continued."""
    rng = np.random.default_rng(args.seed)
    lengths = rng.integers(2, args.longest + 1, args.prompts)
    counts = rng.integers(args.new // 4, args.new + 1, args.prompts)
    return [windows(tokens, [rng.integers(len(tokens) - n)], n - 1)[0] for n in lengths], counts.tolist()


def measure(ways, prompts, counts, args):
    """Texts by each way, and the characters per second of each round: all take turns."""
    texts, speeds = {}, {name: [] for name in ways}
    often = 0.2 if sys.stderr.isatty() else 15
    bar = tqdm(total=len(ways) * (args.rounds + 1), desc="generating", ncols=100, mininterval=often)
    for turn in range(args.rounds + 1):
        for name, generate in ways.items():
            bar.set_postfix_str(name)
            began = time.perf_counter()
            texts[name] = generate(prompts, counts)
            if turn:  # the first compiles
                speeds[name].append(sum(counts) / (time.perf_counter() - began))
            bar.update()
    bar.close()
    return texts, speeds


def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--prompts", type=int, default=6, help="how many")
    option("--longest", type=int, default=128, help="characters of a prompt, at most")
    option("--new", type=int, default=64, help="characters to write after one, at most")
    option("--slots", type=int, default=3, help="sequences that the paged cache holds at once")
    option("--page-size", type=int, default=16, help="tokens of a page: a power of two from 16 to 256")
    option("--chunk", type=int, default=32, help="rows of a step that prompts may have")
    option("--rounds", type=int, default=2, help="timed, by turns")
    option("--steps", type=int, default=100, help="of training")
    option("--context", type=int, default=256, help="characters of a training example")
    option("--width", type=int, default=128)
    option("--layers", type=int, default=2)
    option("--heads", type=int, default=4)
    option("--batch", type=int, default=4)
    option("--lr", type=float, default=4e-3)
    option("--dtype", default="float32")
    option("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.capacity = args.longest + args.new  # tokens of the longest text
    args.pages = -(-args.capacity // args.page_size)
    return args


def main(argv=None):
    args = parsed(argv)
    jax.config.update("jax_default_matmul_precision", "float32")  # else a GPU multiplies in TF32, each way its own
    tokens, held_out, characters = load_text()
    model = Model(len(characters), args)
    params = train(model, tokens, args)
    prompts, counts = drawn(held_out, args)
    ways = {
        "recompute": recomputing(model, params, args),
        "jax.nn": with_dense_cache(model, params, args, by_jax_nn),
        "dense": with_dense_cache(model, params, args, by_flash),
        "paged": with_pages(model, params, args),
    }
    texts, speeds = measure(ways, prompts, counts, args)

    print(f"\n{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} characters, continued by")
    print(f"{min(counts)} to {max(counts)} each; {args.dtype}, on {jax.devices()[0]}:\n")
    agree = True
    for name, speed in speeds.items():
        same = sum(a == b for a, b in zip(texts[name], texts["recompute"], strict=True))
        agree &= same == len(prompts)
        verdict = f"{same} of {len(prompts)} texts equal to recomputation's"
        print(f"  {name:10} {statistics.median(speed):8.0f} characters/s   {verdict}")
    show = lambda numbers: "".join(characters[i] for i in numbers)
    most = counts.index(max(counts))
    print(f"\n{show(prompts[most])[-40:]!r} goes on {show(texts['paged'][most])!r}")
    if not agree:
        print("\nTexts DIFFER.")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
