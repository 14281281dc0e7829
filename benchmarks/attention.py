"""Attention problems: inputs, the reference, what can compute them, and how many FLOPs they take.

FLOPs are those of the products that the definition needs, over the pairs of rows and keys that are visible: forward
4 for each pair and head width (q kᵀ and p v, a multiply-add is 2); forward and backward 14 (five products more, as
FlashAttention's papers count). What an implementation computes besides (hidden pairs, p again) counts for nothing.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_flash_attn2 import Config, flash_attention, get_cached_flash_attention

from .problem import Work
from .status import Unsupported

TOLERANCE = {"float32": 1e-4, "float16": 6e-3, "bfloat16": 4e-2}
"""Largest error in units of the largest number: some roundings of the dtype, of p and of the sums' terms."""

_LOGITS_AT_ONCE = 2**26  # of the reference: 256 MiB


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is attended to: q `[batch, rows, heads, head_dim]`, k and v `[batch, seqlen, kv_heads, head_dim]`."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool = False
    bias: bool = False
    dtype: str = "float32"
    kv_heads: int = 0
    """0: as many as heads."""
    rows: int = 0
    """0: as many as keys; fewer have no causal mask here."""
    dbias: bool = False
    """Whether the bias has a gradient, which is summed over heads."""
    v_dim: int = 0
    """The width of v; 0: head_dim."""

    def flops(self, mode: str) -> float:
        """Of "fwd" or "bwd" (which is forward and backward)."""
        t = self.seqlen
        pairs = self.batch * self.heads * (t * (t + 1) // 2 if self.causal else t * (self.rows or t))
        with_d, with_v = {"fwd": (2, 2), "bwd": (8, 6)}[mode]
        return pairs * (with_d * self.head_dim + with_v * (self.v_dim or self.head_dim))


class Attention:
    """A `worker.Problem`: providers are functions `(q, k, v, bias) -> o`, by name.

    Args:
      shape: of the arrays.
      mode: "fwd": o; "bwd": forward and backward, o and the gradients (of o times random numbers, summed) of q, k and
        v, and of the bias if it has one.
      providers: makes the function of a name.
    """

    def __init__(self, shape: Shape, mode: str, providers: Callable[[str], "Provider"]):
        if mode not in ("fwd", "bwd"):
            raise ValueError(f'mode must be "fwd" or "bwd", got {mode!r}')
        self.shape, self.mode, self.providers = shape, mode, providers
        self.dtype, self.tolerance, self.flops = shape.dtype, TOLERANCE[shape.dtype], shape.flops(mode)
        self.row_axis = 1  # the axis of q, k and v along which some may be far smaller than others
        self.arrays = inputs(shape)
        self._expected: Any = None

        self._works: dict[str, Work] = {}

    def work(self, provider: str) -> Work:
        if provider not in self._works:
            self._works[provider] = self.work_of(self.providers(provider))
        return self._works[provider]

    def work_of(self, made: "Provider") -> Work:
        """What a provider runs, in this problem's mode."""
        arguments = self.arrays if self.mode == "bwd" else self.arrays[:4]
        function = self._gradients(made.attend) if self.mode == "bwd" else made.attend
        return Work(jax.jit(function) if made.jit else function, arguments, made.during)

    def expected(self, provider: str) -> Any:
        if self._expected is None:
            attend = functools.partial(reference, causal=self.shape.causal)
            function = self._gradients(attend) if self.mode == "bwd" else attend
            arrays = [x if x is None else x.astype(jnp.float32) for x in self.arrays]
            self._expected = jax.block_until_ready(jax.jit(function)(*arrays[: 5 if self.mode == "bwd" else 4]))
        return self._expected

    def _gradients(self, attend: Callable) -> Callable:
        """Of o, which is a result too: else XLA would leave out what the gradients alone do not need of it."""

        def run(q, k, v, bias, do):
            given = (q, k, v, bias) if self.shape.dbias else (q, k, v)
            o, vjp = jax.vjp(lambda *x: attend(*x, *(q, k, v, bias)[len(x) :]), *given)
            return o, *vjp(do.astype(o.dtype))

        return run


@dataclasses.dataclass
class Provider:
    """One way to attend."""

    attend: Callable[..., Array]
    jit: bool = True
    during: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """What encloses tracing and compiling."""


def inputs(shape: Shape) -> tuple[Array, Array, Array, Array | None, Array]:
    """q, k, v, bias and do, standard normal; the bias hides a quarter of the pairs by its lowest number."""
    dtype, rows = jnp.dtype(shape.dtype), shape.rows or shape.seqlen
    of_rows = (shape.batch, rows, shape.heads, shape.head_dim)
    of_keys = (shape.batch, shape.seqlen, shape.kv_heads or shape.heads, shape.head_dim)
    v_dim = shape.v_dim or shape.head_dim
    *keys, bias_key = jax.random.split(jax.random.key(8), 5)
    sizes = (of_rows, of_keys, (*of_keys[:3], v_dim), (*of_rows[:3], v_dim))
    q, k, v, do = (jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True))
    bias = None
    if shape.bias:
        hidden = jax.random.randint(bias_key, (shape.batch, 1, rows, shape.seqlen), 0, 4) > 2
        lowest = max(float(jnp.finfo(dtype).min), -1e9)  # in fp32 the lowest number overflows as soon as one subtracts
        bias = jnp.where(hidden, lowest, 0).astype(dtype)
    return q, k, v, bias, do


