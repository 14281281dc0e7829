"""Launches kernels on a GPU through jax-triton; the only file that imports it."""

import contextlib
import functools
import hashlib
import inspect
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax_triton as jt
import triton
from jax import Array
from jax.interpreters import partial_eval
from jax_triton import triton_lib
from triton._C import libtriton

from ..base import versions
from ..base.config import Tuned
from ..base.errors import shared_memory_error
from ..base.spec import Spec
from ..kernels import bwd, combine, fwd, scalar  # noqa: F401  all of them now: what is hashed is what is compiled
from . import cache, tuning
from .passes import Rows
from .target import Target

# Which line of the source each instruction is from makes PTX longer by half, and jaxlib copies and hashes all of it at
# each launch (jaxlib/gpu/triton_kernels.cc). For a profiler that shows sources, TRITON_DISABLE_LINE_INFO=0 keeps it.
_LINES = os.environ.get("TRITON_DISABLE_LINE_INFO") == "0"
# The SHA-256 of jax-triton's `_compile_kernel` (0.4.1). `_rebuilt` does what the end of that function does; where it
# is another, nothing is kept.
_KNOWN = ("e19dbe877090a5c0c16b1c6620be5aaf799316f1f021e832dbbcf89c379440c5",)
_NEWER = tuple(versions.untested(*versions.KERNELS))


def run(
    target: Target, kernel: Any, programs: int, operands: tuple, outputs: tuple, spec: Spec, config: Tuned
) -> tuple[Array | None, ...]:
    """Binds one custom call. An output of None is not computed; the kernel is passed None in its place."""
    if programs >= 2**31:
        raise ValueError(
            f"the arrays are too large: {kernel.__name__} would need {programs} programs, at most 2**31 - 1; split the "
            "batch over several calls"
        )
    if config.warp_specialize and _COMPILER is None:  # it would be started with too few threads
        raise ValueError(
            "config.warp_specialize=True needs a jax-triton that is known here (0.4.1), and whose source can be read, "
            f"got {jt.__version__}; leave it None"
        )
    absent = {name: None for name, x in zip(_output_names(kernel, outputs), outputs, strict=True) if x is None}
    with _noted():
        results = jt.triton_call(
            *(_operand(x, target, config) for x in operands),
            kernel=kernel,
            out_type=tuple(x for x in outputs if x is not None),
            grid=(programs,),
            name=kernel.__name__,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            compute_capability=target.capability or None,
            backend_options=tuning.compiler_options(config, target, spec),
            SPEC=spec,
            CFG=config,
            **absent,
        )
    waiting = iter(results)
    return tuple(None if x is None else next(waiting) for x in outputs)


_lock = threading.Lock()


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """What fails with versions that nobody has tried says so; what works with them says nothing."""
    try:
        yield
    except Exception as error:
        for newer in _NEWER:
            error.add_note(newer)
        raise


@contextlib.contextmanager
def _lines(wanted: bool) -> Iterator[None]:
    """Compiles with or without the lines of the source in the code: one thread at a time, as Triton's knob is a
    variable of the environment too."""
    with _lock, triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = not wanted
        yield


def _output_names(kernel: Any, outputs: tuple) -> list[str]:
    names = [p for p in inspect.signature(kernel.fn).parameters if p not in ("SPEC", "CFG")]
    return names[len(names) - len(outputs) :]


def _operand(x: Any, target: Target, config: Tuned) -> Any:
    if not isinstance(x, Rows):  # an array, a tuple of arrays, a number, or nothing
        return x
    if config.block_ptr and target.has_tma:
        return jt.TensorDescriptor.from_array(x.array, x.block_shape)
    return x.array


def _mend_dce() -> None:
    """jax 0.12 passes DCE rules a third argument, which jax-triton 0.4.1's rule does not take."""
    rule = partial_eval.dce_rules.get(triton_lib.triton_kernel_call_p)
    if rule is None or len(inspect.signature(rule).parameters) != 2 or jax.__version_info__ < (0, 12):
        return

    def mended(used_outs: list[bool], live_ins: Any, eqn: Any) -> Any:
        return rule(used_outs, eqn)

    rules: dict[Any, Any] = partial_eval.dce_rules
    rules[triton_lib.triton_kernel_call_p] = mended


def _compiler() -> dict[str, Any] | None:
    """What compiles kernels, beside its arguments; None if that is not known well enough to keep what it makes."""
    try:
        known = inspect.getsource(triton_lib.TritonFunction._compile_kernel).encode()
    except (AttributeError, OSError):
        return None
    made_of = cache.made_of()
    if made_of is None or hashlib.sha256(known).hexdigest() not in _KNOWN:
        return None
    return {"made_of": made_of, "jax_triton": jt.__version__, "lines": _LINES}


