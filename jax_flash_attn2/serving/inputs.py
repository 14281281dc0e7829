"""The arguments of a paged call: checked, and brought into the form that the primitives take. The messages are here."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments
from ..base.arguments import Implementation, describe
from ..base.config import Config
from ..base.known import full, is_known

NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")
"""The dtypes of a cache whose numbers count what a scale says."""

_MAX_HEAD_DIM = 1024
_LEAST_PAGE, _LARGEST_PAGE = 16, 256


def pages_of(name: str, x: Any) -> Array:
    """k_pages or v_pages."""
    if not isinstance(x, Array | np.ndarray):
        raise TypeError(f"{name} must be an array [num_pages, page_size, Hkv, D], got {type(x).__name__}")
    if x.dtype.name not in (*arguments.DTYPES, *NARROW):
        raise TypeError(
            f"{name} must have one of the dtypes {', '.join((*arguments.DTYPES, *NARROW))}, got {x.dtype.name}"
        )
    if x.ndim != 4:
        raise ValueError(f"{name} must have shape [num_pages, page_size, Hkv, D], got {x.shape}")
    size = x.shape[1]
    if not _LEAST_PAGE <= size <= _LARGEST_PAGE or size & (size - 1):
        raise ValueError(
            f"{name} must have pages of a power of two from {_LEAST_PAGE} to {_LARGEST_PAGE} tokens, got {size} (shape "
            f"{x.shape} is [num_pages, page_size, Hkv, D])"
        )
    return jnp.asarray(x)


def check_pages(k: Array, v: Array) -> None:
    """Raises unless k_pages and v_pages fit each other."""
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v_pages must have k_pages' pages, page size and heads {k.shape[:3]}, got {v.shape[:3]} (shapes "
            f"[num_pages, page_size, Hkv, D]: k_pages {k.shape}, v_pages {v.shape})"
        )
    if v.dtype != k.dtype:
        raise TypeError(f"v_pages must have the dtype of k_pages, {k.dtype.name}, got {v.dtype.name}; cast one")


def check_queries(q: Array, k: Array, v: Array) -> None:
    """Raises unless q [..., H, D] fits the pages."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"k_pages must have q's head_dim {q.shape[-1]}, got {k.shape[-1]} (shapes: q {q.shape}, k_pages {k.shape})"
        )
    heads, kv_heads = q.shape[-2], k.shape[2]
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of the pages, got {heads} and {kv_heads} (shapes: q "
            f"{q.shape}, k_pages {k.shape})"
        )
    for name, x in (("q and k_pages", k), ("v_pages", v)):
        if not 1 <= x.shape[-1] <= _MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name} must be from 1 to {_MAX_HEAD_DIM}, got {x.shape[-1]}")


def latent_width(head_dim_v: Any, k: Array) -> int:
    """How many of the first columns of k_pages are the values."""
    if head_dim_v is None:
        raise ValueError(
            "v_pages=None means that values are the first columns of k_pages; say how many: head_dim_v=512"
        )
    if not arguments.is_integer(head_dim_v) or not 1 <= head_dim_v <= k.shape[3]:
        raise ValueError(f"head_dim_v must be from 1 to the head_dim of k_pages, {k.shape[3]}, got {head_dim_v!r}")
    return int(head_dim_v)


def table_of(page_table: Any, batch: int) -> Any:
    """page_table `[B, n]` in int32."""
    _check_int32("page_table", page_table, "[B, pages of a sequence]")
    if page_table.ndim != 2 or page_table.shape[0] != batch:
        raise ValueError(f"page_table must have shape [{batch}, pages of a sequence], got {page_table.shape}")
    return page_table


def lengths_of(lengths: Any, batch: int | None = None) -> Any:
    """lengths `[B]` in int32."""
    _check_int32("lengths", lengths, "[B]")
    if lengths.ndim != 1 or batch not in (None, lengths.shape[0]):
        raise ValueError(f"lengths must have shape [{'B' if batch is None else batch}], got {lengths.shape}")
    return lengths


