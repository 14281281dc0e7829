"""Maskers: each adds the keys that one rule shows to a `Mask`, so that rules compose by calling one after another.

`masker(previous, implementation=None)` merges what the masker shows, at weight 1, into `previous`; start from
`Mask.empty(shape)`. The implementations of a masker give the same mask and differ in time and memory. Rows are aligned
to the last query, as decoding needs: query i has position i + Sk - Sq among the keys.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from ..base import arguments, axes, known
from ..base.arguments import accumulator
from . import checks, weighing
from .mask import Mask
from .shown import Range, scatter_keys, top_keys

Implementation = Literal["sparse", "dense", "broadcast", "triangle"]
"""How a masker makes its mask: "sparse" as a list of entries, which is merged as such; the others as an array."""

_FEW = 16
"""Up to which part of the keys it pays to list them: in a mask [4, 16, 256, 1024] a window of 1/64 of the keys takes a
seventh of the time, of 1/16 a quarter, of 1/2 three times as long (two CPU cores)."""


@dataclasses.dataclass(frozen=True)
class Masker:
    """What all maskers are: a number of keys, ways to show them, and a merge."""

    is_fraction: bool = dataclasses.field(init=False, repr=False)
    """Whether it is a fraction of them: 1 and 1.0 are equal in Python, and must not be so as static arguments."""
    implementations: ClassVar[tuple[Implementation, ...]] = ("sparse", "dense")
    """Its own; the second is what runs where nobody says, but for few keys in an empty mask."""
    _counted: ClassVar[str]
    """The field that is a number of keys."""

    def __post_init__(self) -> None:
        name = self._counted
        value = getattr(self, name)
        is_fraction = isinstance(value, float | np.floating)
        if not (0 < value <= 1 if is_fraction else arguments.is_integer(value) and value >= 0):
            raise ValueError(
                f"{name} must be an int of at least 0 (a number of keys) or a float in (0, 1] (a fraction of them), "
                f"got {value!r}"
            )
        object.__setattr__(self, name, float(value) if is_fraction else int(value))
        object.__setattr__(self, "is_fraction", is_fraction)
        causal = getattr(self, "causal", True)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be a bool, got {causal!r}")

    def _count(self, keys: int) -> int:
        """The number of keys, of so many. A fraction is rounded: 0.1 * 30 is above 3, and 0.29 * 100 below 29."""
        value = getattr(self, self._counted)
        return min(max(1, round(value * keys)) if self.is_fraction else value, keys)

    def _checked(self, implementation: Any, previous: Any) -> Implementation | None:
        """The implementation that is asked for, if it is one of them."""
        if not isinstance(previous, Mask):
            raise TypeError(f"previous must be a Mask, got {type(previous).__name__}; start from Mask.empty(shape)")
        if implementation is not None and implementation not in self.implementations:
            names = ", ".join(map(repr, self.implementations))
            raise ValueError(f"implementation must be one of {names} or None, got {implementation!r}")
        return implementation


@dataclasses.dataclass(frozen=True)
class _ByPlace(Masker):
    """A masker of keys that follow from their places."""

    def __call__(self, previous: Mask, *, implementation: Implementation | None = None) -> Mask:
        """`previous` with these keys shown.

        Args:
          previous: the mask to merge into. The result has its shape and dtype.
          implementation: one of the masker's `implementations`. "sparse" makes a list of entries and merges it as such,
            "dense" and "broadcast" compare places of keys, "triangle" scatters to the indices of one triangle and then
            to those of another, and these merge densely. None: "sparse" if these are at most a sixteenth of the keys
            and the mask is empty, else the second of them.

        Raises:
          TypeError: previous is not a Mask.
          ValueError: an unknown implementation; under jit, "sparse" into a dense mask whose entries are not counted
            (`previous.to_indices(size)` says how many there may be).
        """
        chosen = self._checked(implementation, previous)
        shown = self._range(*previous.shape[2:])
        if chosen is None:
            # An empty mask takes what is merged into it as it is, so that entries are all that is written. Where there
            # are weights already they would have to be sorted. `python -m benchmarks sparse_masks` checks this choice.
            few = previous.kind == "empty" and _FEW * shown.count <= shown.rows * shown.keys
            chosen = self.implementations[0 if few else 1]
        ways = {"sparse": shown.sparse, "triangle": shown.triangles}
        return _merged(previous, ways.get(chosen, shown.dense))

    def _range(self, rows: int, keys: int) -> Range:
        """What is shown."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LocalMasker(_ByPlace):
    """Shows a row the `window` keys up to and including the one at its position, and never a later key.

    The last row has the position of the last key: query i has i + Sk - Sq. The row's own key counts: `LocalMasker(256)`
    shows 256 keys, as `sliding_window(255, offset=Sk - Sq)` does, which counts from the first key but for its offset.

    Raises:
      ValueError: window is neither an int of at least 0 nor a float in (0, 1].

    Examples:
      >>> LocalMasker(2)(Mask.empty((1, 1, 3, 3), bool)).to_dense()[0, 0].astype(int)
      Array([[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]], dtype=int32)
    """

    window: int | float
    """Keys, or a fraction of them as a float: rounded to the nearest number of keys, at least 1."""
    implementations = ("sparse", "broadcast", "triangle")
    _counted = "window"

    def _range(self, rows: int, keys: int) -> Range:
        return Range(rows, keys, window=self._count(keys))


