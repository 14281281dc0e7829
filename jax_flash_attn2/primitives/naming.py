"""Passes that XLA divides, named by what they compute.

In a program's text such a pass is a call whose code XLA asks of this process, by a pointer. JAX's persistent cache of
compiled programs knows them by their texts: without a name of its own, another pass whose pointer happens to be the
same, or is left out (`JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY`), would be taken for this one.
"""

import functools
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from .. import kernels
from ..base.spelling import spell
from ..base.versions import KERNELS, installed
from ..gpu.cache import environment


def named(function: Callable[..., Any], name: str, params: dict[str, Any]) -> Callable[..., Any]:
    """The function of arrays, in a program under this name and a digest of all that decides what it computes. params:
    of the primitive."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = f"{name}_{_digest(params)}"
    return jax.jit(call)


def _digest(params: dict[str, Any]) -> str:
    """What cannot be known again in another process has a name that is never met again."""
    try:
        text = spell((params, _sources(), environment(), jax.config.jax_default_matmul_precision))
    except (TypeError, OSError):
        return uuid.uuid4().hex
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _sources() -> tuple[Any, ...]:
    """What makes code of the parameters: this package, and what kernels are compiled by."""
    files = sorted(Path(__file__).parents[1].rglob("*.py")) + sorted(Path(kernels.__path__[0]).glob("*.py"))
    own = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return (own, *map(installed, KERNELS))
