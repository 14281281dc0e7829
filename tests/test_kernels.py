"""The Triton kernels, run by Triton's interpreter, are the definition. Needs TRITON_INTERPRET=1.

`interpret.run` fills outputs with NaN, so an element that no kernel writes shows, and surrounds every operand with
NaN, so a read outside an array does.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_masks import DEFINITION, PREDICATES, K, Q, V, assert_bounds_cut_full_tiles, dense, made, results
from cases import CASES, Case, drawn
from checks import (
    SETTINGS,
    assert_documents_are_apart,
    assert_far_rows_are_alike,
    assert_nan_stays,
    assert_near,
    assert_padding_is_not_read,
    assert_positions_go_to_the_last,
    assert_same_bits,
    flash,
    flash_function,
    kept_by_pass,
    operands,
)

from benchmarks import numerics
from jax_flash_attn2 import Config, flash_attention, gpu_target, primitives
from jax_flash_attn2.base.rounding import joined
from jax_flash_attn2.base.spec import Rules
from jax_flash_attn2.call import inputs
from jax_flash_attn2.gpu import interpret, tuning
from jax_flash_attn2.primitives import share
from jax_flash_attn2.primitives.call import Call
from jax_flash_attn2.primitives.plan import Plan


def interpreted(case: Case, inputs=None, **options):
    return flash(case, inputs, implementation="triton", **options)


def takes_descriptors(case: Case) -> bool:
    size = jnp.dtype(case.dtype).itemsize
    return not (case.head_dim * size % 16 or (case.v_dim or case.head_dim) * size % 16)


def test_interpreter_is_on():
    assert interpret.enabled()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    assert_near(case, interpreted(case, block_ptr=False))


def test_a_bias_without_a_scale():
    """Products start from the bias divided by the scale: however large the one, and though the other be 0."""
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 1, 16)), jnp.float32)
    bias = jnp.where(jnp.arange(32) % 3 == 0, 100.0, -1e9)[None]
    o = flash_attention(v, v, v, bias, softmax_scale=0.0, implementation="triton")
    want = jnp.broadcast_to(v[:, ::3].mean(1, keepdims=True), o.shape)
    np.testing.assert_allclose(o, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_ptr", [False, True])
def test_rules_that_either_path_may_follow(block_ptr, monkeypatch):
    """What is compiled for no GPU in particular keeps m and l of rows; on one, kernels read them."""
    prepare, kept = inputs.prepare, []

    def precisely(**arguments):
        call, *rest = prepare(**arguments)
        return dataclasses.replace(call, rules=dataclasses.replace(call.rules, precise=True)), *rest

    monkeypatch.setattr(inputs, "prepare", precisely)
    backward = primitives.backward
    read = lambda *args, **more: kept.append((more["lost"].dtype, len(args[6]))) or backward(*args, **more)
    monkeypatch.setattr(primitives, "backward", read)
    case = next(c for c in CASES if c.name == "bfloat16")
    assert_near(case, interpreted(case, block_ptr=block_ptr))
    assert kept == [(jnp.int8, 2)]


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("kind", numerics.KINDS)
def test_no_further_than_plain(kind, dtype):
    """With an o that has all of its digits, fp16's small probabilities, and m and l in fp32; else dq, dk or dv of one
    of these would be 1.8 to 13 times as far."""
    errors = numerics.compare(kind, dtype, 128, "triton")["errors"]
    for name, error in errors["ours"].items():
        assert error <= (1.7 if dtype == "float32" else 1.3) * errors["plain"][name], name


def test_equal_keys_with_large_logits():
    """In fp32: two keys share rows by halves backward, too, though lse has no room for log 2 beside 1e9."""
    q, v = jnp.full((1, 16, 1, 16), 1e4), jnp.ones((1, 2, 1, 16))
    attend = lambda v: flash_attention(q, 1e4 * jnp.ones_like(v), v, implementation="triton")
    o, vjp = jax.vjp(attend, v)
    np.testing.assert_allclose(vjp(jnp.ones_like(o))[0], 8.0, rtol=1e-6)


GROUPED = ("gqa_6_2", "gqa_8_1", "decode", "gpt_oss", "block_mask_by_head")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in GROUPED], ids=str)
def test_one_program_for_a_group(case, monkeypatch):
    """So few programs as there are in a case have a query head each; here they sum dk and dv over those of a group."""
    assert case.kv_heads < case.heads
    monkeypatch.setattr(tuning, "PROGRAMS_EACH", 0)
    assert_near(case, interpreted(case, block_ptr=False))


@pytest.mark.thorough
@hypothesis.settings(SETTINGS, max_examples=4)
@hypothesis.given(drawn())
def test_drawn_cases(case):
    assert_near(case, interpreted(case))


INTERPRETED = results(lambda q, k, v, mask: flash_attention(q, k, v, mask=mask, implementation="triton"))


ALWAYS = ("documents", "by_head", "nothing")
THIRDS = [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.in_thirds) for name in PREDICATES]


@pytest.mark.parametrize("name", THIRDS)
def test_block_masks(name):
    """Kernels whose tiles are a part of the mask's, or all of it."""
    sizes = (32, 32) if len(name) % 2 else (64, 128)
    got, want = INTERPRETED(Q, K, V, made(name, *sizes)), DEFINITION(Q, K, V, dense(name))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, want)


