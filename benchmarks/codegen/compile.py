"""Compiles one kernel as it is launched, from the same operands, and keeps what was read off its code."""

import dataclasses
import hashlib
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash_attn2.base.config import PASSES, Config, Tuned
from jax_flash_attn2.base.rounding import lost_dtype
from jax_flash_attn2.base.spec import Spec
from jax_flash_attn2.gpu import cache, passes, short, store, tuning
from jax_flash_attn2.gpu.passes import Rows
from jax_flash_attn2.gpu.target import Target

from .points import EXTRAS, Point, arrays

KEPT = Path(__file__).parents[2] / ".cache" / "codegen"
_TYPES = {
    **{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
    **{"int32": "i32", "uint32": "u32", "bool": "i1", "int8": "i8"},
    **{"float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"},
}


def launches(point: Point) -> list[tuple]:
    """What `passes` would launch: (kernel, operands, outputs, spec, config) of each kernel of the point's pass."""
    seen = []

    def run(kernel, programs, operands, outputs, spec, config):
        seen.append((kernel, operands, outputs, spec, config))
        return tuple(None if x is None else jnp.zeros(x.shape, x.dtype) for x in outputs)

    rules, q, k, v, operands = arrays(point)
    spec, extra = Spec.of(rules, q, k, v, operands), EXTRAS[point.extra]
    if point.name in ("fwd", "combine"):
        spec, _ = short.choose(spec, q, k, operands, Target(point.arch), Config(block_ptr=point.config.block_ptr))
        jax.eval_shape(lambda *a: passes.forward(run, spec, point.config, *a), q, k, v, operands)
        return [launch for launch in seen if point.name in launch[0].__name__]
    configs = dict.fromkeys(PASSES, point.config)
    row = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    o = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    lost = jax.ShapeDtypeStruct(o.shape, lost_dtype(o.dtype)) if rules.lost else None

    def backward(q, k, v, operands, o, stats, do, dlse, lost):
        given = {"wanted": extra.wanted, "groups": (1,) * len(extra.wanted), "lost": lost}
        return passes.backward(run, spec, configs, q, k, v, operands, o, stats, do, dlse, **given)

    stats = (row,) * (2 if spec.alters_logits else 1)
    jax.eval_shape(backward, q, k, v, operands, o, stats, o, row if extra.dlse else None, lost)
    return [launch for launch in seen if point.name in launch[0].__name__]


def compile_point(point: Point, *, anew: bool = False, ptxas: str | None = None):
    """The machine code of one point: `sass.Code`, from disk if it is there and not wanted anew.

    ptxas: assembles what Triton wrote with this one, and does not keep the code.
    """
    from . import sass

    ((kernel, operands, outputs, spec, config),) = launches(point)
    kinds = [_kind(x, config, Target(point.arch)) for x in (*operands, *outputs)]
    names = [*kernel.arg_names]
    signature = dict(zip(names, [*kinds, "constexpr", "constexpr"], strict=True))
    constants = {name: None for name, kind in signature.items() if kind == "constexpr"} | {
        "SPEC": spec,
        "CFG": config,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options |= tuning.compiler_options(config, Target(point.arch), spec)
    kept, key = store.Store(KEPT, 64 * 2**20), _key(kernel, signature, constants, point.arch, options)
    meta, parts = (None if key is None or anew else kept.get(key)) or (None, {})
    if meta is not None:
        code = sass.Code(**meta | {"loops": tuple(meta["loops"])})
        if ptxas is None:
            return code
        text = zlib.decompress(parts["ptx"]).decode()
        ptx = sass.Ptx(text, point.arch, code.shared, code.warps, code.tensor_memory)
    else:
        ptx = sass.lower(kernel, signature, constants, point.arch, options)
    code = sass.assemble(ptx, ptxas)
    if key is not None and ptxas is None:
        meta = dataclasses.asdict(code) | {"loops": list(code.loops)}
        kept.put(key, meta, {"ptx": zlib.compress(ptx.text.encode())})
    return code


def _key(kernel: Any, signature: dict, constants: dict, arch: int, options: dict) -> str | None:
    """What the code of a kernel is known by: all that Triton and `sass.py` make it from."""
    return cache.key(
        kernel=kernel.__name__,
        target=arch,
        signature=signature,
        constants=constants,
        options=options,
        environment=cache.environment(),
        made_of=cache.made_of(),
        reader=hashlib.sha256(Path(__file__).with_name("sass.py").read_bytes()).hexdigest(),
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
