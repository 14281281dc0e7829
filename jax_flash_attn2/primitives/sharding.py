"""Attention on arrays that lie on several devices, under plain `jit`: who computes what, and what is summed.

Batches, heads and query rows are divided as q is; keys and values follow along batches and heads and are gathered
along the sequence. The rule tells Shardy so, so that it spreads shardings through the call; `_Plan` then makes each
operand fit, and each device runs the code of a single device on its share.

The axes of every array have a letter: b batch, h query heads, x key/value heads, i query rows, j keys, d and v the
widths of a row, 1 an axis along which an operand does not vary.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src import dispatch  # the only way to have the devices named when a primitive is lowered
from jax._src.sharding_impls import ShardingContext  # and to say which of them `custom_partitioning` may divide by
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..base import axes
from ..base.operands import BLOCK_LISTS, is_read
from .call import Call

_NO_MESH = jax.sharding.AbstractMesh((), ())
_whole_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("whole_mesh", default=None)
"""Of a `shard_map` that leaves some axes to XLA, while a pass within it is lowered."""

Maths = Callable[..., list[Array]]
"""A pass as its primitive takes it: (*arrays, **params) -> results."""


def name_devices(primitive: Any) -> None:
    """Has JAX say which devices there are when it lowers `primitive`."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def is_divided(ctx: Any) -> bool:
    """Whether what is lowered here will be divided among devices by XLA (and not by `shard_map`)."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        return mesh.size > 1 and frozenset(context.manual_axes) != frozenset(mesh.axis_names)
    return getattr(context, "num_devices", 1) > 1


def vary_alike(operands: Any) -> Any:
    """Within `shard_map`: operands that are the same on all devices of a mesh axis over which others vary, said to vary
    over it too. That sums their gradients over it, which is what they are owed."""
    leaves, tree = jax.tree.flatten(operands)
    axes = [_varying(jax.typeof(x)) for x in leaves]
    every = frozenset().union(*axes)
    if not every:
        return operands
    leaves = [
        x if own == every else lax.pcast(x, tuple(sorted(every - own)), to="varying")
        for x, own in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def _varying(aval: Any) -> frozenset[str]:
    """The manual mesh axes over which an array varies."""
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))


def varying_as_operands(shapes: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A rule for the shapes of results, which vary over the manual mesh axes over which the operands do (`vary_alike`
    has seen to it that they do so alike)."""

    def rule(*operands, **params):
        results = shapes(*operands, **params)
        like = next((x for x in operands if _varying(x)), None)
        if like is None:
            return results
        mesh = NamedSharding(like.sharding.mesh, PartitionSpec())
        typed = {"sharding": mesh, "manual_axis_type": like.manual_axis_type}
        return [jax.core.ShapedArray(x.shape, x.dtype, **typed) for x in results]

    return rule


@contextlib.contextmanager
def on_own_share(ctx: Any) -> Iterator[Any]:
    """Where a pass is lowered within `shard_map`: a context in which its maths is that of a single device.

    Which axes an array varies over is no matter there. Where `shard_map` leaves some mesh axes to XLA, these are what
    `custom_partitioning` finds as the mesh; its collectives name devices of all axes.
    """
    context = ctx.module_context.axis_context
    mesh, manual = getattr(context, "mesh", None), frozenset(getattr(context, "manual_axes", ()))
    if mesh is None or not manual:
        yield ctx
        return
    own = {side: [_plain(x) for x in getattr(ctx, side)] for side in ("avals_in", "avals_out")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(_NO_MESH))
        if manual != frozenset(mesh.axis_names):
            at = tuple(0 if name in manual else slice(None) for name in mesh.axis_names)
            auto = Mesh(mesh.devices[at], tuple(n for n in mesh.axis_names if n not in manual))
            among = ShardingContext(auto.size, tuple(auto.devices.flat), auto.abstract_mesh)
            own["module_context"] = ctx.module_context.replace(axis_context=among)
            stack.callback(_whole_mesh.reset, _whole_mesh.set(mesh))
        yield ctx.replace(**own)