def test_bounds_cut_full_tiles():
    assert_bounds_cut_full_tiles(implementation="triton")


def test_bfloat16_is_rounded():
    """To nearest even, as on a GPU: where two keys count the same, o is the mean of their values."""
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 1, 64)), jnp.bfloat16)
    o = flash_attention(jnp.zeros_like(v), v, v, implementation="triton")
    want = v.astype(jnp.float32).mean(1, keepdims=True).astype(jnp.bfloat16)
    np.testing.assert_array_equal(o, jnp.broadcast_to(want, o.shape))


SOME = {
    "causal",
    "wide_keys",
    "wide_rows",
    "one_row_causal",
    "ragged_causal",
    "more_rows",
    "gqa_6_2",
    "bias_bhqk",
}
SOME |= {"head_dim_40", "narrow_v", "float16", "bfloat16_bias", "lengths_qk", "window_both", "everything"}


@pytest.mark.in_thirds
@pytest.mark.parametrize("capability", [80, 90], ids=["descriptor_in_kernel", "descriptor_from_host"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in SOME], ids=str)
def test_descriptors(case, capability):
    """The other way to memory: descriptors made by the kernel, or handed to it. Not one bit may differ."""
    assert takes_descriptors(case)
    with gpu_target(compute_capability=capability):
        assert_same_bits(interpreted(case, block_ptr=True), interpreted(case, block_ptr=False))


OVERLAPPED = ("ragged_causal", "more_rows", "window_both", "segments_packed_causal", "dropout_bottom_right", "gemma")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in OVERLAPPED], ids=str)
def test_product_beside_softmax(case):
    """Where wgmma multiplies one tile's p with v while the next one's is computed, not one bit differs: an infinite
    value in the first tile stays infinite, too, and is not multiplied by 0."""
    case = dataclasses.replace(case, dtype="float16")
    inner, given, _ = operands(case, case.inputs())
    inner["v"][..., 0, :, :2] = np.inf
    configs = [{"fwd": Config(*case.block, block_ptr=True, overlaps=overlaps)} for overlaps in (True, False)]
    with gpu_target(compute_capability=90):
        outs = [flash_function(case, implementation="triton", config=c)(inner, given) for c in configs]
    assert_same_bits(*(dict(o=out["o"]) for out in outs))


def test_warps_of_their_own():
    """Who computes what is no matter to what is computed."""
    case, plain = Case("specialized", 50, 70, causal=True, dtype="float16"), Config(32, 32)
    own = dataclasses.replace(plain, warp_specialize=True)
    with gpu_target(compute_capability=100):
        got = [interpreted(case, config=c) for c in ({"fwd": own, "dq": own, "dkdv": plain}, plain)]
    assert_same_bits(*got)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("ragged_causal", "bias_k")], ids=str)
def test_bitwise_repeatable(case):
    assert_same_bits(interpreted(case), interpreted(case))


