"""The XLA path is the definition: values, every gradient, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from checks import assert_near, assert_same_bits, flash
from jax.test_util import check_grads

from jax_flash_attn2 import Config, flash_attention


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    assert_near(case, flash(case))


@pytest.mark.parametrize("case", [c for c in CASES if "thousand" in c.name or "causal" in c.name], ids=str)
def test_tuned_blocks(case):
    """The block sizes that callers get who ask for none."""
    tuned = dataclasses.replace(case, block=(None, None))
    assert_near(tuned, flash(tuned))


def test_float64():
    """Under x64 the path computes in fp64, and finite differences agree with its gradients."""
    with jax.enable_x64(True):
        case = Case("float64", 20, 30, dtype="float64", heads=4, causal=True, bias="hk", head_dim=8)
        x = {k: None if v is None else jnp.asarray(v, jnp.float64) for k, v in case.inputs().items()}

        def f(q, k, v, bias, scale):
            o, lse = flash_attention(
                q, k, v, bias, causal=True, softmax_scale=scale, return_lse=True, config=Config(16, 16)
            )
            assert o.dtype == lse.dtype == jnp.float64
            return (o * x["do"]).sum() + (lse * x["dlse"]).sum()

        operands = (x["q"], x["k"], x["v"], x["bias"], jnp.float64(0.3))
        check_grads(f, operands, order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


def _temporary_bytes(seqlen: int, **options) -> int:
    x = jax.ShapeDtypeStruct((1, seqlen, 8, 64), jnp.float32)
    step = jax.grad(lambda q, k, v: flash_attention(q, k, v, **options).sum(), argnums=(0, 1, 2))
    return jax.jit(step).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear(causal):
    """Forward and backward: twice the length takes at most 2.2 times the memory, and far less than the logits."""
    small, large = _temporary_bytes(8192, causal=causal), _temporary_bytes(16384, causal=causal)
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


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("ragged_causal", "bias_bhqk", "bfloat16")], ids=str)
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
