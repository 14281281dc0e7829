"""The character-level Transformer of the training examples, in Flax NNX, and the text that they train it on.

The text is the language manual inside every CPython, `pydoc_data.topics`: half a million characters, nothing to
download.
"""

from pydoc_data.topics import topics

import jax.numpy as jnp
import numpy as np
from flax import nnx

ROPE = nnx.RoPE()  # rotary position embedding of queries and keys


class Block(nnx.Module):
    def __init__(self, width, heads, attention_fn, dtype, rngs):
        self.norm1 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, attention_fn=attention_fn, decode=False, use_bias=False,
            out_kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.norm2 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, vocabulary, args, attention_fn):
        rngs, dtype = nnx.Rngs(args.seed), jnp.dtype(args.dtype)
        self.here = nnx.Embed(vocabulary, args.width, dtype=dtype, rngs=rngs)
        self.before = nnx.Embed(vocabulary, args.width, dtype=dtype, rngs=rngs)
        blocks = [Block(args.width, args.heads, attention_fn, dtype, rngs) for _ in range(args.layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.RMSNorm(args.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(args.width, vocabulary, dtype=dtype, rngs=rngs)

    def __call__(self, tokens, before=None):  # [batch, length] -> [batch, length, vocabulary]
        if before is None:  # the character before each; seeing pairs of characters saves many steps
            before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        x = self.here(tokens) + self.before(before)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).astype(jnp.float32)


def load_text():
    """The text as character numbers, nine tenths to train on and one held out, and the characters."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    tokens = np.array([number[c] for c in text], np.int32)
    split = len(tokens) * 9 // 10
    return tokens[:split], tokens[split:], characters


def windows(tokens, starts, context):
    """A row per start: `context` characters and the one that follows."""
    return np.stack([tokens[start : start + context + 1] for start in starts])
