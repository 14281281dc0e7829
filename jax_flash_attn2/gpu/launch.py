"""Launches kernels on a GPU through jax-triton; the only file that imports it."""

import functools
import inspect
from typing import Any

import jax
import jax_triton as jt
from jax import Array
from jax.interpreters import partial_eval
from jax_triton import triton_lib

from ..base.errors import shared_memory_error
from ..base.spec import Spec, Tuned
from .passes import Rows
from .target import Target

# Triton 3.9 warns when this is left unset and 3.10 turns it off, at 13% more instructions in the hot loop.
_OPTIONS = {"enable_fp_fusion": True}


def run(
    target: Target, kernel: Any, programs: int, operands: tuple, outputs: tuple, spec: Spec, config: Tuned
) -> tuple[Array | None, ...]:
    """Binds one custom call. An output of None is not computed; the kernel is passed None in its place."""
    if programs >= 2**31:
        raise ValueError(
            f"the arrays are too large: {kernel.__name__} would need {programs} programs, at most 2**31 - 1"
        )
    options = _OPTIONS | ({} if config.maxnreg is None else {"maxnreg": config.maxnreg})
    absent = {name: None for name, x in zip(_output_names(kernel, outputs), outputs, strict=True) if x is None}
    results = jt.triton_call(
        *(_operand(x, target, config) for x in operands),
        kernel=kernel,
        out_type=tuple(x for x in outputs if x is not None),
        grid=(programs,),
        name=kernel.__name__,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        compute_capability=target.capability or None,
        backend_options=options,
        SPEC=spec,
        CFG=config,
        **absent,
    )
    waiting = iter(results)
    return tuple(None if x is None else next(waiting) for x in outputs)


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


def _check_shared_memory() -> None:
    """Refuses one of our kernels that does not fit its chip when it is compiled, not when it is launched."""
    compile_kernel = triton_lib.TritonFunction._compile_kernel

    @functools.wraps(compile_kernel)
    def checked(self, spec, gpu_target, backend, backend_options):
        compiled = compile_kernel(self, spec, gpu_target, backend, backend_options)
        if self.fn.__module__.startswith(__name__.partition(".")[0]):
            target = Target(gpu_target.arch if gpu_target.backend == "cuda" else 0)
            config, used = spec.constants["CFG"], compiled[-1].shared_mem_bytes
            if used > target.shared_memory:
                raise shared_memory_error(self.name, config, used, target)
        return compiled

    triton_lib.TritonFunction._compile_kernel = checked


_mend_dce()
if hasattr(triton_lib.TritonFunction, "_compile_kernel"):  # else jaxlib still refuses it, at launch
    _check_shared_memory()
