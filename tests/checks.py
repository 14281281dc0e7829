"""How near is near enough: error against fp64 at most twice that of the same maths done plainly, plus rounding.

Rounding: `ROUNDINGS` of the result in its own dtype; one of the base-2 logits in fp32, which p = 2^s turns into
a relative error of p as large as the logit; and `ROUNDINGS` in fp32 of the terms whose difference a gradient is (in
the result's dtype where the bias has no key axis: there the terms of a row cancel, and o's rounding in delta does not);
in half precision one of each term of dq and dk, which sum what ds, rounded, was multiplied by; and what is lost where
numbers become too small, which for each logit may be the smallest that fp32 has in full.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import roundings
from cases import Case, with_score
from reference import attention, distance, visible
from roundings import definition_options

from jax_flash_attn2 import Config, flash_attention
from jax_flash_attn2.gpu import interpret
from jax_flash_attn2.masks import BlockMask, Mask

DIFFERENTIABLE = ("q", "k", "v", "bias", "scale", "sinks", "alibi_slopes", "read")
SUMS = ("dscale", "dsinks", "dalibi_slopes", "dread")
"""A few numbers each, with no neighbours whose largest would be a fair measure: the terms that they sum are."""
TIMES, ROUNDINGS = 2, 4
KERNELS = interpret.enabled() or jax.default_backend() == "gpu"
"""Whether it is kernels that may be called."""
ROUNDED = 1.0 if KERNELS else float(jnp.finfo(jnp.bfloat16).eps)
"""How often, in half precision, `roundings.of`'s `rounded` counts: in kernels p is rounded before it meets v, and ds
before k and q; on the XLA path nothing is but what o loses, when that is kept."""
BLOCK = 32
"""Rows and keys of a block mask's tiles."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""A small case runs for a millisecond and compiles for a second, most of that in LLVM's optimizer."""


def operands(case: Case, inputs) -> tuple[dict, dict, dict]:
    """What is differentiated, the other arrays, and the cotangents of the results."""
    real = np.float64 if inputs["q"].dtype == np.float64 else np.float32
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    given = {name: x for name, x in inputs.items() if x is not None} | {"scale": np.asarray(scale, real)}
    # Nothing may come of a cotangent of max_logits.
    cotangents = {"o": given.pop("do"), "lse": given.pop("dlse"), "max_logits": np.ones((), real)}
    inner = {name: given.pop(name) for name in DIFFERENTIABLE if name in given}
    return inner, given, cotangents


def results(function, inner, given, cotangents) -> dict[str, jax.Array]:
    """The results of `function(inner, given)`, by name, and its gradients with respect to all of inner."""
    out, vjp = jax.vjp(lambda inner: function(inner, given), inner)
    cotangents = {name: jnp.broadcast_to(cotangents[name].astype(x.dtype), x.shape) for name, x in out.items()}
    if "lse" in out:  # a row that sees nothing has lse = -inf, which nothing can be done with: its cotangent is 0
        cotangents["lse"] = jnp.where(out["lse"] == -jnp.inf, 0, cotangents["lse"])
    return out | {f"d{name}": x for name, x in vjp(cotangents)[0].items()}


def compiled(function, *, quick: bool = True):
    """`function` under jit, which returns NumPy arrays."""
    made = jax.jit(function, compiler_options=QUICK if quick else None)
    return lambda *args: jax.tree.map(np.asarray, made(*args))


def run(function, *args, quick: bool = True):
    """`function(*args)` under jit, in NumPy arrays."""
    return compiled(function, quick=quick)(*args)


def flash_function(case: Case, *, attend=flash_attention, **options):
    """`flash_attention`, or another that is called like it, as a function of the first two of `operands`, for
    `results`."""
    options = {**(case.static if attend is flash_attention else {}), "config": Config(*case.block), **options}

    def function(inner, given):
        arrays = {"softmax_scale" if name == "scale" else name: x for name, x in (inner | given).items()}
        arrays.pop("keep", None)
        arrays = with_mask(case, with_score(case, arrays))
        out = attend(**arrays, **options, return_lse=case.lse, return_max_logits=case.max_logits)
        return dict(zip(case.results, out if isinstance(out, tuple) else (out,), strict=True))

    return function


def with_mask(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays, the mask as the case wants it held; under jit too."""
    mask, weights, kind = arrays.get("mask"), arrays.get("weights"), case.mask_kind
    arrays = {name: x for name, x in arrays.items() if name != "weights"}
    if not kind:
        return arrays
    if kind == "function":
        return arrays | {"mask": as_function(jnp.reshape(mask, (-1, *mask.shape[-3:])))}
    axes = case.batch if "b" in case.mask_axes else (1,) * len(case.batch)
    axes = (*axes, case.heads if "h" in case.mask_axes else 1, case.seqlen_q, case.seqlen_k)
    dense = jnp.broadcast_to(mask if weights is None else weights, axes)
    dense = dense.reshape(math.prod(axes[:-3]), *axes[-3:])
    if kind == "weights":
        return arrays | {"mask": Mask.from_dense(dense)}
    tiles = max(-(-case.seqlen_q // BLOCK) * -(-case.seqlen_k // BLOCK), 1)
    most = {"max_tiles": tiles, "max_parts": tiles * dense.shape[0] * dense.shape[1]}
    return arrays | {"mask": BlockMask.from_mask(dense, block_m=BLOCK, block_n=BLOCK, **most)}


def as_function(mask) -> Any:
    """The predicate that a mask `[1|B, 1|H, 1|Sq, 1|Sk]` is."""
    at = lambda n, size: n if size > 1 else 0
    return lambda *place: mask[tuple(at(n, size) for n, size in zip(place, mask.shape, strict=True))]


def definition(case: Case, **precision):
    """`attention` likewise."""

    def function(inner, given):
        arrays = with_score(case, inner | given)
        o, *rest = attention(**arrays, **definition_options(case), dropout_rate=case.dropout, **precision)
        out = {"o": o.astype(precision.get("round_p", o.dtype)), **dict(zip(("lse", "max_logits"), rest, strict=True))}
        return {name: out[name] for name in case.results}

    return function


def flash(case: Case, inputs=None, *, quick: bool = True, **options) -> dict[str, np.ndarray]:
    """What `flash_attention` makes of the case."""
    function = functools.partial(results, flash_function(case, **options))
    return run(function, *operands(case, inputs or case.inputs()), quick=quick)


def plain(case: Case, inputs) -> dict[str, np.ndarray]:
    """The definition in the case's own precision: products accumulated in fp32, p and results rounded to the dtype."""
    return _plain_function(case)(*operands(case, inputs))


def exact(case: Case, inputs) -> tuple[dict[str, np.ndarray], float, dict[str, float], dict[str, float]]:
    """The definition in fp64, with what `roundings.of` says of it."""
    with jax.enable_x64(True):
        return _exact_function(case)(*operands(case, in_float64(inputs)))


@functools.lru_cache(maxsize=4)  # other inputs of the same case follow each other
def _plain_function(case: Case):
    return compiled(functools.partial(results, definition(case, compute=jnp.float32, round_p=jnp.dtype(case.dtype))))


@functools.lru_cache(maxsize=4)
def _exact_function(case: Case):
    def function(inner, given, cotangents):
        out = results(definition(case), inner, given, cotangents)
        return out, *roundings.of(case, inner, given, cotangents, out["o"])

    return compiled(function)


def in_float64(inputs):
    """The same numbers."""
    real = {name for name, x in inputs.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}
    wide = dict.fromkeys(real, np.float64) | dict.fromkeys(("q_positions", "kv_positions"), np.int64)
    return {name: x.astype(wide[name]) if name in wide and x is not None else x for name, x in inputs.items()}


@functools.lru_cache(maxsize=512)
def _exact(case: Case):
    return exact(case, case.inputs())


def assert_near(case: Case, got: dict[str, np.ndarray], inputs=None, *, decided: bool = False) -> None:
    """Applies the rule to every result. Decided: logits are so far apart that no rounding of one matters."""
    if inputs is None:
        want, largest_logit, terms, rounded = _exact(dataclasses.replace(case, block=(None, None)))
    else:
        want, largest_logit, terms, rounded = exact(case, inputs)
    rough, largest_logit = None, 0.0 if decided else largest_logit
    assert got.keys() == want.keys()
    eps32, count = float(jnp.finfo(jnp.float32).eps), math.prod(case.axes("bhqk"))
    eps = float(jnp.finfo(case.dtype).eps)  # of what a gradient of logits is made of, also where a bias is fp32
    for name, x in got.items():
        assert x.shape == want[name].shape, name
        if decided and name[0] == "d" and KERNELS and case.dtype != "float32":
            continue  # docs/limits.md: beyond 10^7
        error, cancels = _error(x, want[name]), name == "dbias" and "k" not in case.bias
        dtype, size = (case.dtype, terms[name]) if name in SUMS else (x.dtype, _size(want[name]))
        size = max(size, terms[name]) if name == "dv" else size  # p is off by its logit's roundings, and dv may cancel
        # A rounding of a logit is a share of p, and of what p multiplies; of a logarithm it is that number itself.
        of_logits = 1 if name in ("lse", "max_logits") else size
        band = ROUNDINGS * float(jnp.finfo(dtype).eps) * size + largest_logit * eps32 * of_logits
        band += float(jnp.finfo(x.dtype).eps) * _size(want[name]) * (name in SUMS)  # rounded to its own dtype
        band += ROUNDINGS * (eps if cancels else eps32) * terms.get(name, 0.0)
        band += float(jnp.finfo(x.dtype).smallest_subnormal) + count * float(jnp.finfo(jnp.float32).tiny)
        if jnp.dtype(case.dtype).itemsize == 2:
            band += eps * ROUNDED * rounded.get(name, 0.0)
        if error <= band:
            continue  # whatever the plain error, which takes a second to learn
        rough = rough or plain(case, inputs or case.inputs())
        plain_error = _error(rough[name], want[name])
        assert error <= TIMES * plain_error + band, (
            f"{case} {name}: error {error:.3g}, plain {plain_error:.3g}, band {band:.3g}"
        )


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    """Bitwise equal, NaN and the sign of zero included."""
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


def _error(x: np.ndarray, want: np.ndarray) -> float:
    x = x.astype(np.float64)
    same = (x == want) | (np.isneginf(x) & np.isneginf(want))
    return float(np.max(np.abs(np.where(same, 0.0, x) - np.where(same, 0.0, want)), initial=0.0))


def _size(want: np.ndarray) -> float:
    return float(np.max(np.abs(np.where(np.isfinite(want), want, 0.0)), initial=0.0))


# What must hold for every implementation; `flash` is one of them, as `flash` above.

SETTINGS = hypothesis.settings(
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],  # shrinking takes hundreds of runs
)
"""For drawn cases: the same ones each time."""


def _seen(case: Case, inputs) -> np.ndarray:
    """Which keys the rows see; it broadcasts to `[*batch, H, Sq, Sk]`."""
    sight = ("causal", "causal_alignment", "window_size", "mask", "q_segment_ids", "kv_segment_ids", "kv_lengths")
    given = {name: x for name, x in (inputs | case.static).items() if name in sight and x is not None}
    seen = visible(distance(inputs["q"], inputs["k"], case.alignment), **given)
    if inputs["q_lengths"] is not None:
        seen &= np.arange(case.seqlen_q)[:, None] < inputs["q_lengths"][..., None, None, None]
    return np.asarray(seen)


def assert_padding_is_not_read(flash, case: Case) -> None:
    """NaN in the rows and keys that lengths cut off reaches nothing, nor does it in a bias where that is hidden."""
    assert case.batch == (4,)
    x = case.inputs()
    x["q_lengths"] = np.array([case.seqlen_q - 3, 16, 0, case.seqlen_q], np.int32)  # within a tile, at its edge, ...
    x["kv_lengths"] = np.array([16, case.seqlen_k - 3, case.seqlen_k, 0], np.int32)
    clean = flash(case, x)
    dirty = {name: None if a is None else a.copy() for name, a in x.items()}
    for b in range(4):
        for name, length in (("q", "q_lengths"), ("do", "q_lengths"), ("k", "kv_lengths"), ("v", "kv_lengths")):
            dirty[name][b, x[length][b] :] = np.nan
    if case.bias:
        lacking = tuple(axis for axis, n in enumerate(dirty["bias"].shape) if n == 1)
        read = np.broadcast_to(_seen(case, x), (4, case.heads, case.seqlen_q, case.seqlen_k)).any(
            lacking, keepdims=True
        )
        assert not read.all()
        dirty["bias"] = np.where(read, x["bias"], np.where(np.indices(read.shape).sum(0) % 2, np.nan, np.inf))
        dirty["bias"] = dirty["bias"].astype(x["bias"].dtype)
    dirty = flash(case, dirty)
    assert_near(case, clean, x)
    assert_same_bits(clean, dirty)
    for b in range(4):
        assert not clean["dq"][b, x["q_lengths"][b] :].any()
        assert not clean["dk"][b, x["kv_lengths"][b] :].any()
        assert not clean["dv"][b, x["kv_lengths"][b] :].any()


def assert_documents_are_apart(flash, case: Case) -> None:
    """What is in one document changes no bit of another's results and gradients."""
    x = case.inputs()
    changed, rng = dict(x), np.random.default_rng(0)
    ids = x["q_segment_ids"], x["q_segment_ids"] if x["kv_segment_ids"] is None else x["kv_segment_ids"]
    here, there = (
        np.broadcast_to(i, (*case.batch, n)) == 1 for i, n in zip(ids, (case.seqlen_q, case.seqlen_k), strict=True)
    )
    assert here.any()
    assert there.any()
    for name, mine in (("q", here), ("do", here), ("k", there), ("v", there)):
        noise = 10 * rng.standard_normal(x[name].shape).astype(x[name].dtype)
        changed[name] = np.where(mine[..., None, None], noise, x[name])
    one, other = flash(case, x), flash(case, changed)
    for name, mine in (("o", here), ("dq", here), ("dk", there), ("dv", there)):
        np.testing.assert_array_equal(one[name][~mine], other[name][~mine], err_msg=name)
        assert (one[name] != other[name]).any()
    rows = np.broadcast_to(here[..., None, :], one["lse"].shape)
    np.testing.assert_array_equal(one["lse"][~rows], other["lse"][~rows])


def kept_by_pass(flash, case: Case) -> dict[str, np.ndarray]:
    """What dropout keeps in each pass, `[*batch, H, Sq, Sk]`: logits are equal, values and keys unit vectors."""
    rows, keys, x = case.seqlen_q, case.seqlen_k, case.inputs()
    assert (case.heads, case.head_dim, case.v_dim) == (case.kv_heads, keys, keys + rows)

    def each(*parts):
        """A row is the parts beside each other, in every batch and head."""
        row = np.concatenate(parts, -1, dtype=np.float32)[:, None]
        return np.broadcast_to(row, (*case.batch, len(row), case.heads, row.shape[-1]))

    x |= {"q": np.zeros_like(x["q"]), "k": each(np.eye(keys)), "v": each(np.eye(keys), np.zeros((keys, rows)))}
    x |= {"do": each(np.ones((rows, keys)), np.eye(rows)), "dlse": np.zeros_like(x["dlse"])}
    got = {name: np.moveaxis(a, -2, -3) for name, a in flash(case, x).items() if name in ("o", "dq", "dv")}
    return {
        "fwd": got["o"][..., :keys] > 0,  # p_ij
        "dq": got["dq"] > 0,  # p_ij * (1 / (1 - rate) or 0, less a mean of these)
        "dkdv": got["dv"][..., keys:].swapaxes(-1, -2) > 0,  # p_ij
    }


def assert_positions_go_to_the_last(flash) -> None:
    """Any int32 is a position: at either end as anywhere, and of one at the first and one at the last."""
    case = Case("last_positions", 40, 50, (1,), 2, 2, 16, block=(16, 16), positions="mixed", window=(9, 4), alibi="h")
    x, names, of = case.inputs(), ("q_positions", "kv_positions"), np.iinfo(np.int32)
    clean = flash(case, x)
    least, most = min(x[name].min() for name in names), max(x[name].max() for name in names)
    for shift in (of.max - int(most), of.min - int(least)):
        assert_same_bits(clean, flash(case, x | {name: (x[name] + np.int64(shift)).astype(np.int32) for name in names}))
    for first, last in itertools.permutations(names):
        ends = {first: np.full_like(x[first], of.min), last: np.full_like(x[last], of.max)}
        assert (flash(case, x | ends)["lse"] == -np.inf).all()
        wide = dataclasses.replace(case, window=None)  # 2^32 - 1 apart
        got = flash(wide, x | ends)
        np.testing.assert_allclose(got["lse"], -(x["alibi_slopes"] * 2.0**32)[:, None] + 0 * got["lse"], rtol=1e-6)


def assert_far_rows_are_alike(attend, dtype: str, far: float, *, rows: int, keys: int, width: int) -> None:
    """Rows that a bias takes far below 0, beside which products are lost: all keys count the same, in every kernel."""
    q, do = (jax.random.normal(jax.random.key(n), (1, rows, 1, width), dtype) for n in range(2))
    k, v = (jax.random.normal(jax.random.key(n), (1, keys, 1, width), dtype) for n in range(2, 4))
    o, vjp = jax.vjp(attend, q, k, v, -jnp.float32(far) * (1 + jnp.arange(rows)[:, None] / 7))
    got = (np.asarray(x, np.float64) for x in (o, *vjp(do)))
    q, k, v, do = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v, do))
    dp = do @ v.T
    ds = (dp - dp.mean(1, keepdims=True)) / keys
    dv = np.tile(do.sum(0) / keys, (keys, 1))
    want = np.tile(v.mean(0), (rows, 1)), ds @ k * width**-0.5, ds.T @ q * width**-0.5, dv, np.zeros((rows, 1))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x.reshape(y.shape), y, atol=1e-5 if dtype == "float32" else 0.01)


