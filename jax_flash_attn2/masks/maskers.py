"""Maskers: each adds the keys that one rule shows to a `Mask`, so that rules compose by calling one after another.

`masker(previous, implementation=None)` merges what the masker shows, at weight 1, into `previous`; start from
`Mask.empty(shape)`. The implementations of a masker give the same mask and differ in time and memory. Rows are aligned
to the last query, as decoding needs: query i has position i + Sk - Sq among the keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from ..base import axes, known
from .checks import check_size
from .mask import Mask

LocalImplementation = Literal["sparse", "broadcast", "triangle"]
SinkImplementation = Literal["sparse", "dense"]
TopKImplementation = Literal["sparse", "dense"]

# What runs where nobody says. `python -m benchmarks sparse_masks` times each against the others and checks the choice.
DEFAULT_LOCAL: LocalImplementation = "broadcast"
DEFAULT_SINK: SinkImplementation = "dense"
DEFAULT_TOP_K: TopKImplementation = "dense"


@dataclasses.dataclass(frozen=True)
class LocalMasker:
    """Shows a row the `window` keys up to and including the one at its position, and never a later key.

    The row's own key counts: `LocalMasker(256)` shows 256 keys, as `sliding_window(255)` does.

    Raises:
      ValueError: window is neither an int of at least 0 nor a float in (0, 1].
    """

    window: int | float
    """Keys, or a fraction of them as a float: rounded to the nearest number of keys, at least 1."""
    is_fraction: bool = dataclasses.field(init=False, repr=False)
    """Whether window is a fraction: 1 and 1.0 are equal in Python, and must not be so as static arguments of jit."""

    def __post_init__(self) -> None:
        _check_count(self, "window")

    def __call__(
        self, previous: Mask, *, implementation: LocalImplementation | None = None, size: int | None = None
    ) -> Mask:
        """`previous` with these keys shown.

        Args:
          previous: the mask to merge into. The result has its shape and dtype.
          implementation: "sparse" makes a list of entries and merges it as such; "broadcast" compares positions of
            rows and keys, "triangle" scatters to the indices of one triangle and then to those of another, and both
            merge densely. None: `DEFAULT_LOCAL`.
          size: with "sparse", the room of the result, as in `Mask.merge`.

        Raises:
          TypeError: previous is not a Mask.
          ValueError: an unknown implementation, or a size as in `Mask.merge`.
        """
        chosen = _chosen(implementation, LocalImplementation, DEFAULT_LOCAL)
        _check_previous(previous)
        rows, keys = previous.shape[2:]
        window = _count(self.window, keys)

        def shown() -> Mask:
            if chosen == "triangle":
                return Mask.from_dense(_band_by_triangles(rows, keys, window))
            return _range(rows, keys, chosen, window=window)

        return _merged(previous, shown, size)


@dataclasses.dataclass(frozen=True)
class SinkMasker:
    """Shows every row the first `size` keys: those that attention falls back on (Xiao et al. 2023).

    Raises:
      ValueError: size is neither an int of at least 0 nor a float in (0, 1].
      TypeError: causal is not a bool.
    """

    size: int | float
    """Keys, or a fraction of them as a float: rounded to the nearest number of keys, at least 1."""
    causal: bool = True
    """Whether a row at a position before some of these keys does not see them, as `LocalMasker` never shows them."""
    is_fraction: bool = dataclasses.field(init=False, repr=False)
    """Whether size is a fraction: 1 and 1.0 are equal in Python, and must not be so as static arguments of jit."""

    def __post_init__(self) -> None:
        _check_count(self, "size")
        _check_bool("causal", self.causal)

    def __call__(
        self, previous: Mask, *, implementation: SinkImplementation | None = None, size: int | None = None
    ) -> Mask:
        """`previous` with these keys shown.

        Args:
          previous: the mask to merge into. The result has its shape and dtype.
          implementation: "sparse" makes a list of entries and merges it as such; "dense" compares keys, and merges
            densely. None: `DEFAULT_SINK`.
          size: with "sparse", the room of the result, as in `Mask.merge`.

        Raises:
          TypeError: previous is not a Mask.
          ValueError: an unknown implementation, or a size as in `Mask.merge`.
        """
        chosen = _chosen(implementation, SinkImplementation, DEFAULT_SINK)
        _check_previous(previous)
        rows, keys = previous.shape[2:]
        shown = functools.partial(_range, rows, keys, chosen, size=_count(self.size, keys), causal=self.causal)
        return _merged(previous, shown, size)


@dataclasses.dataclass(frozen=True)
class TopKMasker:
    """Shows each row the `k` keys that have its largest logits: an oracle, which computes all logits to find them.

    Of equal logits the earlier key counts as larger. A row that may see fewer keys is shown all of these.

    Raises:
      ValueError: k is neither an int of at least 0 nor a float in (0, 1].
      TypeError: causal is not a bool.
    """

    k: int | float
    """Keys, or a fraction of them as a float: rounded to the nearest number of keys, at least 1."""
    causal: bool = True
    """Whether keys later than a row's position are left out."""
    is_fraction: bool = dataclasses.field(init=False, repr=False)
    """Whether k is a fraction: 1 and 1.0 are equal in Python, and must not be so as static arguments of jit."""

    def __post_init__(self) -> None:
        _check_count(self, "k")
        _check_bool("causal", self.causal)

    def __call__(
        self,
        previous: Mask,
        *,
        q: Array | np.ndarray,
        k: Array | np.ndarray,
        scale: float | Array | None = None,
        allowed: Mask | Array | np.ndarray | None = None,
        implementation: TopKImplementation | None = None,
        size: int | None = None,
    ) -> Mask:
        """`previous` with these keys shown.

        Args:
          previous: the mask to merge into, with the Sq of q and the Sk of k. The result has its dtype, and the B of q
            and H of q where `previous` has 1.
          q: floating `[B, Sq, H, D]`.
          k: floating `[B, Sk, Hkv, D]`, Hkv dividing H: query head h reads `h // (H // Hkv)`.
          scale: what `q kᵀ` is multiplied by. Default: `D**-0.5`. Logits are computed in fp32 (fp64 for fp64).
          allowed: the keys that a row may see, besides `causal`: a bool array that broadcasts to `[B, H, Sq, Sk]`, or
            a Mask, of which these are the keys with weights above 0.
          implementation: "sparse" lists the keys found and merges them as entries; "dense" scatters them and merges
            densely. None: `DEFAULT_TOP_K`.
          size: with "sparse", the room of the result, as in `Mask.merge`.

        Raises:
          TypeError: previous is not a Mask, q or k not a floating array, or allowed neither a Mask nor a bool array.
          ValueError: shapes that do not fit, an unknown implementation, or a size as in `Mask.merge`.
        """
        chosen = _chosen(implementation, TopKImplementation, DEFAULT_TOP_K)
        _check_previous(previous)
        shape = _check_queries(previous, q, k)
        q, k = jnp.asarray(q), jnp.asarray(k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(scale, int | float):
            scale = known.full(float(scale), jnp.dtype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32))
        find = functools.partial(_top_keys, count=_count(self.k, shape[3]), causal=self.causal)

        def shown(q: Array, k: Array, scale: Array, allowed: Any) -> Mask:
            top = find(q, k, scale, _allowed(allowed, shape))  # [B, H, Sq, n], negative where a row sees fewer
            if chosen == "sparse":
                found = Mask.from_row_indices(shape, top, dtype=bool)
            else:
                found = Mask.from_dense(_scatter_keys(top, keys=shape[3]))
            if isinstance(allowed, Mask):
                found = dataclasses.replace(found, overflow=allowed.overflow)  # lost from one, lost from both
            return found

        return _merged(previous, shown, size, q, k, scale, allowed)


