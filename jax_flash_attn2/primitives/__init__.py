"""How JAX sees a call: two primitives, their lowering on each platform, vmap, and devices."""

from . import batching as batching  # which registers its rules
from .define import backward, forward, forward_and_lost, forward_of_nothing, nothing_to_see, unit
from .sharding import said_of_keys
from .share import wide

__all__ = [
    "backward",
    "forward",
    "forward_and_lost",
    "forward_of_nothing",
    "nothing_to_see",
    "said_of_keys",
    "unit",
    "wide",
]
