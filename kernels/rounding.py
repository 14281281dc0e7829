"""What numbers lose when they are rounded, beside them: of bf16 the next 8 bits of fp32, of fp16 the difference."""

import triton
import triton.language as tl


@triton.jit
def lost_of(x, rounded, DTYPE: tl.constexpr):
    """What x, in fp32, lost when it was rounded: in int8, or a floating dtype."""
    rounded = rounded.to(tl.float32)
    if tl.int8 == DTYPE:
        return tl.minimum((bits(x) - bits(rounded) + 128) >> 8, 127).to(DTYPE)  # from -128 to 128
    else:
        return (x - rounded).to(DTYPE)


@triton.jit
def joined(rounded, lost):
    """The inverse; what became infinite stays so."""
    x = rounded.to(tl.float32)
    if lost.dtype == tl.int8:
        nearer = (bits(x) + (lost.to(tl.int32) << 8)).to(tl.float32, bitcast=True)
    else:
        nearer = x + lost.to(tl.float32)
    return tl.where(tl.abs(x) == float("inf"), x, nearer)


@triton.jit
def bits(x):
    """Of a number in fp32, as an integer."""
    return x.to(tl.int32, bitcast=True)
