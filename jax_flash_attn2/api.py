"""The public functions. Reads as the story of a call: check, run, differentiate."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from . import inputs, primitives
from .inputs import Call, Implementation
from .spec import Config


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | Array | None = None,
    implementation: Implementation | None = None,
    block_ptr: bool | None = None,
    config: Config | Mapping[str, Config] | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """softmax(softmax_scale * q kᵀ + bias) v, without holding the `[Sq, Sk]` logits.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691): Triton kernels on NVIDIA and AMD GPUs, a blockwise XLA path
    everywhere else. Differentiable in q, k, v, bias and softmax_scale, through both results. Works under
    jit, grad, vmap and remat. Results and gradients repeat bit for bit.

    Args:
      q: `[*batch, Sq, H, D]`; float16, bfloat16, float32, or float64 (XLA path). D from 1 to 256. Any number of
        batch axes, none included.
      k: `[*batch, Sk, Hkv, D]` in q's dtype. Hkv divides H; query head h reads key/value head `h // (H // Hkv)`.
      v: `[*batch, Sk, Hkv, Dv]` in q's dtype. Dv may differ from D.
      bias: added to the logits; a floating array that broadcasts to `[*batch, H, Sq, Sk]`. Its gradient has its own
        shape. -inf (and anything below -2.3e38, where base-2 logits overflow) hides a key.
      causal: row i sees keys j <= i, counted from the first row and key also when Sq != Sk.
      softmax_scale: a number or a 0-d array, also a traced one; D**-0.5 by default.
      implementation: None chooses by platform: "triton" on GPUs (but for float64), "xla" elsewhere. A name is
        taken at its word: what cannot run that way raises.
      block_ptr: how the kernels reach memory: True through tensor descriptors ("block-ptr"; TMA on sm_90 and later),
        False through pointers ("ptr-block"), None the tuned choice. No meaning off the GPU.
      config: a `Config` for every kernel, or a mapping from "fwd", "dq", "dkdv", "dbias" to one; what is None, or
        missing, is tuned.
      return_lse: also return the logarithm of the softmax denominators.

    Returns:
      o `[*batch, Sq, H, Dv]` in q's dtype; with return_lse, (o, lse), lse `[*batch, H, Sq]` in float32 (float64 for
      float64), natural logarithm. A row that sees no key has o = 0, lse = -inf and gradients of 0.

    Raises:
      TypeError, ValueError: an argument does not fit; the message says which, what was wanted and what came. A config
        too large for the GPU's shared memory, and "triton" where there is no GPU, raise when the call is compiled.
      ImportError: on a GPU without jax-triton and triton installed.
    """
    call, operands, batch = inputs.prepare(
        q, k, v, bias,
        causal=causal, softmax_scale=softmax_scale, implementation=implementation, block_ptr=block_ptr, config=config,
    )  # fmt: skip
    o, lse = _attention(call, *operands)
    o, lse = (x.reshape(*batch, *x.shape[1:]) for x in (o, lse))
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q, k, v, scale, bias) -> tuple[Array, Array]:
    o, lse, _, _ = primitives.forward(call, q, k, v, scale, bias)
    return o, lse


@jax.tree_util.register_static
class _Wanted(frozenset):
    """Which of the optional gradients ("bias", "scale") somebody asked for."""


def _attention_fwd(call: Call, q, k, v, scale, bias):
    wanted = _Wanted(n for n, x in (("bias", bias), ("scale", scale)) if x is not None and x.perturbed)
    q, k, v, scale, bias = q.value, k.value, v.value, scale.value, None if bias is None else bias.value
    o, lse, m, l = primitives.forward(call, q, k, v, scale, bias)
    return (o, lse), (q, k, v, scale, bias, o, m, l, wanted)


def _attention_bwd(call: Call, residuals, cotangents):
    q, k, v, scale, bias, o, m, l, wanted = residuals
    do, dlse = cotangents
    do = jnp.zeros(o.shape, o.dtype) if isinstance(do, SymbolicZero) else do
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    dq, dk, dv, dbias, dscale = primitives.backward(
        call,
        q,
        k,
        v,
        scale,
        bias,
        o,
        m,
        l,
        do,
        dlse,
        bias_grad="bias" in wanted,
        scale_grad="scale" in wanted,
    )
    if bias is not None and dbias is None:  # nobody looks at it
        dbias = jnp.zeros(bias.shape, bias.dtype)
    return dq, dk, dv, jnp.zeros((), scale.dtype) if dscale is None else dscale.sum(), dbias


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def get_cached_flash_attention(
    blocksize_q: int | None = None,
    blocksize_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    implementation: Implementation | None = None,
) -> Callable[..., Array]:
    """`flash_attention` with block sizes fixed, as a function `(query, key, value, bias=None)`.

    The same arguments, and the same `FLASH_ATTN_BLOCK_PTR` in the environment when it is called ("1": tensor
    descriptors, "0": pointers, unset: tuned), give the same object, so jit traces it once.

    Args:
      blocksize_q: query rows per tile, a power of two from 16 to 512; None: tuned.
      blocksize_k: key rows per tile, likewise.
      softmax_scale: a number; None: head_dim**-0.5.
      implementation: as in `flash_attention`. With "xla" the environment is not looked at.

    Returns:
      A function of query `[*batch, Sq, H, D]`, key, value and an optional bias to `[*batch, Sq, H, Dv]`.
    """
    inputs.check_block_size("blocksize_q", blocksize_q)
    inputs.check_block_size("blocksize_k", blocksize_k)
    inputs.check_implementation(implementation)
    block_ptr = None if implementation == "xla" else inputs.block_ptr_from(os.environ.get("FLASH_ATTN_BLOCK_PTR"))
    return _cached(blocksize_q, blocksize_k, inputs.static_scale(softmax_scale), implementation, block_ptr)


@functools.cache
def _cached(blocksize_q, blocksize_k, softmax_scale, implementation, block_ptr) -> Callable[..., Array]:
    config = Config(block_m=blocksize_q, block_n=blocksize_k)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "implementation": implementation,
        "block_ptr": block_ptr,
    }

    def flash_attention_cached(query: Array, key: Array, value: Array, bias: Array | None = None) -> Array:
        o = flash_attention(query, key, value, bias, config=config, **options)
        assert isinstance(o, Array)  # and no lse, which nobody asked for
        return o

    return flash_attention_cached
