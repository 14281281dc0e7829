"""How far roundings may carry results: what `checks.assert_near` allows for, beyond what the plain maths is off."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from cases import SCORES, Case, with_score
from reference import by_query_head, capped, distance, everywhere, logits, probabilities


def definition_options(case: Case) -> dict[str, Any]:
    return {name: x for name, x in case.static.items() if not name.startswith("dropout")}


def of(case: Case, inner, given, cotangents, o):
    """Of a case in fp64: the largest base-2 logit, bias aside; `terms` and `rounded`, by the names of gradients.

    Gradients of logits are sums of ds = p * (dp - delta + dlse), which may cancel, exactly so in a row that sees one
    key. dp and delta are rounded on their own, each relative to what it is made of, and leave such a gradient off by
    some roundings of the root of the sum of the squares of p * (|dp| + |delta| + |do| |o| + |dlse|), each times the
    derivative of its logit: `terms`. (dp is 0 where dropout hides it, and for a sink.)

    The slope of a score function is rounded by as much as the largest of them is, that of a soft cap, 1 - tanh^2, by as
    much as 1 is, and both move as the logit does that they are taken at: ds is off by as many roundings of itself times
    these.

    In half precision, moreover, ds is rounded before it meets k or q, and delta is made of an o whose p was, as much as
    o itself would be if there were one key: `rounded` has what one rounding of each leaves of dq, dk and dbias.
    """
    q, k, scale, do = inner["q"], inner["k"], inner["scale"], cotangents["o"]
    keep = given.get("keep")
    arrays = {n: x for n, x in with_score(case, inner | given).items() if n not in ("v", "keep")}
    p, lse, _ = probabilities(**arrays, **definition_options(case))
    dp = jnp.einsum("...qhd,...khd->...hqk", do, by_query_head(inner["v"], q))
    dp = dp if keep is None else jnp.where(keep, dp / (1 - case.dropout), 0)
    delta = jnp.einsum("...qhd,...qhd->...hq", do, o)[..., None]
    dlse = cotangents["lse"][..., None] if case.lse else 0.0
    least = float(jnp.finfo(case.dtype).tiny)  # numbers below are rounded by as much as this is
    of_o = jnp.sqrt(jnp.einsum("...qhd,...qhd->...hq", do**2, (abs(o) + least) ** 2))[..., None]
    squares = (p * (abs(dp) + abs(delta) + of_o + abs(dlse)) + jnp.where(p > 0, least, 0.0)) ** 2
    ds, by_o = p * (dp - delta + dlse), p * of_o
    to_bias = by_o**2
    ahead = distance(q, k, case.alignment, given.get("q_positions"), given.get("kv_positions"))
    qk = logits(q, k, scale=1.0)
    made, through_cap, seen, whole = scale * qk, squares, squares > 0, 1.0
    if case.score:
        made = everywhere(arrays["score_mod"], made, seen)
    if case.soft_cap is not None:
        of_cap = jax.grad(lambda s: capped(s, case.soft_cap))
        slope, apart = _slope(lambda s, *place: of_cap(s), made, seen)
        apart = jnp.maximum(apart, 1.0)  # 1 - tanh^2, whatever the largest of them is
        through_cap, ds, by_o = squares * slope**2 + (ds * apart) ** 2, ds * slope, by_o * slope
        whole = slope
    through_score = through_cap
    if case.score:
        slope, apart = _slope(jax.grad(arrays["score_mod"]), scale * qk, seen)
        before, whole = ds, whole * slope
        through_score = jnp.where(seen, through_cap * slope**2 + (ds * apart) ** 2, 0)
        ds, by_o = (jnp.where(seen, x * slope, 0) for x in (ds, by_o))

    def summed(function, x, squares):
        """Over all that an element of x is broadcast to."""
        return jax.linear_transpose(lambda x: jnp.broadcast_to(function(x), squares.shape), x)(squares)[0]

    # What a product of q and k was rounded by, of which it may be a small rest.
    products = jnp.sqrt(jnp.einsum("...qhd,...khd->...hqk", q**2, by_query_head(k, q) ** 2))
    keys = scale * by_query_head(k, q)
    to_dq = lambda ds: jnp.einsum("...hqk,...khd->...qhd", ds, keys**2)
    to_dk = lambda ds: summed(
        lambda k: by_query_head(k, q), k, jnp.einsum("...hqk,...qhd->...khd", ds, (scale * q) ** 2)
    )
    # The error of a row's delta is the same for all of its keys.
    rounded = {
        "dq": to_dq(ds**2) + jnp.einsum("...hqk,...khd->...qhd", by_o, keys) ** 2,
        "dk": to_dk(ds**2 + by_o**2),
    }
    of_v = p if keep is None else jnp.where(keep, p / (1 - case.dropout), 0)
    to_dv = summed(lambda v: by_query_head(v, q), inner["v"], jnp.einsum("...hqk,...qhd->...khd", of_v**2, do**2))
    terms = {
        "dv": to_dv,
        "dq": to_dq(through_score),
        "dk": to_dk(through_score),
        "dscale": jnp.sum(through_score * (qk**2 + products**2)),
    }
    if "read" in inner:
        by_read = lambda *place: jax.grad(lambda x: SCORES[case.score](x)(*place))(inner["read"])
        slopes, apart = _slope(by_read, scale * qk, seen)
        summed_over = functools.partial(jnp.tensordot, axes=seen.ndim)
        terms["dread"] = summed_over(jnp.where(seen, through_cap, 0), slopes**2)
        terms["dread"] += summed_over(jnp.where(seen, before**2, 0), apart**2)
    if "bias" in inner:
        terms["dbias"], rounded["dbias"] = (summed(lambda x: x, inner["bias"], x) for x in (squares, to_bias))
    if "alibi_slopes" in inner:
        terms["dalibi_slopes"] = summed(
            lambda x: x[..., None, None], inner["alibi_slopes"], squares * (ahead**2).astype(q.dtype)
        )
    if "sinks" in inner:
        p_sink = jnp.where(lse == -jnp.inf, 0, 1 - p.sum(-1))
        apart = jnp.sum((p_sink[..., None] * (abs(delta) + abs(dlse))) ** 2, -1)  # no more in a row that sees nothing
        terms["dsinks"] = summed(lambda x: x[:, None], inner["sinks"], apart)
    s = logits(q, k, None, scale, ahead, case.soft_cap, inner.get("alibi_slopes"), arrays.get("score_mod"), seen)
    s = jnp.where(jnp.isfinite(s), abs(s), 0)
    # What a product was rounded by is multiplied by a soft cap and a score function.
    s = jnp.maximum(s, jnp.where(seen, jnp.maximum(abs(scale * qk), scale * products) * abs(whole), 0))
    largest = jnp.max(s, initial=0.0) * math.log2(math.e)
    root = lambda squares: {name: jnp.sqrt(jnp.max(x, initial=0.0)) for name, x in squares.items()}
    return largest, root(terms), root(rounded)


def _slope(function, made, seen):
    """A function's slopes, of a logit and its place, and what they are rounded by: see `of`."""
    moves = jnp.where(jnp.isfinite(made), made, 0)  # no slope is off by infinity
    slope, along = jax.jvp(lambda made: everywhere(function, made, seen), (made,), (moves,))
    held = lambda x: jnp.where(seen.reshape(*seen.shape, *(1,) * (x.ndim - seen.ndim)), x, 0)
    slope, along = held(slope), held(along)
    return slope, jnp.max(abs(slope), initial=0.0) + abs(along)
