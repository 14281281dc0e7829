"""The arguments of paged and ragged calls and of `write_pages`: checked, and brought into the form that the primitives
take. The messages are here."""

import contextlib
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base import arguments
from ..base.arguments import describe
from ..base.config import Config
from ..base.known import full, is_known, now
from ..base.tokens import clipped
from ..tiles.ragged import sequence_of_rows

NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")
"""The dtypes of a cache whose numbers may have a dequantization scale of each page: keys are k_pages * k_scale."""

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
    arguments.check_static(name, x)
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
        if not 1 <= x.shape[-1] <= arguments.MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name} must be from 1 to {arguments.MAX_HEAD_DIM}, got {x.shape[-1]}")


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
    page_table = _int32("page_table", page_table, "[B, pages of a sequence]")
    if page_table.ndim != 2 or page_table.shape[0] != batch:
        raise ValueError(f"page_table must have shape [{batch}, pages of a sequence], got {page_table.shape}")
    return page_table


def lengths_of(lengths: Any, batch: int | None = None) -> Any:
    """lengths `[B]` in int32."""
    lengths = _int32("lengths", lengths, "[B]")
    if lengths.ndim != 1 or batch not in (None, lengths.shape[0]):
        raise ValueError(f"lengths must have shape [{'B' if batch is None else batch}], got {lengths.shape}")
    return lengths


def starts_of(starts: Any, batch: int | None = None, name: str = "cu_q_lens") -> Any:
    """cu_q_lens or cu_k_lens `[B + 1]` in int32."""
    starts = _int32(name, starts, "[B + 1]")
    if starts.ndim != 1 or not starts.size or batch not in (None, starts.shape[0] - 1):
        wanted = "" if batch is None else f" = [{batch + 1}]"
        raise ValueError(
            f"{name} must have shape [B + 1]{wanted} (where the {_ROWS[name]} of each sequence begin, and the last "
            f"end), got {starts.shape}"
        )
    return starts


_ROWS = {"cu_q_lens": "rows", "cu_k_lens": "keys"}


def check_starts(starts: Any, rows: int, name: str = "cu_q_lens", of: str = "q") -> None:
    """Raises if starts are known, and do not fit the rows that there are."""
    if starts is not None and is_known(starts):
        values = np.asarray(starts)
        wrong = np.flatnonzero(np.append(values[:1] != 0, np.diff(values) < 0) | (values > rows))
        if wrong.size:
            begin, end = max(int(wrong[0]) - 1, 0), min(int(wrong[0]) + 2, values.size)
            raise ValueError(
                f"{name} must rise from 0 to at most the {rows} {_ROWS[name]} of {of}, got {name}[{begin}:{end}] = "
                f"{values[begin:end].tolist()}"
            )


def bad_starts(starts: Any, rows: int) -> Array:
    """Whether starts are what `check_starts` refuses."""
    starts = jnp.asarray(starts)
    return (starts[0] != 0) | (jnp.diff(starts) < 0).any() | (starts[-1] > rows)


def _int32(name: str, x: Any, wanted: str) -> Any:
    """x as int32, if it is an array of integers: of those that int32 does not hold the nearest, which fit nowhere. What
    is known stays so, under jit too."""
    if not arguments.are_integers(x):
        hint = "; pass jnp.asarray of it" if isinstance(x, list | tuple) else ""
        raise TypeError(f"{name} must be an array {wanted} of integers, got {describe(x)}{hint}")
    arguments.check_static(name, x)
    if x.dtype == jnp.int32:
        return x
    if isinstance(x, np.ndarray):
        least = max(arguments.INT32.min, np.iinfo(x.dtype).min)
        return np.clip(x, least, min(arguments.INT32.max, np.iinfo(x.dtype).max)).astype(np.int32)
    with now() if is_known(x) else contextlib.nullcontext():
        return clipped(x, arguments.INT32.min)