@pytest.mark.parametrize("block_ptr", [False, True], ids=["ptr_block", "block_ptr"])
def test_nan_stays_where_it_is(block_ptr):
    """Rows behind a ragged end are the next batch's; when those are NaN, nothing of it arrives."""
    case = Case("nan", 50, 70, batch=(2,), heads=2, causal=True)
    clean, x = interpreted(case, block_ptr=block_ptr), case.inputs()
    for name in ("q", "k", "v", "do"):
        x[name][1] = np.nan
    dirty = interpreted(case, x, block_ptr=block_ptr)
    for name in ("o", "lse", "dq", "dk", "dv"):
        np.testing.assert_array_equal(clean[name][0], dirty[name][0])


def test_hidden_rows():
    """A bias that hides every key of a row: o 0, lse -inf, gradients 0."""
    case = Case("hidden", 40, 40, bias="qk", causal=True, block=(16, 16))
    x = case.inputs()
    x["bias"][..., 3, :] = x["bias"][..., 20:, :] = -np.inf
    got = interpreted(case, x)
    hidden = np.r_[3, 20:40]
    assert (got["o"][:, hidden] == 0).all()
    assert (got["lse"][..., hidden] == -np.inf).all()
    assert (got["dq"][:, hidden] == 0).all()
    assert_near(case, got, x)


@pytest.mark.parametrize(("dtype", "far"), [("float32", -1e9), ("float16", -1e9), ("float16", -1e8)])
def test_rows_far_below_zero(dtype, far):
    """Rows whose every logit is about -1e9: lse cannot hold log l beside m, the gradients must not need it to. Nor has
    m room beside it for what p is doubled by."""
    case = Case("far_below", 40, 40, bias="qk", block=(16, 16), dtype=dtype)
    x = case.inputs()
    x["bias"] = np.full_like(x["bias"], far, np.float32)
    assert_near(case, interpreted(case, x), x)


@pytest.mark.parametrize("starting", ["", "fwd", "dq dkdv", "fwd dq dkdv dbias"])
@pytest.mark.parametrize(("dtype", "far"), [("float32", 1e9), ("float32", 1e30), ("bfloat16", 1e10), ("float16", 1e9)])
def test_kernels_round_a_logit_alike(starting, dtype, far, monkeypatch):
    """Which kernels start products from the bias is a matter of speed. If some rounded a logit otherwise, it would be a
    rounding larger than the largest, or less, and p infinite, or 0."""
    monkeypatch.setattr(tuning, "_starts", lambda name, spec, arch: name in starting.split())
    attend = functools.partial(flash_attention, implementation="triton", config=Config(16, 16))
    keys = 24 + len(starting)  # nothing of another case is used again
    assert_far_rows_are_alike(attend, dtype, far, rows=40, keys=keys, width=24)


