"""Values that hurt: what the arrays of a case that `fuzzing` draws may hold."""

from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case

Inputs = dict[str, Any]


# Each takes the case and its inputs, as drawn from the normal distribution, and returns others.


def _times(*names: str, factor: Callable[[Any], float]) -> Callable[[Case, Inputs], Inputs]:
    def values(case: Case, x: Inputs) -> Inputs:
        scaled = lambda a: (a.astype(np.float32) * factor(case)).astype(a.dtype)
        return x | {name: scaled(x[name]) for name in names}

    return values


def _largest(case: Case, x: Inputs) -> Inputs:
    """Keys of the largest numbers that half precision has, in both signs."""
    end = lambda a: (np.sign(a.astype(np.float32)) * 65504).astype(a.dtype)
    return x | {"k": end(x["k"]), "q": x["q"] * np.asarray(1e-3, x["q"].dtype)}


def _equal(case: Case, x: Inputs) -> Inputs:
    """Rows are each other's equal, and keys."""
    same = lambda a: np.broadcast_to(a[..., :1, :, :], a.shape).copy()
    return x | {name: same(x[name]) for name in "qk" if x[name].shape[-3]}


def _spikes(case: Case, x: Inputs) -> Inputs:
    """One key that outshines all others, and one that none sees beside them."""
    if not x["k"].shape[-3]:
        return x
    k = x["k"].copy()
    k[..., 0, :, :] *= np.asarray(40, k.dtype)
    k[..., -1, :, :] *= np.asarray(-40, k.dtype)
    return x | {"k": k}


def _empty(case: Case, x: Inputs) -> Inputs:
    """Lengths of 0, where there are lengths."""
    none = {name: np.zeros_like(x[name]) for name in ("q_lengths", "kv_lengths") if x[name] is not None}
    return x | {name: np.where(np.arange(a.size).reshape(a.shape) % 2, x[name], a) for name, a in none.items()}


def _hiding(case: Case, x: Inputs) -> Inputs:
    """A bias of -inf in every third place, and of what is next to it in others."""
    if x["bias"] is None:
        return x
    place = np.arange(x["bias"].size).reshape(x["bias"].shape)
    lowest = -1e38 if x["bias"].dtype != np.float16 else -np.inf
    return x | {
        "bias": np.where(place % 3 == 1, -np.inf, np.where(place % 7 == 2, lowest, x["bias"])).astype(x["bias"].dtype)
    }


def _far(case: Case, x: Inputs) -> Inputs:
    """A bias, in fp32 whatever q is, by which every second row is as far below 0 as rows are that padding hides; or as
    far as numbers go."""
    if x["bias"] is None:
        return x
    rows, far = np.arange(x["bias"].shape[-2])[:, None], 1e9 if case.seqlen_q % 2 else 1e30
    return x | {"bias": x["bias"].astype(np.float32) - np.where(rows % 2, 0, far).astype(np.float32)}


def _huge(case: Case, x: Inputs) -> Inputs:
    """Logits of 1e30."""
    return x | {name: (x[name].astype(np.float32) * 1e15).astype(x[name].dtype) for name in "qk"}


def _last(case: Case, x: Inputs) -> Inputs:
    """Positions up to the last that int32 has; or from its first on."""
    names = ("q_positions", "kv_positions")
    if x["q_positions"] is None or not all(x[name].size for name in names):
        return x
    of = np.iinfo(np.int32)
    least, most = min(x[name].min() for name in names), max(x[name].max() for name in names)
    shift = of.max - int(most) if case.heads == 1 else of.min - int(least)
    return x | {name: (x[name].astype(np.int64) + shift).astype(np.int32) for name in names}


VALUES: dict[str, Callable[[Case, Inputs], Inputs]] = {
    "normal": lambda case, x: x,
    "small": _times("q", "k", "v", "do", "dlse", factor=lambda case: 1e-3 if case.dtype == "float16" else 1e-12),
    "large logits": _times("q", factor=lambda case: 100),
    "largest": _largest,
    "equal": _equal,
    "spikes": _spikes,
    "empty": _empty,
    "hiding": _hiding,
    "far": _far,
    "subnormal": _times("v", "do", factor=lambda case: 1e-6 if case.dtype == "float16" else 1e-39),
    "huge logits": _huge,
    "last positions": _last,
}
