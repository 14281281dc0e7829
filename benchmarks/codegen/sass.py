"""Compiles a kernel for an NVIDIA GPU that need not be there, and reads the machine code that comes out."""

import collections
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend

_BIN = Path(nvidia.__file__).parent / "bin"
_MMA = re.compile(r"HMMA|IMMA|QMMA|HGMMA|QGMMA|UTC[A-Z]*MMA|FFMA")
# Shared memory and warps of one multiprocessor (CUDA C Programming Guide, "Technical Specifications").
_MULTIPROCESSOR = {
    **{80: (167936, 64), 86: (102400, 48), 89: (102400, 48), 90: (233472, 64)},
    **{100: (233472, 64), 120: (102400, 48)},
}
_CLASSES = {
    "mma": r"[HQI]MMA|[HQI]GMMA|UTC[A-Z]*MMA",
    "wgmma": r"[HQI]GMMA",
    "ex2": r"MUFU\.EX2",
    "mufu": r"MUFU",
    "ffma": r"FFMA",
    "cp.async": r"LDGSTS",
    "wide cp.async": r"LDGSTS\.\S*128",
    "half-wide cp.async": r"LDGSTS\.\S*64",
    "tma": r"UTMALDG",
    "ldg": r"LDG(\.|$)",
    "wide ldg": r"LDG\.\S*(64|128)",
    "sts": r"STS(\.|$)|STSM",
    "lds": r"LDS(M|\.|$)",
    "local": r"LDL|STL",
    "bar": r"BAR",
    "depbar": r"WARPGROUP\.DEPBAR",
}


@dataclasses.dataclass(frozen=True)
class Code:
    """What ptxas made of a kernel."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Spill stores anywhere in the kernel."""
    shared: int
    """Bytes of shared memory."""
    warps: int
    serialized: bool
    """ptxas says that it made wgmma synchronous."""
    loops: tuple[dict[str, int], ...]
    """Of each innermost loop that multiplies matrices: instructions by class and in all ("total"), and what a thread
    reads and writes ("global bytes", not through TMA; "shared bytes", not through wgmma). "mufu alone": how many of
    the special-function instructions no wgmma runs beside."""
    tensor_memory: int = 0
    """Columns of 512 (sm_100)."""

    def ctas_per_sm(self, arch: int) -> int:
        """How many blocks run side by side on one multiprocessor."""
        shared_per_sm, warps_per_sm = _MULTIPROCESSOR[arch]
        by_registers = 65536 // (-(-32 * self.registers // 256) * 256 * self.warps)
        return min(by_registers, shared_per_sm // (self.shared + 1024), warps_per_sm // self.warps)


def _leaves(kinds: Iterable, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """The kinds of arguments with their paths; an argument may be a tuple."""
    for i, kind in enumerate(kinds):
        yield from _leaves(kind, (*path, i)) if isinstance(kind, tuple) else [((*path, i), kind)]


@dataclasses.dataclass(frozen=True)
class Ptx:
    """What Triton made of a kernel."""

    text: str
    arch: int
    shared: int
    """Bytes of shared memory."""
    warps: int
    tensor_memory: int = 0
    """Columns of 512 (sm_100)."""


def lower(kernel: Any, signature: dict[str, Any], constants: dict[str, Any], arch: int, options: dict) -> Ptx:
    """Compiles with Triton down to PTX.

    Args:
      kernel: the `triton.jit` function.
      signature: the type of every argument ("*bf16", "i32", "tensordesc<bf16[1,128,1,64]>", "constexpr", or a tuple).
      constants: values of the compile-time arguments.
      arch: 80, 90 ...
      options: num_warps, num_stages, maxnreg ...
    """
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    attributes = {path: [["tt.divisibility", 16]] for path, kind in _leaves(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, attributes)
    parsed = backend.parse_options(dict(options))
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {"target": target, **parsed.__dict__}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[name](module, metadata)
    return Ptx(module, arch, metadata["shared"], options["num_warps"], metadata.get("tmem_size") or 0)


def assemble(ptx: Ptx, ptxas: str | None = None) -> Code:
    """Assembles as JAX does.

    Args:
      ptx: from `lower`.
      ptxas: assembles; the one that Triton carries by default.

    Raises:
      ValueError: ptxas refuses what Triton wrote.
    """
    ptxas = ptxas or nvidia.get_ptxas(ptx.arch).path
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx.text)
        name = re.search(r"^\.target (sm_\w+)", ptx.text, re.M)[1]
        done = subprocess.run([ptxas, "-v", f"--gpu-name={name}", source, "-o", cubin], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{ptxas}: {done.stderr.strip()}")
        log = done.stderr
        disassemble = [_BIN / "nvdisasm", "-c", cubin]
        sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return Code(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spill_bytes=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=ptx.shared,
        warps=ptx.warps,
        serialized="serialized" in log,
        loops=tuple(_loops(sass)),
        tensor_memory=ptx.tensor_memory,
    )


def _bytes(opcodes: list[str]) -> dict[str, int]:
    """What one thread reads and writes by these instructions."""
    found = {"global bytes": 0, "shared bytes": 0}
    for op in opcodes:
        name, *modifiers = op.split(".")
        if name in ("LDSM", "STSM"):
            found["shared bytes"] += 4 * int(modifiers[-1]) if modifiers[-1].isdigit() else 4
        elif name in ("LDG", "LDGSTS", "LDS", "STS"):
            sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
            size = next((sizes[m] for m in modifiers if m in sizes), 4)
            found["global bytes"] += size if name.startswith("LDG") else 0
            found["shared bytes"] += size if name != "LDG" else 0
    return found


def _alone(instructions: list[tuple[str, str]]) -> int:
    """How many special-function instructions of a loop are issued while no wgmma is under way."""
    groups, begun, alone = 0, False, 0
    for turn in range(2):  # what one turn leaves under way, the next one finds
        for op, rest in instructions:
            if "GMMA" in op:
                begun = "gsb0" not in rest  # which the last one of a group has
                groups += not begun
            elif op.startswith("WARPGROUP.DEPBAR") and (left := re.search(r"gsb0, (0x[0-9a-f]+)", rest)):
                groups = min(groups, int(left[1], 16))
            else:
                alone += turn and op.startswith("MUFU") and not (groups or begun)
    return int(alone)


def _loops(sass: str):
    """Instruction counts of the innermost loops that hold matrix products, in program order."""
    opcodes: list[str] = []
    operands: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            if instruction[1].startswith("BRA") and (goal := re.search(r"`\((\.L_\w+)\)", instruction[2])):
                branches.append((len(opcodes), goal[1]))
            opcodes.append(instruction[1])
            operands.append(instruction[2])
    # A branch backwards closes a loop, unless it leads back from an out-of-line wait behind the last EXIT.
    spans = {(labels[goal], at) for at, goal in branches if labels.get(goal, at + 1) <= at}
    spans = {(a, z) for a, z in spans if "EXIT" not in opcodes[a:z] and any(map(_MMA.match, opcodes[a : z + 1]))}
    for a, z in sorted(spans):
        if not any((b, y) != (a, z) and a <= b and y <= z for b, y in spans):
            body = opcodes[a : z + 1]
            counts = collections.Counter(
                {name: sum(bool(re.match(p, op)) for op in body) for name, p in _CLASSES.items()}
            )
            alone = _alone([*zip(body, operands[a : z + 1], strict=True)])
            yield {"total": len(body), **counts, **_bytes(body), "mufu alone": alone}
