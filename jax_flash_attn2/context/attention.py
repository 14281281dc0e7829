"""Attention over sequences that lie on several devices: the public function, and the way to each method."""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from ..base import arguments, axes, names
from ..base.arguments import AnyArray, describe, is_integer
from ..base.spec import Rules
from ..call import api, inputs
from ..call.options import Options
from ..masks import reading
from ..masks.block import BlockMask
from ..masks.mask import Mask
from ..tiles import block_lists
from . import choosing, gathering, ring, ulysses
from .choosing import Facts, Method
from .orders import Order, check_length, piece_length, to_order
from .spread import Spread, cleared, numbered

_TILE = 128
"""The rows of a tile of the list that a mask function is made into."""


@overload
def context_parallel_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *, axis: str, mesh: Any = None,
    method: Method = "auto", order: Order = "zigzag", head_groups: int | None = None,
    return_lse: Literal[False] = False, return_max_logits: Literal[False] = False, **options: Unpack[Options],
) -> Array: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *, axis: str, mesh: Any = None,
    method: Method = "auto", order: Order = "zigzag", head_groups: int | None = None,
    return_lse: Literal[True], return_max_logits: Literal[False] = False, **options: Unpack[Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *, axis: str, mesh: Any = None,
    method: Method = "auto", order: Order = "zigzag", head_groups: int | None = None,
    return_lse: Literal[False] = False, return_max_logits: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *, axis: str, mesh: Any = None,
    method: Method = "auto", order: Order = "zigzag", head_groups: int | None = None,
    return_lse: Literal[True], return_max_logits: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array, Array]: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, bias: AnyArray | None = None, *, axis: str, mesh: Any = None,
    method: Method = "auto", order: Order = "zigzag", head_groups: int | None = None,
    return_lse: bool = False, return_max_logits: bool = False, **options: Unpack[Options],
) -> Array | tuple[Array, ...]: ...  # fmt: skip
def context_parallel_attention(
    q: AnyArray,
    k: AnyArray,
    v: AnyArray,
    bias: AnyArray | None = None,
    *,
    axis: str,
    mesh: Any = None,
    method: Method = "auto",
    order: Order = "zigzag",
    head_groups: int | None = None,
    **options: Any,
) -> Array | tuple[Array, ...]:
    """`flash_attention` over sequences whose tokens lie on the devices of a mesh axis: the same results and gradients.

    Each device has equal shares of rows and of keys, which lie in `order`: `to_order` has put them so, once, on the
    host. Whatever counts tokens counts them as if they lay in their plain order: causality, windows, ALiBi, dropout
    (which drops the same keys as on one device), lengths, score and mask functions.

    - "ring" (Liu et al., arXiv:2310.01889): keys and values travel from device to device, the next ones while the last
      are computed with; what no bound lets anybody see is not sent. Memory does not grow with the number of devices.
    - "all_gather" (Llama 3, arXiv:2407.21783, section 3.3.2): each device gathers all keys, some heads at a time.
    - "ulysses" (Jacobs et al., arXiv:2309.14509): each device gets all rows and keys of some heads. Key heads that are
      fewer than devices are repeated. Heads that another mesh axis divides are brought together for it.
    - "auto": ulysses where it can and that sends fewest bytes; else a ring where bounds leave out devices, or where
      all_gather would hold gigabytes; else all_gather. `docs/scaling.md` has the reasons, `explain` those of a call.

    Two ways to call it: within `jax.shard_map` over `axis` (mesh=None), where all arrays are this device's; or with a
    mesh, under jit (without it each call is compiled anew), on whole arrays, which may be divided along batches and
    heads too.

    Args:
      q: `[*batch, Sq, H, D]`; within `shard_map` this device's rows.
      k: `[*batch, Sk, Hkv, D]`, likewise.
      v: `[*batch, Sk, Hkv, Dv]`, likewise.
      bias: broadcasts to `[*batch, H, Sq, Sk]`, rows and keys in `order` (`to_order(bias, axis=(-2, -1))`). Within
        `shard_map`: this device's rows, and all keys; one that is the same for all rows may have this device's keys.
      axis: the name of the mesh axis.
      mesh: a `jax.sharding.Mesh`, whose other axes are not explicit; None: within `shard_map`.
      method: see above.
      order: "zigzag" balances what devices do under causality, "contiguous" does not; "striped" nearly. See
        `sequence_order`.
      head_groups: in how many groups all_gather meets the key heads, which it divides; None: by bytes, one where
        functions count heads or other mesh axes may divide them.
      **options: those of `flash_attention`. Arrays along rows or keys are in `order`: segment ids, positions, a mask
        of booleans (see bias). Lengths count tokens in their plain order, and so do a `Mask`, a `BlockMask` and
        functions, which are of all rows and keys. A `BlockMask` whose tiles a device's pieces cut is held dense by
        all_gather; a ring refuses it.

    Returns:
      As `flash_attention`, in `order`, divided as q is.

    Raises:
      TypeError, ValueError: as `flash_attention`; there is no such method or order; shares do not fit; "ulysses" where
        devices do not divide the query heads; a ring with a block mask.

    Examples:
      >>> n = jax.device_count()
      >>> mesh = jax.make_mesh((n,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> x = to_order(np.ones((1, 64, 8, 16), np.float32), n, "zigzag")
      >>> attend = lambda x: context_parallel_attention(x, x, x, axis="sequence", mesh=mesh, causal=True)
      >>> jax.jit(attend)(x).shape
      (1, 64, 8, 16)
    """
    asked = Asked(*checked(axis, method, head_groups), order)
    names.check("context_parallel_attention", options, api.defaults())
    every = {"q": q, "k": k, "v": v, "bias": bias, **api.defaults(), **options}
    arrays = {name: every[name] for name in api.ARRAYS}
    options = {name: x for name, x in every.items() if name not in arrays}
    arguments.booleans(return_lse=options["return_lse"], return_max_logits=options["return_max_logits"])
    results = _on_share(asked, arrays, options) if mesh is None else _on_mesh(mesh, asked, arrays, options)
    return results[0] if len(results) == 1 else results


