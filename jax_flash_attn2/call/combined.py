"""Masks and biases as other libraries give them; and two masks of one call: one that was fixed beforehand, and one that
comes with the call."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..base.arguments import are_integers
from ..masks.block import BlockMask
from ..masks.mask import Mask
from ..masks.predicates import all_of


def is_structured(mask: Any) -> bool:
    """Whether it is a mask that is no array: a `Mask`, a `BlockMask` or a function."""
    return isinstance(mask, Mask | BlockMask) or callable(mask)


def floating(x: Any) -> Any:
    """x, in floating numbers if it is an array of integers."""
    if are_integers(x):
        return jnp.asarray(x).astype(jnp.float32)
    return x


def booleans(mask: Any) -> Any:
    """A mask, its numbers as whether they are not 0 if it is an array."""
    if mask is None or is_structured(mask):
        return mask
    mask = jnp.asarray(mask)
    return mask if mask.dtype == jnp.bool_ else mask != 0


def both(fixed: Any, given: Any, bias: Any) -> tuple[Any, Any]:
    """A mask and a bias that let through what two masks do; arrays are booleans.

    Raises:
      TypeError: two that cannot be made one.
    """
    if fixed is None or given is None:
        return given if fixed is None else fixed, bias
    if not is_structured(fixed) and not is_structured(given):
        return jnp.asarray(fixed) & jnp.asarray(given), bias
    if is_structured(fixed) != is_structured(given):  # by the other, tiles are skipped
        mask, array = (fixed, given) if is_structured(fixed) else (given, fixed)
        return mask, _hidden(array, bias)
    if callable(fixed) and callable(given):
        return all_of(fixed, given), bias
    raise TypeError(
        f"mask must be an array or a predicate where another mask is set beforehand, got {type(given).__name__} and "
        f"{type(fixed).__name__}; combine predicates by &, and make one BlockMask of them"
    )


def _hidden(seen: Any, bias: Any) -> Array:
    """bias, -inf where nothing is seen."""
    dtype = jnp.float32 if bias is None else bias.dtype
    hidden = jnp.where(seen, jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype))
    return hidden if bias is None else bias + hidden