# Arguments.


def _check_count(masker: Any, name: str) -> None:
    """Brings the field that is a number of keys, or a fraction of them, into the form that `_count` takes."""
    value = getattr(masker, name)
    is_fraction = isinstance(value, float | np.floating)
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (0 < value <= 1 if is_fraction else is_number and value >= 0):
        raise ValueError(
            f"{name} must be an int of at least 0 (a number of keys) or a float in (0, 1] (a fraction of them), "
            f"got {value!r}"
        )
    object.__setattr__(masker, name, float(value) if is_fraction else int(value))
    object.__setattr__(masker, "is_fraction", is_fraction)


def _chosen(implementation: Any, names: Any, default: Any) -> Any:
    if implementation is None:
        return default
    if implementation not in get_args(names):
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, get_args(names)))} or None ({default!r}), "
            f"got {implementation!r}"
        )
    return implementation


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _check_previous(previous: Any) -> None:
    if not isinstance(previous, Mask):
        raise TypeError(f"previous must be a Mask, got {type(previous).__name__}; start from Mask.empty(shape)")


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
    if previous.shape[2:] != shape[2:] or any(
        m not in (1, n) for m, n in zip(previous.shape[:2], shape[:2], strict=True)
    ):
        raise ValueError(f"previous must have the shape {shape} of q and k (B and H may be 1), got {previous.shape}")
    return shape


def _allowed(allowed: Any, shape: tuple[int, ...]) -> Array | None:
    """A bool array that broadcasts to the shape."""
    if allowed is None:
        return None
    if isinstance(allowed, Mask):
        allowed = _positive(allowed.to_dense(jnp.float32) if allowed.dtype == bool else allowed.to_dense())
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


_positive = jax.jit(lambda weights: weights > 0, inline=True)


def _count(value: int | float, keys: int) -> int:
    """A number of keys, of a number or a fraction of them. Rounded: 0.1 * 30 is above 3, and 0.29 * 100 below 29."""
    if isinstance(value, float):
        value = max(1, round(value * keys))
    return min(value, keys)


# What is shown, as masks of `[1, 1, Sq, Sk]`: bool, so that a merge makes of it what `previous` has.


