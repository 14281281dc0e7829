"""What a forward pass keeps for the backward pass, by names that a checkpoint policy can give."""

from jax import Array
from jax.ad_checkpoint import checkpoint_name

CHECKPOINT_NAMES = ("flash_attention_o", "flash_attention_lse")
"""What `jax.checkpoint` must save so that a backward pass does not run attention forward again:
`policy=jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)`."""


def named(
    o: Array, lost: Array | None, lse: Array, stats: tuple[Array, ...]
) -> tuple[Array, Array | None, Array, tuple[Array, ...]]:
    """Results by `CHECKPOINT_NAMES`: o, what it lost, lse, and what the backward pass reads of rows: stats, or lse if
    there are none."""
    o_name, lse_name = CHECKPOINT_NAMES
    o, lse = checkpoint_name(o, o_name), checkpoint_name(lse, lse_name)
    lost = None if lost is None else checkpoint_name(lost, o_name)
    return o, lost, lse, tuple(checkpoint_name(x, lse_name) for x in stats) or (lse,)
