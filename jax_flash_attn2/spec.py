"""What a call computes (`Spec`), how a caller wants it done (`Config`) and how a kernel does it (`Tuned`)."""

import dataclasses
from typing import Literal

Precision = Literal["ieee", "tf32", "tf32x3"]


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is computed: all that is static about one attention call.

    One `Spec` is handed whole to every kernel as a compile-time constant, so a field read inside a
    kernel costs nothing at run time. `inputs.prepare` is the only place that makes one.
    """

    heads: int
    """Query heads, H."""
    kv_heads: int
    """Key and value heads, Hkv; divides `heads`."""
    head_dim: int
    """Width of a query or key row, D."""
    v_dim: int
    """Width of a value or output row, Dv."""
    causal: bool = False
    """Row i sees keys j <= i (top-left aligned)."""
    bias_axes: tuple[bool, ...] | None = None
    """Which axes of `[B, H, Sq, Sk]` the bias really has; it is broadcast along the others. None: no bias."""
    multiple_q: int = 1
    """The largest power of two up to 128 that divides Sq: tells a kernel which edges cannot be ragged."""
    multiple_k: int = 1
    """The same for Sk; also the alignment of a bias row."""

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def has_bias(self) -> bool:
        """Whether logits have an additive bias."""
        return self.bias_axes is not None

    @property
    def bias_batch(self) -> bool:
        """Whether the bias has a batch axis."""
        return self.bias_axes is not None and self.bias_axes[0]

    @property
    def bias_heads(self) -> bool:
        """Whether the bias has a head axis."""
        return self.bias_axes is not None and self.bias_axes[1]

    @property
    def bias_rows(self) -> bool:
        """Whether the bias has a query axis."""
        return self.bias_axes is not None and self.bias_axes[2]

    @property
    def bias_cols(self) -> bool:
        """Whether the bias has a key axis."""
        return self.bias_axes is not None and self.bias_axes[3]

    @property
    def dbias_partial(self) -> "Spec":
        """A `Spec` whose bias is what the bias-gradient kernel writes.

        A bias with both sequence axes is summed over batches and heads by the kernel itself, so nothing larger
        than the gradient is ever held. One that lacks a sequence axis comes out per batch and head: that is
        small, and the sum over them is left to XLA.
        """
        in_kernel = self.bias_rows and self.bias_cols
        axes = (
            self.bias_batch or not in_kernel,
            self.bias_heads or not in_kernel,
            self.bias_rows,
            self.bias_cols,
        )
        return dataclasses.replace(self, bias_axes=axes)

    @property
    def block_d(self) -> int:
        """`head_dim` as a tile width: a power of two, at least 16 (`tl.dot`)."""
        return max(16, next_power_of_two(self.head_dim))

    @property
    def block_dv(self) -> int:
        """`v_dim` as a tile width."""
        return max(16, next_power_of_two(self.v_dim))


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel shall run. Nothing here changes what is computed; None means the tuned value.

    Block sizes hold on every backend; the other fields speak to the GPU and have no meaning elsewhere.
    """

    block_m: int | None = None
    """Query rows per tile: a power of two, at least 16."""
    block_n: int | None = None
    """Key rows per tile: a power of two, at least 16."""
    num_warps: int | None = None
    """Warps per program: 1, 2, 4, 8 or 16."""
    num_stages: int | None = None
    """Depth of the software pipeline that loads the tiles of the inner loop."""
    maxnreg: int | None = None
    """Upper bound on registers per thread (NVIDIA)."""
    block_ptr: bool | None = None
    """Reach memory through tensor descriptors (True: "block-ptr") or pointers (False: "ptr-block")."""
    precision: Precision = "ieee"
    """Matrix products of fp32 operands: IEEE fp32, one TF32 pass, or three."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A `Config` with every choice made: what a kernel is compiled with, and a row of the tuning table."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    block_ptr: bool = False
    precision: Precision = "ieee"
