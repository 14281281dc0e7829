"""What there is of each token: segment ids, positions; and lengths. Checked, and brought into the form of operands."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .arguments import INT32, are_integers, flat, int32_array, integer_array, is_integer, is_wide
from .known import sent


def integers(name: str, x: Any, batch: tuple[int, ...], axes: tuple[int, ...], wanted: str) -> Any:
    """Integers that broadcast to `[*batch, *axes]`, in their own dtype: `[1|B, ...]`."""
    if is_integer(x):
        x = sent(np.asarray(x, np.int32))
    return flat(name, integer_array(name, x, wanted), batch, axes, wanted)


def lengths(name: str, x: Any, batch: tuple[int, ...]) -> Array:
    """`q_lengths` or `kv_lengths` as int32 `[1|B, 1, 1, 1]`."""
    if is_integer(x):
        x = min(max(int(x), 0), INT32.max)  # no sequence is longer
    elif isinstance(x, np.ndarray) and are_integers(x):
        x = np.clip(x, 0, INT32.max).astype(np.int32)
    return clipped(integers(name, x, batch, (), "[*batch]"), 0).reshape(-1, 1, 1, 1)


def positions(q: Any, kv: Any, batch: tuple[int, ...], seqlen_q: int, seqlen_k: int) -> dict[str, Array]:
    """Positions as the operands `q_positions` and `kv_positions`; none if there are none."""
    if (q is None) != (kv is None):
        missing, index = ("q_positions", "Sq") if q is None else ("kv_positions", "Sk")
        raise ValueError(
            f"q_positions and kv_positions must be given together, got no {missing}; where positions are the index, "
            f"pass jnp.arange({index})"
        )
    made: dict[str, Array] = {}
    for name, x, seqlen in (("q_positions", q, seqlen_q), ("kv_positions", kv, seqlen_k)) if q is not None else ():
        wanted = f"[*batch, {'seqlen_q' if name[0] == 'q' else 'seqlen_k'}]"
        x = clipped(integers(name, int32_array(name, x, wanted), batch, (seqlen,), wanted), INT32.min)
        made[name] = x[:, None, :, None] if name[0] == "q" else x[:, None, None, :]
    return made


@functools.partial(jax.jit, static_argnums=1, inline=True)
def clipped(x: Array, least: int) -> Array:
    """Integers as int32, the nearest one of those from `least` on."""
    least = max(least, int(jnp.iinfo(x.dtype).min))
    return (jnp.clip(x, least, INT32.max) if is_wide(x.dtype) else x).astype(jnp.int32)


def segments(q_ids: Any, kv_ids: Any, batch: tuple[int, ...], seqlen_q: int, seqlen_k: int) -> dict[str, Array]:
    """Segment ids as the operands `q_segments` and `kv_segments`; none if there are none."""
    if q_ids is None and kv_ids is None:
        return {}
    if q_ids is None or (kv_ids is None and seqlen_q != seqlen_k):
        missing = "q_segment_ids" if q_ids is None else "kv_segment_ids"
        raise ValueError(
            f"q_segment_ids and kv_segment_ids go together, got no {missing} (only kv_segment_ids may be left out, and "
            f"only where Sq == Sk; here Sq = {seqlen_q}, Sk = {seqlen_k})"
        )
    q_ids, kv_ids = _renumbered(q_ids, q_ids if kv_ids is None else kv_ids)
    q_ids = integers("q_segment_ids", q_ids, batch, (seqlen_q,), "[*batch, seqlen_q]")
    kv_ids = integers("kv_segment_ids", kv_ids, batch, (seqlen_k,), "[*batch, seqlen_k]")
    q_ids, kv_ids = _narrow(q_ids, kv_ids)
    return {"q_segments": q_ids[:, None, :, None], "kv_segments": kv_ids[:, None, None, :]}


def _renumbered(q_ids: Any, kv_ids: Any) -> tuple[Any, Any]:
    """Segment ids of Python and NumPy, which JAX would cut off at 32 bits. If some are longer, all are numbered anew,
    in order, so that equal ones, and no others, stay equal."""
    known = [np.asarray(x) if is_integer(x) else x for x in (q_ids, kv_ids)]
    here = [isinstance(x, np.ndarray) and are_integers(x) for x in known]
    ends = [(int(x.min(initial=0)), int(x.max(initial=0))) for x in itertools.compress(known, here)]
    if all(low >= INT32.min and high <= INT32.max for low, high in ends):
        return q_ids, kv_ids
    if not all(here):
        raise ValueError(
            "q_segment_ids and kv_segment_ids must fit into int32 where one of them is NumPy's and the other JAX's, "
            "got larger ones; make both NumPy arrays, or number the segments from 0"
        )
    words = [np.where(x < 0, 0, x).astype(np.uint64) for x in known]
    ordered = np.unique(np.concatenate([x.ravel() for x in words]))
    q_ids, kv_ids = (
        np.where(x < 0, -1, np.searchsorted(ordered, y)).astype(np.int32) for x, y in zip(known, words, strict=True)
    )
    return q_ids, kv_ids


@functools.partial(jax.jit, inline=True)
def _narrow(q_ids: Array, kv_ids: Array) -> tuple[Array, Array]:
    """Segment ids as int32; JAX's arrays of longer ones are numbered anew likewise."""
    if not (is_wide(q_ids.dtype) or is_wide(kv_ids.dtype)):
        return q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    unsigned = f"uint{8 * max(q_ids.dtype.itemsize, kv_ids.dtype.itemsize)}"
    batch = max(q_ids.shape[0], kv_ids.shape[0])
    words = [jnp.broadcast_to(x.astype(unsigned), (batch, x.shape[1])) for x in (q_ids, kv_ids)]
    ordered = jnp.sort(jnp.concatenate(words, 1), 1)
    place = jax.vmap(lambda ordered, x: jnp.searchsorted(ordered, x, method="sort").astype(jnp.int32))
    q_ids, kv_ids = (jnp.where(x < 0, -1, place(ordered, y)) for x, y in zip((q_ids, kv_ids), words, strict=True))
    return q_ids, kv_ids