def assert_nan_stays(flash) -> None:
    """A NaN in a row is all that there is of it, forward and backward; it is no row that sees nothing."""
    case = Case("nan", 20, 24, (1,), 2, 2, 16, block=(16, 16), bias="qk", max_logits=True)
    x = case.inputs()
    q = x["q"].copy()
    q[:, 3, 0] = np.nan
    clean, got = flash(case, x), flash(case, x | {"q": q})
    for name, rows in (("o", np.s_[:, :, 0, :]), ("lse", np.s_[:, 0, :]), ("dq", np.s_[:, :, 0, :])):
        own = np.isnan(got[name][rows]).reshape(20, -1)
        np.testing.assert_array_equal(own.all(1), np.arange(20) == 3, err_msg=name)
        np.testing.assert_array_equal(own.any(1), np.arange(20) == 3, err_msg=name)
    np.testing.assert_array_equal(np.isnan(got["max_logits"]), [[True, False]])
    for name in ("dk", "dv"):
        assert np.isnan(got[name][:, :, 0]).all()
        np.testing.assert_array_equal(got[name][:, :, 1], clean[name][:, :, 1])
    case = dataclasses.replace(case, bias=None, scale=np.nan)  # all that there is
    got = flash(case, case.inputs())
    for name in ("o", "lse", "max_logits", "dq", "dk", "dv"):
        assert np.isnan(got[name]).all(), name
