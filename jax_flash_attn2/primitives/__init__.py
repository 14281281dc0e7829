"""How JAX sees a call: two primitives, their lowering on each platform, vmap, and devices."""

from .define import backward, forward, forward_of_nothing, nothing_to_see

__all__ = ["backward", "forward", "forward_of_nothing", "nothing_to_see"]
