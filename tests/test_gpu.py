"""On a GPU: real launches, bf16, determinism, and errors that only a driver can raise. The most telling come first."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import paged_cases
import pytest
from cases import CASES, Case
from checks import assert_far_rows_are_alike, assert_near, assert_same_bits, flash

from jax_flash_attn2 import Config, flash_attention

pytestmark = pytest.mark.gpu

WIDTHS = [
    Case(
        f"bfloat16_hd{d}" + (f"_{v}" if v != d else ""), 256, 256, (2,), 4, 2, d, v,
        causal=True, dtype="bfloat16", block=(None, None),
    )
    for d, v in ((64, 64), (128, 128), (256, 256), (192, 128), (96, 96), (80, 80), (32, 32), (64, 68), (8, 8))
]  # fmt: skip
"""The first to be run: every width forward and backward."""

DECODE = [
    Case(
        f"decode_{dtype}_{rows}x{heads}to{kv_heads}_hd{d}", rows, 4096, (2,), heads, kv_heads, d,
        causal=True, alignment="bottom_right", lengths="k", dtype=dtype, block=(None, None),
    )
    for rows, heads, kv_heads, d in ((1, 32, 8, 128), (1, 64, 1, 128), (4, 16, 4, 64), (1, 8, 2, 256))
    for dtype in ("bfloat16", "float32")
]  # fmt: skip
"""A few rows against many keys, which several programs share."""

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
@pytest.mark.parametrize("splits", [None, 7])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case, splits, block_ptr):
    config = {"fwd": Config(num_splits=splits)}
    assert_near(case, flash(case, implementation="triton", block_ptr=block_ptr, config=config))


def check_paged(problem: paged_cases.Problem | int, block_ptr: bool | None) -> None:
    arrays = (paged_cases.draw(problem) if isinstance(problem, int) else problem).arrays
    pages = [arrays[name] for name in ("k_pages", "v_pages") if name in arrays]
    if block_ptr and any(x.shape[3] * x.dtype.itemsize % 16 for x in pages):
        pytest.skip("a descriptor's rows are multiples of 16 bytes")
    if pages[0].dtype == jnp.float8_e4m3fn and float(jax.devices()[0].compute_capability) < 8.9:
        pytest.skip("this chip has no e4m3")
    paged_cases.check(problem, "triton", block_ptr=block_ptr)


def paged_problem(size: int, cache: str, latent: bool) -> paged_cases.Problem:
    """Four sequences of up to 3000 keys in pages in no order, as they are served."""
    rng, lengths = np.random.default_rng(size), np.int32([3000, 1, 1025, 2048])
    heads, kv_heads, width = (16, 1, 576) if latent else (32, 8, 128)
    table = rng.permutation(4 * -(-3000 // size)).reshape(4, -1).astype(np.int32)
    draw = functools.partial(paged_cases._numbers, rng)
    x = {"q": draw((4, heads, width), "bfloat16"), "page_table": table, "lengths": lengths}
    for name in "k" if latent else "kv":
        x[f"{name}_pages"] = draw((table.size, size, kv_heads, width), cache)
        if cache == "int8":
            x[f"{name}_scale"] = rng.uniform(0.01, 0.03, (table.size, kv_heads)).astype(np.float32)
    options = {"window_size": None, "softmax_scale": None, "head_dim_v": 512 if latent else None}
    return paged_cases.Problem(f"pages{size}-{cache}{'-latent' * latent}", x, options)


PAGED = [(size, "bfloat16", False) for size in (16, 64, 256)]
PAGED += [(64, "int8", False), (64, "bfloat16", True), (16, "int8", True)]


@VARIANTS
@pytest.mark.parametrize(("size", "cache", "latent"), PAGED)
def test_paged(size, cache, latent, block_ptr):
    if latent and block_ptr:
        pytest.skip("latent attention reads through pointers")
    check_paged(paged_problem(size, cache, latent), block_ptr)


@pytest.mark.parametrize("block_ptr", [False, True], ids=["ptr_block", "block_ptr"])
@pytest.mark.parametrize("number", range(12))
def test_paged_drawn(number, block_ptr):
    check_paged(number, block_ptr)


@VARIANTS
@pytest.mark.parametrize("case", LONG, ids=str)
def test_at_length(case, block_ptr):
    check(case, block_ptr)


@pytest.mark.parametrize("case", LONG[:6], ids=str)
def test_bitwise_repeatable(case):
    first = flash(case, implementation="triton")
    for _ in range(5):
        assert_same_bits(first, flash(case, implementation="triton"))


@VARIANTS
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "far"), [("bfloat16", 1e9), ("bfloat16", 1e30), ("float16", 1e9), ("float32", 1e30)])
def test_far_rows_are_alike(dtype, far, width, block_ptr):
    attend = functools.partial(flash_attention, implementation="triton", block_ptr=block_ptr)
    assert_far_rows_are_alike(attend, dtype, far, rows=300, keys=500, width=width)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_largest_logits(width, dtype):
    case = Case("largest", 300, 500, (), 2, 1, width, max_logits=True, scale=1e25, dtype=dtype, block=(None, None))
    x = case.inputs()
    assert_near(case, flash(case, x, implementation="triton"), x, decided=True)


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