def _merged(previous: Mask, shown: Callable[..., Mask], size: int | None, *of: Any) -> Mask:
    """`previous` and `shown(*of)` merged, as the second one is held.

    On a mesh with explicit axes a dense result is divided as the queries (the first of `of`) are, or as `previous` is.
    """

    def merge(arrays: Any) -> Mask:
        previous, *of = arrays
        mask = shown(*of)
        return previous.merge(mask, "dense" if mask.kind == "dense" else "sparse", size=size)

    def types(merged: Mask) -> Any:
        if of:
            batch, rows, heads, _ = axes.spec_of(of[0])
            spec = batch, heads, rows, None
        else:
            spec = (None,) * 4 if previous.dense is None else axes.spec_of(previous.dense)
        return jax.tree.map(lambda x: PartitionSpec(*spec) if x.ndim == 4 else PartitionSpec(), merged)

    return axes.on_auto_axes(merge, (previous, *of), types)


@dataclasses.dataclass(frozen=True)
class _Range:
    """The keys from `start` up to `end` of each row: the last `window` up to its position, or the first `size`."""

    rows: int
    keys: int
    window: int | None
    size: int | None
    causal: bool

    def ends(self, xp: Any) -> tuple[Any, Any]:
        """`start` and `end`, int32 `[Sq]`, clipped to the keys there are; in NumPy or in JAX's."""
        after = xp.arange(self.rows, dtype="int32") + (self.keys - self.rows + 1)  # the position, and one
        end = after if self.size is None else xp.full_like(after, self.size)
        end = xp.clip(xp.minimum(end, after) if self.causal else end, 0, self.keys)
        start = xp.zeros_like(end) if self.window is None else xp.clip(after - self.window, 0, self.keys)
        return start, xp.maximum(start, end)


def _range(
    rows: int, keys: int, implementation: str, window: int | None = None, size: int | None = None, causal: bool = True
) -> Mask:
    shown = _Range(rows, keys, window, size, causal)
    if implementation != "sparse":
        return Mask.from_dense(_compared(shown))
    start, end = shown.ends(np)
    total = int((end - start).sum(dtype=np.int64))
    check_size("the number of entries", total, "use a dense implementation")
    indices, ptr, ones = _listed(shown, total)
    # Not through `from_indices`, which could not know under jit that ptr fits.
    return Mask((1, 1, rows, keys), "sparse", np.dtype(bool), indices=indices, ptr=ptr, data=ones)


@functools.partial(jax.jit, static_argnums=0)
def _compared(shown: _Range) -> Array:
    """The bool array `[1, 1, Sq, Sk]` that is True from start up to end."""
    at = jnp.arange(shown.keys, dtype=jnp.int32)[None]
    start, end = shown.ends(jnp)
    return ((at >= start[:, None]) & (at < end[:, None]))[None, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _listed(shown: _Range, total: int) -> tuple[Array, Array, Array]:
    """`indices`, `ptr` and `data` of what is shown. On the device: it may be a lot."""
    start, end = shown.ends(jnp)
    counts = end - start
    ptr = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    row = jnp.repeat(jnp.arange(counts.size, dtype=jnp.int32), counts, total_repeat_length=total)
    return jnp.arange(total, dtype=jnp.int32) + (start - ptr[:-1])[row], ptr, jnp.ones(total, bool)


@functools.partial(jax.jit, static_argnames=("rows", "keys", "window"))
def _band_by_triangles(rows: int, keys: int, window: int) -> Array:
    """The bool array `[1, 1, Sq, Sk]` of `window` keys up to a row's position: a triangle less a smaller one."""
    shown = jnp.zeros((rows, keys), bool)
    for first, value in ((keys - rows - window + 1, True), (keys - rows + 1, False)):
        shown = shown.at[jnp.triu_indices(rows, first, keys)].set(value)
    return shown[None, None]


@functools.partial(jax.jit, static_argnames=("count", "causal"))
def _top_keys(q: Array, k: Array, scale: Any, allowed: Array | None, count: int, causal: bool) -> Array:
    """The keys with the `count` largest logits of each row, int32 `[B, H, Sq, count]`; -1 where there are fewer."""
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    batch, rows, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    q = q.astype(dtype).reshape(batch, rows, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", q, k.astype(dtype), precision=lax.Precision.HIGHEST)
    logits = logits.reshape(batch, heads, rows, keys) * jnp.asarray(scale, dtype)
    if causal:
        later = jnp.arange(keys)[None] > jnp.arange(rows)[:, None] + (keys - rows)
        logits = jnp.where(later[None, None], -jnp.inf, logits)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    largest, at = lax.top_k(logits, count)
    return jnp.where(largest > -jnp.inf, at, -1)


@functools.partial(jax.jit, static_argnames="keys")
def _scatter_keys(top: Array, keys: int) -> Array:
    """The bool array `[B, H, Sq, Sk]` that is True at the keys named, `[B, H, Sq, n]`."""
    flat = jnp.where(top < 0, keys, top).reshape(math.prod(top.shape[:3]), -1)
    shown = jnp.zeros((flat.shape[0], keys), bool)
    shown = shown.at[jnp.arange(flat.shape[0])[:, None], flat].set(True, mode="drop")
    return shown.reshape(*top.shape[:3], keys)
