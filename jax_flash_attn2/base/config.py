"""How a caller wants a call done (`Config`), and how a kernel does it (`Tuned`)."""

import dataclasses
from typing import Literal

Precision = Literal["ieee", "tf32", "tf32x3"]

PASSES = ("fwd", "dq", "dkdv", "dbias")
"""Every kernel that is tuned; `combine` follows from fwd."""

ONLY_FOR = {"overlaps": ("fwd", "dkdv"), "num_splits": ("fwd",), "warp_specialize": ("fwd", "dq")}
"""Those that have these fields of a `Config`; all have the others."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel shall run; None means the tuned value.

    Only `precision` changes numbers, on every backend; block sizes hold on every backend; all else speaks to the GPU.
    Under a block mask the kernels' tiles are a part of its tiles, or all of one, as asked here; the XLA path takes each
    one whole.
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
    overlaps: bool | None = None
    """Compute p while the tensor cores multiply, which changes no bit: in the pass "fwd" the p of the tile before and v
    (FlashAttention-3, section 3.2; through tensor descriptors, without a block mask), in "dkdv" do and v."""
    num_splits: int | None = None
    """Programs that share the keys of a few query rows, from 1 to 256 (for the pass "fwd"); what they make is merged by
    a kernel of its own."""
    warp_specialize: bool | None = None
    """Loads, products and softmax by warps of their own (sm_100 and sm_103; for the passes "fwd" and "dq"). None is
    off, until it has been timed."""


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
    overlaps: bool = False
    warp_specialize: bool = False
    num_splits: int = 1
    starts: bool = False
    """Whether a bias or a mask is where a tile's product starts from, not what is added to it."""
