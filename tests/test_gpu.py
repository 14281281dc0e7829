"""On a GPU: real launches, bf16, determinism, and errors that only a driver can raise. Skipped where there is none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from checks import assert_near, assert_same_bits, flash

from jax_flash_attn2 import flash_attention

pytestmark = pytest.mark.gpu

LONG = [
    Case(
        f"{dtype}_hd{d}_{'causal' if causal else 'full'}", 1024, 1024, (2,), 4, 2, d,
        causal=causal, dtype=dtype, block=(None, None),
    )
    for dtype in ("float16", "bfloat16", "float32")
    for d in (64, 128, 256)
    for causal in (False, True)
]  # fmt: skip


def widths_fit(case: Case) -> bool:
    size = jnp.dtype(case.dtype).itemsize
    return not (case.head_dim * size % 16 or (case.v_dim or case.head_dim) * size % 16)


@pytest.mark.parametrize("block_ptr", [False, True], ids=["ptr_block", "block_ptr"])
@pytest.mark.parametrize("case", CASES + LONG, ids=str)
def test_values_and_gradients(case, block_ptr):
    if block_ptr and not widths_fit(case):
        pytest.skip("a descriptor's rows are multiples of 16 bytes")
    assert_near(case, flash(case, implementation="triton", block_ptr=block_ptr))


@pytest.mark.parametrize("case", LONG[6:12], ids=str)
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


def test_long_offsets():
    """More than 2**31 elements in one array."""
    x = jnp.ones((1, 1 << 17, 128, 128), jnp.bfloat16)  # 2**31 elements
    tail = flash_attention(x[:, -256:], x, x)
    assert (tail == 1).all()


def test_same_as_xla():
    case = dataclasses.replace(LONG[1], name="both", dtype="float32")
    triton, xla = flash(case, implementation="triton"), flash(case, implementation="xla")
    for name in triton:
        np.testing.assert_allclose(triton[name], xla[name], rtol=2e-3, atol=2e-3)


def test_none_chooses_triton():
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    assert "triton_kernel_call" in jax.jit(flash_attention).lower(x, x, x).as_text()