@dataclasses.dataclass(frozen=True)
class SinkMasker(_ByPlace):
    """Shows every row the first `size` keys: those that attention falls back on (Xiao et al. 2023).

    For causal, query i has position i + Sk - Sq: the last row sees the last key.

    Raises:
      ValueError: size is neither an int of at least 0 nor a float in (0, 1].
      TypeError: causal is not a bool.

    Examples:
      >>> SinkMasker(1)(LocalMasker(1)(Mask.empty((1, 1, 3, 3), bool))).to_dense()[0, 0].astype(int)
      Array([[1, 0, 0],
             [1, 1, 0],
             [1, 0, 1]], dtype=int32)
    """

    size: int | float
    """Keys, or a fraction of them as a float: rounded to the nearest number of keys, at least 1."""
    causal: bool = True
    """Whether a row at a position before some of these keys does not see them, as `LocalMasker` never shows them."""
    _counted = "size"

    def _range(self, rows: int, keys: int) -> Range:
        return Range(rows, keys, size=self._count(keys), causal=self.causal)


@dataclasses.dataclass(frozen=True)
class TopKMasker(Masker):
    """Shows each row the `k` keys that have its largest logits: an oracle, which computes all logits to find them.

    Of equal logits the earlier key counts as larger. A row that may see fewer keys is shown all of these. For causal,
    query i has position i + Sk - Sq: the last row sees the last key.

    Raises:
      ValueError: k is neither an int of at least 0 nor a float in (0, 1].
      TypeError: causal is not a bool.
    """

    k: int | float
    """Keys, or a fraction of them as a float: rounded to the nearest number of keys, at least 1."""
    causal: bool = True
    """Whether keys later than a row's position are left out."""
    _counted = "k"

    def __call__(
        self,
        previous: Mask,
        *,
        q: Array | np.ndarray,
        k: Array | np.ndarray,
        scale: float | Array | None = None,
        allowed: Mask | Array | np.ndarray | None = None,
        implementation: Implementation | None = None,
    ) -> Mask:
        """`previous` with these keys shown.

        Args:
          previous: the mask to merge into, with the Sq of q and the Sk of k. The result has its dtype, and the B of q
            and H of q where `previous` has 1.
          q: floating `[B, Sq, H, D]`.
          k: floating `[B, Sk, Hkv, D]`, Hkv dividing H: query head h reads `h // (H // Hkv)`.
          scale: what `q kᵀ` is multiplied by. Default: `D**-0.5`. Logits are computed in fp32 (fp64 for fp64).
          allowed: the keys that a row may see, besides `causal`: a bool array that broadcasts to `[B, H, Sq, Sk]`, or
            a Mask, of which these are the keys with weights that are not 0.
          implementation: "sparse" lists the keys found and merges them as entries; "dense" scatters them and merges
            densely. None: "dense".

        Raises:
          TypeError: previous is not a Mask, q or k not a floating array, or allowed neither a Mask nor a bool array.
          ValueError: shapes that do not fit, an unknown implementation, or entries that are not counted, as in the
            other maskers.
        """
        chosen = self._checked(implementation, previous) or self.implementations[1]
        shape = _check_queries(previous, q, k)
        q, k = jnp.asarray(q), jnp.asarray(k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(scale, int | float):
            scale = known.full(float(scale), accumulator(q.dtype))
        find = functools.partial(top_keys, count=self._count(shape[3]), causal=self.causal)

        def shown(q: Array, k: Array, scale: Array, allowed: Any) -> Mask:
            top = find(q, k, scale, _allowed(allowed, shape))  # [B, H, Sq, n], negative where a row sees fewer
            if chosen == "sparse":
                found = Mask.from_row_indices(shape, top, dtype=bool)
            else:
                found = Mask.from_dense(scatter_keys(top, keys=shape[3]))
            if isinstance(allowed, Mask):
                found = dataclasses.replace(found, overflow=allowed.overflow)  # lost from one, lost from both
            return found

        return _merged(previous, shown, q, k, scale, allowed)


def _merged(previous: Mask, shown: Callable[..., Mask], *of: Any) -> Mask:
    """`previous` and `shown(*of)` merged, as the second one is held.

    On a mesh with explicit axes a dense result is divided as the queries (the first of `of`) are, or as `previous` is.
    """

    def merge(arrays: Any) -> Mask:
        previous, *of = arrays
        mask = shown(*of)
        return previous.merge(mask, "dense" if mask.kind == "dense" else "sparse")

    def types(merged: Mask) -> Any:
        if of:
            batch, rows, heads, _ = axes.spec_of(of[0])
            spec = batch, heads, rows, None
        else:
            spec = (None,) * 4 if previous.dense is None else axes.spec_of(previous.dense)
        return jax.tree.map(lambda x: PartitionSpec(*spec) if x.ndim == 4 else PartitionSpec(), merged)

    return axes.on_auto_axes(merge, (previous, *of), types)


# Arguments of `TopKMasker`.


def _check_queries(previous: Mask, q: Any, k: Any) -> tuple[int, int, int, int]:
    """`[B, H, Sq, Sk]` of q and k, if they fit each other and the mask."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating array, got {getattr(x, 'dtype', type(x).__name__)}; cast it")
        if x.ndim != 4:
            raise ValueError(f"{name} must have the axes [B, S, H, D], got shape {x.shape}")
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}; cast one of them")
    (batch, rows, heads, width), (kv_batch, keys, kv_heads, kv_width) = q.shape, k.shape
    if (kv_batch, kv_width) != (batch, width) or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"k must have shape [B, Sk, Hkv, D] with the B and D of q and Hkv dividing its H, got {k.shape} for q "
            f"{q.shape}"
        )
    shape = (batch, heads, rows, keys)
    if not checks.fits(previous.shape, shape):
        raise ValueError(f"previous must have the shape {shape} of q and k (B and H may be 1), got {previous.shape}")
    return shape


def _allowed(allowed: Any, shape: tuple[int, ...]) -> Array | None:
    """A bool array that broadcasts to the shape."""
    if allowed is None:
        return None
    if isinstance(allowed, Mask):
        allowed = weighing.seen_of(allowed.to_dense(jnp.float32) if allowed.dtype == bool else allowed.to_dense())
    if not isinstance(allowed, Array | np.ndarray) or allowed.dtype != bool:
        raise TypeError(
            f"allowed must be a Mask or a bool array, got {getattr(allowed, 'dtype', type(allowed).__name__)}; "
            f"compare with 0"
        )
    try:
        fits = np.broadcast_shapes(allowed.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"allowed must broadcast to [B, H, Sq, Sk] = {shape}, got shape {allowed.shape}")
    return jnp.asarray(allowed).reshape((1,) * (4 - allowed.ndim) + allowed.shape)
