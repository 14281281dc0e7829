"""A cache of keys and values in pages: how new tokens get there."""

import functools
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import Array

from ..base import names
from ..base.arguments import AnyArray, accumulator
from ..tiles.ragged import sequence_of_rows
from . import inputs


@overload
def write_pages(
    k_pages: AnyArray, v_pages: AnyArray, k: AnyArray, v: AnyArray, page_table: AnyArray, lengths: AnyArray, *,
    cu_q_lens: AnyArray | None = None, k_scale: float | None = None, v_scale: float | None = None,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def write_pages(
    k_pages: AnyArray, v_pages: AnyArray, k: AnyArray, v: AnyArray, page_table: AnyArray, lengths: AnyArray, *,
    cu_q_lens: AnyArray | None = None, k_scale: AnyArray, v_scale: AnyArray,
) -> tuple[Array, Array, Array, Array]: ...  # fmt: skip
@overload
def write_pages(
    k_pages: AnyArray, v_pages: AnyArray | None, k: AnyArray, v: AnyArray | None, page_table: AnyArray,
    lengths: AnyArray, *,
    cu_q_lens: AnyArray | None = None, k_scale: AnyArray | float | None = None, v_scale: AnyArray | float | None = None,
) -> tuple[AnyArray | float | None, ...]: ...  # fmt: skip
@names.by_our_names
def write_pages(
    k_pages: AnyArray,
    v_pages: AnyArray | None,
    k: AnyArray,
    v: AnyArray | None,
    page_table: AnyArray,
    lengths: AnyArray,
    *,
    cu_q_lens: AnyArray | None = None,
    k_scale: AnyArray | float | None = None,
    v_scale: AnyArray | float | None = None,
) -> tuple[AnyArray | float | None, ...]:
    """Puts the newest keys and values of each sequence where `paged_attention` looks for them.

    lengths count the new tokens: token i of r new ones of sequence b goes to position `lengths[b] - r + i`, which is in
    page `page_table[b, position // page_size]`. It is done in place: k_pages, v_pages, k_scale and v_scale are donated,
    so use what is returned; within jit and scan nothing is copied where the caller's own arrays are donated or carried.
    (But XLA on CPUs copies pages of float8.)

    A cache in int8 or float8 has scales for each page and head, arrays that begin as anything: the page whose first
    token is written starts afresh. Where a token needs a larger scale than its page has, that grows, and what the page
    holds is written anew. In float8 scales are powers of two, so nothing is lost by that; in int8 each time adds an
    error of up to half a step. Pages that no token goes to are neither read nor written. A scale that is a number is
    taken as it is, and what it cannot hold is clipped. int8 has no NaN: under a number it is written as 0; a scale of
    the page's own becomes NaN.

    A page that is written must be one sequence's alone. Where two hold it (a common prefix), copy it first: else what
    one writes, the other reads; and of two tokens for one place, either may stay.

    Args:
      k_pages: `[num_pages, page_size, Hkv, D]`, as in `paged_attention`.
      v_pages: `[num_pages, page_size, Hkv, Dv]` in its dtype; None: the values are columns of the keys (latent
        attention), and v is None too.
      k: `[B, Sq, Hkv, D]`, Sq new tokens of each sequence; `[B, Hkv, D]`, one; or `[T, Hkv, D]` with cu_q_lens. Any
        floating dtype; it is cast.
      v: the same with Dv.
      page_table: integers `[B, n]`. Pages that a window has left behind are best named -1.
      lengths: integers `[B]`: tokens of each sequence, the new ones included. 0: no sequence is there, nothing is
        written.
      cu_q_lens: integers `[B + 1]`: new tokens `cu_q_lens[b]` to `cu_q_lens[b + 1]` are sequence b's; what is behind
        the last is written nowhere.
      k_scale: the dequantization scale: keys are k_pages * k_scale. A number, or (int8, float8) float32 `[num_pages,
        Hkv]`.
      v_scale: the same of v_pages.

    Returns:
      (k_pages, v_pages), or, if a scale is an array, (k_pages, v_pages, k_scale, v_scale). Under jit nobody can look at
      numbers: what would go to a negative position, behind the table or to a page that does not exist is dropped, and
      all of it where cu_q_lens do not fit.

    Raises:
      TypeError, ValueError: an argument does not fit; what is known goes to no place, or to a page that another
        sequence holds.

    Examples:
      >>> k_pages, v_pages = jnp.zeros((2, 8, 16, 1, 8))
      >>> table, lengths = jnp.array([[3, 0], [5, 7]]), jnp.array([9, 20])  # one token more than before
      >>> k_pages, v_pages = write_pages(k_pages, v_pages, jnp.ones((2, 1, 8)), jnp.ones((2, 1, 8)), table, lengths)
      >>> k_pages[3, 8, 0, 0], k_pages[7, 3, 0, 0]
      (Array(1., dtype=float32), Array(1., dtype=float32))
    """
    held = {"k_pages": inputs.pages_of("k_pages", k_pages)}
    if v_pages is not None:
        held["v_pages"] = inputs.pages_of("v_pages", v_pages)
        inputs.check_pages(held["k_pages"], held["v_pages"])
    ragged = cu_q_lens is not None
    new = inputs.new_tokens(held, {"k": k, "v": v}, ragged=ragged)
    lengths = inputs.lengths_of(lengths, None if ragged else new["k"].shape[0])
    batch = lengths.shape[0]
    page_table = inputs.table_of(page_table, batch)
    starts = inputs.starts_of(cu_q_lens, batch) if ragged else None
    if not ragged:
        new = {name: x[:, None] if x.ndim == 3 else x for name, x in new.items()}
    rows = new["k"].shape[0 if ragged else 1]
    scales = inputs.page_scales({"k_scale": k_scale, "v_scale": v_scale}, held)
    count, size, *_ = held["k_pages"].shape
    inputs.check_writes(page_table, lengths, starts, rows, (count, size))

    by_page = {name: jnp.asarray(x) for name, x in scales.items() if x.ndim == 2}
    numbers = {name: x for name, x in scales.items() if name not in by_page}
    if page_table.size and new["k"].size and held["k_pages"].size:
        held, by_page = _write((held, by_page), new, numbers, page_table, lengths, starts)
    results = held["k_pages"], held.get("v_pages")
    return (*results, by_page.get("k_scale", k_scale), by_page.get("v_scale", v_scale)) if by_page else results


@functools.partial(jax.jit, donate_argnums=0, inline=True)
def _write(held, new, numbers, table, lengths, starts) -> tuple[dict[str, Array], dict[str, Array]]:
    """held: pages, and scales by page; numbers: other scales. starts: None if all sequences have as many new tokens."""
    pages, by_page = held
    count, size, *_ = pages["k_pages"].shape
    if starts is None:
        batch, rows = new["k"].shape[:2]
        starts = jnp.arange(batch + 1, dtype=jnp.int32) * rows
        new = {name: x.reshape(batch * rows, *x.shape[2:]) for name, x in new.items()}
    tokens = new["k"].shape[0]
    own = jnp.where(inputs.bad_starts(starts, tokens), 0, jnp.diff(starts))
    written, scales = {}, {}
    for name in new:
        cache, scale = pages[f"{name}_pages"], by_page.get(f"{name}_scale")
        if scale is None:
            page, place = _tokens(table, lengths, starts, own, tokens, (count, size))
            x = _narrowed(new[name], numbers.get(f"{name}_scale"), cache.dtype)
            written[f"{name}_pages"] = cache.at[page, place].set(x, mode="drop")
        else:
            page, first, token, fresh = _written_pages(table, lengths, starts, own, tokens, (count, size))
            content, scale_of_page = _anew(cache, scale, new[name], page, first, token, fresh)
            written[f"{name}_pages"] = cache.at[page].set(content, mode="drop")
            scales[f"{name}_scale"] = scale.at[page].set(scale_of_page, mode="drop")
    return written, scales


def _tokens(table, lengths, starts, own, tokens: int, pages: tuple[int, int]) -> tuple[Array, Array]:
    """`[T]`: the page that each new token goes to, none: the number of pages; and its place there."""
    row, whose = jnp.arange(tokens, dtype=jnp.int32), sequence_of_rows(starts, tokens)
    there, whose = whose < lengths.shape[0], jnp.minimum(whose, lengths.shape[0] - 1)
    at = jnp.where(there & (own[whose] > 0), lengths[whose] - starts[whose + 1] + row, -1)
    return _page(table, whose, at // pages[1], pages[0]), at % pages[1]


def _page(table, whose, number, pages: int) -> Array:
    """The pages that have these numbers in their sequences; those that are none have the number of pages."""
    page = table[whose, jnp.clip(number, 0, table.shape[1] - 1)]
    return jnp.where((number >= 0) & (number < table.shape[1]) & (page >= 0) & (page < pages), page, pages)


def _written_pages(table, lengths, starts, own, tokens: int, pages: tuple[int, int]) -> tuple[Array, ...]:
    """Those that some new token goes to, `[N]`: the page, none: the number of pages; and how many tokens it holds that
    are not new. `[N, page_size]`: which new token each place gets, and whether it gets one.

    r tokens touch at most r pages, and at most (r - 2) // page_size + 2.
    """
    count, size = pages
    batch = lengths.shape[0]
    begin = lengths - own  # if negative, so is the number of its page, which is then none
    touched = jnp.where(own > 0, (lengths - 1) // size - begin // size + 1, 0)
    ends = jnp.append(jnp.zeros((1,), jnp.int32), jnp.cumsum(touched, dtype=jnp.int32))
    n = min(tokens, tokens // size + 2 * batch)
    whose = sequence_of_rows(ends, n)
    there, whose = whose < batch, jnp.minimum(whose, batch - 1)
    number = begin[whose] // size + jnp.arange(n, dtype=jnp.int32) - ends[whose]
    page = _page(table, whose, jnp.where(there, number, -1), count)
    at = (number * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
    token = starts[whose + 1][:, None] - (lengths[whose][:, None] - at)
    return page, begin[whose] - number * size, token, (at >= begin[whose][:, None]) & (at < lengths[whose][:, None])


def _anew(cache, scale, x, page, first, token, fresh) -> tuple[Array, Array]:
    """What pages hold after a write, `[N, page_size, Hkv, D]`, and their scales `[N, Hkv]`."""
    at = jnp.minimum(page, cache.shape[0] - 1)
    x = jnp.where(fresh[..., None, None], x[jnp.clip(token, 0, x.shape[0] - 1)].astype(jnp.float32), 0)
    needed = jnp.abs(x).max((1, 3)) / _largest(cache.dtype)
    if cache.dtype != jnp.int8:  # written anew at another power of two, what a page holds stays what it was
        needed = _power_of_two(needed)
    before = jnp.where(first[:, None] > 0, scale[at], 0)
    after = jnp.maximum(before, needed)
    divisor = jnp.where(after == 0, 1, after)[:, None, :, None]
    kept = jnp.arange(cache.shape[1], dtype=jnp.int32) < first[:, None]
    old = cache[at].astype(jnp.float32) * (before[:, None, :, None] / divisor)
    return _rounded(jnp.where(kept[..., None, None], old, x / divisor), cache.dtype), after


def _power_of_two(x: Array) -> Array:
    """The least one that is not below x; 0, inf and NaN as they are."""
    part, exponent = jnp.frexp(x)
    exponent = jnp.where(part == 0.5, exponent - 1, exponent)
    return jnp.where((x > 0) & jnp.isfinite(x), jnp.ldexp(jnp.ones_like(x), exponent), x)


def _narrowed(x: Array, scale: Array | None, dtype: Any) -> Array:
    """x as a cache holds it."""
    if scale is not None:
        x = x.astype(accumulator(x.dtype))
        x = x / scale.reshape(()).astype(x.dtype)
    return _rounded(x.astype(jnp.float32), dtype) if dtype.name in inputs.NARROW else x.astype(dtype)


def _rounded(x: Array, dtype: Any) -> Array:
    x = jnp.clip(x, -_largest(dtype), _largest(dtype))
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)


def _largest(dtype: Any) -> float:
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
