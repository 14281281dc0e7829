"""What a block mask brings: `flash_attention(mask=BlockMask)` against dense causal attention, and against an option.

    python -m benchmarks block_masks --quick
    python -m benchmarks block_masks --only mask=local,mode=fwd

Batch 1, 8 heads of 64. The masks: a window of 256 keys; the same and 64 sinks; 12 packed documents; every eighth of
512 keys; a tenth of the 128 x 128 tiles, drawn at random and kept whole. All but the last are causal. What a window or
documents can say by themselves is timed as `option` (`window_size`, `q_segment_ids`). "bwd" is forward and backward.

All rows are checked at length 2048; beyond that the first and the last 512, and what they send back: do is 0 in the
rows between, which saves nobody any work. `build` makes the mask: first, compiling included, and again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash_attn2.masks import BlockMask, Predicate, causal, dilated, documents, evaluate, sinks, sliding_window
from jax_flash_attn2.masks.predicates import as_predicate

from .attention import Attention, Provider, Shape, flash
from .problem import Group, Work
from .results import Record, parse_case
from .status import Unsupported
from .sweep import Sweep, milliseconds, parser, ratio, table
from .timing import Effort

WINDOW, SINKS, DOCUMENTS, TILE = 256, 64, 12, 128
MASKS = ("window", "local", "documents", "dilated", "random")
_ALL_CHECKED, _CHECKED_AT_ENDS = 2048, 512


def problem(mask: str, seqlen: int, mode: str, dtype: str) -> "Masked":
    """The problem of a case."""
    return Masked(mask, seqlen, mode, dtype)


@functools.cache
def causal_problem(seqlen: int, mode: str, dtype: str) -> "Masked":
    """What all masks of a length are compared with: compiled, and its reference made, once."""
    return Masked("causal", seqlen, mode, dtype)


@functools.cache
def predicate(mask: str, seqlen: int) -> Predicate:
    """A mask by name; the same object again, so that nothing is compiled twice for it."""
    kept = jnp.asarray(_kept(seqlen))
    return {
        "causal": causal,
        "window": lambda: sliding_window(WINDOW - 1),
        "local": lambda: causal() & (sliding_window(WINDOW - 1) | sinks(SINKS)),
        "documents": lambda: causal() & documents(_ids(seqlen)),
        "dilated": lambda: dilated(window=64, dilation=8),
        "random": lambda: as_predicate(lambda b, h, i, j: kept[i // TILE, j // TILE]),
    }[mask]()


def _kept(seqlen: int) -> np.ndarray:
    """The tiles of "random"."""
    return np.random.default_rng(0).random((-(-seqlen // TILE),) * 2) < 0.1


def _ids(seqlen: int) -> jax.Array:
    return jnp.arange(seqlen) * DOCUMENTS // seqlen


class Masked(Attention):
    """Attention through a mask, or the making of it."""

    def __init__(self, mask: str, seqlen: int, mode: str, dtype: str):
        super().__init__(Shape(1, seqlen, 8, 64, dtype=dtype), "fwd" if mode == "build" else mode, self._provider)
        self.mask, self.building, self.flops = mask, mode == "build", None  # of what is visible, which differs
        self.predicate, self.size = predicate(mask, seqlen), (1, 1, seqlen, seqlen)
        ends = (*range(_CHECKED_AT_ENDS), *range(seqlen - _CHECKED_AT_ENDS, seqlen))
        self.rows = np.arange(seqlen) if seqlen <= _ALL_CHECKED else np.asarray(ends)
        *arrays, do = self.arrays
        self.arrays = (*arrays, jnp.zeros_like(do).at[:, self.rows].set(do[:, self.rows]))
        self.block = None if self.building or mask == "causal" else self._build()
        self.tiles = {} if self.block is None else {"block-mask": int((self.block.tiles() != 0).sum())}

    def _build(self) -> BlockMask:
        if self.mask == "random":
            return BlockMask.from_tiles(_kept(self.shape.seqlen), self.size)
        return BlockMask.from_predicate(self.predicate, self.size)

    def _provider(self, name: str) -> Provider:
        if name != "option":
            return flash(causal=True) if name == "causal" else flash(mask=self.block)
        if self.mask == "window":
            return flash(causal=True, window_size=(WINDOW - 1, 0))
        if self.mask == "documents":
            return flash(causal=True, q_segment_ids=_ids(self.shape.seqlen)[None])
        raise Unsupported("no option says the same")

    def _problem_of(self, provider: str) -> "Masked":
        if provider != "causal":
            return self
        return causal_problem(self.shape.seqlen, self.mode, self.shape.dtype)

    def work(self, provider: str) -> Work:
        if self.building:
            return Work(self._build, (), view=lambda mask: mask.tiles())
        work = super(Masked, self._problem_of(provider)).work(provider)
        work.view = lambda got: got[:, self.rows] if self.mode == "fwd" else (got[0][:, self.rows], *got[1:])
        return work

    def expected(self, provider: str) -> Any:
        return self._tiles() if self.building else self._problem_of(provider)._attended

    @functools.cached_property
    def _attended(self) -> Any:
        q, k, v, _, do = (x if x is None else x.astype(jnp.float32) for x in self.arrays)
        seen = self._seen(self.rows)  # an argument below: as a constant XLA folds it, for 20 s

        def attend(seen, q, k, v):
            o = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None], implementation="xla")
            return jnp.where(seen.any(1)[:, None, None], o, 0)  # jax.nn has a mean where nothing is seen

        def gradients(seen, q, k, v):
            return jax.vjp(functools.partial(attend, seen), q, k, v)[1](do[:, self.rows])

        with jax.default_matmul_precision("highest"):
            made = jax.jit(attend if self.mode == "fwd" else gradients)(seen, q[:, self.rows], k, v)
        return jax.block_until_ready(made)

    def _seen(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the dense mask, `[rows, T]`."""
        zero = np.zeros(1, np.int32)
        return np.asarray(evaluate(self.predicate, zero, zero, rows, np.arange(self.shape.seqlen))[0, 0])

    def _tiles(self) -> np.ndarray:
        """What each tile is, `[1, 1, row blocks, key blocks]`, from rows of the dense mask."""
        starts = range(0, self.shape.seqlen, TILE)
        strips = (self._seen(np.arange(start, start + TILE)).reshape(TILE, -1, TILE) for start in starts)
        return np.stack([np.where(x.all((0, 2)), 1, 2 * x.any((0, 2))) for x in strips]).astype(np.int8)[None, None]