@pytest.mark.parametrize(("rows", "splits"), [(40, 1), (1, 3)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_largest_logits(dtype, rows, splits):
    """exp2(s - m) is one FMA, which leaves what m was rounded by: 2^60 of logits of 1e25, but for their unit."""
    case = Case("largest", rows, 70, heads=2, kv_heads=1, block=(16, 16), dtype=dtype, max_logits=True, scale=1e25)
    x, config = case.inputs(), Config(16, 16)
    config = {name: config for name in ("dq", "dkdv")} | {"fwd": dataclasses.replace(config, num_splits=splits)}
    assert_near(case, interpreted(case, x, config=config), x, decided=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_scores_far_below_zero(splits):
    """A score function's logits are in no other unit, whoever brings their largest together."""
    q, k = (jax.random.normal(jax.random.key(n), (1, length, 1, 16), "bfloat16") for n, length in ((0, 1), (1, 70)))
    options = {"config": {"fwd": Config(16, 16, num_splits=splits)}, "return_lse": True, "return_max_logits": True}
    o, *rest = flash_attention(q, k, k, score_mod=lambda s, *_: s - 1e9, implementation="triton", **options)
    np.testing.assert_allclose(np.float32(o), np.float32(k).mean(1, keepdims=True), atol=0.01)
    for x in rest:
        np.testing.assert_allclose(x, -1e9, rtol=1e-6)


@pytest.mark.parametrize(("cap", "dtype"), [(None, "float32"), (3.0, "float32"), (3.0, "float16")])
def test_halves_of_the_keys_merge(cap, dtype):
    """As devices bring their shares together: what is left of a row besides o and lse is in the kernels' own base."""
    call = Call(Rules(soft_cap=cap, max_logits=True, lost=dtype == "float16"), (Config(),) * 4, "triton", None)
    q, k, v = (jax.random.normal(jax.random.key(n), (1, length, 2, 16), dtype) for n, length in enumerate((8, 64, 64)))
    operands = {"scale": jnp.ones((1, 1, 1, 1))}
    want = primitives.forward(call, q, k, v, operands)
    halves = [
        primitives.forward(share.wide(call), q, k[:, at : at + 32], v[:, at : at + 32], operands) for at in (0, 32)
    ]
    plan = Plan(None, {"j": ("halves",)}, {})
    merge = lambda *results: share.merge(plan, call, primitives.unit, results, q.dtype)
    got = jax.vmap(merge, axis_name="halves")(*map(jnp.stack, zip(*halves, strict=True)))
    near = 2e-6
    if dtype == "float16":
        got, want = ([joined(o, lost), *rows] for o, *rows, lost in (got, want))
        np.testing.assert_allclose(want[0], primitives.forward(share.wide(call), q, k, v, operands)[0], atol=near)
        near = 5e-4  # in each half p is rounded by itself
    for each, whole in zip(got, want, strict=True):
        for x in each:
            np.testing.assert_allclose(x, whole, rtol=near, atol=near)


def test_tuned_blocks():
    """The block sizes that callers get who ask for none."""
    case = Case("tuned", 200, 200, causal=True, head_dim=64, block=(None, None), dtype="float16")
    assert_near(case, interpreted(case))


def test_vmap():
    """The batching rule folds the mapped axis into the batch, here with an unmapped key and a mapped bias."""
    case = Case("vmap", 20, 30, batch=(3,), bias="bhqk", head_dim=16)
    x = {k: jnp.asarray(v) for k, v in case.inputs().items() if v is not None}

    def loss(q, k, v, bias):
        o = flash_attention(q[None], k[None], v[None], bias[None], implementation="triton")
        return (o**2).sum()

    each = [jax.grad(loss, (0, 1, 2, 3))(x["q"][i], x["k"][0], x["v"][i], x["bias"][i]) for i in range(3)]
    mapped = jax.vmap(jax.grad(loss, (0, 1, 2, 3)), (0, None, 0, 0))(x["q"], x["k"][0], x["v"], x["bias"])
    for i, grads in enumerate(each):
        for one, all_ in zip(grads, mapped, strict=True):
            np.testing.assert_allclose(one, all_[i], rtol=1e-6, atol=1e-6)


def test_empty():
    """No queries, no keys, no batch."""
    for changes in ({"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": (0,)}):
        case = dataclasses.replace(Case("empty", 20, 20, causal=True, max_logits=True), **changes)
        got = interpreted(case)
        assert (got["o"] == 0).all()
        assert (got["lse"] == -np.inf).all()
        assert (got["max_logits"] == -np.inf).all()
        assert (got["dq"] == 0).all()


@pytest.mark.parametrize(
    "case",
    [
        Case("padded", 40, 50, (4,), 1, 1, 16, block=(16, 16), bias="bk", causal=True),
        Case(
            "padded_everything",
            40,
            40,
            (4,),
            1,
            1,
            16,
            block=(16, 32),
            sinks=True,
            alibi="bh",
            dropout=0.2,
            mask="qk",
            bias="bqk",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_ptr", [False, True], ids=["ptr_block", "block_ptr"])
def test_padding_is_not_read(block_ptr, case):
    assert_padding_is_not_read(functools.partial(interpreted, block_ptr=block_ptr), case)


def test_positions_go_to_the_last():
    assert_positions_go_to_the_last(interpreted)


def test_nan_stays():
    assert_nan_stays(interpreted)


def test_documents_are_apart():
    case = Case("documents", 60, 60, (1,), 2, 1, 16, block=(16, 16), segments="packed", causal=True, soft_cap=2.0)
    assert_documents_are_apart(interpreted, case)


@pytest.mark.parametrize("block", [(16, 16), (64, 32), (16, 64)], ids=str)
def test_blocks_drop_the_same_keys(block):
    """Every pass, whatever its blocks, drops the keys that Philox says."""
    case = Case("kept", 40, 50, (1,), 2, 2, 50, 90, alignment="bottom_right", dropout=0.3, block=block)
    for name, kept in kept_by_pass(interpreted, case).items():
        np.testing.assert_array_equal(kept, case.inputs()["keep"], err_msg=name)
