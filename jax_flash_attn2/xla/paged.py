"""Keys and values that lie in pages: sequence by sequence, some pages at a time.

Here the rows of all sequences lie behind one another. A sequence is cut into blocks of rows: of one row where it has
but one (decoding), else of a few or of many (a prompt), each size with code of its own. A block goes through the pages
that its rows see, and no others, a tile of keys at a time: these are gathered, widened, and 0 where the sequence has no
keys. Nothing that is done for a block depends on other sequences: one has the same bits in any company.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..base.arguments import accumulator
from ..base.config import Config
from ..base.operands import SERVED, for_every_batch
from ..base.spec import Spec, sequences
from ..tiles import ragged
from . import cached, layout, online
from .logits import HIDDEN, Logits
from .tiling import Tiling

BLOCKS = 1, 16, 64
"""Rows of a block: a sequence is cut by the first of these that holds all its rows, or by the last (or `block_m`)."""
_TILE = 2**18
"""As many numbers are gathered at a time: so few that they stay near their core."""


def forward(
    spec: Spec, config: Config, q: Array, k: Array, v: Array, operands: Mapping[str, Array]
) -> tuple[Array | None, ...]:
    """`forward.forward` of a paged cache. Who wants m and l gets lse and 1."""
    batch, rows, most = sequences(q, operands), q.shape[0] * q.shape[1], q.shape[1]
    if "cu_q_lens" in operands:
        starts, sizes = operands["cu_q_lens"].ravel(), [m for m in BLOCKS if m < most] + [most]
        starts = ragged.risen(starts, rows)
    else:
        starts, sizes = jnp.arange(batch + 1, dtype=jnp.int32) * most, [most]
    largest = config.block_m or BLOCKS[-1]
    sizes = list(dict.fromkeys(min(m, largest) for m in sizes))

    call = _Call(spec, config, q, k, v, operands, starts)
    padding = ((0, sizes[-1] - 1), (0, 0))  # so that every block is whole, and where it begins
    o = jnp.zeros((rows + sizes[-1] - 1, spec.heads, spec.v_dim), call.dtype)
    out = o, jnp.full(o.shape[:2], -jnp.inf, call.dtype)
    padded = jnp.pad(q.reshape(rows, *q.shape[2:]), (*padding, (0, 0)))

    def sequence(b, out):
        own, least = starts[b + 1] - starts[b], 0
        for m in sizes:
            blocks = jnp.where((own > least) & ((own <= m) | (m == sizes[-1])), -(-own // m), 0)
            out = lax.fori_loop(0, blocks, lambda i, out, m=m: call.block(padded, b, i, m, out), out)
            least = m
        return out

    o, lse = lax.fori_loop(0, batch, sequence, out)
    o = o[:rows].reshape(*q.shape[:3], spec.v_dim).astype(spec.rules.result(q.dtype))
    lse = lse[:rows].reshape(q.shape[:3]).swapaxes(1, 2)
    stats = (lse, jnp.where(lse == -jnp.inf, 0, jnp.ones_like(lse))) if spec.alters_logits else (None, None)
    return o, lse, *stats, None, None


class _Call:
    """The arrays of a call, and what is done with them for a block of rows."""

    def __init__(self, spec: Spec, config: Config, q, k, v, operands: Mapping[str, Array], starts: Array):
        self.spec, self.config, self.q, self.starts = spec, config, q, starts
        self.dtype = accumulator(q.dtype)
        batch = starts.shape[0] - 1
        of_each = lambda name: for_every_batch(operands[name], batch)
        self.table = of_each("page_table")[:, 0, 0]
        self.lengths, self.offsets = of_each("kv_lengths").ravel(), of_each("offset").ravel()
        self.others = {name: x for name, x in operands.items() if name not in (*SERVED, "kv_lengths", "offset")}
        self.cache = [
            (k, operands.get("k_scale"), spec.head_dim),
            (k if spec.rules.latent else v, operands.get("v_scale"), spec.v_dim),
        ]
        keys = config.block_n or _TILE // (spec.kv_heads * spec.head_dim)
        self.pages = min(max(keys // spec.page_size, 1), self.table.shape[1])
        """How many are gathered at a time."""

    def block(self, q: Array, b, i, block_m: int, out: tuple[Array, Array]) -> tuple[Array, Array]:
        """o and lse with those of block i of the rows of sequence b."""
        spec, size, rules = self.spec, self.spec.page_size, self.spec.rules
        start, stop = self.starts[b] + i * block_m, jnp.minimum(self.starts[b] + (i + 1) * block_m, self.starts[b + 1])
        position, length = self.offsets[b] + i * block_m, self.lengths[b]
        end = length if rules.right is None else jnp.minimum(length, position + (stop - start) + rules.right)
        first = 0 * position if rules.left is None else jnp.maximum(position - rules.left, 0) // size
        step_n = self.pages * size

        # Rows and keys are counted from the first page that the rows see.
        scalars = {"kv_lengths": length - first * size, "offset": position - first * size}
        own = {name: x.reshape(1, 1, 1, 1) for name, x in scalars.items()} | self.others
        t = self.tiling(block_m, step_n, own)
        logits = Logits(t, own)
        rows = layout.take(q, start, block_m, 0)[None]
        rows = t.rows(rows.astype(t.dtype) * logits.per_batch("scale").astype(t.dtype))

        def tile(j, state):
            k, v = (self.gathered(x, scale, width, b, first + j * self.pages) for x, scale, width in self.cache)
            s, _ = logits.of(cached.products(rows, k, t.dot), 0, j, True)
            return online.step(t.spec, s, state, lambda p: cached.weighted(p, v, t.dot))

        m = jnp.full(rows.shape[:3], HIDDEN, t.dtype)
        state = m, jnp.zeros_like(m), jnp.zeros((*m.shape, spec.v_dim), t.dtype)
        state = lax.fori_loop(0, jnp.maximum(-(-(end - first * size) // step_n), 0), tile, state)
        m, l, o = online.finish(t.spec, state, logits.sinks(0) if spec.sinks else None)
        o, lse = layout.rows_out(o, block_m)[0], layout.stats_out(online.lse(m, l), block_m)[0].T
        there = start + jnp.arange(block_m, dtype=jnp.int32) < stop  # what else the block holds is of other sequences
        o = jnp.where(there[:, None, None], o, layout.take(out[0], start, block_m, 0))
        lse = jnp.where(there[:, None], lse, layout.take(out[1], start, block_m, 0))
        return layout.put(out[0], o, start, 0), layout.put(out[1], lse, start, 0)

    def tiling(self, block_m: int, block_n: int, operands: Mapping[str, Array]) -> Tiling:
        """That of a block of rows and a tile of keys, as if they were all."""
        _, _, heads, width = self.q.shape
        q = jax.ShapeDtypeStruct((1, block_m, heads, width), self.q.dtype)
        k, v = (jax.ShapeDtypeStruct((1, block_n, self.spec.kv_heads, w), self.q.dtype) for *_, w in self.cache)
        spec = Spec.of(dataclasses.replace(self.spec.rules, latent=None), q, k, v, operands)
        config = dataclasses.replace(self.config, block_m=block_m, block_n=block_n)
        return Tiling(spec, config, q, k, operands, whole_rows=False)

    def gathered(self, x: Array, scale: Array | None, width: int, b, page) -> Array:
        """`[1, N, Hkv, width]`: of pages x, the keys of sequence b from `page` of its table on; 0 behind its last."""
        index = page + jnp.arange(self.pages, dtype=jnp.int32)
        at = jnp.minimum(index, self.table.shape[1] - 1)
        numbers = jnp.clip(self.table[b, at], 0, x.shape[0] - 1)
        keys = _gather(x, numbers, self.dtype)[..., :width]
        if scale is not None:
            scale = jnp.broadcast_to(scale, (x.shape[0], x.shape[2], 1, 1))[..., 0]
            keys *= _gather(scale, numbers, self.dtype)[:, None]
        live = index[:, None] * x.shape[1] + jnp.arange(x.shape[1], dtype=jnp.int32) < self.lengths[b]
        keys = jnp.where(live[..., None, None], keys, 0)
        return keys.reshape(1, -1, *keys.shape[2:])


def _gather(x: Array, numbers: Array, dtype: Any) -> Array:
    """x[numbers] in a wider dtype. XLA:CPU knows no fp8: it would convert all of x first, and slowly. So bytes are
    gathered, and looked up (for which it does copy them once)."""
    get = lambda x: x.at[numbers].get(mode="promise_in_bounds")
    if x.dtype.itemsize > 1 or x.dtype == jnp.int8:
        return get(x).astype(dtype)
    values = np.arange(256, dtype=np.uint8).view(x.dtype).astype(dtype)
    found = get(lax.bitcast_convert_type(x, jnp.uint8))
    return jnp.asarray(values).at[found].get(mode="promise_in_bounds")
