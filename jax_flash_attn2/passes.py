"""The passes of attention as kernel launches: which kernel, over how many programs, with which operands.

A pass does not know how a kernel is run. It is given a `run` that does: `launch.run` binds jax-triton's custom
call, `interpret.run` calls Triton's interpreter, and the codegen check compiles without running.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .spec import Spec, Tuned

PASSES = ("fwd", "dq", "dkdv", "dbias")
"""Every kernel of the package, by the name that `tuning` and the codegen check know it by."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """An operand `[B, S, H, D]` that a loop reads in tiles: a pointer or a descriptor, as `run` decides.

    What is read once per program stays a pointer: a descriptor's four axes keep Triton from leaving that tile in
    shared memory, and then ptxas serialises wgmma.
    """

    array: Array
    rows: int
    cols: int

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """The tile, as a block of the four axes."""
        return (1, self.rows, 1, self.cols)


Run = Callable[..., Any]
"""run(kernel, programs, operands, outputs, spec, config) -> the outputs, in order."""


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(run: Run, spec: Spec, config: Tuned, q, k, v, scale, bias) -> tuple[Array, Array, Array, Array]:
    """One launch: o `[B, Sq, H, Dv]`, lse `[B, H, Sq]` (natural log), and the row statistics m and l."""
    from .kernels.fwd import attn_fwd_kernel

    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    m, n, d, dv = config.block_m, config.block_n, spec.block_d, spec.block_dv
    row = _struct((batch, heads, seqlen_q), jnp.float32)
    o, m_row, l_row = run(
        attn_fwd_kernel,
        _cdiv(seqlen_q, m) * heads * batch,
        (q, Rows(k, n, d), Rows(v, n, dv), scale, bias, seqlen_q, seqlen_k),
        (_struct((*q.shape[:3], spec.v_dim), q.dtype), row, row),
        spec,
        config,
    )
    return o, (m_row + jnp.log2(l_row)) * math.log(2), m_row, l_row


def backward(
    run: Run,
    spec: Spec,
    configs: dict[str, Tuned],
    q, k, v, scale, bias, o, m, l, do, dlse,
    *,
    bias_grad: bool,
    scale_grad: bool,
):  # fmt: skip
    """Two launches, and a third for the gradient of a bias: dq, dk, dv, dbias or None, dscale `[B]` or None."""
    from .kernels import bwd

    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    row = _struct((batch, heads, seqlen_q), jnp.float32)

    config = configs["dq"]
    norm, dscale = row if spec.has_bias else None, row if scale_grad else None
    dq, delta, shift, norm, dscale = run(
        bwd.attn_bwd_dq_kernel,
        _cdiv(seqlen_q, config.block_m) * heads * batch,
        (
            q,
            Rows(k, config.block_n, spec.block_d),
            Rows(v, config.block_n, spec.block_dv),
            *(scale, bias, o, m, l, do, dlse, seqlen_q, seqlen_k),
        ),
        (_struct(q.shape, q.dtype), row, row, norm, dscale),
        spec,
        config,
    )

    config = configs["dkdv"]
    dk, dv = run(
        bwd.attn_bwd_dkdv_kernel,
        _cdiv(seqlen_k, config.block_n) * spec.kv_heads * batch,
        (
            Rows(q, config.block_m, spec.block_d),
            *(k, v, scale, bias),
            Rows(do, config.block_m, spec.block_dv),
            *(delta, shift, norm, seqlen_q, seqlen_k),
        ),
        (_struct(k.shape, k.dtype), _struct(v.shape, v.dtype)),
        spec,
        config,
    )

    dbias = None
    if bias_grad:
        config = configs["dbias"]
        axes = spec.dbias_partial.bias_axes or ()
        shape = tuple(n if has else 1 for n, has in zip((batch, heads, seqlen_q, seqlen_k), axes, strict=True))
        tiles = (*shape[:2], _cdiv(shape[2], config.block_m), _cdiv(shape[3], config.block_n))
        whole = shape == bias.shape  # nothing left to sum: the kernel may round to the bias's own dtype
        (dbias,) = run(
            bwd.attn_bwd_dbias_kernel,
            math.prod(tiles),
            (q, k, v, scale, bias, do, delta, shift, norm, batch, seqlen_q, seqlen_k),
            (_struct(shape, bias.dtype if whole else jnp.float32),),
            spec,
            config,
        )
        broadcast = tuple(i for i, (n, own) in enumerate(zip(shape, bias.shape, strict=True)) if n != own)
        dbias = dbias.sum(broadcast, keepdims=True).astype(bias.dtype)
    return dq, dk, dv, dbias, None if dscale is None else dscale.sum((1, 2)).astype(scale.dtype)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
