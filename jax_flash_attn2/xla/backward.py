"""The backward pass: p again from the row statistics, and all gradients in one run over the tiles."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base.config import Config
from ..base.operands import is_score_array, summed_to
from ..base.rounding import joined
from ..base.spec import Spec
from . import by_head, layout
from .logits import Logits
from .tiling import Tiling, loop


@jax.numpy_rank_promotion("allow")  # whatever the caller's code is held to
def backward(
    spec: Spec,
    config: Config,
    q: Array,
    k: Array,
    v: Array,
    operands: Mapping[str, Array],
    o: Array,
    stats: Sequence[Array],
    do: Array,
    dlse: Array | None,
    *,
    wanted: tuple[str, ...],
    groups: tuple[int, ...],
    lost: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients, from the output and the statistics that `forward` returned.

    Args:
      spec: as in `forward`, and so are config, q, k, v and operands.
      o: `[B, Sq, H, Dv]`, from `forward`.
      stats: `[B, H, Sq]` each, likewise: lse, or m and l where `spec.alters_logits`.
      do: `[B, Sq, H, Dv]`, the gradient of o.
      dlse: None or `[B, H, Sq]`, the gradient of lse.
      wanted: the operands to return the gradients of, in the order of `base.operands.DIFFERENTIABLE`.
      groups: for each of them, how many parts of the batch have a gradient of their own.
      lost: `[B, Sq, H, Dv]`, what o lost by rounding, from `forward`; None: o alone is read.

    Returns:
      dq, dk and dv, each of the shape and dtype of what it is the gradient of; then the gradients of the wanted
      operands, `[groups * n, ...]` for an operand `[n, ...]`.
    """
    if by_head.pays(spec, q, operands, wanted):
        args = spec, config, q, k, v, operands, o, stats, do, dlse
        return by_head.backward(backward, *args, wanted=wanted, groups=groups, lost=lost)
    t = Tiling(spec, config, q, k, operands, whole_rows=False)
    logits, groups_of = Logits(t, operands), dict(zip(wanted, groups, strict=True))
    q, k, v, do = logits.clear("q", q), logits.clear("kv", k), logits.clear("kv", v), logits.clear("q", do)
    args, scale = (q, k, v), logits.per_batch("scale").astype(t.dtype)
    # p is exp(s - shift) * norm. The product with norm moves from the tiles of p to the rows of do and delta.
    shift, norm, sees = _shift_and_norm(spec, stats)
    if (t.blocks_q, t.blocks_k) != (1, 1):  # else XLA is to find that p is what was computed forward
        shift = jnp.where(sees, shift, jnp.inf)
    do = do.astype(t.dtype) if norm is None else do.astype(t.dtype) * norm.swapaxes(1, 2)[..., None]
    do = t.rows(do)
    delta = jnp.sum(t.rows(joined(o, lost)) * do, -1)
    if dlse is not None:
        dlse = dlse.astype(t.dtype) if norm is None else dlse.astype(t.dtype) * norm
        delta -= layout.stats(jnp.where(sees, dlse, 0), spec.kv_heads)
    do *= spec.keep_scale
    shift_rows = layout.stats(shift, spec.kv_heads)
    q, k, v = t.rows(q.astype(t.dtype) * scale), t.rows(k), t.rows(v)

    def query_block(i, carry):
        dq, *sums = carry
        start_m = t.start_m(i)
        q_tile, do_tile, shift_tile, delta_tile = (t.query_tile(x, start_m) for x in (q, do, shift_rows, delta))
        shift_tile = t.hide_repeated_rows(shift_tile, i)

        def key_block(masked, j, carry):
            dq_tile, dkt, dvt, grads = carry
            start_n = t.start_n(j)
            k_tile = t.key_tile(k, start_n)
            products = t.dot(q_tile, k_tile, 3, 3)
            s, capped = logits.of(products, start_m, j, masked)
            p = jnp.exp(s - shift_tile[..., None])
            p_kept, dp = p, t.dot(do_tile, t.key_tile(v, start_n), 3, 3)
            if spec.drops:
                kept = logits.kept(start_m, start_n)
                p_kept, dp = (jnp.where(kept, x, 0) for x in (p, dp))
            ds = p * (dp - delta_tile[..., None])
            grads = _add_grads(grads, ds, logits, start_m, start_n)
            if capped is not None:
                ds *= 1 - capped * capped
            if logits.score_function is not None:
                of_scores = {name: x for name, x in grads.items() if is_score_array(name)}
                if of_scores:
                    grads = grads | logits.score_function.add_gradients(of_scores, products, p, ds, start_m, start_n)
                ds = logits.score_function.back(products, p, ds, start_m, start_n)
            dq_tile += t.dot(ds, k_tile, 3, 2)
            dkt = layout.add(dkt, t.dot_of_rows(q_tile, ds), start_n, 3)
            dvt = layout.add(dvt, t.dot_of_rows(do_tile, p_kept), start_n, 3)
            return dq_tile, dkt, dvt, grads

        dq_tile, *sums = t.over_keys(i, key_block, (t.new_rows(dq, 0, i), *sums))
        put = layout.add if t.seqlen_q % t.block_m else layout.put
        return put(dq, dq_tile, start_m * spec.group, 2), *sums

    tiled = [name for name in groups_of if name in ("bias", "slopes") or is_score_array(name)]
    grads = {name: _grad_zeros(name, operands[name], groups_of[name], t) for name in tiled}
    carry = (jnp.zeros_like(q), *(jnp.zeros_like(x).swapaxes(2, 3) for x in (k, v)), grads)
    dq, dkt, dvt, grads = loop(0, t.blocks_q, query_block, carry)
    dq = layout.rows_out(dq, t.seqlen_q)
    if "scale" in groups_of:
        # The sum of ds * (q k), as a product of vectors: that sums more exactly than a reduction does.
        dscale = jnp.einsum("bn,bn->b", *(x.astype(t.dtype).reshape(x.shape[0], -1) for x in (dq, args[0])))
        grads["scale"] = summed_to(dscale[:, None, None, None], operands["scale"].shape, groups_of["scale"])
    if "sinks" in groups_of:
        delta = -layout.stats_out(delta, t.seqlen_q)
        dsinks = jnp.where(sees, delta * jnp.exp(logits.per_batch("sinks")[..., 0] - shift), 0)
        grads["sinks"] = summed_to(dsinks[..., None], operands["sinks"].shape, groups_of["sinks"])
    dqkv = (dq * scale, *(layout.rows_out(x.swapaxes(2, 3), t.seqlen_k) for x in (dkt, dvt)))
    result = spec.rules.result
    dqkv = (g.astype(result(x.dtype)) for g, x in zip(dqkv, args, strict=True))
    return *dqkv, *(grads[name].astype(result(operands[name].dtype)) for name in wanted)


