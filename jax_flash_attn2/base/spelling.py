"""Values as texts that last: by which what is kept on disk is known."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import numpy as np


def spell(x: Any) -> str:
    """A text that is the same in every process for equal values of equal types, and differs for others. What has
    `spelled_as` is spelled as that is.

    Raises:
      TypeError: for what is not made of numbers, texts, dtypes, types, tuples, lists, sets, mappings and dataclasses.
    """
    if x is None or type(x) in (bool, int, float, str, bytes):
        return repr(x)
    if isinstance(x, np.dtype | type):
        return f"{type(x).__name__}:{x.name if isinstance(x, np.dtype) else f'{x.__module__}.{x.__qualname__}'}"
    if isinstance(x, enum.Enum):
        return f"{type(x).__name__}.{x.name}"
    if hasattr(x, "spelled_as"):
        return f"{type(x).__name__}({spell(x.spelled_as)})"
    if dataclasses.is_dataclass(x):
        fields = (f"{field.name}={spell(getattr(x, field.name))}" for field in dataclasses.fields(x))
        return f"{type(x).__name__}({', '.join(fields)})"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{spell(k)}: {spell(v)}" for k, v in x.items()) + "}"
    if isinstance(x, frozenset | set):
        return f"{type(x).__name__}({', '.join(sorted(map(spell, x)))})"
    if isinstance(x, tuple | list):
        return f"{'[' if isinstance(x, list) else '('}{', '.join(map(spell, x))}{']' if isinstance(x, list) else ')'}"
    raise TypeError(f"{x!r} has no lasting spelling")
