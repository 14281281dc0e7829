"""The XLA path is the definition: values, every gradient, memory."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, OPTIONS, PAIRS, Case, drawn
from checks import (
    QUICK,
    SETTINGS,
    assert_documents_are_apart,
    assert_nan_stays,
    assert_near,
    assert_padding_is_not_read,
    assert_positions_go_to_the_last,
    assert_same_bits,
    definition,
    flash,
    flash_function,
    in_float64,
    kept_by_pass,
    operands,
    results,
    run,
)
from jax.test_util import check_grads

from jax_flash_attn2 import flash_attention


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    assert_near(case, flash(case))


TUNED = ("thousand", "thousand_keys", "causal", "ragged_causal", "segments_packed_causal", "everything")


@pytest.mark.usefixtures("compiled_fully")
@pytest.mark.parametrize("case", [c for c in CASES if c.name in TUNED], ids=str)
def test_tuned_blocks(case):
    """The block sizes that callers get who ask for none, compiled as for them."""
    tuned = dataclasses.replace(case, block=(None, None))
    assert_near(tuned, flash(tuned, quick=False))


@pytest.mark.thorough
@hypothesis.settings(SETTINGS, max_examples=6)
@hypothesis.given(drawn())
def test_drawn_cases(case):
    assert_near(case, flash(case))


@pytest.mark.in_thirds
@pytest.mark.parametrize("case", [*OPTIONS[::6], *PAIRS[::6]], ids=str)
def test_higher_order(case):
    """The path that JAX differentiates by itself."""
    assert_near(case, flash(case, higher_order=True))


def test_no_rows_in_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        q, k = jnp.zeros((2, 0, 1, 4)), jnp.zeros((2, 3, 1, 4))
        o, lse = flash_attention(q, k, k, q_lengths=jnp.zeros(2, jnp.int32), return_lse=True)
        assert (o.shape, lse.shape, o.dtype) == ((2, 0, 1, 4), (2, 1, 0), jnp.float64)


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0)])
def test_nothing_to_see(lengths):
    """No rows, or no keys, and a rule that has no score to take a slope at."""
    case = Case("nothing", *lengths, soft_cap=2.0, sinks=True, lse=True)
    assert_near(case, flash(case))


EVERYTHING = Case(
    "float64", 13, 18, dtype="float64", heads=4, kv_heads=2, head_dim=4, batch=(2,), bias="hk", causal=True,
    alignment="bottom_right", window=(12, 2), mask="qk", segments="packed", lengths="qk", soft_cap=3.0, sinks=True,
    alibi="bh", dropout=0.2,
)  # fmt: skip


def test_float64():
    """Under x64 the path computes in fp64, and finite differences agree with its gradients."""
    with jax.enable_x64(True):
        inner, given, cotangents = operands(EVERYTHING, in_float64(EVERYTHING.inputs()))
        function = flash_function(EVERYTHING)

        @jax.jit
        def f(inner):
            out = function(inner, given)
            assert out["o"].dtype == out["lse"].dtype == jnp.float64
            lse = jnp.where(out["lse"] == -jnp.inf, 0, out["lse"])
            return jnp.vdot(out["o"], cotangents["o"]) + jnp.vdot(lse, cotangents["lse"])

        check_grads(f, (inner,), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


def test_second_derivatives():
    """Forward over reverse and reverse over reverse, of everything at once, in fp64."""

    def second(function, inner, given, cotangents):
        def gradient(inner):
            return {name: x for name, x in results(function, inner, given, cotangents).items() if name[1:] in inner}

        def along(inner):
            return sum(jnp.vdot(x, inner[name[1:]]) for name, x in gradient(inner).items())

        return jax.jvp(gradient, (inner,), (inner,))[1], jax.grad(along)(inner)

    with jax.enable_x64(True):
        args = operands(EVERYTHING, in_float64(EVERYTHING.inputs()))
        functions = flash_function(EVERYTHING, higher_order=True), definition(EVERYTHING)
        got, want = (run(functools.partial(second, f), *args) for f in functions)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, want)


def _temporary_bytes(seqlen: int, segments: bool = False, **options) -> int:
    x = jax.ShapeDtypeStruct((1, seqlen, 8, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, seqlen), jnp.int32) if segments else None

    def loss(q, k, v, ids):
        return flash_attention(q, k, v, q_segment_ids=ids, **options).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return step.lower(x, x, x, ids).compile(QUICK).memory_analysis().temp_size_in_bytes


MEMORY = {
    "full": {},
    "causal": {"causal": True},
    "segments": {
        "segments": True,
        "window_size": 1000,
        "causal": True,
        "dropout_rate": 0.1,
        "dropout_seed": 1,
        "logits_soft_cap": 30.0,
    },
    "higher_order": {"causal": True, "higher_order": True},
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_linear(name):
    """Forward and backward: twice the length takes at most 2.2 times the memory, and far less than the logits."""
    small, large = _temporary_bytes(8192, **MEMORY[name]), _temporary_bytes(16384, **MEMORY[name])
    print(f"temporary memory: {small / 2**20:.1f} MiB at 8192, {large / 2**20:.1f} MiB at 16384")
    assert large <= 2.2 * small
    assert large < 16384 * 16384 * 4


def test_hidden_rows():
    """A bias that hides every key of a row: o 0, lse -inf, gradients 0, and no NaN on the way."""
    case = Case("hidden", 40, 40, bias="qk", causal=True, block=(16, 16))
    for hide in (-np.inf, np.finfo(np.float32).min):
        x = case.inputs()
        x["bias"][..., 3, :] = x["bias"][..., 20:, :] = hide
        with jax.debug_nans(True):
            got = flash(case, x)
        hidden = np.r_[3, 20:40]
        assert (got["o"][:, hidden] == 0).all()
        assert (got["lse"][..., hidden] == -np.inf).all()
        assert (got["dq"][:, hidden] == 0).all()
        x["bias"] = np.where(x["bias"] == hide, -np.inf, x["bias"]).astype(np.float32)
        assert_near(case, got, x)


def test_rows_far_below_zero():
    """Rows whose every logit is about -1e9: lse cannot hold log l beside m, the gradients must not need it to."""
    case = Case("far_below", 40, 40, bias="qk", block=(16, 16))
    x = case.inputs()
    x["bias"] = np.full_like(x["bias"], -1e9)
    assert_near(case, flash(case, x), x)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("ragged_causal", "bfloat16", "segments_mixed")], ids=str
)
def test_bitwise_repeatable(case):
    assert_same_bits(flash(case), flash(case))


def test_nan_stays_where_it_is():
    """A NaN in one batch does not reach another."""
    case = Case("nan", 50, 50, batch=(2,), heads=2, causal=True, block=(16, 16))
    clean, x = flash(case), case.inputs()
    for name in ("q", "k", "v"):
        x[name][1] = np.nan
    dirty = flash(case, x)
    for name in ("o", "lse", "dq", "dk", "dv"):
        np.testing.assert_array_equal(clean[name][0], dirty[name][0])


PADDED = [
    Case("padded", 50, 60, (4,), 2, 1, 16, block=(16, 16), bias="bk"),
    Case("padded_causal", 60, 50, (4,), 2, 1, 16, block=(32, 16), causal=True, alignment="bottom_right", bias="bq"),
    Case(
        "padded_everything", 50, 50, (4,), 2, 2, 16, block=(16, 32), window=(20, 5), soft_cap=2.0, sinks=True,
        alibi="bh", bias="bhqk", mask="qk", max_logits=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_padding_is_not_read(case):
    assert_padding_is_not_read(flash, case)


def test_positions_go_to_the_last():
    assert_positions_go_to_the_last(flash)


@pytest.mark.parametrize("higher_order", [False, True])
def test_nan_stays(higher_order):
    assert_nan_stays(functools.partial(flash, higher_order=higher_order))


DOCUMENTS = [
    Case("documents", 70, 70, (1,), 2, 1, 16, block=(16, 16), segments="packed", causal=True),
    Case("documents_mixed", 50, 60, (2,), 2, 2, 16, block=(32, 16), segments="mixed", soft_cap=2.0),
]


@pytest.mark.parametrize("case", DOCUMENTS, ids=str)
def test_documents_are_apart(case):
    assert_documents_are_apart(flash, case)


@pytest.mark.parametrize("block", [(16, 16), (64, 16), (16, 32), (None, None)], ids=str)
def test_blocks_drop_the_same_keys(block):
    """Every pass, whatever its blocks, drops the keys that Philox says."""
    alignment = "bottom_right" if block[0] == 16 else "top_left"
    case = Case("kept", 40, 50, (2,), 2, 2, 50, 90, alignment=alignment, dropout=0.3, block=block)
    for name, kept in kept_by_pass(flash, case).items():
        np.testing.assert_array_equal(kept, case.inputs()["keep"], err_msg=name)
