"""Runs the kernels on the CPU in Triton's interpreter, for tests and for stepping through them with a debugger.

Set `TRITON_INTERPRET=1` before the kernels are imported. The interpreter is NumPy: correct, and thousands of
times slower than a GPU. Outputs start as NaN, so an element that a kernel fails to write shows.
"""

import contextlib
import functools
import os
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..base.config import Tuned
from ..base.spec import Spec
from .passes import Rows
from .target import Target

# XLA may run independent callbacks side by side, but the interpreter keeps the program id in a global.
_one_at_a_time = threading.Lock()


def enabled() -> bool:
    """Whether this process interprets kernels; Triton reads the variable when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Tensor:
    """As much of a torch tensor as Triton's interpreter asks for, over a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    dtype = property(lambda self: _dtype(self.array.dtype))
    shape = property(lambda self: self.array.shape)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def copy_(self, other: "_Tensor") -> None:  # host and "device" are the same memory
        assert other.array is self.array

    def new_empty(self, *_: Any, **__: Any) -> "_Tensor":
        return _Tensor(self.array)

    def set_(self, storage: "_Tensor", *_: Any) -> None:
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
        self.is_floating_point = jnp.issubdtype(dtype, jnp.floating)

    def __str__(self) -> str:
        return self.name


@functools.cache
def _dtype(dtype: np.dtype) -> _Dtype:
    """One object per dtype, for good: Triton caches what it reads by the object's identity."""
    return _Dtype(dtype)


@functools.cache
def _mend_bfloat16() -> None:
    """Triton's interpreter holds bf16 as bit patterns: tl.dot multiplies these (triton#11584), a cast to them cuts
    off where a GPU rounds, and makes patterns of integers. Widen the ones, round the others."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder = InterpreterBuilder
    cast, create_dot = builder.cast_impl, builder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(handle.data.view(jnp.bfloat16).astype(np.float32), tl.float32)

    def cast_rounded(self, x, dtype):
        numbers = x.dtype.scalar == tl.float32 or x.dtype.scalar.is_int()
        if dtype.scalar != tl.bfloat16 or not numbers:
            return cast(self, x, dtype)
        return TensorHandle(x.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)

    def create_dot_widened(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_dot = cast_rounded, create_dot_widened


@functools.cache
def _mend_booleans() -> None:
    """What Triton's interpreter compares is boolean and says fp32, so that one scalar made a tile becomes numbers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_splat = InterpreterBuilder.create_splat

    def create_splat_of_booleans(self, ret_ty, arg):
        if arg.data.dtype != np.bool_:
            return create_splat(self, ret_ty, arg)
        return TensorHandle(np.full(ret_ty.shape, arg.data.reshape(-1)[0]), tl.int1)

    InterpreterBuilder.create_splat = create_splat_of_booleans


@contextlib.contextmanager
def _patched_once():
    """Triton patches `triton.language` anew with each call of a device function, which takes a third of all its time.
    Once for each module of functions and each launch is enough."""
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, {}

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module in seen:
            return interpreter._LangPatchScope()
        return seen.setdefault(module, patch(function))

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


def _poisoned(shape: Any, dtype: Any) -> np.ndarray:
    """An array whose elements are all NaN, True, or the largest integer."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.full(shape, np.nan, dtype)
    return np.full(shape, True if dtype == np.bool_ else np.iinfo(dtype).max, dtype)


def _guarded(array: np.ndarray) -> np.ndarray:
    """A copy with poison in the memory on either side, so that a read outside the array does not go unseen."""
    guard = 4096  # elements
    memory = _poisoned(array.size + 2 * guard, array.dtype)
    inside = memory[guard : guard + array.size].reshape(array.shape)
    inside[...] = array
    return inside


def run(
    target: Target, kernel: Any, programs: int, operands: tuple, outputs: tuple, spec: Spec, config: Tuned
) -> tuple[Array | None, ...]:
    """Interprets one kernel through a host callback, so that it works inside jit; see `launch.run`."""
    _mend_bfloat16()
    _mend_booleans()
    present = [x for x in outputs if x is not None]

    def callback(*values):
        values = iter(values)
        results = [_Tensor(_poisoned(x.shape, x.dtype)) for x in present]
        waiting = iter(results)

        def argument(x):
            if isinstance(x, tuple):
                return tuple(map(argument, x))
            if x is None or isinstance(x, int):
                return x
            tensor = _Tensor(_guarded(np.asarray(next(values))))
            if not (isinstance(x, Rows) and config.block_ptr and target.has_tma):
                return tensor
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(x.block_shape))

        args = [argument(x) for x in operands] + [None if x is None else next(waiting) for x in outputs]
        with _one_at_a_time, _patched_once(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy about NaN, which a GPU does not mention either
            kernel[(programs,)](*args, SPEC=spec, CFG=config)
        return tuple(x.array for x in results)

    leaves = [y for x in operands for y in (x if isinstance(x, tuple) else (x,))]
    values = [x.array if isinstance(x, Rows) else x for x in leaves if x is not None and not isinstance(x, int)]
    results = iter(jax.pure_callback(callback, tuple(present), *values, vmap_method="sequential"))
    return tuple(None if x is None else next(results) for x in outputs)
