"""Which `Config` a kernel runs with. The rows are data; `python -m benchmarks.codegen` compiles every one.

A row is chosen by architecture, pass, tile width (`Spec.block_d` or `block_dv`, the wider, or both where a row has
both) and size of the operands' dtype. Where a caller fixes some fields, the rest follow from the row.
"""

import dataclasses
from typing import Any

import numpy as np

from ..base.config import Config, Tuned
from ..base.errors import check_pages, overlaps_error, warp_specialize_error
from ..base.spec import Spec
from .target import Target


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Of 16-bit operands; fp32 goes by `_modest`."""

    arch: int
    name: str
    width: int
    """Of q and k, and of v unless that is another."""
    config: Tuned
    v_width: int | None = None


def _row(arch, name, width, m, n, warps, stages, *, v_width=None, block_ptr=False, overlaps=False) -> Row:
    return Row(arch, name, width, Tuned(m, n, warps, stages, None, block_ptr, overlaps=overlaps), v_width)


# None of these has been timed on a GPU yet. They are the largest tiles that `benchmarks.codegen --check` passes (no
# spill in a loop, no serialised wgmma, shared memory within the chip, asynchronous copies), near the sizes that
# FlashAttention-2 and FlexAttention publish for each chip. Where both memory variants are offered, the first is tuned.
ROWS = (
    _row(80, "fwd", 64, 128, 64, 4, 3),
    _row(80, "fwd", 128, 128, 64, 8, 3),
    _row(80, "fwd", 256, 64, 64, 8, 2),
    _row(80, "dq", 64, 128, 32, 4, 3),
    _row(80, "dq", 128, 128, 32, 8, 2),
    _row(80, "dq", 256, 32, 32, 4, 2),
    _row(80, "dkdv", 64, 64, 64, 4, 2),
    _row(80, "dkdv", 128, 64, 64, 8, 2),
    _row(80, "dkdv", 256, 32, 32, 4, 2),
    _row(80, "fwd", 256, 128, 32, 8, 2, v_width=128),
    _row(80, "dbias", 64, 64, 32, 4, 2),
    _row(80, "dbias", 128, 64, 32, 4, 2),
    _row(80, "dbias", 256, 64, 32, 4, 2),
    *(
        _row(arch, *row)
        for row in (
            ("fwd", 64, 128, 64, 4, 2),
            ("fwd", 128, 128, 64, 8, 2),
            ("fwd", 256, 32, 64, 4, 2),
            ("dq", 64, 128, 32, 4, 2),
            ("dq", 128, 128, 32, 8, 2),
            ("dq", 256, 32, 32, 4, 2),
            ("dkdv", 64, 64, 64, 4, 2),
            ("dkdv", 128, 64, 64, 8, 2),
            ("dkdv", 256, 32, 32, 4, 2),
            ("dbias", 64, 64, 32, 4, 2),
            ("dbias", 128, 64, 32, 4, 2),
            ("dbias", 256, 32, 32, 4, 2),
        )
        for arch in (86, 89)
    ),
    _row(90, "fwd", 64, 128, 64, 4, 3, block_ptr=True, overlaps=True),
    _row(90, "fwd", 64, 128, 64, 4, 3),
    _row(90, "fwd", 128, 128, 128, 8, 2, block_ptr=True, overlaps=True),
    _row(90, "fwd", 128, 128, 128, 8, 2),
    _row(90, "fwd", 256, 128, 64, 8, 2, block_ptr=True, overlaps=True),
    _row(90, "fwd", 256, 128, 64, 8, 2),
    _row(90, "dq", 64, 128, 64, 4, 3, block_ptr=True),
    _row(90, "dq", 64, 128, 64, 4, 3),
    _row(90, "dq", 128, 128, 64, 8, 2, block_ptr=True),
    _row(90, "dq", 128, 128, 64, 8, 2),
    _row(90, "dq", 256, 64, 64, 4, 2, block_ptr=True),
    _row(90, "dq", 256, 128, 32, 8, 2),
    _row(90, "dkdv", 64, 64, 64, 4, 3, overlaps=True),
    _row(90, "dkdv", 64, 64, 64, 4, 3, block_ptr=True, overlaps=True),
    _row(90, "dkdv", 128, 64, 128, 8, 2, block_ptr=True, overlaps=True),
    _row(90, "dkdv", 128, 64, 128, 8, 3, overlaps=True),
    _row(90, "dkdv", 256, 32, 64, 8, 2, block_ptr=True, overlaps=True),
    _row(90, "dkdv", 256, 32, 32, 4, 2),
    _row(90, "dq", 256, 128, 64, 8, 2, v_width=128, block_ptr=True),
    _row(90, "dkdv", 256, 32, 64, 4, 2, v_width=128, block_ptr=True),
    _row(90, "dbias", 64, 64, 64, 4, 2),
    _row(90, "dbias", 128, 64, 64, 4, 2),
    _row(90, "dbias", 256, 64, 64, 8, 2),
    _row(100, "fwd", 64, 128, 64, 4, 3, block_ptr=True),
    _row(100, "fwd", 64, 128, 64, 4, 3),
    _row(100, "fwd", 128, 128, 128, 8, 2, block_ptr=True),
    _row(100, "fwd", 128, 128, 128, 8, 2),
    _row(100, "fwd", 256, 128, 64, 8, 2, block_ptr=True),
    _row(100, "fwd", 256, 128, 64, 8, 2),
    _row(100, "dq", 64, 128, 64, 4, 3, block_ptr=True),
    _row(100, "dq", 64, 128, 64, 4, 3),
    _row(100, "dq", 128, 128, 64, 8, 2, block_ptr=True),
    _row(100, "dq", 128, 128, 64, 8, 2),
    _row(100, "dq", 256, 64, 64, 4, 2, block_ptr=True),
    _row(100, "dq", 256, 128, 32, 8, 2),
    _row(100, "dkdv", 64, 64, 128, 4, 2),
    _row(100, "dkdv", 64, 64, 128, 4, 2, block_ptr=True),
    _row(100, "dkdv", 128, 64, 128, 8, 2),
    _row(100, "dkdv", 128, 64, 128, 8, 2, block_ptr=True),
    _row(100, "dkdv", 256, 32, 64, 8, 2),
    _row(100, "dkdv", 256, 32, 64, 8, 2, block_ptr=True),
    _row(100, "dq", 256, 64, 64, 4, 2, v_width=128, block_ptr=True),
    _row(100, "dkdv", 256, 64, 64, 4, 2, v_width=128, block_ptr=True),
    _row(100, "dbias", 64, 64, 64, 4, 2),
    _row(100, "dbias", 128, 64, 64, 4, 2),
    _row(100, "dbias", 256, 64, 64, 8, 2),
)


def architecture(target: Target) -> int:
    """The architecture whose rows fit `target`: chips with little shared memory go by sm_86 or sm_89."""
    if target.capability in (86, 89):
        return target.capability
    if target.capability >= 120:
        return 89
    if not target.capability:
        return 0
    return max(arch for arch in (80, 90, 100) if arch <= target.capability)


def choose(name: str, spec: Spec, dtype: Any, target: Target, wanted: Config) -> Tuned:
    """The config of one pass with every field set (but for `maxnreg`): `wanted` where it says, tuned where not.

    Args:
      name: one of `config.PASSES`.
      spec: what is computed.
      dtype: of q, k and v.
      target: the GPU.
      wanted: what the caller fixed.

    Raises:
      ValueError: see `fixed`.
    """
    itemsize = np.dtype(dtype).itemsize
    row = _find(name, architecture(target), spec, itemsize, wanted.block_ptr)
    if wanted.block_ptr is None and not suit_descriptors(spec, itemsize):
        row = dataclasses.replace(row, block_ptr=False)
    heavy = spec.rules.score is not None and spec.rules.score.heavy
    if name == "dbias" and heavy:
        row = dataclasses.replace(row, block_n=min(row.block_n, 32))
    elif name != "dbias" and (spec.bias or spec.mask or spec.rules.soft_cap or spec.drops or heavy):
        row = _halved(name, row)
        if name == "fwd" and spec.mask is not None:  # wider ones have ptxas serialise wgmma
            row = dataclasses.replace(row, block_n=min(row.block_n, 32))
        if name == "dq" and spec.bias is not None and max(spec.block_d, spec.block_dv) > 128:  # else it spills
            row = dataclasses.replace(row, block_n=min(row.block_n, 16))
    return fixed(name, spec, dtype, target, within_mask(spec, row), wanted)


def suit_descriptors(spec: Spec, itemsize: int) -> bool:
    """Whether descriptors can read the rows of k and v, whose elements have so many bytes: multiples of 16 bytes."""
    return not any(rows.width * itemsize % 16 for rows in (spec.k_rows, spec.v_rows))


def within_mask(spec: Spec, row: Tuned) -> Tuned:
    """With a tile that is a part of a block mask's, or all of it, if there is one."""
    if not spec.listed:
        return row
    return dataclasses.replace(row, block_m=min(row.block_m, spec.tile_rows), block_n=min(row.block_n, spec.tile_keys))