class Asked(NamedTuple):
    """What was asked for besides the options of `flash_attention`."""

    axis: str
    method: Method
    head_groups: int | None
    order: Order


def checked(axis: Any, method: Any, head_groups: Any) -> tuple[str, Method, int | None]:
    """These arguments, if they are right."""
    if not isinstance(axis, str):
        raise TypeError(f"axis must be the name of a mesh axis, got {axis!r}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if head_groups is not None and not (is_integer(head_groups) and head_groups > 0):
        raise ValueError(f"head_groups must be a positive integer or None, got {describe(head_groups)}")
    if head_groups is not None and method not in ("auto", "all_gather"):
        raise ValueError(f'head_groups speaks to method="all_gather", got method={method!r}; leave one of them out')
    return axis, method, head_groups


def checked_mesh(mesh: Any, axis: str) -> jax.sharding.Mesh:
    """The mesh, if sequences may lie along this axis of it."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, or None within jax.shard_map, got {mesh!r}")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's, {mesh.axis_names}, got {axis!r}")
    others = [name for name in getattr(mesh, "explicit_axes", ()) if name != axis and mesh.shape[name] > 1]
    if others:
        raise ValueError(
            f"mesh must have no explicit axes of several devices but {axis!r}, got {others}; give one with "
            "AxisType.Auto there, or call it within jax.shard_map over all axes"
        )
    return mesh


def _on_mesh(mesh: Any, asked: Asked, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Array, ...]:
    """Whole arrays, divided along the axis; other axes are left to XLA."""
    mesh = checked_mesh(mesh, asked.axis)
    for name in ("q", "k", "v"):
        arrays[name] = arguments.array(name, arrays[name])
    arguments.check_shapes(*(arrays[name] for name in "qkv"))
    for name in ("q", "k"):
        check_length(f"the length of {name}", arrays[name].shape[-3], mesh.shape[asked.axis], asked.order)
    given = {name: x for name, x in arrays.items() if isinstance(x, Array | np.ndarray)}
    lengths = {side: (1, 1, 1, *arrays[name].shape)[-3] for side, name in (("q", "q"), ("kv", "k"))}
    specs = {name: _spec(asked.axis, name, x, lengths) for name, x in given.items()}
    batch = (None,) * (arrays["q"].ndim - 3)
    out = [specs["q"]]
    out += [PartitionSpec(*batch, None, asked.axis)] if options["return_lse"] else []
    out += [PartitionSpec()] if options["return_max_logits"] else []

    def own(given: dict[str, Any]) -> tuple[Array, ...]:
        return _on_share(asked, arrays | given, options)

    f = jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=tuple(out), axis_names={asked.axis})
    return jax.jit(f)(given)


def _spec(axis: str, name: str, x: Any, lengths: Mapping[str, int]) -> PartitionSpec:
    """How a whole array is divided."""
    if name in ("q", "k", "v"):
        return PartitionSpec(*(None,) * (x.ndim - 3), axis)
    if name in api.BY_TOKENS:
        side = name.partition("_")[0]
        if x.shape[-1:] not in ((), (1,), (lengths[side],)):
            raise ValueError(
                f"{name} must broadcast to [*batch, seqlen_{side[0]}], whose last axis is {lengths[side]} (or 1), got "
                f"shape {x.shape}"
            )
        return PartitionSpec(*(None,) * (x.ndim - 1), axis) if x.shape[-1:] == (lengths[side],) else PartitionSpec()
    if name in ("bias", "mask"):
        _check_whole(name, x, lengths)
        before, (rows, keys) = (None,) * max(x.ndim - 2, 0), (1, 1, *x.shape)[-2:]
        if rows == lengths["q"] > 1:
            return PartitionSpec(*before, axis, None)
        if keys == lengths["kv"] > 1 and x.ndim:
            return PartitionSpec(*before, *(None,) * (x.ndim > 1), axis)
    return PartitionSpec()


def _check_whole(name: str, x: Any, lengths: Mapping[str, int]) -> None:
    for axis, length in ((-2, lengths["q"]), (-1, lengths["kv"])):
        if x.ndim >= -axis and x.shape[axis] not in (1, length):
            raise ValueError(
                f"{name} must broadcast to [*batch, heads, seqlen_q, seqlen_k], whose last two axes are "
                f"{lengths['q']} and {lengths['kv']} (each 1 or full), got shape {x.shape}"
            )


def _on_share(asked: Asked, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Array, ...]:
    """One device's part of a call."""
    arrays = arrays | {name: arguments.array(name, arrays[name]) for name in ("q", "k", "v")}
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    arguments.check_shapes(q, k, v)
    spread = _spread(asked, q, k)
    facts = facts_of(spread, arrays, options)
    method, _ = choosing.choose(asked.method, asked.head_groups, facts)
    mask, lists = mask_for(method, spread, arrays["mask"])
    bias = arrays["bias"]
    if isinstance(mask, Mask) and bias is not None and jnp.shape(bias)[-1:] == (spread.keys,):
        whole = spread.gathered(bias, bias.ndim - 1)  # to which weights are added
        bias = to_order(whole, spread.devices, spread.order, -1)
    _check_arrays(spread, bias, mask)
    share = spread.share(spread.here, lists)
    call, operands, batch = inputs.prepare(**arrays | {"mask": mask, "bias": bias}, **options, share=share)
    native = options["higher_order"]
    gather = functools.partial(_all_gather, asked.head_groups)
    run = {"ring": _ring, "all_gather": gather, "ulysses": _ulysses}[method]
    o, lse, largest = inputs.poisoned(run(facts, call, *operands, native), mask)
    results = api.returned((o, lse, largest), batch, options["return_lse"])
    return results if largest is None else (*results[:-1], lax.pmax(results[-1], spread.axis))


def _spread(asked: Asked, q: Array, k: Array) -> Spread:
    try:
        devices = lax.axis_size(asked.axis)
    except NameError as error:
        raise ValueError(
            f"axis={asked.axis!r} is no axis of an enclosing jax.shard_map; call it within one, or give the mesh"
        ) from error
    for name, x in (("q", q), ("k", k)):
        check_length(f"the length of {name}", devices * x.shape[-3], devices, asked.order)
        if devices > 1 and x.shape[-3] == 0:
            raise ValueError(f"{name} must have tokens on each device, got shape {x.shape}")
    return Spread(asked.axis, devices, asked.order, q.shape[-3], k.shape[-3], _alone(asked.axis))


def _alone(axis: str) -> bool:
    """Whether no other axis of more than one device is left to XLA."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(mesh.shape[name] == 1 for name in getattr(mesh, "auto_axes", ()) if name != axis)


def facts_of(spread: Spread, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Facts:
    """What decides how a call is divided, of this device's arrays."""
    q, k, v, mask = (arrays[name] for name in ("q", "k", "v", "mask"))
    left, right = arguments.window(options["window_size"], arguments.boolean("causal", options["causal"]))
    low = options["causal_alignment"] == "bottom_right"
    function = callable(mask) and not isinstance(mask, Mask | BlockMask)
    return Facts(
        spread, math.prod(q.shape[:-3]), q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], q.dtype.itemsize,
        Rules(left, right), ahead=spread.devices * (spread.keys - spread.rows) if low else 0,
        implied=arrays["q_positions"] is None, segments=arrays["q_segment_ids"] is not None,
        lists=isinstance(mask, BlockMask) or (function and inputs.has_known_tiles(mask)),
        functions=function or options["score_mod"] is not None,
    )  # fmt: skip


