"""What JAX's arithmetic has and Triton's language lacks, element by element: for functions that a caller wrote."""

import triton
import triton.language as tl


@triton.jit
def int_div(a, b):
    """Towards zero. By 0 it is -1, as XLA has it; the least number by -1 is itself."""
    ones = b * 0 + 1
    plain = (b != 0) & (b != -1)
    quotient = a // tl.where(plain, b, ones)
    return tl.where(plain, quotient, tl.where(b == 0, -ones, 0 - a))


@triton.jit
def int_rem(a, b):
    """With the sign of a. By 0 it is a."""
    ones = b * 0 + 1
    plain = (b != 0) & (b != -1)
    remainder = a % tl.where(plain, b, ones)
    return tl.where(plain, remainder, tl.where(b == 0, a, a * 0))


@triton.jit
def uint_div(a, b):
    """By 0 it is all ones, as XLA has it."""
    return tl.where(b == 0, ~(b * 0), a // tl.where(b == 0, b * 0 + 1, b))


@triton.jit
def uint_rem(a, b):
    """By 0 it is a."""
    return tl.where(b == 0, a, a % tl.where(b == 0, b * 0 + 1, b))


@triton.jit
def float_rem(a, b):
    """a - trunc(a / b) b: with the sign of a."""
    quotient = a / b
    whole = tl.where(quotient < 0.0, tl.ceil(quotient), tl.floor(quotient))
    return tl.where(tl.abs(b) == float("inf"), a, a - whole * b)


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN of NaN."""
    return tl.where(x > 0, x * 0 + 1, tl.where(x < 0, x * 0 - 1, x))


@triton.jit
def float_sign(x):
    """Likewise, of infinities too."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def round_to_even(x):
    """To the nearest whole number, halves to the even one."""
    down = tl.floor(x)
    rest = x - down
    odd = down - 2.0 * tl.floor(down * 0.5) == 1.0
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    return tl.where(tl.abs(x) < 8388608.0, tl.where(up, down + 1.0, down), x)


@triton.jit
def round_from_zero(x):
    """To the nearest whole number, halves away from 0."""
    size = tl.abs(x)
    down = tl.floor(size)
    near = tl.where(size - down >= 0.5, down + 1.0, down)
    return tl.where(size < 8388608.0, tl.where(x < 0.0, -near, near), x)


@triton.jit
def exp_minus_1(x):
    """exp(x) - 1 (Kahan): exact where the difference cancels."""
    u = tl.exp(x)
    inner = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where((u == 0.0) | (u == float("inf")), u - 1.0, inner))


@triton.jit
def log_of_1_plus(x):
    """log(1 + x) (Kahan)."""
    u = 1.0 + x
    inner = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, inner))


@triton.jit
def power(x, y):
    """x to the y. Of a negative x only for whole y, else NaN."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    odd = y - 2.0 * tl.floor(y * 0.5) == 1.0  # and whole
    signed = tl.where((x < 0.0) & odd, -size, size)
    lost = (x < 0.0) & (tl.floor(y) != y) & (tl.abs(x) < float("inf"))
    made = tl.where(lost, float("nan"), signed)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, made)


@triton.jit
def erfc(x):
    """1 - erf(x), where the difference cancels too: t exp(-z^2 + P(t)) for z = |x| and t = 1 / (1 + z / 2), P through
    the logarithm at ten Chebyshev nodes of z from 0 to 9.6. Off by less than 3e-7, and by 2e-6 of itself below 4."""
    z = tl.abs(x)
    t = 1.0 / (1.0 + 0.5 * z)
    y = (((0.14424046 * t - 0.67685060) * t + 1.14675378) * t - 0.68197905) * t - 0.09305857
    y = ((((y * t + 0.00866603) * t + 0.03184483) * t + 0.38727547) * t + 0.99855127) * t - 1.26544358
    made = t * tl.exp(y - z * z)
    return tl.where(x < 0.0, 2.0 - made, made)
