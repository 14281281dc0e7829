"""How near is near enough: error against fp64 at most twice that of the same maths done plainly, plus rounding.

Rounding: `ROUNDINGS` of the result in its own dtype; one of the base-2 logits in fp32, which p = 2^s turns into
a relative error of p as large as the logit; and `ROUNDINGS` in fp32 of the terms whose difference a gradient is.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from reference import attention

from jax_flash_attn2 import Config, flash_attention

NAMES = ("o", "lse", "dq", "dk", "dv", "dbias", "dscale")
TIMES, ROUNDINGS = 2, 4


def results(function, case: Case, inputs) -> dict[str, np.ndarray]:
    """Both results of `function(q, k, v, bias, scale)`, and its gradients for the case's cotangents."""
    scale = jnp.asarray(case.head_dim**-0.5 if case.scale is None else case.scale, inputs["dlse"].dtype)
    operands = [None if inputs[x] is None else jnp.asarray(inputs[x]) for x in ("q", "k", "v", "bias")]

    @jax.jit
    def both(*operands):
        (o, lse), vjp = jax.vjp(function, *operands)
        # A row that sees nothing has lse = -inf, which nothing can be done with: its cotangent is 0.
        dlse = jnp.where(lse == -jnp.inf, 0, jnp.asarray(inputs["dlse"]).astype(lse.dtype))
        return o, lse, *vjp((jnp.asarray(inputs["do"]).astype(o.dtype), dlse))

    o, lse, dq, dk, dv, dbias, dscale = both(*operands, scale)
    out = dict(zip(NAMES, (o, lse, dq, dk, dv, dbias, dscale), strict=True))
    return {name: np.asarray(x) for name, x in out.items() if x is not None}


def flash(case: Case, inputs=None, **options) -> dict[str, np.ndarray]:
    """What `flash_attention` makes of the case."""
    config = Config(*case.block)
    function = functools.partial(flash_attention, causal=case.causal, return_lse=True, config=config, **options)
    return results(lambda q, k, v, b, s: function(q, k, v, b, softmax_scale=s), case, inputs or case.inputs())


def exact(case: Case, inputs=None) -> dict[str, np.ndarray]:
    """The definition in fp64."""
    inputs = inputs or case.inputs()
    with jax.enable_x64(True):
        wide = {k: None if x is None else x.astype(np.float64) for k, x in inputs.items()}
        return results(functools.partial(attention, causal=case.causal), case, wide)


def plain(case: Case, inputs=None) -> dict[str, np.ndarray]:
    """The definition in the case's own precision: products accumulated in fp32, p and results rounded to the dtype."""
    inputs = inputs or case.inputs()
    dtype = jnp.dtype(case.dtype)
    function = functools.partial(attention, causal=case.causal, compute=jnp.float32, round_p=dtype)

    def rounded(q, k, v, bias, scale):
        o, lse = function(q, k, v, bias, scale)
        return o.astype(dtype), lse

    return results(rounded, case, inputs)


def _logits_and_terms(case: Case, inputs) -> tuple[float, dict[str, float]]:
    """The largest base-2 logit, and how large the terms are that the gradients of the logits are summed from.

    dq, dk, dbias and dscale are sums of p * (dp - delta), and that difference may cancel, exactly so in a row that
    sees one key. dp and delta are rounded on their own, each relative to itself, and leave such a gradient off by
    some roundings of the root of the sum of the squares of p * (|dp| + |delta|), times k, q, 1 or q k.
    """
    group = case.heads // case.kv_heads
    x = {k: None if v is None else v.astype(np.float64) for k, v in inputs.items()}
    k, v = (np.repeat(x[name], group, -2) for name in "kv")
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    qk = np.einsum("...qhd,...khd->...hqk", x["q"], k)
    dp = np.einsum("...qhd,...khd->...hqk", x["do"], v)
    s = qk * scale
    largest = float(np.max(abs(s), initial=0.0)) * math.log2(math.e)
    s = s + (0 if x["bias"] is None else x["bias"])
    s = np.where(np.tri(*s.shape[-2:], dtype=bool) | (not case.causal), s, -np.inf)
    m = np.max(s, -1, keepdims=True, initial=-1e300)
    p = np.exp(s - m)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    delta = np.sum(p * dp, -1, keepdims=True)
    squares = (p * (abs(dp) + abs(delta))) ** 2
    dk = np.einsum("...hqk,...qhd->...khd", squares, (scale * x["q"]) ** 2)
    terms = {
        "dq": np.einsum("...hqk,...khd->...qhd", squares, (scale * k) ** 2),
        "dk": dk.reshape(*dk.shape[:-2], case.kv_heads, group, -1).sum(-2),
        "dscale": np.sum(squares * qk**2),
    }
    if x["bias"] is not None:
        _, vjp = jax.vjp(lambda bias: jnp.broadcast_to(bias, squares.shape), inputs["bias"].astype(np.float32))
        terms["dbias"] = vjp(squares.astype(np.float32))[0]  # sums the axes along which the bias is broadcast
    return largest, {name: float(np.sqrt(np.max(t, initial=0.0))) for name, t in terms.items()}


def assert_near(case: Case, got: dict[str, np.ndarray], inputs=None) -> None:
    """Applies the rule to every result."""
    inputs = inputs or case.inputs()
    want, rough = exact(case, inputs), plain(case, inputs)
    largest_logit, terms = _logits_and_terms(case, inputs)
    assert got.keys() == want.keys()
    eps32 = float(jnp.finfo(jnp.float32).eps)
    for name, x in got.items():
        assert x.shape == want[name].shape, name
        error, plain_error = _error(x, want[name]), _error(rough[name], want[name])
        # dscale is one number, with no neighbours whose largest would be a fair measure: its terms are.
        dtype, size = (case.dtype, terms[name]) if name == "dscale" else (x.dtype, _size(want[name]))
        band = (ROUNDINGS * float(jnp.finfo(dtype).eps) + largest_logit * eps32) * size
        band += ROUNDINGS * eps32 * terms.get(name, 0.0)
        assert error <= TIMES * plain_error + band, (
            f"{case} {name}: error {error:.3g}, plain {plain_error:.3g}, band {band:.3g}"
        )


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    """Bitwise equal, NaN and the sign of zero included."""
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


def _error(x: np.ndarray, want: np.ndarray) -> float:
    x = x.astype(np.float64)
    same = (x == want) | (np.isneginf(x) & np.isneginf(want))
    return float(np.max(np.abs(np.where(same, 0.0, x) - np.where(same, 0.0, want)), initial=0.0))


def _size(want: np.ndarray) -> float:
    return float(np.max(np.abs(np.where(np.isfinite(want), want, 0.0)), initial=0.0))
