"""What a GPU would run, without one: the Triton calls are in the module, and nothing the size of the logits is."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARRAYS, CASES
from checks import with_mask, with_score

from jax_flash_attn2 import EXPORT_DISABLED_CHECKS, Config, flash_attention, get_cached_flash_attention, gpu_target
from jax_flash_attn2.base.config import PASSES

pytest.importorskip("jax_triton", reason="lowering for CUDA needs jax-triton")
pytest.importorskip("jax_cuda13_plugin", reason="lowering for CUDA needs JAX's CUDA plugin")

import score_functions

from jax_flash_attn2.base.config import Tuned
from jax_flash_attn2.functions.trace import trace
from jax_flash_attn2.gpu import launch, translate
from jax_flash_attn2.gpu.target import Target

TRITON_CALL = "custom_call @triton_kernel_call_ffi"


def lower(function, *shapes, capability=90):
    """The StableHLO of `function` for an NVIDIA GPU that need not be there."""
    with gpu_target(compute_capability=capability):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def gradient(argnums=(0, 1, 2), **options):
    def loss(*x):
        return flash_attention(*x, **options).astype(jnp.float32).sum()

    return jax.grad(loss, argnums)


def shape(*axes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(axes, dtype)


@pytest.mark.in_thirds
@pytest.mark.parametrize("block_ptr", [False, True], ids=["ptr_block", "block_ptr"])
@pytest.mark.parametrize("capability", [80, *(pytest.param(x, marks=pytest.mark.thorough) for x in (86, 89, 100)), 90])
def test_three_calls_and_no_logits(capability, block_ptr):
    """Odd lengths, so that [.., Sq, Sk] could not hide behind another array of the same shape."""
    q, kv = shape(2, 1016, 8, 64), shape(2, 776, 4, 64)
    text = lower(gradient(causal=True, block_ptr=block_ptr), q, kv, kv, capability=capability)
    assert text.count(TRITON_CALL) == 3
    assert not re.search(r"1016x776|776x1016", text)


def test_smoke():
    """One forward and backward: the test that every version of JAX and Triton must pass."""
    x = shape(1, 200, 2, 64, dtype="float16")
    assert lower(gradient(), x, x, x).count(TRITON_CALL) == 3


# A kernel takes its second to compile: every other case, and of those that combine options or only vary a bias, every
# eighth. `make test` has all options at once, what is read through lists of tiles, and the widest; and decoding.
MASKS = [case.name for case in CASES if case.mask_kind and not case.name.startswith("pair")]
LOWERED = [
    case
    for i, case in enumerate(CASES)
    if i % (8 if case.name.startswith(("pair", "bias")) else 2) == 0 or case.name in ("everything", *MASKS)
]


QUICKLY = ("everything", "block_mask_weights", "mask_weights", "mla", "decode")
NUMBERED = [
    pytest.param(i, case, marks=[] if case.name in QUICKLY else pytest.mark.thorough) for i, case in enumerate(LOWERED)
]


@pytest.mark.parametrize(("number", "case"), NUMBERED, ids=str)
def test_cases(number, case):
    """The cases compile, on the architectures and memory variants by turns.

    IEEE fp32 products unroll into thousands of instructions: every fourth case, the rest stand for their shapes.
    """
    if case.dtype == "float32" and number % 4:
        case = dataclasses.replace(case, dtype="bfloat16")
    dtype = jnp.dtype(case.dtype)
    widths = (case.head_dim * dtype.itemsize, (case.v_dim or case.head_dim) * dtype.itemsize)
    x = case.inputs()
    given = {
        name: shape(*x[name].shape, dtype=x[name].dtype)
        for name in ("q", "k", "v", "bias", *ARRAYS)
        if x[name] is not None
    }
    real = {name for name, like in given.items() if jnp.issubdtype(like.dtype, jnp.floating)}
    differentiated = real - {"weights"}  # those of a BlockMask have no gradient

    def loss(some, others):
        out = flash_attention(
            **with_mask(case, with_score(case, some | others)), **case.static,
            config=Config(*case.block), softmax_scale=case.scale,
            block_ptr=number % 3 != 0 and not any(w % 16 for w in widths), return_max_logits=case.max_logits,
        )  # fmt: skip
        return jax.tree.leaves(out)[0].astype(jnp.float32).sum()

    some = {name: given.pop(name) for name in differentiated}
    text = lower(jax.grad(loss), some, given, capability=(80, 86, 90, 100)[number % 4])
    # The gradient of a bias has a kernel of its own unless nothing is summed for it.
    added = [x["bias"], x["weights"] if case.mask_kind == "weights" else None]
    added = [y.shape for y in added if y is not None]
    whole = case.seqlen_q * case.seqlen_k * case.heads * math.prod(case.batch)
    less = math.prod(np.broadcast_shapes(*added)) < whole
    summed = x["bias"] is not None and (less or case.mask_kind.startswith("block"))
    reads = {"": 0, "folds": 2}.get(case.score, 1)  # each element that a score function reads has a kernel, too
    assert text.count(TRITON_CALL) == 3 + summed + reads


@pytest.mark.in_thirds
@pytest.mark.parametrize("bias", ["hqk", "k"])
def test_bias_gradient_holds_no_logits(bias):
    """A broadcast bias has its gradient reduced on the way: one more call, no [B, H, Sq, Sk] in the module."""
    q, sizes = shape(2, 1016, 8, 64), {"h": 8, "q": 1016, "k": 1016}
    b = shape(1, *(sizes[axis] if axis in bias else 1 for axis in "hqk"))
    text = lower(gradient((0, 1, 2, 3)), q, q, q, b)
    assert text.count(TRITON_CALL) == 4
    assert "2x8x1016x1016" not in text
    assert lower(gradient((0, 1, 2)), q, q, q, b).count(TRITON_CALL) == 3  # nobody asked for the bias's


def test_specialised_warps_are_started(monkeypatch):
    """A kernel with warps of their own for loads and products has more of them than were asked for."""
    built, library = [], launch.triton_lib.triton_kernel_call_lib
    build = library.TritonKernel
    monkeypatch.setattr(library, "TritonKernel", lambda *args: built.append(args) or build(*args))
    monkeypatch.setenv("JAX_FLASH_ATTN2_CACHE", "off")
    x, config = shape(1, 512, 2, 64), {"fwd": Config(warp_specialize=True)}
    lower(functools.partial(flash_attention, config=config, causal=True), x, x, x, capability=100)
    _, warps, _, _, ptx, *_ = built[-1]
    assert warps > 4
    assert f".reqntid {32 * warps}" in ptx
    with pytest.raises(ValueError, match="for chips with tensor memory, sm_100 and sm_103, got sm_90"):
        lower(functools.partial(flash_attention, config=config), x, x, x)
    monkeypatch.setattr(launch, "_COMPILER", None)
    with pytest.raises(ValueError, match="needs a jax-triton that is known here"):
        lower(functools.partial(flash_attention, config=config), x, x, x, capability=100)


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.thorough), 100])
def test_translated_functions_compile(capability):
    """What a person wrote in JAX, and its derivative, as functions that a kernel calls."""
    function = lambda *x: sum(
        score_functions.FUNCTIONS[name](*x)
        for name in ("relative", "powers", "integers", "a hash", "tails", "trigonometry")
    )
    with jax.numpy_dtype_promotion("standard"):
        for f in (function, jax.grad(function)):
            traced, arrays = trace(f, "score_mod", jnp.float32)
            source = translate.translate(score_functions.value_of(traced), arrays)
            spec, config = score_functions.Spec(translate.jitted(source)), Tuned(16, 32, 4, 1)

            def call(scores, *arrays, spec=spec, config=config):
                out = jax.ShapeDtypeStruct(scores.shape, scores.dtype)
                operands = (scores, arrays)
                return launch.run(Target(capability), score_functions.apply_kernel, 6, operands, (out,), spec, config)

            assert lower(call, score_functions.SCORES, *arrays, capability=capability).count(TRITON_CALL) == 1


def test_implementation_is_taken_at_its_word():
    x = shape(1, 64, 2, 64, dtype="float32")
    call = functools.partial(functools.partial, flash_attention)
    assert TRITON_CALL in lower(call(implementation="triton"), x, x, x)
    assert TRITON_CALL not in lower(call(implementation="xla"), x, x, x)


def test_float64_is_left_to_xla():
    with jax.enable_x64(True):
        x = shape(1, 64, 2, 64, dtype="float64")
        assert TRITON_CALL not in lower(flash_attention, x, x, x)


def test_cached_function_reads_the_environment(monkeypatch):
    x, texts = shape(1, 128, 2, 64), []
    for value in ("0", "1"):
        monkeypatch.setenv("FLASH_ATTN_BLOCK_PTR", value)
        texts.append(lower(get_cached_flash_attention(64, 64), x, x, x))
    assert texts[0] != texts[1]


def test_too_large_for_the_chip():
    """Shared memory is checked when a call is compiled, not when it is launched."""
    x, config = shape(1, 1024, 2, 128), Config(64, 64, num_stages=6)
    with pytest.raises(ValueError, match=r"attn_fwd_kernel with block_m=64, block_n=64.*needs \d+ bytes of shared"):
        lower(functools.partial(flash_attention, config=config), x, x, x, capability=86)


def test_config_by_pass():
    """A mapping sets one pass and leaves the others tuned."""
    x = shape(1, 1024, 2, 64)
    config = {"dkdv": Config(128, 64, num_stages=8)}
    assert set(config) < set(PASSES)
    lower(functools.partial(flash_attention, config=config), x, x, x)  # the forward is not concerned
    with pytest.raises(ValueError, match="attn_bwd_dkdv_kernel with block_m=128, block_n=64, num_stages=8"):
        lower(gradient(config=config), x, x, x)


def test_needs_a_target_without_a_gpu():
    if any(d.platform == "gpu" for d in jax.devices()):
        pytest.skip("there is a GPU")
    x = shape(1, 64, 2, 64)
    with pytest.raises(ValueError, match=r"gpu_target\(compute_capability=90\)"):
        jax.jit(flash_attention).trace(x, x, x).lower(lowering_platforms=("cuda",))


def test_export():
    """Ahead of time, for a GPU elsewhere."""
    x = shape(1, 256, 2, 64)
    options = {"platforms": ("cuda",), "disabled_checks": EXPORT_DISABLED_CHECKS}
    with gpu_target(compute_capability=90):
        exported = jax.export.export(jax.jit(flash_attention), **options)(x, x, x)
    assert exported.platforms == ("cuda",)
    assert TRITON_CALL in exported.mlir_module()


def test_under_strict_rank_promotion():
    """What the caller's code is held to is no matter in ours."""
    x, lengths = shape(2, 200, 1, 64), shape(2, dtype="int32")

    def loss(x, lengths):
        return flash_attention(x, x, x, kv_lengths=lengths, window_size=(40, 3)).astype(jnp.float32).sum()

    with jax.numpy_rank_promotion("raise"):
        assert lower(jax.grad(loss), x, lengths).count(TRITON_CALL) == 3


def test_another_gpu_is_asked_for():
    """AMD's have no name to be compiled for elsewhere."""
    attend = jax.jit(lambda x: flash_attention(x, x, x))
    with pytest.raises(ValueError, match="lowering for rocm needs an AMD GPU on this machine"):
        attend.trace(shape(2, 64, 1, 64)).lower(lowering_platforms=("rocm",))
