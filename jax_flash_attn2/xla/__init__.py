"""The same attention in plain `jax.numpy`, tile by tile: what CPU, TPU and every declined call runs.

Memory is linear in the sequence lengths: scores exist one `[block_m, block_n]` tile at a time, for all
batches and heads at once, so that batch and head axes shard freely. A ragged sequence is never padded: its
last tile is moved back to end with the sequence, and what it shares with the tile before counts once. Only a block mask
that differs from head to head has tiles of one key head at a time (`by_head`).

Some choices are XLA:CPU's. Its fast matrix product (YNNPACK) wants the left operand contracted along its
last axis, so dk and dv are summed transposed. It fuses a mask that is added, not one that is selected. And a
tile costs a dozen kernel calls of some microseconds each, so tiles are larger than on a GPU.

A long cache under a few query rows is not copied: it is read in place (`cached`), or gathered from pages a tile at a
time (`paged`), which XLA:CPU's matrix products alone would not do.

Inside, the G heads that share a key head are rows beside one another: q is `[B, Hkv, Sq * G, D]` (`layout`). `tiling`
says how a call is cut and which tiles are met, `logits` what is in a tile, `online` how tiles become a softmax;
`forward`, `backward` and `differentiable` are the passes.
"""

from .backward import backward
from .differentiable import differentiable, whole_rows
from .forward import forward
from .tiling import tiles

__all__ = ["backward", "differentiable", "forward", "tiles", "whole_rows"]
