"""The plainest forward kernel, in the form of Triton's own tutorial: what our kernels' code is compared with."""

from typing import Any

import triton
import triton.language as tl

from jax_flash_attn2.base.config import Tuned

from .points import Point

CONFIGS = {64: Tuned(128, 64, 4, 3, block_ptr=True), 128: Tuned(128, 128, 8, 2, block_ptr=True)}


@triton.jit
def plain_fwd_kernel(
    q, k, v, scale_log2, o, lse, seqlen, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """softmax(q kᵀ) v of arrays [heads * seqlen, D], seqlen a multiple of every tile; no mask, no options."""
    start = tl.program_id(1) * seqlen
    first = start + tl.program_id(0) * M
    q_tile = q.load([first, 0])
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for n in range(0, seqlen, N):
        s = tl.dot(q_tile, k.load([start + n, 0]).T)
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v_tile = v.load([start + n, 0])
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
        m = m_new
    rows, cols = first + tl.arange(0, M), tl.arange(0, D)
    tl.store(o + rows[:, None] * D + cols[None, :], (acc / l[:, None]).to(o.dtype.element_ty))
    tl.store(lse + rows, m + tl.log2(l))


def compiled(width: int) -> tuple[Point, Any]:
    """It, for an H100: the point that it stands for, and its code."""
    from . import sass

    config = CONFIGS[width]
    signature = {"q": config.block_m, "k": config.block_n, "v": config.block_n}
    signature = {name: f"tensordesc<bf16[{rows},{width}]>" for name, rows in signature.items()}
    signature |= {"scale_log2": "fp32", "o": "*bf16", "lse": "*fp32", "seqlen": "i32"}
    constants = {"M": config.block_m, "N": config.block_n, "D": width}
    signature |= dict.fromkeys(constants, "constexpr")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = True
    code = sass.assemble(sass.lower(plain_fwd_kernel, signature, constants, 90, options))
    return Point(90, "fwd", width, False, config), code
