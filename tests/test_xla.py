"""The XLA path is the definition: values, every gradient, memory."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, OPTIONS, PAIRS, Case, drawn
from checks import (
    SETTINGS,
    assert_documents_are_apart,
    assert_near,
    assert_padding_is_not_read,
    assert_same_bits,
    flash,
    kept_by_pass,
)
from jax.test_util import check_grads

from jax_flash_attn2 import Config, flash_attention


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    assert_near(case, flash(case))


TUNED = ("thousand", "thousand_keys", "causal", "ragged_causal", "segments_packed_causal", "everything")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in TUNED], ids=str)
def test_tuned_blocks(case):
    """The block sizes that callers get who ask for none, compiled as for them."""
    tuned = dataclasses.replace(case, block=(None, None))
    assert_near(tuned, flash(tuned, quick=False))


@hypothesis.settings(SETTINGS, max_examples=8)
@hypothesis.given(drawn())
def test_drawn_cases(case):
    assert_near(case, flash(case))


@pytest.mark.parametrize("case", [*OPTIONS[::4], *PAIRS[::4]], ids=str)
def test_higher_order(case):
    """The path that JAX differentiates by itself."""
    assert_near(case, flash(case, higher_order=True))


EVERYTHING = Case(
    "float64", 13, 18, dtype="float64", heads=4, kv_heads=2, head_dim=4, batch=(2,), bias="hk", causal=True,
    alignment="bottom_right", window=(12, 2), mask="qk", segments="packed", lengths="qk", soft_cap=3.0, sinks=True,
    alibi="bh", dropout=0.2,
)  # fmt: skip


@pytest.mark.parametrize("higher_order", [False, True], ids=["first_order", "higher_order"])
def test_float64(higher_order):
    """Under x64 both paths compute in fp64, and finite differences agree with their gradients, second ones too."""
    with jax.enable_x64(True):
        x = {k: jnp.asarray(a) for k, a in EVERYTHING.inputs().items() if a is not None and k != "keep"}
        do, dlse = x.pop("do"), x.pop("dlse").astype(jnp.float64)
        inner = {k: x.pop(k) for k in ("q", "k", "v", "bias", "sinks", "alibi_slopes")}
        inner = {k: a.astype(jnp.float64) for k, a in inner.items()} | {"softmax_scale": jnp.float64(0.3)}
        options = {**EVERYTHING.static, **x, "return_lse": True, "config": Config(16, 16), "higher_order": higher_order}

        def f(inner):
            o, lse = flash_attention(**inner, **options)
            assert o.dtype == lse.dtype == jnp.float64
            return (o * do).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * dlse).sum()

        order, modes = (2, ("fwd", "rev")) if higher_order else (1, ("rev",))
        check_grads(f, (inner,), order=order, modes=modes, atol=1e-5, rtol=1e-5)


def _temporary_bytes(seqlen: int, segments: bool = False, **options) -> int:
    x = jax.ShapeDtypeStruct((1, seqlen, 8, 64), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, seqlen), jnp.int32) if segments else None

    def loss(q, k, v, ids):
        return flash_attention(q, k, v, q_segment_ids=ids, **options).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return step.lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes


MEMORY = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (512, 0)},
    "segments": {"segments": True, "causal": True, "dropout_rate": 0.1, "dropout_seed": 1, "logits_soft_cap": 30.0},
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


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("ragged_causal", "bfloat16", "everything")], ids=str)
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
    Case("padded", 50, 60, (4,), 2, 1, 16, block=(16, 16), bias="hk"),
    Case("padded_causal", 60, 50, (4,), 2, 1, 16, block=(32, 16), causal=True, alignment="bottom_right"),
    Case(
        "padded_everything", 50, 50, (4,), 2, 2, 16, block=(16, 32), window=(20, 5), soft_cap=2.0, sinks=True,
        alibi="bh", dropout=0.2, mask="qk", max_logits=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_padding_is_not_read(case):
    assert_padding_is_not_read(flash, case)


DOCUMENTS = [
    Case("documents", 70, 70, (1,), 2, 1, 16, block=(16, 16), segments="packed", causal=True),
    Case("documents_mixed", 50, 60, (2,), 2, 2, 16, block=(32, 16), segments="mixed", soft_cap=2.0, dropout=0.2),
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
