"""Each message: the argument, what was wanted, what came, what to do."""

import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2 import Config, flash_attention, get_cached_flash_attention, gpu_target
from jax_flash_attn2.base import arguments

X = jax.device_put(np.zeros((2, 10, 4, 16), np.float32))
KV = jax.device_put(np.zeros((2, 12, 2, 16), np.float32))


def call(q=X, k=KV, v=KV, bias=None, **options):
    return flash_attention(q, k, v, bias, **options)


WRONG = {
    "rank": (lambda: call(q=X[0, 0]), ValueError, "q must have shape [..., sequence, heads, head_dim], so at least 3 axes, got shape (4, 16)"),
    "batch": (lambda: call(k=KV[:1]), ValueError, "k must have q's batch axes (2,), got (1,)"),
    "batch_rank": (lambda: call(v=KV[0]), ValueError, "v must have q's batch axes (2,), got ()"),
    "head_dim": (lambda: call(k=KV[..., :8]), ValueError, "k must have q's head_dim 16, got 8"),
    "v_length": (lambda: call(v=KV[:, :11]), ValueError, "v must have k's length and heads (12, 2), got (11, 2)"),
    "heads": (lambda: call(q=X[:, :, :3]), ValueError, "the heads of q must be a multiple of those of k and v, got 3 and 2"),
    "no_heads": (lambda: call(q=X[:, :, :0]), ValueError, "must be a multiple of those of k and v, got 0 and 2"),
    "head_dim_wide": (
        lambda: call(*(jnp.zeros((1, 4, 2, 1025)),) * 3),
        ValueError,
        "head_dim of q and k must be from 1 to 1024, got 1025",
    ),
    "v_dim_wide": (lambda: call(v=jnp.zeros((2, 12, 2, 1025))), ValueError, "head_dim of v must be from 1 to 1024, got 1025"),
    "wide_kernels": (lambda: call(v=jnp.zeros((2, 12, 2, 300)), implementation="triton"), ValueError, 'implementation="triton" has heads of up to 256, got 16 and 300'),
    "int": (lambda: call(q=X.astype(jnp.int32)), TypeError, "q must have one of the dtypes float16, bfloat16, float32, float64, got int32; cast it first"),
    "list": (lambda: call(q=[[1.0]]), TypeError, "q must be an array, got list"),
    "dtypes": (lambda: call(k=KV.astype(jnp.bfloat16)), TypeError, "q, k and v must share one dtype, got q float32 and k bfloat16"),
    "bias_shape": (lambda: call(bias=jnp.zeros((2, 2, 10, 12))), ValueError, "bias must broadcast to [*batch, heads, seqlen_q, seqlen_k] = (2, 4, 10, 12)"),
    "bias_rank": (lambda: call(bias=jnp.zeros((1, 1, 1, 10, 12))), ValueError, "got shape (1, 1, 1, 10, 12)"),
    "bias_bool": (lambda: call(bias=jnp.ones((10, 12), bool)), TypeError, "got bool; pass booleans as mask"),
    "bias_int": (lambda: call(bias=jnp.ones((10, 12), int)), TypeError, "got int32; cast it first"),
    "bias_float": (lambda: call(bias=0.5), TypeError, "bias must be an array, got float"),
    "mask_float": (lambda: call(mask=jnp.ones((10, 12))), TypeError, "mask must have dtype bool (True: attend), got float32; what is added to logits is a bias"),
    "mask_list": (lambda: call(mask=[True]), TypeError, "mask must be an array of booleans, a Mask, a BlockMask or a function of (b, h, i, j), got list"),
    "mask_shape": (lambda: call(mask=jnp.ones((3, 12), bool)), ValueError, "mask must broadcast to [*batch, heads, seqlen_q, seqlen_k] = (2, 4, 10, 12) (each axis 1 or full), got shape (3, 12)"),
    "bias_heads": (lambda: call(bias=jnp.zeros((2, 10, 12))), ValueError, "got shape (2, 10, 12); of [batch, seqlen_q, seqlen_k], the same for all heads, pass bias[:, None]"),
    "mask_heads": (lambda: call(mask=jnp.ones((2, 10, 12), bool)), ValueError, "the same for all heads, pass mask[:, None]"),
    "symbolic": (lambda: jax.eval_shape(call, jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, s, 4, 16"), jnp.float32)), ValueError, "q must have a static shape, as tiles are counted when a call is traced, got symbolic lengths [b, s, 4, 16]"),
    "alignment": (lambda: call(causal_alignment="end"), ValueError, "causal_alignment must be one of ('top_left', 'bottom_right'), got 'end'"),
    "window_negative": (lambda: call(window_size=(-1, 0)), ValueError, "window_size must not be negative, got (-1, 0); None means that there is no bound"),
    "window_type": (lambda: call(window_size=(1, 2, 3)), TypeError, "window_size must be an integer, a pair (left, right) of integers or None (no bound), and is static under jit, got (1, 2, 3)"),
    "window_traced": (lambda: jax.jit(lambda n: call(window_size=(n, 0)))(3), TypeError, "and is static under jit, got ("),
    "segments_alone": (lambda: call(q_segment_ids=jnp.zeros((2, 10), int)), ValueError, "got no kv_segment_ids (only kv_segment_ids may be left out, and only where Sq == Sk; here Sq = 10, Sk = 12)"),
    "segments_kv_alone": (lambda: call(kv_segment_ids=jnp.zeros((2, 12), int)), ValueError, "got no q_segment_ids"),
    "segments_float": (lambda: call(q_segment_ids=jnp.zeros((2, 10)), kv_segment_ids=jnp.zeros((2, 12))), TypeError, "q_segment_ids must be an array of integers [*batch, seqlen_q], got"),
    "positions_alone": (lambda: call(q_positions=jnp.zeros((2, 10), int), causal=True), ValueError, "q_positions and kv_positions must be given together, got no kv_positions; where positions are the index, pass jnp.arange(Sk)"),
    "positions_float": (lambda: call(q_positions=jnp.zeros((2, 10)), kv_positions=jnp.zeros((2, 12), int)), TypeError, "q_positions must be an array of integers [*batch, seqlen_q], got"),
    "positions_shape": (lambda: call(q_positions=jnp.zeros(10, int), kv_positions=jnp.zeros((3, 12), int)), ValueError, "kv_positions must broadcast to [*batch, seqlen_k] = (2, 12)"),
    "positions_wide": (lambda: call(q_positions=np.full(10, 2**40), kv_positions=np.zeros(12, int)), ValueError, "q_positions must fit int32, got values from 1099511627776 to 1099511627776"),
    "positions_aligned": (lambda: call(q_positions=jnp.zeros(10, int), kv_positions=jnp.zeros(12, int), causal_alignment="bottom_right"), ValueError, 'causal_alignment="bottom_right" says what the position of an index is, and so do q_positions and kv_positions; leave one of them out'),
    "segments_shape": (lambda: call(q_segment_ids=jnp.zeros((2, 12), int), kv_segment_ids=jnp.zeros((2, 12), int)), ValueError, "q_segment_ids must broadcast to [*batch, seqlen_q] = (2, 10)"),
    "lengths_shape": (lambda: call(kv_lengths=jnp.zeros(3, int)), ValueError, "kv_lengths must broadcast to [*batch] = (2,) (each axis 1 or full), got shape (3,)"),
    "lengths_foreign": (lambda: call(q_lengths=types.SimpleNamespace(dtype="torch.int64")), TypeError, "q_lengths must be an array of integers [*batch], got SimpleNamespace of dtype torch.int64"),
    "sinks_long": (lambda: call(sinks=[0.5] * 1000), TypeError, "sinks must be a floating array [heads], got [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ...]"),
    "lengths_float": (lambda: call(q_lengths=3.0), TypeError, "q_lengths must be an array of integers [*batch], got 3.0"),
    "soft_cap": (lambda: call(logits_soft_cap=0.0), ValueError, "logits_soft_cap must be positive and finite, got 0.0; None means that there is none"),
    "soft_cap_traced": (lambda: jax.jit(lambda c: call(logits_soft_cap=c))(3.0), TypeError, "logits_soft_cap must be a number (it is static under jit) or None"),
    "soft_cap_large": (lambda: call(logits_soft_cap=1e300), ValueError, "logits_soft_cap must be from 1.2e-38 to 5.9e+37, as logits are float32, got 1e+300; None means"),
    "soft_cap_small": (lambda: call(logits_soft_cap=1e-50), ValueError, "logits_soft_cap must be from 1.2e-38 to 5.9e+37, as logits are float32, got 1e-50; None means"),
    "soft_cap_integer": (lambda: call(logits_soft_cap=10**400), ValueError, "logits_soft_cap must be positive and finite, got inf"),
    "sinks_shape": (lambda: call(sinks=jnp.zeros(3)), ValueError, "sinks must broadcast to [heads] = (4,)"),
    "sinks_int": (lambda: call(sinks=jnp.zeros(4, int)), TypeError, "sinks must be a floating array [heads]"),
    "slopes_shape": (lambda: call(alibi_slopes=jnp.zeros((3, 4))), ValueError, "alibi_slopes must broadcast to [*batch, heads] = (2, 4)"),
    "dropout_rate": (lambda: call(dropout_rate=1.0, dropout_seed=0), ValueError, "dropout_rate must be at least 0 and below 1, got 1.0"),
    "dropout_rate_type": (lambda: call(dropout_rate="0"), TypeError, "dropout_rate must be a number (it is static under jit), got '0'"),
    "dropout_no_seed": (lambda: call(dropout_rate=0.1), ValueError, "dropout_rate > 0 needs a dropout_seed"),
    "dropout_seed_type": (lambda: call(dropout_rate=0.1, dropout_seed=0.5), TypeError, "dropout_seed must be an integer, a PRNG key, or an array of integers"),
    "dropout_seed_axis": (lambda: call(dropout_rate=0.1, dropout_seed=jnp.zeros(4, int)), ValueError, "dropout_seed as an array needs at least 2 axes [*batch, heads]"),
    "dropout_seed_keys": (lambda: call(dropout_rate=0.1, dropout_seed=jax.random.split(jax.random.key(0))), ValueError, "dropout_seed must be a single PRNG key, got keys of shape (2,)"),
    "higher_order": (lambda: call(higher_order=True, implementation="triton"), ValueError, 'higher_order=True runs on XLA, got implementation="triton" too'),
    "forward_mode": (lambda: jax.jvp(call, (X,), (X,)), TypeError, "higher_order=True"),
    "hessian": (lambda: jax.grad(lambda q: jax.grad(lambda q: call(q).sum())(q).sum())(X), TypeError, "higher_order=True"),
    "return_lse": (lambda: call(return_lse=1), TypeError, "return_lse must be True or False"),
    "return_lse_traced": (lambda: jax.jit(flash_attention)(X, X, X, return_lse=True), TypeError, "return_lse must be True or False (it is static under jit), got DynamicJaxprTracer of dtype bool"),
    "causal": (lambda: call(causal=1), TypeError, "causal must be True or False (it is static under jit), got 1"),
    "scale_shape": (lambda: call(softmax_scale=jnp.ones(2)), ValueError, "softmax_scale must be a single number, got an array of shape (2,)"),
    "scale_nan": (lambda: call(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
    "scale_large": (lambda: call(softmax_scale=-1e300), ValueError, "softmax_scale must be at most 2.4e+38, as logits are float32, got -1e+300"),
    "scale_type": (lambda: call(softmax_scale="1"), TypeError, "softmax_scale must be a number or a 0-d floating array, got '1'"),
    "implementation": (lambda: call(implementation="cudnn"), ValueError, 'implementation must be "triton", "xla" or None (choose), got \'cudnn\''),
    "block_ptr": (lambda: call(block_ptr=1), TypeError, "block_ptr must be True (tensor descriptors), False (pointers) or None (choose), got 1"),
    "block_ptr_width": (
        lambda: call(*(jnp.zeros((1, 4, 2, 59)),) * 3, block_ptr=True),
        ValueError,
        "block_ptr=True needs rows of a multiple of 16 bytes, got head_dim 59 of q and k in float32",
    ),
    "block_ptr_twice": (
        lambda: call(block_ptr=True, config=Config(block_ptr=False)),
        ValueError,
        "block_ptr=True contradicts config.block_ptr=False",
    ),
    "xla_block_ptr": (lambda: call(implementation="xla", block_ptr=True), ValueError, 'block_ptr speaks to the Triton kernels and means nothing to implementation="xla"'),
    "xla_warps": (lambda: call(implementation="xla", config=Config(num_warps=4)), ValueError, "got num_warps=4; leave one of them out"),
    "block_size": (lambda: call(config=Config(block_m=48)), ValueError, "config.block_m must be a power of two from 16 to 512, or None (tuned), got 48"),
    "block_size_small": (lambda: call(config=Config(block_n=8)), ValueError, "config.block_n must be a power of two from 16 to 512"),
    "warps": (lambda: call(config=Config(num_warps=3)), ValueError, "config.num_warps must be 1, 2, 4, 8, 16 or None (tuned), got 3"),
    "stages": (lambda: call(config=Config(num_stages=0)), ValueError, "config.num_stages must be from 1 to 8, or None (tuned), got 0"),
    "maxnreg": (lambda: call(config=Config(maxnreg=1000)), ValueError, "config.maxnreg must be from 24 to 255, or None (no bound), got 1000"),
    "config_flag": (lambda: call(config=Config(overlaps="yes")), TypeError, "config.overlaps must be True, False or None (tuned), got 'yes'"),
    "specialize": (lambda: call(config=Config(warp_specialize=True)), ValueError, "config.warp_specialize is for 'fwd' and 'dq', got it for 'dkdv'; give it by pass: config={'fwd': Config(warp_specialize=True)}"),
    "overlaps": (lambda: call(config={"dq": Config(overlaps=True)}), ValueError, "config.overlaps is for 'fwd' and 'dkdv', got it for 'dq'; give it by pass: config={'fwd': Config(overlaps=True)}"),
    "precision": (lambda: call(config=Config(precision="fp8")), ValueError, "config.precision must be one of ('ieee', 'tf32', 'tf32x3'), got 'fp8'"),
    "config": (lambda: call(config=(64, 64)), TypeError, "config must be a Config, or a mapping from ('fwd', 'dq', 'dkdv', 'dbias') to Config"),
    "config_pass": (lambda: call(config={"bwd": Config()}), ValueError, "config has no pass 'bwd'; the passes are ('fwd', 'dq', 'dkdv', 'dbias')"),
    "not_here": (lambda: call(implementation="triton"), ValueError, 'implementation="triton" runs on GPUs, and this is being lowered for another platform'),
    "not_here_jit": (lambda: jax.jit(lambda q: call(q, implementation="triton"))(X), ValueError, "set TRITON_INTERPRET=1 before Python starts"),
    "target": (lambda: gpu_target(compute_capability=75).__enter__(), ValueError, "compute_capability must be an integer of at least 80 (Ampere), such as 80, 86, 89, 90 or 100, got 75"),
    "cached_block_size": (lambda: get_cached_flash_attention(100), ValueError, "blocksize_q must be a power of two from 16 to 512, or None (tuned), got 100"),
    "cached_scale": (lambda: get_cached_flash_attention(softmax_scale=jnp.ones(())), TypeError, "softmax_scale must be a number here"),
    "cached_scale_nan": (lambda: get_cached_flash_attention(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
    "cached_implementation": (lambda: get_cached_flash_attention(implementation="gpu"), ValueError, 'implementation must be "triton", "xla" or None'),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "far"), [(np.int64, 2**40), (np.uint32, 2**31 + 5)])
def test_wide_positions_do_not_wrap(dtype, far):
    """One that int32 does not hold is far away, also where its value is not known."""
    x, rows = jnp.zeros((1, 4, 1, 16)), np.arange(4)
    options = {"causal": True, "q_positions": rows, "return_lse": True}
    with jax.enable_x64(True):
        f = jax.jit(lambda at: flash_attention(x, x, x, kv_positions=at, **options)[1])
        lse = f(np.where(rows > 2, far, rows).astype(dtype))
    np.testing.assert_allclose(np.exp(lse[0, 0]), [1, 2, 3, 3], rtol=1e-5)


def test_positions_of_other_processes_are_not_looked_at(monkeypatch):
    with jax.enable_x64(True):
        x = jnp.full(4, 2**40)
        assert x.dtype == jnp.int64
        monkeypatch.setattr(type(x), "is_fully_addressable", property(lambda self: False))
        assert arguments.int32_array("q_positions", x) is x


@pytest.mark.parametrize("name", WRONG)
def test_message(name):
    function, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        function()


def test_float64_has_no_kernel():
    with jax.enable_x64(True), pytest.raises(TypeError, match='implementation="triton" has no float64'):
        call(X.astype(jnp.float64), *(KV.astype(jnp.float64),) * 2, implementation="triton")


def test_numbers_that_float64_holds():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 16)))
        capped = flash_attention(x, x, x, logits_soft_cap=1e300)
        np.testing.assert_allclose(capped, flash_attention(x, x, x), rtol=1e-12)
        assert jnp.isfinite(flash_attention(x, x, x, softmax_scale=1e200)).all()


def test_environment(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_BLOCK_PTR", "yes")
    with pytest.raises(ValueError, match='FLASH_ATTN_BLOCK_PTR must be "1"'):
        get_cached_flash_attention()


def test_numpy_inputs():
    """NumPy arrays and scalars are welcome."""
    o = flash_attention(
        np.asarray(X), np.asarray(KV), np.asarray(KV), causal=np.bool_(True), softmax_scale=np.float32(1)
    )
    assert o.shape == X.shape


BLOCKED = """
import sys
for name in ("triton", "jax_triton"):
    sys.modules[name] = None                      # as if it were not installed
import jax, jax.numpy as jnp
import jax_flash_attn2 as fa
x = jnp.ones((1, 8, 2, 16))
print(fa.flash_attention(x, x, x, causal=True).sum())
lower = lambda: jax.jit(lambda x: fa.flash_attention(x, x, x)).trace(x).lower(lowering_platforms=("cuda",))
try:
    with fa.gpu_target(compute_capability=90):
        lower()
except ImportError as error:
    print(error)
"""


def test_without_triton():
    """The package works with neither Triton nor jax-triton; a GPU without them is told what to install."""
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("256.0")
    assert 'pip install ".[cuda13]" in a checkout of jax_flash_attn2' in run.stdout
    assert 'implementation="xla"' in run.stdout


def test_cpu_does_not_import_triton():
    """A CPU run does not wait for Triton."""
    code = (
        "import sys, jax, jax.numpy as jnp, jax_flash_attn2 as fa; x = jnp.ones((1, 8, 2, 16));"
        "jax.grad(lambda x: fa.flash_attention(x, x, x).sum())(x); print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def seen(**options):
    """For each row of batch 0, how many keys it sees; all logits are 0."""
    x = jnp.zeros((2, 4, 1, 16))
    lse = flash_attention(x, x, x, return_lse=True, **options)[1][0, 0]
    return np.rint(np.exp(np.asarray(lse))).astype(int).tolist()


WIDE = np.array([[2**32 + 1, 2**32 + 1, 1, -(2**40)]] * 2)


def test_wide_segment_ids_are_compared_as_they_are():
    """2**32 + 1 and 1 are two documents, and 2**31 + 1 is no padding, whoever holds them."""
    assert seen(q_segment_ids=WIDE) == [2, 2, 1, 0]
    assert seen(q_segment_ids=WIDE, kv_segment_ids=np.array([[1, 2**32 + 1, 2, -1]] * 2, np.int64)) == [1, 1, 1, 0]
    assert seen(q_segment_ids=2**40) == [4] * 4
    for ids in (np.full((2, 4), 2**31 + 1, np.uint32), jnp.full((2, 4), 2**31 + 1, jnp.uint32)):
        assert seen(q_segment_ids=ids) == [4] * 4
    mixed = jnp.array([[3, 3, -1, 2]] * 2)
    assert seen(q_segment_ids=jnp.full((2, 4), 3, jnp.uint32), kv_segment_ids=mixed) == [2] * 4
    with jax.enable_x64(True):
        assert seen(q_segment_ids=jnp.asarray(WIDE)) == [2, 2, 1, 0]
    with pytest.raises(ValueError, match="must fit into int32 where one of them is NumPy's"):
        seen(q_segment_ids=jnp.zeros((2, 4), int), kv_segment_ids=WIDE)


@pytest.mark.parametrize("length", [2**31, 2**70, np.array([2**31, 2**40]), jnp.array([2**31, 3], jnp.uint32)], ids=str)
def test_long_lengths_are_all_there_is(length):
    assert seen(kv_lengths=length) == [4] * 4
    assert seen(kv_lengths=-1) == [0] * 4


def test_seeds_of_64_bits():
    """No two of them are one, as an integer, in an array, or by batch and head."""
    x = jnp.ones((1, 8, 4, 16))
    draw = lambda seed: np.asarray(flash_attention(x, x, x, dropout_rate=0.5, dropout_seed=seed)).tobytes()
    kinds = (
        lambda n: n,
        lambda n: np.asarray(n),
        lambda n: np.full((1, 4), n),
    )
    for kind in kinds:
        assert len({draw(kind(n)) for n in (5, 2**32 + 5, 2**40 + 5)}) == 3
    assert draw(5) == draw(np.asarray(5)) == draw(jnp.int32(5)) == draw(np.int16(5))
    assert draw(-1) == draw(np.asarray(-1)) == draw(jnp.int32(-1))
    with pytest.raises(ValueError, match="dropout_seed must be an integer of 64 bits, got 18446744073709551616"):
        draw(2**64)


def test_nothing_of_a_bias_or_mask():
    """No batches, rows or keys, for bias and mask too."""
    e = jnp.zeros((0, 5, 4, 16))
    assert flash_attention(e, e, e, jnp.zeros((0, 4, 5, 5)), mask=jnp.zeros((0, 1, 5, 5), bool)).shape == e.shape
    rows, keys = jnp.zeros((2, 0, 4, 16)), jnp.zeros((2, 5, 4, 16))
    db = jax.grad(lambda b: flash_attention(rows, keys, keys, b).sum())(jnp.zeros((2, 4, 0, 5)))
    assert db.shape == (2, 4, 0, 5)