def reference(q: Array, k: Array, v: Array, bias: Array | None = None, *, causal: bool = False) -> Array:
    """The definition, in fp32, some rows of the logits at a time."""
    batch, seqlen, heads, head_dim = q.shape
    k, v = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k, v))
    rows = max(1, min(seqlen, _LOGITS_AT_ONCE // (batch * heads * k.shape[1])))
    while seqlen % rows:
        rows -= 1
    index, keys = (jnp.arange(x.shape[1], dtype=jnp.int32) for x in (q, k))

    @jax.checkpoint
    def block(start):
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=rows)
        s = jnp.einsum("bqhd,bkhd->bhqk", cut(q, axis=1), k, precision="highest") * head_dim**-0.5
        s = s if bias is None else s + cut(bias, axis=2)
        s = jnp.where(cut(index, axis=0)[:, None] >= keys, s, -jnp.inf) if causal else s
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, -1), v, precision="highest")

    blocks = jax.lax.map(block, jnp.arange(0, seqlen, rows))
    return jnp.moveaxis(blocks, 0, 1).reshape(batch, seqlen, heads, v.shape[-1])


def naive(q: Array, k: Array, v: Array, bias: Array | None = None, *, causal: bool = False) -> Array:
    """What one writes first: all logits at once, in the arrays' dtype but for the softmax."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    if causal:
        s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, -1).astype(q.dtype), v)


def library(implementation: str, *, causal: bool = False) -> Provider:
    """`jax.nn.dot_product_attention` with "xla" or "cudnn"."""
    if implementation == "cudnn":
        need_gpu("cuDNN")

    def attend(q, k, v, bias=None, **options):
        try:
            return jax.nn.dot_product_attention(
                q, k, v, bias, is_causal=causal, implementation=implementation, **options
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:  # while it is traced
            if implementation == "cudnn":
                raise Unsupported(f"cuDNN: {error}") from error
            raise

    return Provider(attend)


def flash(*, causal: bool = False, config: Config | None = None, **options: Any) -> Provider:
    """`flash_attention`, tuned but for what `config` says."""
    return Provider(functools.partial(flash_attention, causal=causal, config=config, **options))


def triton(block_ptr: bool, blocksize_q: int, blocksize_k: int) -> Provider:
    """Our kernels, as those call them who compare the memory variants: by the environment and block sizes."""
    need_gpu("the Triton kernels")
    with environment(FLASH_ATTN_BLOCK_PTR="1" if block_ptr else "0"):
        return Provider(get_cached_flash_attention(blocksize_k=blocksize_k, blocksize_q=blocksize_q))


def need_gpu(what: str) -> None:
    """Raises `Unsupported` where there is none."""
    if jax.default_backend() != "gpu":
        raise Unsupported(f"{what} need a GPU; this is {jax.default_backend()}".replace("cuDNN need", "cuDNN needs"))


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
