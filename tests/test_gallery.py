"""The gallery of attention: each variant agrees with its plain definition, on the XLA path, or in the interpreter where
that is what runs (TRITON_INTERPRET=1); and its kernels compile. `make test` looks at a few."""

import attention_gallery
import attention_variants
import jax
import jax.numpy as jnp
import pytest
from attention_gallery import TOLERANCE, VARIANTS, check, inputs

from jax_flash_attn2 import Config, flash_attention, gpu_target
from jax_flash_attn2.gpu import interpret

QUICKLY = ("causal_documents", "tree", "relative_table", "forgetting")
EACH = [
    pytest.param(n, make, marks=[] if make.__name__ in QUICKLY else pytest.mark.thorough, id=make.__name__)
    for n, make in enumerate(VARIANTS)
]


@pytest.fixture(autouse=True)
def as_people_write():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(("number", "make"), EACH)
def test_agrees_with_its_definition(number, make):
    """In the interpreter through descriptors and pointers by turns."""
    how = {"implementation": "triton", "block_ptr": number % 2 == 0} if interpret.enabled() else {}
    assert check(make(), config=Config(block_m=32, block_n=32), **how) <= TOLERANCE


@pytest.mark.skipif(interpret.enabled(), reason="interprets")
@pytest.mark.parametrize(("number", "make"), EACH[::2])
def test_compiles(number, make):
    """Every other one, for sm_80, 90 and 100 by turns."""
    pytest.importorskip("jax_triton")
    variant = make()
    (q, k, v, w), floats, others = inputs(variant)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))

    def loss(q, k, v, floats):
        o = flash_attention(q, k, v, **variant.ours(floats | others))
        return (o.astype(jnp.float32) * w).sum()

    with gpu_target(compute_capability=(80, 90, 100)[number % 3]):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(q, k, v, floats).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call") >= 3


def test_every_variant_is_shown():
    """And each has a picture and its text on the page."""
    made = [x for x in vars(attention_variants).values() if getattr(x, "__module__", "") == "attention_variants"]
    assert {x for x in made if x not in (attention_variants.Variant, attention_variants.hide)} == set(VARIANTS)
    page = (attention_gallery.PAGE / "README.md").read_text()
    for make in VARIANTS:
        assert f"({make.__name__}.png)" in page
        assert (attention_gallery.PAGE / f"{make.__name__}.png").exists()
