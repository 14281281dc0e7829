"""Functions written in JAX, translated to Triton: the same numbers as JAX's. Needs TRITON_INTERPRET=1."""

import linecache
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import score_functions
from jax import lax
from reference import attention
from score_functions import (
    DRAWN,
    FUNCTIONS,
    SCORES,
    SLOPES,
    TABLE,
    B,
    H,
    M,
    N,
    apply_kernel,
    assert_drawn_agree,
    drawn,
    value_of,
)

from jax_flash_attn2 import Config, flash_attention
from jax_flash_attn2.base.config import Tuned
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.functions.trace import trace
from jax_flash_attn2.gpu import functions, interpret, translate
from jax_flash_attn2.gpu.target import Target


@pytest.fixture(autouse=True)
def as_people_write():
    with jax.numpy_dtype_promotion("standard"):
        yield


def translated(function):
    """What the kernel makes of `SCORES`."""
    source, arrays = sourced(function)
    spec, out = score_functions.Spec(translate.jitted(source)), jax.ShapeDtypeStruct(SCORES.shape, jnp.float32)
    operands = (jnp.asarray(SCORES), arrays)
    (result,) = interpret.run(Target(80), apply_kernel, B * H, operands, (out,), spec, Tuned(M, N, 4, 1))
    return np.asarray(result)


def sourced(function, name="score_mod"):
    """The source of a function, and what it reads."""
    traced, arrays = trace(function, "score_mod", jnp.float32)
    return translate.translate(value_of(traced), arrays, name), tuple(arrays)


def wanted(function):
    """What JAX makes of them."""
    each = jax.vmap(function, (0, None, None, None, 0))
    for axes in ((0, None, None, 0, None), (0, None, 0, None, None), (0, 0, None, None, None)):
        each = jax.vmap(each, axes)
    return np.asarray(each(SCORES, *(jnp.arange(n, dtype=jnp.int32) for n in SCORES.shape)), np.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = FUNCTIONS[name]
    np.testing.assert_allclose(translated(function), wanted(function), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["soft_cap", "relative", "powers", "trigonometry", "a branch", "jitted", "small"])
def test_derivatives(name):
    """Of the score: what `jax.grad` makes of a function is one, too."""
    function = jax.grad(FUNCTIONS[name])
    np.testing.assert_allclose(translated(function), wanted(function), rtol=5e-5, atol=5e-5)


def test_drawn_functions():
    rng = random.Random(0)
    for _ in range(40):
        text = drawn(rng, rng.randint(1, 4))
        function = eval(f"lambda s, b, h, i, j: {text} + 0.0 * s", vars(score_functions))
        got, want = translated(function), wanted(function)
        size = np.maximum(1, np.abs(want))
        assert (np.abs(got - want) <= 1e-4 * size).all(), text


@pytest.mark.parametrize("numbers", DRAWN)
def test_attention_with_drawn_functions(numbers):
    """Through the kernels, with all gradients: tiles of 16, through descriptors and pointers by turns."""

    def ours(q, k, v, score_mod):
        how = {"config": Config(16, 16), "block_ptr": numbers.start % 12 == 0}
        return flash_attention(q, k, v, score_mod=score_mod, implementation="triton", **how)

    assert_drawn_agree(numbers, ours, lambda *args: attention(*args[:3], score_mod=args[3], compute=jnp.float32)[0])


def test_traced_arrays_are_closed_over():
    """Under jit, and what JAX makes of them beforehand."""

    @jax.jit
    def both(slopes):
        f = lambda s, b, h, i, j: s - (slopes * 2)[h] * jnp.abs(i - j) * jnp.sqrt(2.0)
        return sourced(f)[1]

    (array,) = both(SLOPES)
    np.testing.assert_array_equal(array, SLOPES * 2)
    assert "SLOPES" not in sourced(FUNCTIONS["alibi"])[0]


def test_source_can_be_read():
    source, _ = sourced(FUNCTIONS["alibi"], "alibi")
    assert source.startswith("def alibi(score, b, h, i, j, x):\n")
    assert "tl.load(x[0] + t" in source
    assert all("score_functions.py:" in line for line in source.splitlines()[1:-1])
    assert "tl.fma(" in source  # a product that is added to something, which nothing else would fuse
    assert translate.jitted(source) is translate.jitted(source)


def test_a_line_above_changes_no_kernel():
    """Nor is the text that they are compiled from kept twice."""
    made = []
    for above in ("", "# a comment\n"):
        names = {}
        exec(compile(f"{above}f = lambda s, b, h, i, j: s * 2 + i", "users_file.py", "exec"), names)
        functions._source.cache_clear()  # as in another process
        score, _ = trace(names["f"], "score_mod", jnp.float32)
        spec = Spec.of(Rules(score=score), *[jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.float32)] * 3, {})
        assert f"users_file.py:{2 if above else 1}" in functions.for_kernels(spec, {}, 1, places=True).score.source
        made.append(functions.for_kernels(spec, {}, 1).score)
    assert made[0] == made[1]
    before = len(linecache.cache)
    for one in made:
        translate.jitted.cache_clear()
        assert one.value is translate.jitted(one.source)
    assert len(linecache.cache) <= before + 1


REFUSED = {
    "sorts": (lambda s, b, h, i, j: jnp.sort(TABLE[h] + s)[0], "score_mod uses "),
    "loops": (lambda s, b, h, i, j: lax.fori_loop(0, i, lambda _, s: s * 2, s), "score_mod uses while, which has no"),
    "a row": (
        lambda s, b, h, i, j: s + TABLE[h].sum(),
        "takes a whole array, where a kernel reads elements",
    ),
    "prints": (lambda s, b, h, i, j: (jax.debug.print("{}", s), s)[1], "has a side effect"),
    "two": (
        lambda s, b, h, i, j: (s, s),
        "must return one scalar of float32, and <lambda> returned float32[], float32[]",
    ),
    "a shape": (
        lambda s, b, h, i, j: s * jnp.ones(3),
        "and <lambda> returned float32[3] (",
    ),
    "half": (
        lambda s, b, h, i, j: (s.astype(jnp.float16) * 2).astype(jnp.float32),
        "makes float16, where a kernel has",
    ),
    "a signed shift": (
        lambda s, b, h, i, j: s + lax.shift_right_arithmetic(i.astype(jnp.uint32), jnp.uint32(1)),
        "score_mod uses shift_right_arithmetic, which has no translation into a kernel",
    ),
    "erf_inv": (lambda s, b, h, i, j: lax.erf_inv(s), "score_mod uses erf_inv, which has no translation into a kernel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(TypeError) as caught:
        sourced(function)
    assert message in str(caught.value)
    if " uses " in str(caught.value):
        assert "test_translate.py:" in str(caught.value)
