"""Tiles of scores through a score function, and what its derivatives make of the gradient of what came out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..base.spec import score_arrays
from ..functions import mapped
from .tiling import Tiling


class ScoreTiles:
    """The score function of a call, mapped over tiles `[B, Hkv, M, G, N]`."""

    def __init__(self, tiling: Tiling, operands: Mapping[str, Array]):
        self.tiling, self.function = tiling, tiling.spec.rules.score
        self.arrays = {name: operands[name] for name in score_arrays(self.function.arrays)}
        self.origin = operands.get("origin")
        self.bound = self._with(self.arrays)

    def of(self, s: Array, start_m, start_n) -> Array:
        """What the function makes of a tile of scores `[B, Hkv, M * G, N]`."""
        return self._mapped(self.bound.value, s, start_m, start_n)

    def back(self, s: Array, p: Array, ds: Array, start_m, start_n) -> Array:
        """The gradient of s, of that of what the function made of it; 0 where p is, whatever its derivative there."""
        return jnp.where(p == 0, 0, ds * self._mapped(self.bound.slope, s, start_m, start_n))

    def add_gradients(self, grads: Mapping[str, Array], s: Array, p: Array, ds: Array, start_m, start_n):
        """grads, by the names of arrays that it reads, with what a tile adds to them; the rest as in `back`."""
        added, names = dict(grads), [*self.arrays]
        tile, place = self._tile(s), self._place(start_m, start_n)
        slopes = mapped.over(self.bound.slopes, tile, *place)
        b, h, i, j = place
        place = b[..., 0], h.reshape(1, -1, 1, 1), i[..., 0], j[:, :, :, 0]
        for k, read in enumerate(self.function.reads):
            name = names[read.array]
            if name in grads and read.array not in self.function.whole:
                part = self._by_heads(jnp.where(self._tile(p) == 0, 0, self._tile(ds) * slopes[k]))
                apart = grads[name].shape[0] // self.arrays[name].shape[0]
                score = self._by_heads(tile)
                added[name] = mapped.add_gradient(added[name], self.function, self.bound, k, part, score, place, apart)
        for n in self.function.whole:
            name = names[n]
            if name in grads:
                added[name] += self._of_whole(name, s, jnp.where(p == 0, 0, ds), start_m, start_n, grads[name].shape)
        return added

    def _of_whole(self, name: str, s: Array, ds: Array, start_m, start_n, shape: tuple[int, ...]) -> Array:
        """What a tile adds to the gradient of an array that is not read by elements."""
        value = lambda x: self._mapped(self._with({**self.arrays, name: x}).value, s, start_m, start_n)
        _, pull = jax.vjp(value, self.arrays[name])
        parts = shape[0] // self.arrays[name].shape[0]
        of = jnp.arange(s.shape[0]).reshape(-1, 1, 1, 1) // (s.shape[0] // parts)
        return jnp.concatenate([pull(jnp.where(of == part, ds, 0))[0] for part in range(parts)])

    def _with(self, arrays: Mapping[str, Array]) -> Any:
        several = self.origin is not None or self.tiling.batch > self.function.batch
        return self.function.bound([*arrays.values()], several)

    def _mapped(self, function: Any, s: Array, start_m, start_n) -> Array:
        tile = self._tile(s)
        made = mapped.over(function, tile, *self._place(start_m, start_n))
        return jnp.broadcast_to(made, tile.shape).reshape(s.shape)

    def _place(self, start_m, start_n) -> tuple[Array, Array, Array, Array]:
        """b, h, i and j of a tile, each along its axes of `[B, Hkv, M, G, N]`."""
        t, spec = self.tiling, self.tiling.spec
        first = [0, 0, 0] if self.origin is None else self.origin[0, 0, 0]
        sizes, starts = (t.batch, spec.heads, t.block_m, t.block_n), (*first[:2], first[2] + start_m, start_n)
        numbers = zip(sizes, starts, strict=True)
        b, h, i, j = (jnp.arange(n, dtype=jnp.int32) + jnp.asarray(start, jnp.int32) for n, start in numbers)
        h = h.reshape(1, spec.kv_heads, 1, -1, 1)
        return b.reshape(-1, 1, 1, 1, 1), h, i.reshape(1, 1, -1, 1, 1), j.reshape(1, 1, 1, 1, -1)

    def _tile(self, x: Array) -> Array:
        b, heads, _, keys = x.shape
        return x.reshape(b, heads, self.tiling.block_m, -1, keys)

    def _by_heads(self, tile: Array) -> Array:
        """`[B, Hkv, M, G, N]` -> `[B, H, M, N]`."""
        b, _, rows, _, keys = tile.shape
        return tile.swapaxes(2, 3).reshape(b, -1, rows, keys)