def mask_for(method: str, spread: Spread, mask: Any) -> tuple[Any, bool]:
    """The mask as a method takes it, and whether the tiles that it leaves are of use."""
    if method == "ulysses":
        return mask, True
    if not isinstance(mask, BlockMask):
        return mask, method == "all_gather" and piece_length(spread.rows, spread.order) % _TILE == 0
    if method == "ring":
        raise ValueError(
            'method="ring" takes no BlockMask, whose lists are of all keys; use "all_gather" or "ulysses", or pass the '
            "function that it was made of"
        )
    fits = piece_length(spread.rows, spread.order) % mask.block_m == 0
    return (mask, True) if fits else (reading.as_mask(mask), False)


def _check_arrays(spread: Spread, bias: Any, mask: Any) -> None:
    """Raises where a share of one token could be taken for what does not vary."""
    for name, x in (("bias", bias), ("mask", mask)):
        if isinstance(x, Array | np.ndarray) and spread.devices > 1 and 1 in (spread.rows, spread.keys):
            raise ValueError(
                f"{name} as an array needs shares of at least 2 tokens, got {spread.rows} rows and {spread.keys} keys "
                "a device; use fewer devices"
            )


def _ring(facts: Facts, call, q, k, v, operands, native: bool):
    spread = facts.spread
    given = "kv_positions" in operands
    here = spread.here
    made, within = numbered(call, operands, spread.row_tokens(here), spread.key_tokens(here), in_order=False)
    implied = tuple(name for name in ("kv_positions", "kv_index") if name in made and not (given and "pos" in name))
    made = {name: x for name, x in made.items() if name not in implied}
    moving = tuple(name for name, x in made.items() if spread.has_own_keys(name, x))
    k, v = (cleared(x, within.get("kv")) for x in (k, v))
    args = axes.vary_alike((cleared(q, within.get("q")), k, v, made, within.get("q")))
    return ring.attention(ring.Ring(call, spread, facts.ways, moving, implied, native), *args)


