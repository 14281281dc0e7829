"""What one device has of a call whose sequences lie on several."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Share:
    """Which of all rows a device has, and how what has one axis for all keys lies there: in which order of tokens.

    Masks that are more than an array, and functions, are of all rows and keys, in the order of the tokens.
    """

    rows: int
    """Query rows on all devices."""
    keys: int
    """Keys on all devices."""
    row_tokens: Array
    """int32 `[Sq]`: which token each of the device's rows is."""
    key_tokens: np.ndarray
    """int32 `[keys]`: which token the key at each place is, over all devices."""
    lists: bool
    """Whether it is of use to know which tiles a mask leaves of all rows and keys."""

    def axes(self, name: str, x: Any, heads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int]:
        """The axes of the logits that a bias or a mask broadcasts to: with all keys, or, where it does not vary from
        row to row, with the device's own.

        Raises:
          ValueError: it has rows, and keys of this device only.
        """
        shape = getattr(x, "shape", ())
        keys = shape[-1] if shape else 1
        if keys != self.keys and keys == seqlen_k > 1 and shape[-2:-1] not in ((), (1,)):
            raise ValueError(
                f"{name} must have all {self.keys} keys where it has rows, as every device's rows meet them all, got "
                f"{keys} of them (shape {shape})"
            )
        return heads, seqlen_q, self.keys if keys == self.keys else seqlen_k

    def own(self, x: Array) -> Array:
        """Of `[..., rows, keys]` in the order of the tokens, what this device's rows have to do with, in its order."""
        x = jnp.take(x, self.row_tokens, axis=-2) if x.shape[-2] > 1 else x
        in_order = (self.key_tokens == np.arange(self.keys)).all()
        return x if x.shape[-1] == 1 or in_order else jnp.take(x, self.key_tokens, axis=-1)
