"""What a newcomer gets wrong, and what he is told: names of other libraries, places, layouts, masks of other kinds."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn2 as fa
from jax_flash_attn2 import masks
from jax_flash_attn2.base import names

X = jax.device_put(np.zeros((2, 10, 4, 16), np.float32))
ROW = jax.device_put(np.zeros((10, 4, 16), np.float32))
STARTS = np.array([0, 4, 10], np.int32)
PAGES = jax.device_put(np.zeros((4, 16, 4, 16), np.float32))
PADDING = np.ones((2, 10), bool)
BLOCKS = masks.BlockMask.from_predicate(masks.causal(), (1, 1, 10, 10))


def call(*args, **options):
    return fa.flash_attention(X, X, X, *args, **options)


def door(*args, **options):
    return fa.dot_product_attention(X, X, X, *args, **options)


WRONG = {
    "is_causal": (lambda: call(is_causal=True), "flash_attention has no argument 'is_causal'; here it is causal"),
    "scale": (lambda: call(scale=0.1), "no argument 'scale'; here it is softmax_scale"),
    "sm_scale": (lambda: call(sm_scale=0.1), "no argument 'sm_scale'; here it is softmax_scale"),
    "dropout_p": (lambda: call(dropout_p=0.1), "no argument 'dropout_p'; here it is dropout_rate"),
    "segment_ids": (lambda: call(segment_ids=STARTS), "here it is q_segment_ids and kv_segment_ids"),
    "attn_mask": (lambda: call(attn_mask=PADDING), "no argument 'attn_mask'; here it is mask"),
    "block_mask": (lambda: call(block_mask=BLOCKS), "no argument 'block_mask'; here it is mask"),
    "key_padding_mask": (lambda: call(key_padding_mask=PADDING), "here it is mask[:, None, None, :], or kv_lengths"),
    "enable_gqa": (lambda: call(enable_gqa=True), "'enable_gqa': fewer heads of k and v than of q need no option"),
    "deterministic": (lambda: call(deterministic=True), "'deterministic': results and gradients always repeat bit for"),
    "max_seqlen_q": (lambda: call(max_seqlen_q=3), "'max_seqlen_q': no largest length is asked for; leave it out"),
    "k_cache": (lambda: call(k_cache=X), "no argument 'k_cache'; here it is k"),
    "v_cache": (lambda: call(v_cache=X), "no argument 'v_cache'; here it is v"),
    "kernel_options": (
        lambda: call(kernel_options={}),
        "'kernel_options'; here it is config=Config(block_m=..., block",
    ),
    "blocks": (lambda: call(blocksize_q=64), "here it is config=Config(block_m=..., block_n=...)"),
    "query": (lambda: fa.flash_attention(query=X, key=X, value=X), "no argument 'query'; here it is q"),
    "typo": (lambda: call(casual=True), "no argument 'casual'; did you mean causal?"),
    "unknown": (lambda: call(zzz=1), "no argument 'zzz'; it has q, k, v, bias, score_mod, causal,"),
    "door_causal": (lambda: door(causal=True), "dot_product_attention has no argument 'causal'; here it is is_causal"),
    "door_scale": (lambda: door(softmax_scale=1.0), "no argument 'softmax_scale'; here it is scale"),
    "door_query": (lambda: fa.dot_product_attention(*[X.astype(np.int32)] * 3), "query must have one of the dtypes"),
    "door_residual": (lambda: door(return_residual=1), "return_residual must be True or False"),
    "probabilities": (lambda: call(return_attn_probs=True), "here it is return_lse=True, and exp(logit - lse), as pro"),
    "no_starts": (lambda: fa.varlen_attention(ROW, ROW, ROW, None), "an array [B + 1] of integers, got None"),
    "door_lengths": (lambda: door(kv_lengths=STARTS), "no argument 'kv_lengths'; here it is key_value_seq_lengths"),
    "explain": (lambda: fa.explain(X, X, X, is_causal=True), "explain has no argument 'is_causal'; here it is causal"),
    "supported": (lambda: fa.supported(X, X, X, scale=1), "supported has no argument 'scale'; here it is softmax_sc"),
    "context": (lambda: fa.context_parallel_attention(X, X, X, axis="a", scale=1), "context_parallel_attention has no"),
    "varlen": (lambda: fa.varlen_attention(ROW, ROW, ROW, cu_seqlens_q=STARTS), "varlen_attention has no argument"),
    "paged": (lambda: fa.paged_attention(ROW, PAGES, PAGES, block_tables=STARTS), "paged_attention has no argument"),
    "places": (
        lambda: call(None, PADDING),
        "takes 4 positional arguments (q, k, v, bias), got 5; give others by name, ",
    ),
    "mask_as_bias": (
        lambda: call(PADDING),
        "bias must have one of the dtypes float16, bfloat16, float32, float64, got",
    ),
    "block_mask_as_bias": (lambda: call(BLOCKS), "must be an array, got BlockMask; what says who sees whom is mask=,"),
    "predicate_as_bias": (lambda: call(masks.causal()), "what says who sees whom is mask=, by name"),
    "padding": (lambda: call(mask=PADDING), "got shape (2, 10); of padding, [batch, seqlen_k], pass mask[:, None, Non"),
    "two_arguments": (lambda: call(mask=lambda i, j: i >= j), "must take four arguments, (b, h, i, j), got <lambda> ("),
    "uncalled": (lambda: call(mask=masks.causal), "too many positional arguments; did you mean masks.causal()?"),
    "uncalled_part": (lambda: call(mask=masks.causal() & masks.padding), "did you mean masks.padding(...)?"),
    "score_of_two": (lambda: call(score_mod=lambda s, i: s), "score_mod must take five arguments, (score, b, h, i, j)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_says_what_to_write(name):
    wrong, message = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        wrong()
    assert message in str(caught.value)


def test_what_is_said_is_there():
    """Each argument of ours that the table names is one, in a function that says so, and no name of theirs is ours."""
    ours = set(fa.explain.__globals__["api"].defaults()) | {"q", "k", "v", "bias"}
    assert {name for name in names._THEIRS if name.isidentifier()} - ours <= {"q", "k", "v"}
    assert not names._OURS.keys() & ours


@pytest.mark.parametrize("swapped", [False, True])
def test_heads_before_the_sequence(swapped):
    """[batch, heads, sequence, head_dim] has as many heads as there are tokens; said once."""
    shape = (1, 4, 200, 8) if swapped else (1, 200, 4, 8)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Error reading persistent")  # as in pyproject.toml, which this sets aside
        fa.explain(x, x, x)
        fa.explain(x, x, x)
    assert [str(w.message)[:60] for w in said] == [
        "q of shape (1, 4, 200, 8) was read as [..., sequence, heads,"
    ] * swapped
    assert all(w.filename == __file__ for w in said)


def test_few_rows_of_many_heads():
    """Decoding with 256 heads over grouped or latent keys is none of that."""
    q, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 256, 8), (1, 64, 1, 8)))
    fa.explain(q, k, k)