def _plain(aval: Any) -> Any:
    return jax.core.ShapedArray(aval.shape, aval.dtype) if isinstance(aval, jax.core.ShapedArray) else aval


def on_auto_axes(function: Callable, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Array, ...]:
    """function(arrays, options), on a mesh with explicit axes too: results are typed as q is, XLA does the rest."""
    moving = {name: x for name, x in arrays.items() if _is_arrays(x)}
    q = arrays["q"]
    if not isinstance(q, Array) or q.ndim < 3:
        return function(arrays, options)
    fixed = {name: x for name, x in arrays.items() if name not in moving}
    *batch, rows, heads, _ = axes.spec_of(q)
    out = [PartitionSpec(*batch, rows, heads, None)]
    out += [PartitionSpec(*batch, heads, rows)] if options["return_lse"] else []
    out += [PartitionSpec(*batch, heads)] if options["return_max_logits"] else []
    return axes.on_auto_axes(lambda moving: function(fixed | moving, options), moving, lambda results: tuple(out))


def _is_arrays(x: Any) -> bool:
    leaves = jax.tree.leaves(x)
    return bool(leaves) and all(isinstance(leaf, Array) for leaf in leaves)


def forward(maths: Maths, *args: Array, call: Call, names: tuple[str, ...]) -> list[Array]:
    """The forward pass, divided."""
    params = {"call": call, "names": names}
    args = (*args[:3], *_whole_batches(names, args[3:], args[0].shape[0]))
    letters = ["bihd", "bjxd", "bjxv", *(_letters(n, x, *args[:2]) for n, x in zip(names, args[3:], strict=True))]

    def share(plan: "_Plan", q, k, v, *rest):
        operands = plan.own_operands(call, dict(zip(names, rest, strict=True)))
        return maths(q, plan.own_heads(k), plan.own_heads(v), *operands.values(), call=call, names=tuple(operands))

    results = ["bihv", *["bhi"] * call.row_results(names)]
    return _divided(maths, share, args, letters, results, params)