def _key(fn: Any, spec: Any, gpu_target: Any, backend_options: Any) -> str | None:
    if _COMPILER is None or triton_lib._JAX_TRITON_DUMP_DIR:  # a dump needs what is not kept
        return None
    return cache.key(
        kernel=f"{fn.__module__}.{fn.__name__}",
        target=gpu_target,
        signature=spec.signature,
        specialization=spec.specialization,
        attrs=spec.attrs,
        constants=spec.constants,
        options=dict(sorted(backend_options.items())),
        environment=cache.environment(getattr(libtriton, "get_cache_invalidating_env_vars", dict)()),
        **_COMPILER,
    )


def _warps(ptx: str) -> int:
    """Of one block: a kernel with specialised warps has more than it was asked for.

    Raises:
      ValueError: the code does not say.
    """
    found = re.search(r"^\.reqntid (\d+)", ptx, re.MULTILINE)
    if found is None:
        raise ValueError(f"PTX of Triton {triton.__version__} does not say how many threads it needs (.reqntid)")
    return int(found[1]) // 32


def _compiled(result: tuple, gpu_target: Any) -> cache.Compiled:
    """Of what `_compile_kernel` returned, all that a launch needs."""
    _, ttir, _, made = result
    scratch = None if made.global_scratch_size is None else (made.global_scratch_size, made.global_scratch_align)
    binary = made.binary.encode() if gpu_target.backend == "cuda" else Path(made.binary).read_bytes()
    descriptors = None if made.tensordesc_meta is None else [dict(meta) for meta in made.tensordesc_meta]
    return cache.Compiled(made.name, made.shared_mem_bytes, scratch, descriptors, ttir, binary)


def _rebuilt(kernel: cache.Compiled, gpu_target: Any, backend_options: Any) -> tuple:
    """What `_compile_kernel` returns, less the options, which only a dump wants."""
    warps, ctas = backend_options["num_warps"], backend_options["num_ctas"]
    if gpu_target.backend == "cuda":
        binary = kernel.binary.decode()
        warps = _warps(binary)
    else:  # jaxlib takes a code object by the name of a file
        file, binary = tempfile.mkstemp(dir=triton_lib._HSACO_TMPDIR.name)
        with os.fdopen(file, "wb") as out:
            out.write(kernel.binary)
    arch = gpu_target.arch if isinstance(gpu_target.arch, int) else 0
    scratch = kernel.scratch or ()
    build = triton_lib.triton_kernel_call_lib.TritonKernel
    built = build(kernel.name, warps, ctas, kernel.shared, binary, kernel.ttir, arch, *scratch)
    made = triton_lib.CompilationResult(
        binary, kernel.name, kernel.shared, "", "", *(kernel.scratch or (None, None)), kernel.descriptors
    )
    return built, kernel.ttir, None, made


def _wrap_compiler() -> None:
    """Has our kernels looked up on disk before they are compiled, and refused if they do not fit their chip: now, and
    not when they are launched."""
    compile_kernel = triton_lib.TritonFunction._compile_kernel
    package = __name__.partition(".")[0]

    @functools.wraps(compile_kernel)
    def wrapped(self, spec, gpu_target, backend, backend_options):
        if self.fn.__module__.partition(".")[0] != package:
            return compile_kernel(self, spec, gpu_target, backend, backend_options)
        key = _key(self.fn, spec, gpu_target, backend_options)
        kept = None if key is None else cache.load(key)
        if kept is not None:
            result = _rebuilt(kept, gpu_target, backend_options)
        else:
            with _lines(_LINES), _noted():
                result = compile_kernel(self, spec, gpu_target, backend, backend_options)
            if key is not None:
                kernel = _compiled(result, gpu_target)
                cache.save(key, kernel, target=f"{gpu_target.backend} {gpu_target.arch}", triton=triton.__version__)
            if spec.constants["CFG"].warp_specialize:  # which jax-triton would start with too few threads
                result = _rebuilt(_compiled(result, gpu_target), gpu_target, backend_options)
        target = Target(gpu_target.arch if gpu_target.backend == "cuda" else 0)
        used = result[-1].shared_mem_bytes
        if used > target.shared_memory:
            raise shared_memory_error(self.name, spec.constants["CFG"], used, target)
        return result

    triton_lib.TritonFunction._compile_kernel = wrapped


_mend_dce()
_COMPILER = _compiler()
if _COMPILER is not None:  # else jaxlib still refuses what does not fit, at launch
    _wrap_compiler()
