"""The score and mask functions of a call as kernels have them: Triton source, and the arrays that they read."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..base.config import Tuned
from ..base.operands import mask_arrays, score_arrays
from ..base.spec import Operand, Spec
from ..functions import mapped
from ..functions.function import Function
from . import translate


@dataclasses.dataclass(frozen=True)
class Source:
    """A function as a part of what a kernel is compiled from."""

    source: str
    slope_source: str | None = None
    """None: its derivative by the score is 1, or of no use."""
    read_source: str | None = None
    at: int = 0
    """Where its arrays are, behind the operands."""

    value = property(lambda self: translate.jitted(self.source))
    """What it makes of a score; of a mask function, whether it shows it."""
    slope = property(lambda self: self.slope_source and translate.jitted(self.slope_source))
    """Its derivative by the score, for the backward pass."""
    read = property(lambda self: self.read_source and translate.jitted(self.read_source))
    """Its derivative by what one read gave, for the kernel that sums this up."""


def arrays_of(spec: Spec, operands: Mapping[str, Array]) -> tuple[Array, ...]:
    """What the functions of the rules read, in the order in which kernels have it."""
    return (*_arrays(spec.rules.score, score_arrays, operands), *_arrays(spec.rules.mask, mask_arrays, operands))


def _arrays(function: Function | None, names: Callable[[int], Any], operands: Mapping[str, Array]) -> tuple[Array, ...]:
    return () if function is None else tuple(operands[name] for name in names(function.arrays))


def for_kernels(
    spec: Spec, operands: Mapping[str, Array], batch: int, *, backward: bool = False, read: int | None = None,
    places: bool = False,
) -> Spec:  # fmt: skip
    """The same spec with the functions of its rules as Triton source.

    Args:
      spec: as the rules say.
      operands: of the call.
      batch: B.
      backward: whether derivatives are wanted.
      read: of which of the score function's reads a derivative is wanted besides; None: of none.
      places: as in `translate`. Not for what is compiled: a line above a function would have it compiled anew.
    """
    score, mask = spec.rules.score, spec.rules.mask
    if score is None and mask is None:
        return spec
    several, at = spec.origin is not None or batch > spec.rules.own_batch, spec.spans_at + spec.looks_up
    of_score = of_mask = None
    if score is not None:
        arrays = _types(_arrays(score, score_arrays, operands))
        source = functools.partial(_source, score, "score_mod", arrays, several, places)
        slope = source("slope") if backward else None
        slope = None if slope is None or translate.is_one(slope) else slope
        of_score = Source(source("value"), slope, None if read is None else source("slopes", read), at)
    if mask is not None:
        arrays = _types(_arrays(mask, mask_arrays, operands))
        of_mask = Source(
            _source(mask, "mask", arrays, several, places, "value"), at=at + (score.arrays if score else 0)
        )
    rules = dataclasses.replace(spec.rules, score=None, mask=None)
    return dataclasses.replace(spec, rules=rules, score=of_score, mask_function=of_mask)


CHEAP = 4
"""About how many instructions an element takes whose bit is read: compare "blocks" with "blocks-documents", which takes
one comparison, in `benchmarks/codegen/baseline.json`."""


def cheaper_than_bits(function: Function, arrays: Sequence[Any]) -> bool:
    """Whether kernels can compute a mask function of arrays `[n, ...]`, and in fewer instructions than it takes to read
    a bit for each element."""
    if function.per_element > CHEAP or any({"i", "j"} <= read.varies for read in function.every_read):
        return False
    try:
        _source(function, "mask", _types(arrays), False, False, "value")
    except TypeError:
        return False
    return True


def _types(arrays: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype.name) for x in arrays)


@functools.lru_cache(maxsize=256)
def _source(
    function: Function, name: str, arrays: tuple[Any, ...], several: bool, places: bool, what: str,
    place: int | None = None,
) -> str:  # fmt: skip
    """The source of one of what a `Function` is `bound` to, or of one result of that. name: of the argument that it
    is."""

    def scalars_and_arrays(score: Any, b: Any, h: Any, i: Any, j: Any, *arrays: Any) -> Any:
        made = getattr(function.bound(arrays, several), what)(score, b, h, i, j)
        return made if place is None else made[place]

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]
    own = {"value": name, "slope": f"slope_of_{name}", "slopes": f"slope_{place}_of_{name}"}[what]
    return translate.translate(scalars_and_arrays, shapes, own, argument=name, places=places)


_AT_ONCE = 2**24
"""Elements of ds that are in memory at a time while an array's gradient is summed."""