def starts_of(cu_q_lens: Any, batch: int) -> Any:
    """cu_q_lens `[B + 1]` in int32."""
    _check_int32("cu_q_lens", cu_q_lens, "[B + 1]")
    if cu_q_lens.shape != (batch + 1,):
        raise ValueError(
            f"cu_q_lens must have shape [B + 1] = [{batch + 1}] (where the rows of each sequence begin, and the last "
            f"end), got {cu_q_lens.shape}"
        )
    return cu_q_lens


def _check_int32(name: str, x: Any, wanted: str) -> None:
    if not isinstance(x, Array | np.ndarray) or x.dtype != jnp.int32:
        raise TypeError(f"{name} must be an array {wanted} of int32, got {describe(x)}; cast it: x.astype(jnp.int32)")


def scale_of(name: str, scale: Any, pages: Array) -> Array | None:
    """k_scale or v_scale as `[1|pages, 1|Hkv, 1, 1]` in fp32."""
    own = name[0] + "_pages"
    if scale is None:
        if pages.dtype == jnp.int8:
            raise ValueError(
                f"{own} of int8 need {name}: what 1 counts, a number or an array [num_pages, Hkv] (`write_pages` "
                "makes it)"
            )
        return None
    if arguments.is_integer(scale) or isinstance(scale, float | np.floating):
        return full(float(scale), jnp.dtype(jnp.float32), (1, 1, 1, 1))
    wanted = (pages.shape[0], pages.shape[2])
    if not isinstance(scale, Array | np.ndarray) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"{name} must be a number or a floating array [num_pages, Hkv], got {describe(scale)}")
    if scale.shape not in ((), wanted):
        raise ValueError(f"{name} must be a number or have shape [num_pages, Hkv] = {wanted}, got {scale.shape}")
    return jnp.asarray(scale).astype(jnp.float32).reshape(*(scale.shape or (1, 1)), 1, 1)


def check_values(table: Any, lengths: Any, starts: Any, rows: int, left: int | None, pages: tuple[int, int]) -> None:
    """Raises if page numbers, lengths or starts that are known do not fit. rows: of all sequences, or of each if there
    are no starts. left: how far a row sees, None: all. pages: their number, and how many keys each has."""
    width = table.shape[1]
    capacity = width * pages[1]
    if is_known(lengths) and (wrong := _outside(lengths, 0, capacity)) is not None:
        raise ValueError(
            f"lengths must be from 0 to {capacity}, the keys of {width} pages of {pages[1]}, got {wrong[1]} of "
            f"sequence {wrong[0]}; widen page_table"
        )
    if starts is not None and is_known(starts):
        values = np.asarray(starts)
        if values[0] != 0 or (np.diff(values) < 0).any() or values[-1] > rows:
            raise ValueError(f"cu_q_lens must rise from 0 to at most the {rows} rows of q, got {values.tolist()}")
    if not (is_known(table) and is_known(lengths) and is_known(starts)):
        return
    first, end = (np.asarray(x) for x in live_pages(np, table, lengths, starts, rows, left, pages[1]))
    at = np.arange(width)
    numbers = np.asarray(table)
    wrong = np.argwhere((at >= first[:, None]) & (at < end[:, None]) & ((numbers < 0) | (numbers >= pages[0])))
    if wrong.size:
        b, i = wrong[0]
        raise ValueError(
            f"page_table must name pages from 0 to {pages[0] - 1}, got {numbers[b, i]} as page {i} of sequence {b}, "
            f"whose rows see pages {first[b]} to {end[b] - 1}"
        )


def _outside(x: Any, least: int, largest: int) -> tuple[int, int] | None:
    """Where the first number is that is not within bounds, and the number."""
    values = np.asarray(x)
    wrong = np.flatnonzero((values < least) | (values > largest))
    return (int(wrong[0]), int(values[wrong[0]])) if wrong.size else None


