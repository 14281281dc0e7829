"""Compiles every row of the tuning table for its GPU, without one, and checks the machine code.

    python -m benchmarks.codegen                    # a table of registers, spills, shared memory, instruction mix
    python -m benchmarks.codegen --check            # exit status 1 if a row breaks a rule
    python -m benchmarks.codegen --only arch=90,name=dkdv --json out.json

What was read off is kept in `.cache/codegen`; a kernel is compiled again when something changes that its code depends
on, or with `--anew`. The kernels are compiled as `jax_flash_attn2` launches them, from the same operands, and
assembled by the ptxas that Triton carries with the options that JAX uses. A GPU is needed to say how fast a kernel
is; that it spills, waits for every product or loads without overlap can be read off here.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jax_flash_attn2 import kernels
from jax_flash_attn2.base.spec import PASSES, Config, Rules, Spec, Tuned
from jax_flash_attn2.gpu import cache, passes, store, tuning
from jax_flash_attn2.gpu.passes import Rows
from jax_flash_attn2.gpu.target import Target

_TYPES = {
    **{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    **{"int32": "i32", "uint32": "u32", "bool": "i1"},
}
# Shared memory and warps of one multiprocessor (CUDA C Programming Guide, "Technical Specifications").
_MULTIPROCESSOR = {80: (167936, 64), 86: (102400, 48), 89: (102400, 48), 90: (233472, 64), 100: (233472, 64)}
KEPT = Path(__file__).parents[1] / ".cache" / "codegen"
NINTHS = 9


@dataclasses.dataclass(frozen=True)
class Point:
    """One kernel to compile."""

    arch: int
    name: str
    head_dim: int
    causal: bool
    config: Tuned
    extra: str = ""
    """One of `EXTRAS`, or nothing."""

    @property
    def title(self) -> str:
        c = self.config
        variant = "block-ptr" if c.block_ptr else "ptr-block"
        return (
            f"sm_{self.arch} {self.name:4} hd{self.head_dim:<3} {'causal' if self.causal else 'full  '} "
            f"{f'{self.extra} ' if self.extra else ''}{variant} "
            f"{c.block_m:>3}x{c.block_n:<3} w{c.num_warps} s{c.num_stages}{f' r{c.maxnreg}' if c.maxnreg else ''}"
        )


_BLOCKS = {
    **{f"{side}_ends": (1, 1, 8, 3, "int32") for side in ("row", "col")},
    **{f"{side}_tiles": (1, 1, 64, 2, "int32") for side in ("row", "col")},
    "tile_bits": (1, 1, 64, 128 * 128 // 32, "int32"),
}
EXTRAS = {
    "bias": ({}, {"bias": ("b", "h", "q", "k", None)}),
    "mask": ({}, {"mask": ("b", 1, "q", "k", "bool")}),
    "segments": ({}, {"q_segments": ("b", 1, "q", 1, "int32"), "kv_segments": ("b", 1, 1, "k", "int32")}),
    "lengths": ({}, {name: ("b", 1, 1, 1, "int32") for name in ("q_lengths", "kv_lengths")}),
    "window": ({"left": 256}, {}),
    "softcap": ({"soft_cap": 30.0}, {}),
    "alibi": ({}, {"slopes": (1, "h", 1, 1, "float32")}),
    "dropout": ({"dropout_rate": 0.1}, {name: ("b", "h", 1, 1, "uint32") for name in ("dropout_key0", "dropout_key1")}),
    "blocks": ({"tiles": (128, 128), "right": None}, _BLOCKS),
    "weights": (
        {"tiles": (128, 128), "right": None},
        {**_BLOCKS, "tile_weights": (1, 1, 64, 128 * 128, "float32")},
    ),
}
"""What a call may have besides, as it is compiled here: `Rules`, and operands by their axes and dtype."""


def points() -> list[Point]:
    """Every row of the table, causal and not; what is chosen where there is a bias or a block mask; and, on two chips,
    each extra."""
    plain = [Point(r.arch, r.name, r.width, causal, r.config) for r in tuning.ROWS for causal in (False, True)]
    tuned = dict.fromkeys((p.arch, p.name, p.head_dim) for p in plain)
    chips = {"bias": (80, 86, 89, 90, 100), "blocks": (80, 86, 90, 100)}  # sm_89 gets the code of sm_86
    extras = [
        (*key, extra)
        for key in tuned
        for extra in EXTRAS
        if key[0] in chips.get(extra, (80, 90)) and (extra in chips or key[2] == 128)
    ]
    return plain + [_tuned(*key) for key in extras]


def _tuned(arch: int, name: str, head_dim: int, extra: str) -> Point:
    spec = Spec.of(*_arrays(head_dim, causal=True, extra=extra))
    config = tuning.choose(name, spec, jnp.bfloat16, Target(arch), Config())
    return Point(arch, name, head_dim, spec.causal, config, extra)


def _arrays(head_dim: int, *, causal: bool, extra: str = "", seqlen: int = 1024, dtype: Any = jnp.bfloat16) -> tuple:
    """Rules, q, k, v and operands to compile for."""
    x = jax.ShapeDtypeStruct((2, seqlen, 8, head_dim), dtype)
    rules, more = EXTRAS[extra] if extra else ({}, {})
    sizes = {"b": 2, "h": 8, "q": seqlen, "k": seqlen, 1: 1}
    operands = {"scale": jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)}
    for name, (*axes, kind) in more.items():
        operands[name] = jax.ShapeDtypeStruct([sizes.get(axis, axis) for axis in axes], kind or dtype)
    return Rules(**{"right": 0 if causal else None} | rules), x, x, x, operands


def launches(point: Point, **options) -> list[tuple]:
    """What `passes` would launch: (kernel, operands, outputs, spec, config) of each kernel of the point's pass."""
    seen = []

    def run(kernel, programs, operands, outputs, spec, config):
        seen.append((kernel, operands, outputs, spec, config))
        return tuple(None if x is None else jnp.zeros(x.shape, x.dtype) for x in outputs)

    arrays = _arrays(point.head_dim, causal=point.causal, extra=point.extra, **options)
    spec, (q, *_) = Spec.of(*arrays), arrays[1:]
    if point.name == "fwd":
        jax.eval_shape(lambda *a: passes.forward(run, spec, point.config, *a), *arrays[1:])
        return seen
    configs = dict.fromkeys(PASSES, point.config)
    row = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    def backward(q, k, v, operands, o, m, l, do):
        return passes.backward(run, spec, configs, q, k, v, operands, o, m, l, do, None, wanted=(), apart=())

    jax.eval_shape(backward, *arrays[1:], q, row, row, q)
    return [launch for launch in seen if point.name in launch[0].__name__]


