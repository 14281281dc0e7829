"""Runs the kernels on the CPU in Triton's interpreter, for tests and for stepping through them with a debugger.

Set `TRITON_INTERPRET=1` before the kernels are imported. The interpreter is NumPy: correct, and thousands of
times slower than a GPU. Outputs start as NaN, so an element that a kernel fails to write shows.
"""

import functools
import os
import threading
from typing import Any

import jax
import numpy as np

from .passes import Rows
from .spec import Config, Spec


# XLA may run independent callbacks side by side, but the interpreter keeps the program id in a global.
_one_at_a_time = threading.Lock()


def enabled() -> bool:
    """Whether this process interprets kernels; Triton reads the variable when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Storage:
    """As much of a torch tensor as Triton's interpreter asks for, over a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    dtype = property(lambda self: _Dtype(self.array.dtype))
    shape = property(lambda self: self.array.shape)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Storage":
        return self

    def cpu(self) -> "_Storage":
        return self

    def copy_(self, other: "_Storage") -> None:  # host and "device" are the same memory
        assert other.array is self.array

    def new_empty(self, *_: Any, **__: Any) -> "_Storage":
        return _Storage(self.array)

    def set_(self, storage: "_Storage", *_: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        # From the shape: NumPy leaves the strides of axes of length 1 undefined.
        return tuple(int(np.prod(self.array.shape[i + 1 :])) for i in range(self.array.ndim))


class _Dtype:
    """A dtype that prints as Triton expects to read it ("float16")."""

    def __init__(self, dtype: np.dtype):
        self.name, self.itemsize = dtype.name, dtype.itemsize
        self.is_floating_point = True

    def __str__(self) -> str:
        return self.name


@functools.cache
def _mend_bfloat16() -> None:
    """tl.dot in the interpreter multiplies the bit patterns of bf16 operands (triton#11584); widen them first."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot_widened(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    builder.create_dot = create_dot_widened


def run(kernel: Any, programs: int, operands: tuple, outputs: tuple, spec: Spec, config: Config) -> tuple:
    """Interprets `kernel` through a host callback, so that it works inside jit."""
    _mend_bfloat16()
    operands = tuple(operands)
    leaves, tree = jax.tree.flatten([x.array if isinstance(x, Rows) else x for x in operands])
    present = [x for x in outputs if x is not None]

    def callback(*leaves):
        from triton.tools.tensor_descriptor import TensorDescriptor

        results = [_Storage(np.full(x.shape, np.nan, x.dtype)) for x in present]
        waiting = iter(results)
        args: list[Any] = []
        for operand, leaf in zip(operands, jax.tree.unflatten(tree, leaves), strict=True):
            if leaf is None or isinstance(operand, int):
                args.append(operand)
                continue
            array = _Storage(np.ascontiguousarray(leaf))
            if isinstance(operand, Rows) and config.block_ptr and array.array.shape[-1] * array.dtype.itemsize % 16 == 0:
                args.append(TensorDescriptor(array, array.shape, array.stride(), list(operand.block_shape)))
            else:
                args.append(array)
        args += [None if x is None else next(waiting) for x in outputs]
        with _one_at_a_time:
            kernel[(programs,)](*args, SPEC=spec, CFG=config)
        return tuple(x.array for x in results)

    results = iter(jax.pure_callback(callback, tuple(present), *leaves, vmap_method="sequential"))
    return tuple(None if x is None else next(results) for x in outputs)