def _shift_and_norm(spec: Spec, stats: Sequence[Array]) -> tuple[Array, Array | None, Array]:
    """What turns rows' logits into probabilities, exp(s - shift) * norm, with norm None where it is 1; and whether rows
    see anything. Where logits are only scaled products, lse is enough. A bias may make m so large that log(l) would be
    lost beside it."""
    if not spec.alters_logits:
        (lse,) = stats
        sees = lse != -jnp.inf
        return jnp.where(sees, lse, 0), None, sees
    m, l = stats
    return m, jnp.where(l == 0, 0, 1 / jnp.where(l == 0, 1, l)), l != 0


def _grad_zeros(name: str, operand: Array, groups: int, t: Tiling) -> Array:
    """Where the gradient of an operand is summed."""
    dtype = t.dtype
    if name == "bias" and 1 not in operand.shape[2:]:
        dtype = t.spec.rules.result(operand.dtype)  # each element is added to once, and needs no wider one
    return jnp.zeros((groups * operand.shape[0], *operand.shape[1:]), dtype)


def _add_grads(grads, ds: Array, logits: Logits, start_m, start_n):
    """Add what the tile ds [B, Hkv, M * G, N] gives to the gradients of bias and slopes."""
    added, operands, block_m = dict(grads), logits.operands, logits.tiling.block_m
    if "bias" in grads:
        added["bias"] = _add_grad(grads["bias"], ds, operands["bias"].shape, block_m, start_m, start_n)
    if "slopes" in grads:
        dslopes = -(ds * logits.distances(start_m, start_n)).sum(-1, keepdims=True)
        added["slopes"] = _add_grad(grads["slopes"], dslopes, operands["slopes"].shape, block_m, start_m, start_n)
    return added


def _add_grad(grad: Array, x: Array, shape: tuple[int, ...], block_m: int, start_m, start_n) -> Array:
    """Add x [B, Hkv, M * G, 1|N] to the gradient of an operand of this shape, summed over the axes that it lacks."""
    x = summed_to(layout.by_heads(x, block_m), shape, grad.shape[0] // shape[0]).astype(grad.dtype)
    start = (0, 0, start_m if grad.shape[2] > 1 else 0, start_n if grad.shape[3] > 1 else 0)
    own = lax.dynamic_slice(grad, start, x.shape, allow_negative_indices=False)
    return lax.dynamic_update_slice(grad, own + x, start, allow_negative_indices=False)
