"""The one list of test inputs: the XLA path, the interpreter, lowering and the GPU tests all take theirs from it."""

import dataclasses
import itertools
import zlib

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `flash_attention`, by its shapes."""

    name: str
    seqlen_q: int = 64
    seqlen_k: int = 64
    batch: tuple[int, ...] = (1,)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    v_dim: int | None = None
    causal: bool = False
    bias: str = ""
    """The axes of `bhqk` (batch, head, query, key) that the bias has; "-" has none of them, "" is no bias."""
    dtype: str = "float32"
    scale: float | None = None
    block: tuple[int, int] = (32, 32)
    """Small, so that several tiles meet in few elements."""

    def __str__(self) -> str:
        return self.name

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        full = {"b": self.batch, "h": (self.heads,), "q": (self.seqlen_q,), "k": (self.seqlen_k,)}
        shape = [n if axis in self.bias else 1 for axis in "bhqk" for n in full[axis]]
        return tuple(shape) if self.bias else None

    def inputs(self) -> dict[str, np.ndarray | None]:
        """q, k, v, bias, and the cotangents do and dlse, drawn from the case's name."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        v_dim = self.v_dim or self.head_dim

        def draw(*shape, dtype=self.dtype):
            return rng.standard_normal(shape).astype(jnp.dtype(dtype))

        bias_dtype = "float32" if self.dtype == "float64" else self.dtype
        return {
            "q": draw(*self.batch, self.seqlen_q, self.heads, self.head_dim),
            "k": draw(*self.batch, self.seqlen_k, self.kv_heads, self.head_dim),
            "v": draw(*self.batch, self.seqlen_k, self.kv_heads, v_dim),
            "bias": None if self.bias_shape is None else draw(*self.bias_shape, dtype=bias_dtype),
            "do": draw(*self.batch, self.seqlen_q, self.heads, v_dim),
            "dlse": draw(*self.batch, self.heads, self.seqlen_q, dtype="float32"),
        }


def _biases() -> list[Case]:
    """Every broadcast shape, causal or not by turns, on lengths that no block divides."""
    shapes = ["".join(c) or "-" for n in range(5) for c in itertools.combinations("bhqk", n)]
    return [
        Case(f"bias_{s}", 50, 70, batch=(2,), heads=2, kv_heads=1, head_dim=16, causal=i % 2 == 0, bias=s)
        for i, s in enumerate(shapes)
    ]


CASES = [
    Case("plain", 128, 128),
    Case("causal", 128, 128, causal=True),
    Case("wide_keys", 96, 96, causal=True, block=(16, 64)),
    Case("wide_rows", 96, 96, causal=True, block=(64, 16)),
    Case("one_tile", 17, 17, causal=True, block=(64, 64)),
    Case("one_row", 1, 127, heads=4, kv_heads=1),
    Case("one_row_causal", 1, 33, causal=True),
    Case("one_key", 127, 1),
    Case("one_by_one", 1, 1, causal=True),
    Case("more_keys", 17, 127, causal=True),
    Case("more_rows", 127, 17, causal=True),
    Case("ragged", 127, 100),
    Case("ragged_causal", 100, 127, batch=(2,), causal=True),
    Case("thousand", 1000, 1000, heads=1, kv_heads=1, causal=True, block=(128, 64)),
    Case("thousand_keys", 17, 1000, heads=1, kv_heads=1, block=(16, 128)),
    Case("gqa_8_1", 64, 64, heads=8, kv_heads=1, causal=True),
    Case("gqa_6_2", 50, 40, batch=(2,), heads=6, kv_heads=2),
    Case("no_batch", 40, 40, batch=(), causal=True),
    Case("three_batch_axes", 20, 20, batch=(2, 1, 2), causal=True, bias="bk"),
    Case("head_dim_1", 40, 40, head_dim=1),
    Case("head_dim_40", 50, 50, head_dim=40, causal=True),
    Case("head_dim_59", 50, 50, head_dim=59, causal=True),
    Case("head_dim_80", 50, 50, head_dim=80),
    Case("head_dim_96", 50, 50, head_dim=96, causal=True),
    Case("head_dim_192", 40, 40, head_dim=192, v_dim=128, causal=True),
    Case("head_dim_256", 40, 40, head_dim=256, heads=1, kv_heads=1, block=(16, 16)),
    Case("narrow_v", 50, 50, head_dim=64, v_dim=24),
    Case("wide_v", 50, 50, head_dim=24, v_dim=72, causal=True),
    Case("scale_large", 64, 64, scale=3.0),
    Case("scale_zero", 40, 50, scale=0.0, causal=True),
    Case("scale_negative", 40, 50, scale=-0.4, causal=True),
    Case("float16", 100, 127, dtype="float16", causal=True, heads=4, kv_heads=2),
    Case("float16_bias", 70, 50, dtype="float16", bias="hqk", causal=True),
    Case("float16_one_row", 1, 127, dtype="float16"),
    Case("bfloat16", 100, 127, dtype="bfloat16", causal=True, heads=4, kv_heads=2),
    Case("bfloat16_bias", 70, 50, dtype="bfloat16", bias="bk"),
    Case("bfloat16_head_dim_80", 64, 64, dtype="bfloat16", head_dim=80),
    *_biases(),
]