def live_pages(np_or_jnp: Any, table, lengths, starts, rows: int, left: int | None, size: int) -> tuple[Any, Any]:
    """The first page that some row of each sequence sees, and the one behind the last."""
    lengths = np_or_jnp.asarray(lengths)
    own = rows if starts is None else np_or_jnp.diff(np_or_jnp.asarray(starts))
    first = 0 * lengths if left is None else np_or_jnp.maximum(lengths - own - left, 0) // size
    return first, np_or_jnp.where(own * (0 * lengths + 1) > 0, -(-lengths // size), 0)


def bad_sequences(table, lengths, starts, rows: int, left: int | None, pages: tuple[int, int]) -> Array | None:
    """`[B]`: which sequences have what `check_values` refuses; None where that has looked at all of them."""
    if is_known(table) and is_known(lengths) and is_known(starts):
        return None
    first, end = live_pages(jnp, table, lengths, starts, rows, left, pages[1])
    at = jnp.arange(table.shape[1], dtype=jnp.int32)
    wrong = (at >= first[:, None]) & (at < end[:, None]) & ((table < 0) | (table >= pages[0]))
    bad = wrong.any(1) | (lengths < 0) | (lengths > table.shape[1] * pages[1])
    if starts is not None and not is_known(starts):
        bad |= (starts[0] != 0) | (jnp.diff(starts) < 0).any() | (starts[-1] > rows)
    return bad


def poisoned(o: Array, lse: Array, bad: Array | None, starts: Any) -> tuple[Array, Array]:
    """o `[B, Sq, H, Dv]` and lse `[B, H, Sq]`, or `[1, T, ...]` if there are starts, with NaN in the rows of bad
    sequences, and in those that are nobody's if all are bad."""
    if bad is None:
        return o, lse
    if starts is None:
        rows = bad[:, None]
    else:
        rows = jnp.append(bad, bad.all())[sequence_of_rows(starts, o.shape[1])][None]
    return jnp.where(rows[:, :, None, None], jnp.nan, o), jnp.where(rows[:, None], jnp.nan, lse)


def sequence_of_rows(starts: Array, rows: int) -> Array:
    """`[T]`: which sequence each row belongs to; B: none."""
    row = jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.asarray(starts)[1:], row, side="right", method="compare_all").astype(jnp.int32)


def no_gradient_error() -> TypeError:
    """Somebody differentiates a paged call."""
    return TypeError(
        "paged_attention has no gradient: a cache is no parameter; use varlen_attention or flash_attention on the keys "
        "and values themselves"
    )


def check_rows(q: Array, ragged: bool) -> None:
    """Raises unless q has the axes of a paged call."""
    if ragged and q.ndim != 3:
        raise ValueError(f"q must have shape [T, H, D] with cu_q_lens, got {q.shape}")
    if q.ndim not in (3, 4):
        raise ValueError(
            f"q must have shape [B, Sq, H, D], [B, H, D] (one row of each sequence), or [T, H, D] with cu_q_lens, got "
            f"{q.shape}"
        )


def with_splits(config: Any, splits: Any) -> Any:
    """config, and how many programs share the keys of a tile of rows."""
    if splits is None:
        return config
    if not arguments.is_integer(splits) or not 1 <= splits <= 256:
        raise ValueError(f"splits must be from 1 to 256, or None (chosen), got {splits!r}")
    if config is None:
        return {"fwd": Config(num_splits=int(splits))}
    if isinstance(config, Config) and config.num_splits in (None, splits):
        return {"fwd": dataclasses.replace(config, num_splits=int(splits))}
    raise ValueError(f"splits={splits} contradicts config={config!r}; give one of them")


def fitting(implementation: Implementation | None, q: Array) -> Implementation | None:
    """The implementation, unless it does not have q's dtype."""
    if implementation == "triton" and q.dtype == jnp.float64:
        raise TypeError('implementation="triton" has no float64, got float64 q; use "xla", or cast it')
    return implementation
