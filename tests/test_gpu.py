"""On a GPU: real launches, bf16, determinism, and errors that only a driver can raise. The most telling come first."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from checks import assert_near, assert_same_bits, flash

from jax_flash_attn2 import flash_attention

pytestmark = pytest.mark.gpu

WIDTHS = [
    Case(
        f"bfloat16_hd{d}" + (f"_{v}" if v != d else ""), 256, 256, (2,), 4, 2, d, v,
        causal=True, dtype="bfloat16", block=(None, None),
    )
    for d, v in ((64, 64), (128, 128), (256, 256), (192, 128), (96, 96), (80, 80), (32, 32), (64, 68), (8, 8))
]  # fmt: skip
"""The first to be run: every width forward and backward."""

LONG = [
    Case(
        f"{dtype}_hd{d}_{'causal' if causal else 'full'}", 1024, 1024, (2,), 4, 2, d,
        causal=causal, dtype=dtype, block=(None, None),
    )
    for dtype in ("bfloat16", "float16", "float32")
    for d in (64, 128, 256)
    for causal in (False, True)
]  # fmt: skip

VARIANTS = pytest.mark.parametrize("block_ptr", [None, True, False], ids=["tuned", "block_ptr", "ptr_block"])


def check(case: Case, block_ptr: bool | None) -> None:
    size = jnp.dtype(case.dtype).itemsize
    if block_ptr and (case.head_dim * size % 16 or (case.v_dim or case.head_dim) * size % 16):
        pytest.skip("a descriptor's rows are multiples of 16 bytes")
    assert_near(case, flash(case, implementation="triton", block_ptr=block_ptr))


@VARIANTS
@pytest.mark.parametrize("case", WIDTHS, ids=str)
def test_widths(case, block_ptr):
    check(case, block_ptr)


@VARIANTS
@pytest.mark.parametrize("case", LONG, ids=str)
def test_at_length(case, block_ptr):
    check(case, block_ptr)


@pytest.mark.parametrize("case", LONG[:6], ids=str)
def test_bitwise_repeatable(case):
    first = flash(case, implementation="triton")
    for _ in range(5):
        assert_same_bits(first, flash(case, implementation="triton"))


def test_nan_behind_the_end():
    """A NaN in the next batch, which lies right behind a ragged end, does not arrive."""
    case = Case("nan", 1000, 1000, (2,), 4, 4, 64, causal=True, dtype="bfloat16", block=(None, None))
    clean, x = flash(case, implementation="triton"), case.inputs()
    for name in ("q", "k", "v", "do"):
        x[name][1] = np.nan
    dirty = flash(case, x, implementation="triton")
    for name in ("o", "lse", "dq", "dk", "dv"):
        assert clean[name][0].tobytes() == dirty[name][0].tobytes(), name


@VARIANTS
def test_long_offsets(block_ptr):
    """The last of three batches, whose elements are all past 2**31, comes out as it does alone, gradients included."""
    batch, seqlen, heads, width = 3, 1 << 17, 64, 128

    @functools.partial(jax.jit, static_argnums=0)
    def some(first):  # no two rows, heads or batches alike; a fraction of a pattern that is random enough
        at = jnp.arange(seqlen * heads * width, dtype=jnp.uint32).reshape(1, seqlen, heads, width)
        bits = (at + jnp.arange(first, batch, dtype=jnp.uint32)[:, None, None, None] * 0x9E3779B1) * 0x85EBCA6B
        return (((bits ^ bits >> 15) >> 8) * 2.0**-22 - 2).astype(jnp.bfloat16)

    @jax.jit
    def results(x):
        attend = functools.partial(
            flash_attention, causal=True, window_size=(255, 0), implementation="triton", block_ptr=block_ptr
        )
        o, vjp = jax.vjp(attend, x, x, x)
        return o, *vjp(x)

    whole, alone = results(some(0)), results(some(batch - 1))
    assert float(jnp.var(alone[0][:, -256:].astype(jnp.float32))) > 1e-4
    for name, x, y in zip(("o", "dq", "dk", "dv"), whole, alone, strict=True):
        assert bool((x[-1] == y[0]).all()), name


def test_same_as_xla():
    case = dataclasses.replace(LONG[1], name="both", dtype="float32")
    triton, xla = flash(case, implementation="triton"), flash(case, implementation="xla")
    for name in triton:
        np.testing.assert_allclose(triton[name], xla[name], rtol=2e-3, atol=2e-3)


def test_none_chooses_triton():
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    assert "triton_kernel_call" in jax.jit(flash_attention).lower(x, x, x).as_text()


@pytest.mark.parametrize("block_ptr", [False, True], ids=["ptr_block", "block_ptr"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, block_ptr):
    check(case, block_ptr)