def gradients(
    launch: Callable[..., Array], spec: Spec, config: Tuned, operands: Mapping[str, Array], q: Array, k: Array,
    wanted: Mapping[str, int],
) -> dict[str, Array]:  # fmt: skip
    """The gradients of what a score function reads, fp32: of each read by itself, summed by a kernel over the axes
    along which it does not vary, and then put where it read.

    A read that i and j both decide has no such axis but batch and heads: as many rows are done at a time as memory that
    does not grow with the sequences takes.

    Args:
      launch: `launch(axes, shape, first, read)` runs the kernel that makes an array of this shape, with these axes of
        an operand, of rows from `first` on (None: of all).
      spec: with the score function in its rules.
      config: of that kernel.
      operands: of the call.
      q: `[B, Sq, H, D]`.
      k: `[B, Sk, Hkv, D]`.
      wanted: the names of the arrays, and how many parts of the batch have a gradient of their own.
    """
    function = spec.rules.score
    arrays = _arrays(function, score_arrays, operands)
    (batch, rows, heads, _), keys = q.shape, k.shape[1]
    bound = function.bound(arrays, spec.origin is not None or batch > function.batch)
    origin = operands["origin"][0, 0, 0] if "origin" in operands else jnp.zeros(3, jnp.int32)
    names = score_arrays(function.arrays)
    grads = {
        name: jnp.zeros((n * operands[name].shape[0], *operands[name].shape[1:]), jnp.float32)
        for name, n in wanted.items()
    }

    def add(grad: Array, name: str, n: int, part: Array, first: Any) -> Array:
        numbers = (jnp.arange(size, dtype=jnp.int32) for size in (batch, heads, max(part.shape[2], 1), keys))
        b, h, i, j = (x + start for x, start in zip(numbers, (*origin[:2], origin[2] + first, 0), strict=True))
        if spec.q_index is not None:  # part has rows past the end, whose share is 0
            i = operands["q_index"].ravel()[jnp.minimum(i - origin[2], rows - 1)]
        if spec.kv_index is not None:
            j = operands["kv_index"].ravel()
        place = b.reshape(-1, 1, 1, 1), h.reshape(1, -1, 1, 1), i.reshape(1, 1, -1, 1), j.reshape(1, 1, 1, -1)
        in_order = spec.q_index is None and spec.kv_index is None
        return mapped.add_gradient(grad, function, bound, n, part, None, place, wanted[name], in_order)

    for n, read in enumerate(function.reads):
        name = names[read.array]
        if name not in wanted:
            continue
        if "score" in read.varies:
            raise TypeError(
                "score_mod reads an array at an index that the score decides, and the kernels have no gradient of such "
                'an array, which is asked for; pass implementation="xla", or read jax.lax.stop_gradient(array)'
            )
        if not {"i", "j"} <= read.varies:
            own = Operand(0, 0, True, "j" not in read.varies, "j" in read.varies)
            part = launch(own, (batch, heads, rows if own.rows else 1, keys if own.cols else 1), None, n)
            grads[name] = add(grads[name], name, n, part, 0)
            continue
        each = "b" in read.varies or grads[name].shape[0] > 1
        planes = (batch if each else 1, heads if "h" in read.varies else 1)
        own = Operand(0, 0 if each else 1, planes[1] > 1, True, True)
        size = max(_AT_ONCE // (planes[0] * planes[1] * keys) // config.block_m, 1) * config.block_m
        size = min(size, -(-rows // config.block_m) * config.block_m)

        def some_rows(
            grad: Array, first: Array, own=own, shape=(*planes, size, keys), name=name, n=n
        ) -> tuple[Array, None]:
            return add(grad, name, n, launch(own, shape, first, n), first[0]), None

        starts = jnp.arange(0, rows, size, dtype=jnp.int32)[:, None]
        grads[name], _ = lax.scan(some_rows, grads[name], starts)
    return grads