def _all_gather(head_groups: int | None, facts: Facts, call, q, k, v, operands, native: bool):
    spread, groups = facts.spread, choosing.groups_of(head_groups, facts)
    if call.rules.tiles:
        blocks = spread.row_tokens(spread.here)[:: call.rules.tiles[0]] // call.rules.tiles[0]
        operands = block_lists.of_rows(operands, blocks)
    own = {name: x for name, x in operands.items() if spread.has_own_keys(name, x)}
    all_keys = {name: spread.plain(x, 3) for name, x in operands.items() if spread.has_all_keys(name, x)}
    operands = operands | all_keys | {name: spread.gathered(x, 3) for name, x in own.items()}
    keys = jnp.arange(spread.devices * spread.keys, dtype=jnp.int32)
    made, within = numbered(call, operands, spread.row_tokens(spread.here), keys, in_order=True)
    args = axes.vary_alike((cleared(q, within.get("q")), k, v, made, within.get("q")))
    return gathering.attention(gathering.Gathering(call, spread, groups, native), *args)


def _ulysses(facts: Facts, call, q, k, v, operands, native: bool):
    choosing.check_heads(facts)
    args = axes.vary_alike((q, k, v, operands))
    return ulysses.attention(ulysses.Ulysses(call, facts.spread, native), *args)