def backward(maths: Maths, *args: Array, call: Call, names, wanted, apart) -> list[Array]:
    """The backward pass, divided."""
    first, batch = 5 + call.row_stats(names), args[0].shape[0]
    end = first + len(names)
    args = (*args[:first], *_whole_batches(names, args[first:end], batch), *args[end:])
    full = [not is_read(n) and args[first + names.index(n)].shape[0] == batch for n in wanted]
    apart = tuple(1 if each else n for each, n in zip(full, apart, strict=True))
    params = {"call": call, "names": names, "wanted": wanted, "apart": apart}
    letters = ["bihd", "bjxd", "bjxv", "bihv", "bihv", *["bhi"] * (first - 5)]
    letters += [_letters(n, x, *args[:2]) for n, x in zip(names, args[first:end], strict=True)]
    letters += ["bhi"] * (len(args) - end)
    own = [letters[first + names.index(name)] for name in wanted]
    own = [f"b{x[1:]}" if n > 1 else x for x, n in zip(own, apart, strict=True)]

    def share(plan: "_Plan", q, k, v, o, do, *rest):
        stats, rest = rest[: first - 5], rest[first - 5 :]
        operands = plan.own_operands(call, dict(zip(names, rest, strict=False)))
        here = params | {"names": tuple(operands), "apart": tuple(max(n // plan.parts("b"), 1) for n in apart)}
        heads = plan.own_heads(k), plan.own_heads(v)
        dq, dk, dv, *grads = maths(q, *heads, o, do, *stats, *operands.values(), *rest[len(names) :], **here)
        dk, dv = (plan.sum(plan.put_heads(x, like), "bjx") for x, like in ((dk, k), (dv, v)))
        return [dq, dk, dv, *(plan.sum(x, mine) for x, mine in zip(grads, own, strict=True))]

    return _divided(
        maths, share, args, letters, ["bihd", "bjxd", "bjxv", *own], params, math.gcd(*(n for n in apart if n > 1))
    )


def _letters(name: str, x: Array, q: Array, k: Array) -> str:
    """Of an operand `[1|B, 1|H, 1|Sq, 1|Sk]`; the last two axes of a block mask's are no sequences, and each device
    needs all of what a function reads."""
    if is_read(name):
        return "1" * x.ndim
    full = (q.shape[0], q.shape[2], *((0, 0) if name in BLOCK_LISTS else (q.shape[1], k.shape[1])))
    return "".join(letter if n == m > 1 else "1" for letter, n, m in zip("bhij", x.shape, full, strict=True))


def _whole_batches(names: Sequence[str], operands: Sequence[Array], batch: int) -> list[Array]:
    """Operands whose batch axis has a period of its own, repeated: their batches must divide as all others do."""
    parts = [not is_read(n) and 1 < x.shape[0] < batch for n, x in zip(names, operands, strict=True)]
    return [jnp.tile(x, (batch // x.shape[0], 1, 1, 1)) if p else x for p, x in zip(parts, operands, strict=True)]


def _divided(maths, share, args, letters, results, params, groups: int = 0) -> list[Array]:
    heads, kv_heads = args[0].shape[2], args[1].shape[2]
    sizes = {"b": args[0].shape[0], "i": args[0].shape[1], "h": heads, "x": kv_heads}
    if params["call"].rules.tiles:
        del sizes["i"]  # whose lists count blocks of rows from the first of all

    whole = _whole_mesh.get()

    def partition(mesh: Mesh, arg_shapes, result_shapes):
        arrays = [*zip(letters, arg_shapes, strict=True), *zip(results, result_shapes, strict=True)]
        plan = _Plan.of(mesh, sizes, arrays, groups)
        shardings = [[NamedSharding(mesh, plan.spec(x)) for x in group] for group in (results, letters)]

        def own_share(*own):
            with jax.sharding.use_abstract_mesh(_NO_MESH):  # nothing is divided any further
                return share(plan, *own)

        return whole or mesh, own_share, shardings[0], tuple(shardings[1])

    call = custom_partitioning(lambda *args: maths(*args, **params))
    rule = lambda mesh, *_: _rule(letters, results, sizes, mesh)
    call.def_partition(partition, decode_shardings=True, sharding_rule=rule)
    return call(*args)


def _rule(letters: list[str], results: list[str], sizes: Mapping[str, int], mesh: Mesh) -> tuple[str, dict[str, Any]]:
    """The call in Shardy's notation, an einsum whose query heads are pairs (key head, head of its group).

    A mesh axis that does not divide the key heads would divide such a pair in two ways at once, which a PartitionSpec
    cannot say. On a mesh with one, query heads and key heads are divided each by themselves.
    """
    group = sizes["h"] // sizes["x"]
    pairs = group > 1 and sizes["x"] > 1 and all(sizes["x"] % n == 0 for n in mesh.shape.values())
    query = {True: "(x g)", False: "x" if group == 1 else "h"}[pairs]
    ones = itertools.count()

    def factors(letters: str) -> str:
        return " ".join(query if x == "h" else f"u{next(ones)}" if x == "1" else x for x in letters)

    sides = [", ".join(map(factors, group)) for group in (letters, results)]
    factor_sizes = {"g": group} if pairs else {}
    whole = ("d", "j", "v") if "i" in sizes else ("i", "d", "j", "v")
    return " -> ".join(sides), {"need_replication_factors": whole, **factor_sizes}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which mesh axes divide b, i and h, and x if key heads are divided too."""

    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, mesh: Mesh, sizes: Mapping[str, int], arrays: list[tuple[str, Any]], groups: int) -> "_Plan":
        """What the arrays' shardings ask for, as far as it goes together; q, which comes first, has the first word.

        groups: what a batch may be divided by where gradients are summed in groups of batches; 0: by anything.
        """
        axes: dict[str, tuple[str, ...]] = {}
        for letters, x in arrays:
            for letter, names in zip(letters, getattr(x.sharding, "spec", ()), strict=False):
                letter = "h" if letter == "x" else letter
                names = names if isinstance(names, tuple) else () if names is None else (names,)
                taken = {name for other in axes.values() for name in other}
                parts = math.prod(mesh.shape[name] for name in names)
                fits = letter in sizes and sizes[letter] % parts == 0 and not (letter == "b" and groups % parts)
                if names and fits and not axes.get(letter) and not taken & set(names):
                    axes[letter] = names
        axes = {letter: axes.get(letter, ()) for letter in "bih"}
        axes["x"] = axes["h"] if sizes["x"] % math.prod(mesh.shape[a] for a in axes["h"]) == 0 else ()
        return cls(mesh, axes, sizes)

    def spec(self, letters: str) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(letter) or None for letter in letters))

    def parts(self, letter: str) -> int:
        """How many shares an axis is divided into."""
        return math.prod(self.mesh.shape[a] for a in self.axes[letter])

    def own_operands(self, call: Call, operands: Mapping[str, Array]) -> dict[str, Array]:
        """Operands as the rows of this device count: its first row is not the first."""
        own = dict(operands)
        if call.rules.score is not None or call.rules.mask is not None:
            origin = jnp.stack([self._first(letter) for letter in "bhi"]).reshape(1, 1, 1, 3)
            own["origin"] = own.get("origin", 0) + origin
        if not self.axes["i"]:
            return own
        start = self._first("i")
        rules = call.rules
        by_place = rules.left is not None or rules.right is not None or rules.dropout_rate or "slopes" in own
        if by_place and "q_index" not in own:
            own["offset"] = own.get("offset", jnp.zeros((1, 1, 1, 1), jnp.int32)) + start
        if "q_lengths" in own:
            own["q_lengths"] = jnp.maximum(own["q_lengths"] - start, 0).astype(jnp.int32)
        return own

    def _first(self, letter: str) -> Array:
        """The first batch, head or row of this device."""
        if not self.axes[letter]:
            return jnp.zeros((), jnp.int32)
        return (lax.axis_index(self.axes[letter]) * (self.sizes[letter] // self.parts(letter))).astype(jnp.int32)

    def _head_numbers(self) -> Array:
        """The key head of each of this device's query heads."""
        heads = self.sizes["h"] // self.parts("h")
        return (lax.axis_index(self.axes["h"]) * heads + jnp.arange(heads)) // (self.sizes["h"] // self.sizes["x"])

    def _slices(self) -> tuple[bool, bool]:
        """Whether a device has more key heads than it needs, and whether one of them serves all its query heads."""
        group, heads = self.sizes["h"] // self.sizes["x"], self.sizes["h"] // self.parts("h")
        return self.axes["x"] != self.axes["h"] and self.sizes["x"] > 1, group % heads == 0

    def own_heads(self, k: Array) -> Array:
        """The key heads that this device's query heads read, of `[B, Sk, Hkv, D]`."""
        slices, one = self._slices()
        if not slices:
            return k
        numbers = self._head_numbers()
        return jnp.take(k, numbers[:1] if one else numbers, axis=2)

    def put_heads(self, dk: Array, k: Array) -> Array:
        """`own_heads` undone, for what is to be summed over devices."""
        slices, one = self._slices()
        if not slices:
            return dk
        numbers = self._head_numbers()
        return jnp.zeros(k.shape, dk.dtype).at[:, :, numbers[:1] if one else numbers].add(dk)

    def sum(self, x: Array, letters: str) -> Array:
        """Over the devices between which an array of these letters is not divided, though the logits are."""
        if "x" in letters:
            missing = self.axes["i"] + (self.axes["h"] if self.axes["x"] != self.axes["h"] else ())
        else:
            missing = tuple(a for letter in "bih" if letter not in letters for a in self.axes[letter])
        if not missing:
            return x
        wide = x.dtype if x.dtype == jnp.float64 else jnp.float32
        return lax.psum(x.astype(wide), missing).astype(x.dtype)
