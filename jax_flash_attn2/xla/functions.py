"""Functions of the caller's over tiles: what they make of scores, what their derivatives make of gradients, whom they
let see whom."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..functions import mapped
from . import layout


class FunctionTiles:
    """A score function, or a mask function, mapped over tiles `[B, Hkv, M * G, N]`."""

    def __init__(self, logits: Any, function: Any, names: Callable[..., Any]):
        """logits: the `Logits` of the call; names: of the arrays that the function reads."""
        self.logits, self.tiling, self.function = logits, logits.tiling, function
        tiling, operands = logits.tiling, logits.operands
        self.arrays = {name: operands[name] for name in names(function.arrays)}
        self.origin = operands.get("origin")
        self.several = self.origin is not None or tiling.batch > self.function.batch
        self.bound = self.function.bound([*self.arrays.values()], self.several)

    def of(self, s: Array, start_m, start_n, seen: Array | None = None) -> Array:
        """What the function makes of a tile of scores. seen: JAX is to differentiate it, with nothing of the rest."""
        place = self._place(start_m, start_n)
        if seen is None or self.function.whole:
            return mapped.over(self.bound.value, s, *place)
        reads = mapped.over(self.bound.elements, s, *place)
        return mapped.held(self.bound.given, 1 + len(reads))(seen, s, *reads, *place)

    def visible(self, start_m, start_n) -> Array:
        """What a mask function shows of a tile; axes along which it does not vary have length 1."""
        score = jnp.zeros((1, 1, 1, 1), jnp.float32)
        return mapped.over(self.bound.value, score, *self._place(start_m, start_n))

    def back(self, s: Array, p: Array, ds: Array, start_m, start_n) -> Array:
        """The gradient of s, of that of what the function made of it; 0 where p is, whatever its derivative there."""
        return jnp.where(p == 0, 0, ds * mapped.over(self.bound.slope, s, *self._place(start_m, start_n)))

    def add_gradients(
        self, grads: Mapping[str, Array], s: Array, p: Array, ds: Array, start_m, start_n
    ) -> dict[str, Array]:
        """grads, by the names of arrays that it reads, with what a tile adds to them; the rest as in `back`."""
        added, names, rows = dict(grads), [*self.arrays], self.tiling.block_m
        slopes = mapped.over(self.bound.slopes, s, *self._place(start_m, start_n))
        place = self._place(start_m, start_n, by_heads=True)
        for k, read in enumerate(self.function.reads):
            name = names[read.array]
            if name in grads and read.array not in self.function.whole:
                part, scores = (layout.by_heads(x, rows) for x in (jnp.where(p == 0, 0, ds * slopes[k]), s))
                groups = grads[name].shape[0] // self.arrays[name].shape[0]
                given = self.function, self.bound, k, part, scores, place, groups, self.logits.in_order
                added[name] = mapped.add_gradient(added[name], *given)
        for n in self.function.whole:
            if (name := names[n]) in grads:
                added[name] += self._of_whole(name, s, jnp.where(p == 0, 0, ds), start_m, start_n, grads[name].shape)
        return added

    def _of_whole(self, name: str, s: Array, ds: Array, start_m, start_n, shape: tuple[int, ...]) -> Array:
        """What a tile adds to the gradient of an array that is not read by elements."""

        def value(x: Array) -> Array:
            bound = self.function.bound([*(self.arrays | {name: x}).values()], self.several)
            return mapped.over(bound.value, s, *self._place(start_m, start_n))

        _, pull = jax.vjp(value, self.arrays[name])
        parts = shape[0] // self.arrays[name].shape[0]
        of = jnp.arange(s.shape[0]).reshape(-1, 1, 1, 1) // (s.shape[0] // parts)
        return jnp.concatenate([pull(jnp.where(of == part, ds, 0))[0] for part in range(parts)])

    def _place(self, start_m, start_n, *, by_heads: bool = False) -> tuple[Array, Array, Array, Array]:
        """b, h, i and j of a tile, each along its axes of `[B, Hkv, M * G, N]`; of `[B, H, M, N]`, by heads."""
        t, spec = self.tiling, self.tiling.spec
        sizes, starts = (t.batch, spec.heads, t.block_m, t.block_n), (0, 0, start_m, start_n)
        b, h, i, j = (jnp.arange(n, dtype=jnp.int32) + layout.int32(at) for n, at in zip(sizes, starts, strict=True))
        if self.origin is not None:  # where this device's share begins
            b, h, i = (x + self.origin[0, 0, 0, n] for n, x in enumerate((b, h, i)))
        if "q_index" in self.logits.operands:
            i = self.logits.numbers("q_index", start_m)
        if "kv_index" in self.logits.operands:
            j = self.logits.numbers("kv_index", start_n)
        h = h.reshape(1, -1, 1, 1)
        if spec.group > 1 and not by_heads:
            h = jnp.tile(h.reshape(1, spec.kv_heads, 1, -1), (1, 1, t.block_m, 1)).reshape(1, spec.kv_heads, -1, 1)
            i = jnp.repeat(i, spec.group)
        return b.reshape(-1, 1, 1, 1), h, i.reshape(1, 1, -1, 1), j.reshape(1, 1, 1, -1)