def page_scale(name: str, scale: Any, pages: Array) -> Array | None:
    """k_scale or v_scale as `[1|pages, 1|Hkv, 1, 1]` in fp32."""
    own = name[0] + "_pages"
    if scale is None:
        if pages.dtype == jnp.int8:
            raise ValueError(
                f"{own} of int8 need {name}, by which their numbers are multiplied: a number or an array [num_pages, "
                "Hkv] (`write_pages` makes it)"
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


def page_scales(scales: dict[str, Any], held: dict[str, Array]) -> dict[str, Any]:
    """Those of `write_pages` that are given, of the pages that there are: by page `[num_pages, Hkv]`, or one number."""
    made = {}
    for name, scale in scales.items():
        pages = held.get(f"{name[0]}_pages")
        if pages is None:
            if scale is not None:
                raise ValueError(f"{name} is of {name[0]}_pages, which is None; leave it out")
            continue
        one = page_scale(name, scale, pages)
        if scale is None or getattr(scale, "ndim", 0) == 0:
            made |= {} if one is None else {name: one}
            continue
        made[name] = scale
        if pages.dtype.name not in NARROW:
            raise TypeError(
                f"{name} must be a number or None for pages in {pages.dtype.name}, which need no scale of their own, "
                f"got an array {scale.shape}"
            )
        if scale.dtype != jnp.float32:
            raise TypeError(f"{name} must be float32 to be written to, got {scale.dtype.name}; cast it")
    return made


def new_tokens(held: dict[str, Array], new: dict[str, Any], *, ragged: bool) -> dict[str, Array]:
    """k and, if there are v_pages, v."""
    if (new["v"] is None) != ("v_pages" not in held):
        came, missing = ("v_pages", "v") if new["v"] is None else ("v", "v_pages")
        raise ValueError(f"v_pages and v go together, got {came} and no {missing}; both are None for a latent cache")
    made = {name: arguments.array(name, x) for name, x in new.items() if x is not None}
    for name, x in made.items():
        wanted, pages = f"Hkv, {'D' if name == 'k' else 'Dv'}]", held[f"{name}_pages"]
        if ragged and x.ndim != 3:
            raise ValueError(f"{name} must have shape [T, {wanted} with cu_q_lens, got {x.shape}")
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must have shape [B, Sq, {wanted}, [B, {wanted} (one token of each sequence), or [T, {wanted} "
                f"with cu_q_lens, got {x.shape}"
            )
        if x.shape[-2:] != pages.shape[2:]:
            raise ValueError(
                f"{name} must have the heads and the head_dim of {name}_pages, {pages.shape[2:]}, got {x.shape[-2:]} "
                f"(shapes: {name} {x.shape}, {name}_pages {pages.shape})"
            )
        if x.shape[:-1] != made["k"].shape[:-1]:
            raise ValueError(f"v must have the tokens of k, {made['k'].shape[:-2]}, got {x.shape[:-2]}")
    return made


def check_values(table: Any, lengths: Any, starts: Any, rows: int, left: int | None, pages: tuple[int, int]) -> None:
    """Raises if page numbers, lengths or starts that are known do not fit. rows: of all sequences, or of each if there
    are no starts. left: how far a row sees, None: all. pages: their number, and how many keys each has."""
    width = table.shape[1]
    _check_lengths(lengths, width, pages[1])
    check_starts(starts, rows)
    if not (is_known(table) and is_known(lengths) and is_known(starts)):
        return
    _check_own(np.asarray(lengths), rows if starts is None else np.diff(np.asarray(starts)))
    first, end = (np.asarray(x) for x in live_pages(np, lengths, starts, rows, left, pages[1]))
    at = np.arange(width)
    numbers = np.asarray(table)
    wrong = np.argwhere((at >= first[:, None]) & (at < end[:, None]) & ((numbers < 0) | (numbers >= pages[0])))
    if wrong.size:
        b, i = wrong[0]
        raise ValueError(
            f"page_table must name pages from 0 to {pages[0] - 1}, got {numbers[b, i]} as page {i} of sequence {b}, "
            f"whose rows see pages {first[b]} to {end[b] - 1}"
        )


def check_writes(table: Any, lengths: Any, starts: Any, rows: int, pages: tuple[int, int]) -> None:
    """Raises if new tokens, rows of each sequence or of all, would go to no place, or to a page that is not one
    sequence's alone, as far as that is known."""
    _check_lengths(lengths, table.shape[1], pages[1])
    check_starts(starts, rows, of="k")
    if not (is_known(table) and is_known(lengths) and is_known(starts)):
        return
    lengths, numbers, at = np.asarray(lengths), np.asarray(table), np.arange(table.shape[1])
    own = _check_own(lengths, rows if starts is None else np.diff(np.asarray(starts)))
    held = at < -(-lengths // pages[1])[:, None]
    written = held & (at >= ((lengths - own) // pages[1])[:, None]) & (own > 0)[:, None]
    there = (numbers >= 0) & (numbers < pages[0])
    if (wrong := np.argwhere(written & ~there)).size:
        b, i = wrong[0]
        raise ValueError(
            f"page_table must name pages from 0 to {pages[0] - 1}, got {numbers[b, i]} as page {i} of sequence {b}, "
            f"to which new tokens go"
        )
    holders = np.bincount(numbers[held & there], minlength=pages[0])
    if (wrong := np.argwhere(written & (holders[np.where(there, numbers, 0)] > 1))).size:
        b, i = wrong[0]
        others = [int(c) for c, j in np.argwhere(held & (numbers == numbers[b, i])) if (c, j) != (b, i)]
        raise ValueError(
            f"page_table must give new tokens pages that are one sequence's alone, got {numbers[b, i]} as page {i} of "
            f"sequence {b}, which sequence {others[0]} holds too; copy it to a page of its own, or put -1 where a "
            "window has left it behind"
        )


def _check_own(lengths: np.ndarray, rows: Any) -> np.ndarray:
    """How many new tokens each sequence that is there has; raises if it is shorter."""
    own = np.where(lengths > 0, rows, 0)
    if (wrong := np.flatnonzero(own > lengths)).size:
        b = wrong[0]
        raise ValueError(
            f"lengths must count the new tokens too, got {lengths[b]} of sequence {b}, which has {own[b]} new ones"
        )
    return own


def _check_lengths(lengths: Any, width: int, size: int) -> None:
    capacity = width * size
    if is_known(lengths) and (wrong := _outside(lengths, 0, capacity)) is not None:
        raise ValueError(
            f"lengths must be from 0 to {capacity}, the keys of {width} pages of {size}, got {wrong[1]} of sequence "
            f"{wrong[0]}{'; widen page_table' if wrong[1] > 0 else ''}"
        )


def _outside(x: Any, least: int, largest: int) -> tuple[int, int] | None:
    """Where the first number is that is not within bounds, and the number."""
    values = np.asarray(x)
    wrong = np.flatnonzero((values < least) | (values > largest))
    return (int(wrong[0]), int(values[wrong[0]])) if wrong.size else None


def live_pages(np_or_jnp: Any, lengths, starts, rows: int, left: int | None, size: int) -> tuple[Any, Any]:
    """The first page that some row of each sequence sees, and the one behind the last."""
    lengths = np_or_jnp.asarray(lengths)
    own = rows if starts is None else np_or_jnp.diff(np_or_jnp.asarray(starts))
    first = 0 * lengths if left is None else np_or_jnp.maximum(lengths - own - left, 0) // size
    return first, np_or_jnp.where(own * (0 * lengths + 1) > 0, -(-lengths // size), 0)


def bad_sequences(table, lengths, starts, rows: int, left: int | None, pages: tuple[int, int]) -> Array | None:
    """`[B]`: which sequences have what `check_values` refuses; None where that has looked at all of them."""
    if is_known(table) and is_known(lengths) and is_known(starts):
        return None
    first, end = live_pages(jnp, lengths, starts, rows, left, pages[1])
    at = jnp.arange(table.shape[1], dtype=jnp.int32)
    wrong = (at >= first[:, None]) & (at < end[:, None]) & ((table < 0) | (table >= pages[0]))
    bad = wrong.any(1) | (lengths < 0) | (lengths > table.shape[1] * pages[1])
    if starts is not None and not is_known(starts):
        bad |= bad_starts(starts, rows)
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


def check_packed(q: Array, k: Array, v: Array, *, together: bool) -> None:
    """Raises unless q, k and v are rows of sequences. together: their sequences are the same."""
    for name, x, wanted in (("q", q, "[T, H, D]"), ("k", k, "[Tk, Hkv, D]"), ("v", v, "[Tk, Hkv, Dv]")):
        if x.ndim != 3:
            raise ValueError(
                f"{name} must have shape {wanted}, all sequences in one row, got {x.shape}; `masks.pack` packs a "
                "padded batch, and jax.vmap takes several rows with sequences of their own"
            )
    if together and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k must have as many rows as q where there is no cu_k_lens, got {k.shape[0]} and {q.shape[0]}; give "
            "cu_k_lens"
        )


def of_forward(config: Any, splits: Any, implementation: Any) -> dict[str, Config]:
    """config for the one pass that there is, and how many programs share the keys of a tile of rows."""
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config must be a Config of the forward kernel, or None (tuned), got {config!r}")
    config = config or Config()
    if splits is None:
        return {"fwd": config}
    if not arguments.is_integer(splits) or not 1 <= splits <= 256:
        raise ValueError(f"splits must be from 1 to 256, or None (chosen), got {splits!r}")
    if implementation == "xla":
        raise ValueError(
            'splits speaks to the Triton kernels and means nothing to implementation="xla", '
            f"got splits={splits}; leave one of them out"
        )
    if config.num_splits not in (None, splits):
        raise ValueError(f"splits={splits} contradicts config.num_splits={config.num_splits}; give one of them")
    return {"fwd": dataclasses.replace(config, num_splits=int(splits))}
