"""Units of logits, and which of their sums are rounded: alike in all kernels of a call, else p is not what it was.

The compiler fuses nothing, unless it does not matter (`tuning.compiler_options`): what is one FMA is written as one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rounding import bits
from .tile import LOG2E, load_scalar

TINY = tl.constexpr(1e-20)
"""A scale below this counts as 0: what it leaves of a product is lost in the rounding of any logit."""
LARGE = tl.constexpr(2.0**28)
"""Base-2 logits from here on are 16 or more apart in fp32."""
ITS_OWN = tl.constexpr(1.5 * 2.0**28)
"""An `exact_logit` from here on is in a unit of its own, by which it is twice `LARGE` or more."""


class Scale(NamedTuple):
    """The softmax scale of a batch."""

    unit: tl.tensor
    """Times log2(e). Callers make it non-negative; a zero must not turn -inf into NaN, and what is added to products is
    divided by it: it becomes 1."""
    counts: tl.tensor
    """What products then are multiplied by: 0; else 1. None: nothing is divided, and a small number is as good as 0."""


@triton.constexpr_function
def divides(spec):
    """Whether a bias is divided by the scale, for products to start from it; in kernels whose products do not, too."""
    return spec.bias is not None and spec.rules.soft_cap is None and spec.score is None


@triton.jit
def load_scale(x, b, SPEC: tl.constexpr):
    """The `Scale` of batch b."""
    scale = load_scalar(x, b, 0, SPEC.scale, SPEC).to(tl.float32) * LOG2E
    if divides(SPEC):
        return Scale(tl.where(scale < TINY, 1.0, scale), tl.where(scale < TINY, 0.0, 1.0))
    else:
        return Scale(tl.where(scale < 1e-37, 1e-37, scale), None)  # a maximum would pass over a NaN


@triton.jit
def counted(operand, scale, SPEC: tl.constexpr, CFG: tl.constexpr):
    """One operand of q kᵀ: as it is, unless products start from a bias and count nothing."""
    if divides(SPEC) and CFG.starts:
        return (operand.to(tl.float32) * scale.counts).to(operand.dtype)
    else:
        return operand


@triton.jit
def exponential(s, unit, shift, SPEC: tl.constexpr):
    """2^(s unit - shift).

    Where logits are only scaled products it is one FMA and one EX2. The FMA leaves what shift was rounded by: half of
    16 and more beside large logits, but for those in an `exact_unit`. A bias or a score function may well make a whole
    row large (-1e9 is a common way to hide a key): there, s unit is rounded as shift was.
    """
    if SPEC.alters_logits:
        return tl.exp2(s * unit - shift)
    else:
        return tl.exp2(tl.fma(s, unit, -shift))


@triton.jit
def power_above(unit):
    """A power of two, from twice to four times as large."""
    return (bits(unit) & 0x7F800000).to(tl.float32, bitcast=True) * 4.0


@triton.jit
def exact_logit(largest, unit, SPEC: tl.constexpr):
    """What a row's largest logit is times `unit`, in base 2, and that unit: where this is large, a power of two, for
    products with it are exact. Logits that differ do so by 16 or more there, in either: p is 1 or next to nothing."""
    if not SPEC.alters_logits:
        unit = tl.where(tl.abs(largest) < 1.0 / unit * LARGE, unit, power_above(unit))
    return largest * unit, unit


@triton.jit
def exact_unit(m, unit, SPEC: tl.constexpr):
    """The unit that came with an `exact_logit`."""
    if not SPEC.alters_logits:
        unit = tl.where(tl.abs(m) < ITS_OWN, unit, power_above(unit))
    return unit


@triton.jit
def in_true_unit(m, x, b, SPEC: tl.constexpr):
    """A base-2 logit, of an `exact_logit`."""
    if SPEC.alters_logits:
        return m
    else:
        unit = load_scale(x, b, SPEC).unit
        return tl.where(tl.abs(m) < ITS_OWN, m, m / power_above(unit) * unit)  # others are not to be rounded again


@triton.constexpr_function
def lift(dtype, spec, config):
    """How many times p is doubled, which cancels in o. fp16 has no numbers below 2^-24, and keys beside one that has
    nearly all of the attention would be lost. Up to 2^16 it has: four doublings are left for p that is above 1, as a
    large logit, less its maximum, may be by an FMA. Not where p is scaled by what may be large, nor in a split, whose
    m is a largest logit."""
    lifts = spec.v_scale is None and not spec.drops and config.num_splits == 1
    return 12 if dtype == tl.float16 and lifts else 0


@triton.jit
def lowered(largest, LIFT: tl.constexpr):
    """What logits are taken less, of which this is the largest, for p to be doubled LIFT times: none at all where fp32
    would round the difference to more or to less."""
    if LIFT > 0:
        return largest - tl.where(tl.abs(largest) < 2.0**25, LIFT, 0.0)
    else:
        return largest