def groups(seqlens: dict[str, tuple[int, ...]], dtype: str) -> list[Group]:
    """All points: the lengths of each mask."""
    made = []
    for mask, lengths in seqlens.items():
        attending = ("causal", "block-mask", *(("option",) if mask in ("window", "documents") else ()))
        for seqlen, mode in ((t, m) for t in lengths for m in ("build", "fwd", "bwd")):
            providers = ("build",) if mode == "build" else attending
            case = {"mask": mask, "seqlen": seqlen, "mode": mode, "dtype": dtype}
            made.append(
                Group("benchmarks.block_masks:problem", case, providers, dict.fromkeys(providers[1:], "causal"))
            )
    return made


def tables(records: list[Record]) -> str:
    """Milliseconds, how many times faster than causal, tiles visited; and what making the mask takes."""
    found = {(r.case, r.provider): r for r in records}
    rows = [
        ["mask", "seqlen", "mode", "causal ms", "block-mask ms", "option ms", "x causal", "option x causal", "tiles"]
    ]
    built = [["mask", "seqlen", "first ms", "again ms"]]
    for name in dict.fromkeys(r.case for r in records):
        case = parse_case(name)
        if case["mode"] == "build":
            r = found[name, "build"]
            built.append([case["mask"], case["seqlen"], "-" if r.first_ms is None else f"{r.first_ms:.0f}",
                          milliseconds(r)])  # fmt: skip
            continue
        causal, block, option = (found.get((name, p)) for p in ("causal", "block-mask", "option"))
        n = -(-int(case["seqlen"]) // TILE)
        tiles = "-" if block is None or block.tiles is None else f"{block.tiles} of {n * n}"
        cells = [*map(milliseconds, (causal, block, option)), ratio(block), ratio(option), tiles]
        rows.append([case["mask"], case["seqlen"], case["mode"], *cells])
    parts = [table(part, left=n) for part, n in ((rows, 3), (built, 1)) if len(part) > 1]
    return "\n\nBuilding the mask\n".join(parts) if len(parts) == 2 else "".join(parts)


def main(argv: list[str] | None = None) -> int:
    options = parser("block_masks", __doc__ or "", seconds=2.0, quick_seconds=0.2).parse_args(argv)
    seconds = options.seconds if options.seconds is not None else options.seconds_by_quick[options.quick]
    effort = Effort(seconds, least=3 if options.quick else 5, warmup=0)  # at length 8192 a first call takes seconds
    with Sweep(options, effort) as sweep:
        lengths = {mask: (2048, 8192) for mask in MASKS}
        if options.quick:
            lengths = {mask: (8192,) if mask == "local" else (2048,) for mask in MASKS}
        records = sweep.measure_all(sweep.select(groups(lengths, "bfloat16" if sweep.on_gpu else "float32")))
        sweep.close_bar()
        print(f"{tables(records)}\n\n{sweep.closing()}")
    return 0