def compile_point(point: Point, *, anew: bool = False, **options):
    """The machine code of one point: `sass.Code`, from disk if it is there and not wanted anew."""
    from . import sass

    ((kernel, operands, outputs, spec, config),) = launches(point, **options)
    kinds = [_kind(x, config, Target(point.arch)) for x in (*operands, *outputs)]
    names = [*kernel.arg_names]
    signature = dict(zip(names, [*kinds, "constexpr", "constexpr"], strict=True))
    constants = {name: None for name, kind in signature.items() if kind == "constexpr"} | {
        "SPEC": spec,
        "CFG": config,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.maxnreg:
        options["maxnreg"] = config.maxnreg
    kept, key = store.Store(KEPT, 64 * 2**20), _key(kernel, signature, constants, point.arch, options)
    found = None if key is None or anew else kept.get(key)
    if found is not None:
        return sass.Code(**found[0] | {"loops": tuple(found[0]["loops"])})
    code = sass.compile_kernel(kernel, signature, constants, point.arch, options)
    if key is not None:
        kept.put(key, dataclasses.asdict(code) | {"loops": list(code.loops)}, {})
    return code


def _key(kernel: Any, signature: dict, constants: dict, arch: int, options: dict) -> str | None:
    """What the code of a kernel is known by: all that Triton and `sass.py` make it from."""
    import triton
    from triton._C import libtriton

    return cache.key(
        kernel=kernel.__name__,
        target=arch,
        signature=signature,
        constants=constants,
        options=options,
        environment=cache.environment(),
        source=cache.sources(kernels.__path__[0]),
        reader=hashlib.sha256(Path(__file__).with_name("sass.py").read_bytes()).hexdigest(),
        triton=(triton.__version__, os.path.getsize(libtriton.__file__)),
    )


def _kind(x: Any, config: Tuned, target: Target) -> str | tuple:
    """The type of a kernel's argument, as Triton writes it."""
    if isinstance(x, tuple):
        return tuple(_kind(y, config, target) for y in x)
    if x is None:
        return "constexpr"
    if isinstance(x, int):
        return "i32"
    if isinstance(x, Rows):
        element = _TYPES[x.array.dtype.name]
        if config.block_ptr and target.has_tma:
            return f"tensordesc<{element}[{','.join(map(str, x.block_shape))}]>"
        return f"*{element}"
    return f"*{_TYPES[x.dtype.name]}"


def broken_rules(point: Point, code) -> list[str]:
    """What is wrong with a kernel's code; nothing, for a row that may stay in the table."""
    limit = Target(point.arch).shared_memory
    loops = code.loops
    rules = {
        "no hot loop found": not loops,
        f"{code.shared} bytes of shared memory, the chip has {limit}": code.shared > limit,
        "a spill in a loop": any(loop["local"] for loop in loops),
        f"{code.registers} registers and yet spills": code.registers < 64 and code.spill_bytes > 0,
        "wgmma serialised by ptxas": code.serialized,
        "a wait behind every wgmma": any(loop["depbar"] > 4 + 4 for loop in loops),
        "no asynchronous copy in a loop": any(not loop["cp.async"] + loop["tma"] for loop in loops),
    }
    if not point.extra:  # what is loaded, drawn or computed besides changes the mix
        rules |= {
            "tiles loaded without asynchronous copies": any(loop["wide ldg"] for loop in loops),
            "no fused multiply-add before each exp2": any(loop["ffma"] < 0.9 * loop["ex2"] for loop in loops),
            "a layout conversion in the forward loop": _converts(point) and any(loop["sts"] for loop in loops),
            "the masked loop takes more than 1.75 times the bare one's instructions": _mask_cost(loops) > 1.75,
        }
    return [rule for rule, broken in rules.items() if broken]


def _mask_cost(loops: Sequence[dict[str, int]]) -> float:
    """How many instructions the masked loop, which comes first, takes for each of the bare one."""
    return loops[0]["total"] / loops[-1]["total"] if loops else 0.0


def _converts(point: Point) -> bool:
    """Whether a store to shared memory in this kernel's loop would be a layout conversion that need not be.

    Below sm_90 Triton lays warps side by side along o's width where that exceeds block_m, so that a row's maximum
    crosses warps. Widths to 128 have tiles of 128 rows; 256 rows of 256 fit no registers. On sm_100 p goes to the
    tensor cores through memory.
    """
    return point.name == "fwd" and (point.arch == 90 or (point.arch < 90 and point.head_dim <= 128))


def _measure(point: Point, anew: bool = False) -> dict[str, Any]:
    """One line of the table, as plain data."""
    line: dict[str, Any] = {"title": point.title, **dataclasses.asdict(point)}
    try:
        code = compile_point(point, anew=anew)
    except Exception as error:  # one row that does not compile must not lose the others
        return line | {"broken": [f"{type(error).__name__}: {error}"[:500]]}
    line |= dataclasses.asdict(code)
    return line | {
        "ctas_per_sm": code.ctas_per_sm(*_MULTIPROCESSOR[point.arch]),
        "broken": broken_rules(point, code),
    }


_COLUMNS = "regs spill  shared CTAs | instructions of each hot loop: total (mma wgmma ex2 ffma | cp.async tma ldg sts)"


def _format(line: dict[str, Any]) -> str:
    if "loops" not in line:
        return f"{line['title']} | did not compile"
    loops = "   ".join(
        f"{x['total']:>4} ({x['mma']} {x['wgmma']} {x['ex2']} {x['ffma']} | "
        f"{x['cp.async']} {x['tma']} {x['ldg']} {x['sts']})"
        for x in line["loops"]
    )
    return (
        f"{line['title']} {line['registers']:>4} {line['spill_bytes']:>5} {line['shared']:>7} "
        f"{line['ctas_per_sm']:>4} | {loops}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a row breaks a rule")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was read off")
    parser.add_argument("--only", default="", metavar="KEY=VALUE,...", help="arch=90,name=fwd,head_dim=128,causal=True")
    parser.add_argument("--anew", action="store_true", help="compile what is kept too")
    parser.add_argument("--ninth", type=int, choices=range(NINTHS), help="only this ninth of the kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled side by side")
    options = parser.parse_args(argv)
    wanted = dict(part.split("=") for part in options.only.split(",") if part)
    chosen = [p for p in points() if all(str(getattr(p, key)) == value for key, value in wanted.items())]
    if options.ninth is not None:
        print(f"ninth {options.ninth} of the kernels (make test-codegen NINTH={options.ninth})", flush=True)
        chosen = chosen[options.ninth :: NINTHS]
    if not chosen:
        parser.error(f"no row matches --only {options.only}")
    lines = list(measure_all(chosen, options.jobs, options.anew))
    print(f"{'':58} {_COLUMNS}")
    for line in lines:
        print(_format(line))
    broken = [line for line in lines if line["broken"]]
    for line in broken:
        print(f"BROKEN {line['title']}: {'; '.join(line['broken'])}")
    print(f"{len(lines)} kernels, {len(broken)} break a rule")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "kernels": lines}, indent=1) + "\n")
    return 1 if options.check and broken else 0


def measure_all(chosen: list[Point], jobs: int | None, anew: bool = False):
    """The lines of `chosen`, in order, with a progress bar."""
    measure = functools.partial(_measure, anew=anew)
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        yield from tqdm(pool.map(measure, chosen), total=len(chosen), desc="compiling", unit="kernel")


@functools.cache
def versions() -> dict[str, str]:
    """What the code was made with."""
    import triton

    return {"python": sys.version.split()[0], "jax": jax.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    sys.exit(main())