def fixed(name: str, spec: Spec, dtype: Any, target: Target, row: Tuned, wanted: Config) -> Tuned:
    """A row of the table, with what the caller fixed, and what follows from that.

    Raises:
      ValueError: `wanted` asks for warp specialization or overlapping that this chip or call cannot have, or for tiles
        larger than a page.
    """
    starts, overlaps = _starts(name, spec, architecture(target)), row.overlaps and _can_overlap(name, spec, row)
    row = dataclasses.replace(row, starts=starts, overlaps=overlaps)
    fixed = {f.name: value for f in dataclasses.fields(wanted) if (value := getattr(wanted, f.name)) is not None}
    config = dataclasses.replace(row, **fixed)
    if (config.block_m, config.block_n) != (row.block_m, row.block_n):
        config = _suit(config, name, spec, np.dtype(dtype).itemsize, target, wanted)
    if config.warp_specialize and not target.has_tensor_memory:
        raise warp_specialize_error(target)
    if name == "fwd" and config.overlaps and (spec.listed or not config.block_ptr):
        raise overlaps_error(spec.listed)
    if spec.page_size:
        check_pages(config, spec.page_size)
    return config


def one_head(spec: Spec, config: Tuned, batch: int, seqlen_k: int, target: Target) -> bool:
    """Whether a program of the dk and dv kernel takes one query head, not all that share its keys: these one after the
    other would leave most of the chip with nothing to do, which costs more than summing their results afterwards."""
    blocks = -(-seqlen_k // config.block_n)
    return spec.group > 1 and blocks * spec.kv_heads * batch < PROGRAMS_EACH * target.multiprocessors


PROGRAMS_EACH = 2
"""Programs for each multiprocessor that keep it busy."""


def compiler_options(config: Tuned, target: Target, spec: Spec) -> dict[str, Any]:
    """What Triton's backend is given besides warps and stages.

    Kernels say themselves what is one FMA (`kernels/units.py`): the compiler might make one in one kernel of a call and
    not in another. Where that does not matter it may, for fewer instructions.
    """
    options: dict[str, Any] = {"enable_fp_fusion": spec.small_logits}
    if target.ptx_version is not None:
        options["ptx_version"] = target.ptx_version
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return options


def _starts(name: str, spec: Spec, arch: int) -> bool:
    """Where a product that starts from the bias or mask takes fewer instructions: not on sm_100, where it would go
    through tensor memory, but for the forward pass; nor where the loop would spill."""
    if spec.bias is None and spec.mask is None:
        return False
    width, bias = max(spec.block_d, spec.block_dv), spec.bias is not None
    if name == "fwd":
        return not (arch == 90 and width > 128 and spec.rules.gives_lost)
    if name == "dbias":
        return bias and arch < 100 and (arch == 90 or width <= 128)
    return arch < 100 and (name == "dq" or width > 64 or (bias and arch == 90))


def _can_overlap(name: str, spec: Spec, row: Tuned) -> bool:
    """Whether it is possible, and registers hold one tile more without a spill in a loop."""
    if name == "fwd":
        wide_bias = spec.bias is not None and max(spec.block_d, spec.block_dv) > 128
        return row.block_ptr and not (spec.listed or spec.slopes or spec.scores or wide_bias)
    return not (spec.summed > 1 and spec.masks)


def _find(name: str, arch: int, spec: Spec, itemsize: int, block_ptr: bool | None) -> Tuned:
    width, widths = max(spec.block_d, spec.block_dv, 64), (spec.block_d, spec.block_dv)
    if itemsize == 4 or not arch:
        return _modest(name, arch, width, itemsize, bool(block_ptr))
    found = [row for row in ROWS if (row.arch, row.name, row.width) == (arch, name, width)]
    rows = [r.config for r in found if (r.width, r.v_width) == widths] or [r.config for r in found if not r.v_width]
    config = next((c for c in rows if block_ptr in (None, c.block_ptr)), rows[0])
    return config if block_ptr is None else dataclasses.replace(config, block_ptr=block_ptr)


def _halved(name: str, row: Tuned) -> Tuned:
    """Half the tile: a second one beside the logits (a bias, a mask, random bits, a tanh) takes as many registers
    again, and spills."""
    kept, streamed = ("block_n", "block_m") if name == "dkdv" else ("block_m", "block_n")
    side = kept if getattr(row, kept) > 32 >= getattr(row, streamed) else streamed
    half = max(getattr(row, side) // 2, 16)
    return dataclasses.replace(row, block_m=half) if side == "block_m" else dataclasses.replace(row, block_n=half)


def _modest(name: str, arch: int, width: int, itemsize: int, block_ptr: bool) -> Tuned:
    """Small tiles that fit every chip: for fp32, whose IEEE products fill registers, and for AMD."""
    if itemsize == 4:
        # Left to itself, ptxas takes so few registers on sm_80 that it spills in the loop, and on others too many.
        maxnreg = 128 if name == "dkdv" and arch and width <= 64 else None
        return Tuned(32, 32, 8, 1, maxnreg, block_ptr) if width <= 128 else Tuned(16, 16, 4, 1, None, block_ptr)
    size = 64 if width <= 64 else 32
    return Tuned(size, size, 4, 2, None, block_ptr)


def _suit(config: Tuned, name: str, spec: Spec, itemsize: int, target: Target, wanted: Config) -> Tuned:
    """Warps and stages for block sizes that no row has: as many stages as fit, warps by the size of a tile."""
    warps = 8 if config.block_m * config.block_n >= 128 * 128 or config.block_m * spec.block_d >= 128 * 128 else 4
    row = (spec.block_d + spec.block_dv) * itemsize
    kept, streamed = (config.block_n, config.block_m) if name == "dkdv" else (config.block_m, config.block_n)
    stages = next((s for s in (3, 2) if (kept + s * streamed) * row <= target.shared_memory), 1)
    how = {"num_warps": wanted.num_warps or warps, "num_stages": wanted.num_stages or stages, "maxnreg": wanted.maxnreg}
    return dataclasses.replace(config, **how, overlaps=bool(wanted.overlaps))
