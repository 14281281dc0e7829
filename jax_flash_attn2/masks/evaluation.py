"""How a predicate is evaluated: on every combination of batches, heads, rows and keys, each answer checked."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments, errors, names
from .programs import Program


def evaluate(
    predicate: Callable[..., Any],
    b: Array | np.ndarray,
    h: Array | np.ndarray,
    i: Array | np.ndarray,
    j: Array | np.ndarray,
) -> Array:
    """The predicate of every combination of batches b `[B]`, heads h `[H]`, rows i `[Q]` and keys j `[K]`.

    What a predicate does not depend on is computed once: ids of rows are read Q times, not Q * K times.

    Args:
      predicate: a `Predicate`, or a function of four 0-d int32 that returns a 0-d bool.
      b, h, i, j: integers, 1-D; traced ones too.

    Returns:
      bool `[B, H, Q, K]`.

    Raises:
      TypeError: the predicate returns something else than a bool.
      ValueError: it does not return a single one, or indices are not 1-D.
    """
    indices = [integers(name, x, (name.upper(),)) for name, x in zip("bhij", (b, h, i, j), strict=True)]
    return _evaluate(trace(predicate), *indices)


def everywhere(predicate: Callable[..., Any], shape: tuple[int, int, int, int]) -> Array:
    """The predicate of all batches, heads, rows and keys: bool `[B, H, Sq, Sk]`."""
    return _everywhere(trace(predicate), shape)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _everywhere(program: Program, shape: tuple[int, int, int, int]) -> Array:
    return _evaluate(program, *(jnp.arange(n, dtype=jnp.int32) for n in shape))


def trace(predicate: Callable[..., Any]) -> Program:
    """What the predicate does, as a program of four 0-d int32.

    Raises:
      TypeError, ValueError: as `evaluate`.
    """
    check_callable(predicate)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return Program.of(lambda b, h, i, j: seen(predicate, b, h, i, j), *[index] * 4)


@functools.partial(jax.jit, inline=True)
def _evaluate(program: Program, b: Array, h: Array, i: Array, j: Array) -> Array:
    return jax.vmap(jax.vmap(over(program, i, j), (None, 0)), (0, None))(b, h)


def over(program: Program, i: Array, j: Array) -> Callable[[Array, Array], Array]:
    """The function of one batch and head that gives `[Q, K]`."""
    rows = jax.vmap(jax.vmap(program, (None, None, None, 0)), (None, None, 0, None))
    return lambda b, h: rows(b, h, i, j)


def seen(predicate: Callable[..., Any], b: Any, h: Any, i: Any, j: Any) -> Array:
    """The predicate's answer, checked: a 0-d bool."""
    try:
        answer = predicate(b, h, i, j)
    except errors.UNTRACEABLE as error:
        raise errors.untraceable_error(_named(predicate), "indices", error) from error
    if not isinstance(answer, bool | np.bool_) and (
        not isinstance(answer, Array | np.ndarray) or answer.dtype != jnp.bool_
    ):
        raise TypeError(
            f"{_named(predicate)} must return a bool, got {arguments.describe(answer)}; of a number, return x != 0"
        )
    answer = jnp.asarray(answer)
    if answer.shape != ():
        raise ValueError(
            f"{_named(predicate)} must return a single bool of four 0-d indices, got shape {answer.shape}; index its "
            f"arrays with all of (b, h, i, j) that they have axes for"
        )
    return answer


def _named(predicate: Any) -> str:
    return f"the mask function {names.of_function(predicate)}"


def take(x: Any, where: tuple[Any, ...], beyond: Any, first_varies: bool = True) -> Array:
    """One element of x, `beyond` if it has none there; a batch axis of length 1 is everyone's."""
    if first_varies and x.shape[0] == 1:
        where = (0, *where[1:])
    if x.size == 0:
        return jnp.asarray(beyond, x.dtype)
    return jnp.asarray(x).at[where].get(mode="fill", fill_value=beyond, wrap_negative_indices=False)


def integers(name: str, x: Any, axes: tuple[str, ...], least: int = 1) -> Any:
    """x as int32 with all its axes, if it is an array of integers that fit."""
    return with_axes(name, arguments.int32_array(name, x, f"[{', '.join(axes)}]"), axes, least).astype(jnp.int32)


def with_axes(name: str, x: Any, axes: tuple[str, ...], least: int = 1) -> Any:
    """x with all its axes, those left out in front being 1. NumPy stays NumPy: inside jit, jnp would trace it."""
    if not least <= x.ndim <= len(axes):
        raise ValueError(f"{name} must have axes [{', '.join(axes)}] (leading ones may be left out), got {x.shape}")
    return x.reshape((1,) * (len(axes) - x.ndim) + x.shape)


def check_callable(predicate: Any, name: str = "predicate") -> None:
    """Raises unless it is a function. name: of the argument that it is."""
    if not callable(predicate):
        raise TypeError(
            f"{name} must be a function of (b, h, i, j), got {arguments.describe(predicate)}; a dense mask is a "
            f"predicate through from_dense"
        )
    try:
        inspect.signature(predicate).bind("b", "h", "i", "j")
    except TypeError as error:
        raise TypeError(
            f"{name} must take four arguments, (b, h, i, j), got {names.of_function(predicate)}: {error}; "
            f"{_instead(predicate)}"
        ) from error
    except ValueError:  # it has no signature
        pass


def _instead(predicate: Any) -> str:
    """What to write in place of a function that does not take four arguments."""
    if not inspect.isfunction(predicate) or not predicate.__module__.startswith(f"{__package__}."):
        return "of a function of a row and a key write lambda b, h, i, j: f(i, j)"
    needed = any(p.default is p.empty for p in inspect.signature(predicate).parameters.values())
    return f"did you mean masks.{predicate.__name__}({'...' if needed else ''})?"
