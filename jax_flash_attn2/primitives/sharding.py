"""Attention on arrays that lie on several devices, under plain `jit`: who computes what, and what is summed.

Batches, heads and query rows are divided as q is; keys and values follow along batches and heads. Along the sequence
they are gathered, or stay where they are and what devices make of them is merged, whichever moves less (`plan`). The
rule tells Shardy so, so that it spreads shardings through the call; a `Plan` then makes each operand fit, and each
device runs the code of a single device on its share (`share`). Axes have the letters of `plan`.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src import dispatch  # the only way to have the devices named when a primitive is lowered
from jax._src.sharding_impls import ShardingContext  # and to say which of them `custom_partitioning` may divide by
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..base import axes
from ..base.arguments import accumulator
from ..base.operands import BLOCK_LISTS, SERVED, for_every_batch, is_read, names_of
from ..base.rounding import loses, lost_dtype
from . import share
from .call import Call
from .naming import named
from .plan import WHOLE, Division, Plan, axes_of, devices

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


def varying_as_operands(shapes: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A rule for the shapes of results, which vary over the manual mesh axes over which the operands do (`vary_alike`
    has seen to it that they do so alike)."""

    def rule(*operands, **params):
        results = shapes(*operands, **params)
        like = next((x for x in operands if axes.varying(x)), None)
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


def typed_as_q(function: Callable, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Array, ...]:
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


def forward(unit: Callable[..., Array], maths: Maths, *args: Array, call: Call, names: tuple[str, ...]) -> list[Array]:
    """The forward pass, divided. unit: `define.unit`."""
    params = {"call": call, "names": names}
    args = (*args[:3], *_whole_batches(names, args[3:], args[0].shape[0]))

    def own_share(plan: Plan, _, q, k, v, *rest):
        operands = share.own_operands(plan, call, dict(zip(names, rest, strict=True)))
        operands = share.own_scales(plan, share.own_sinks(plan, operands))
        k, v, split = share.own_heads(plan, k), share.own_heads(plan, v), bool(plan.axes["j"])
        here = share.wide(call) if split else call
        results = maths(q, k, v, *operands.values(), call=here, names=tuple(operands))
        return share.merge(plan, call, unit, results, q.dtype) if split else results

    return _divided("attention_forward", maths, own_share, args, _forward_pass(call, names, args), params)


def backward(maths: Maths, *args: Array, call: Call, names, wanted, groups, adds) -> list[Array]:
    """The backward pass, divided."""
    first, batch = call.before_operands(names), args[0].shape[0]
    end = first + len(names)
    args = (*args[:first], *_whole_batches(names, args[first:end], batch), *args[end:])
    full = [not is_read(n) and args[first + names.index(n)].shape[0] == batch for n in wanted]
    groups = tuple(1 if each else n for each, n in zip(full, groups, strict=True))
    params = {"call": call, "names": names, "wanted": wanted, "groups": groups, "adds": adds}
    of_pass = _backward_pass(call, names, args, wanted, groups, adds)

    def own_share(plan: Plan, divided, q, k, v, o, do, *rest):
        stats, rest = rest[: first - 5], rest[first - 5 :]
        operands = share.own_operands(plan, call, dict(zip(names, rest, strict=False)))
        summed = any(plan.summed(letters) for letters in of_pass.results[:3])
        here = params | {"names": tuple(operands), "groups": tuple(max(n // plan.parts("b"), 1) for n in groups)}
        here["call"] = share.wide(call) if summed else call
        heads = share.own_heads(plan, k), share.own_heads(plan, v)
        if adds and plan.axes["j"]:  # on one of the devices whose shares are summed
            rest = (*rest[:-1], jnp.where(plan.first("j") == 0, rest[-1], 0))
        dq, dk, dv, *grads = maths(q, *heads, o, do, *stats, *operands.values(), *rest[len(names) :], **here)
        dk, dv = share.put_heads(plan, dk, k), share.put_heads(plan, dv, v)
        of = (rest[-1] if adds else q, k, v, *(operands[name] for name in wanted))
        made = zip((dq, dk, dv, *grads), of_pass.results, divided, of, strict=True)
        return [plan.sum(x, letters, each, call.rules.result(like.dtype)) for x, letters, each, like in made]

    return _divided("attention_backward", maths, own_share, args, of_pass, params)


def said_of_keys(call: Call, q: Array, k: Array, v: Array, operands: Mapping[str, Array]) -> tuple[str, ...]:
    """What becomes of keys that lie divided along the sequence, and why, for each pass; nothing is said of arrays whose
    shardings are not known yet. Results are taken to lie as q does, and gradients as what they are of."""
    operands = {name: operands[name] for name in names_of(operands)}
    args = (q, k, v, *operands.values())
    mesh = next((m for x in (k, v) if (m := _mesh_of(x)) is not None), None)
    if mesh is None or any(isinstance(x, jax.core.Tracer) for x in args):
        return ()
    lying = next((names[1] for names in map(axes_of, (k, v)) if devices(mesh, names[1]) > 1), ())
    if not lying:
        return ()
    batch, rows, heads, _ = axes_of(q)
    o = _struct((*q.shape[:3], v.shape[3]), q.dtype, mesh, batch, rows, heads)
    stats, call = accumulator(q.dtype), call.with_lost(loses(q.dtype))
    row = _struct((q.shape[0], q.shape[2], q.shape[1]), stats, mesh, batch, heads, rows)
    lost = [_struct(o.shape, lost_dtype(q.dtype), mesh, batch, rows, heads)] * call.rules.lost
    names = tuple(operands)
    forward = _forward_pass(call, names, args), args, (o, *[row] * call.row_results(names), *lost)
    args = (q, k, v, o, o, *lost, *[row] * call.row_stats(names), *operands.values())
    backward = _backward_pass(call, names, args, (), (), False), args, (q, k, v)
    return tuple(
        f"{name}: keys are sharded over {_listed(lying)} ({devices(mesh, lying)} devices){_said(mesh, lying, *each)}"
        for name, each in (("forward", forward), ("backward", backward))
    )


def _said(mesh: Mesh, lying: tuple[str, ...], what: Division, operands: Sequence[Any], results: Sequence[Any]) -> str:
    mib = lambda plan: f"{plan.moves(what, operands, results) / 2**20:.3g} MiB"
    chosen, plans = Plan.of(mesh, what, operands, results), Plan.possible(mesh, what, operands, results)
    whole = next(plan for plan in plans if not plan.axes["j"])
    split = [plan for plan in plans if plan.axes["j"]]
    if over := chosen.axes["j"]:
        part = "" if over == lying else f" over {_listed(over)}"
        summed = "merged by lse" if what.merged is not None else "dq summed"
        return f": split{part} and {summed}, {mib(chosen)} a device instead of {mib(whole)} to gather them"
    if split:
        other = min(split, key=lambda plan: plan.moves(what, operands, results))
        return f": gathered, {mib(chosen)} a device, less than {mib(other)} to split and merge them"
    why = "; a block mask counts its tiles from the first key"
    if "j" in what.sizes:
        why = ", which divides rows or batches"
    return f"{why}: gathered, {mib(chosen)} a device"


def _struct(shape: Sequence[int], dtype: Any, mesh: Mesh, *divided: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec(*(names or None for names in divided))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _mesh_of(x: Any) -> Mesh | None:
    mesh = None if isinstance(x, jax.core.Tracer) else getattr(x.sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _forward_pass(call: Call, names: Sequence[str], args: Sequence[Any]) -> Division:
    keys = ["bjxd", "bjxv"]
    if "page_table" in names:  # a page is anybody's
        keys = ["1jxd", "1jxd" if call.rules.latent else "1jxv"]
    letters = ["bihd", *keys, *(_letters(n, x, *args[:2]) for n, x in zip(names, args[3:], strict=True))]
    results = ["bihv", *["bhi"] * call.row_results(names), *["bihv"] * call.rules.gives_lost]
    return Division(_sizes(call, args[0], args[1], names), letters, results, merged=2 + call.rules.max_logits)


def _backward_pass(call: Call, names: Sequence[str], args: Sequence[Any], wanted, groups, adds: bool) -> Division:
    first = call.before_operands(names)
    end = first + len(names)
    letters = ["bihd", "bjxd", "bjxv", "bihv", "bihv", *["bihv"] * call.rules.lost, *["bhi"] * call.row_stats(names)]
    letters += [_letters(n, x, *args[:2]) for n, x in zip(names, args[first:end], strict=True)]
    letters += ["bhi"] * (len(args) - end - adds) + ["bihd"] * adds
    own = {name: letters[first + names.index(name)] for name in wanted}
    if "sinks" in own:  # no key has a part in their gradient
        own["sinks"] = own["sinks"][:3] + WHOLE
    grads = [f"b{own[name][1:]}" if n > 1 else own[name] for name, n in zip(wanted, groups, strict=True)]
    divisor = math.gcd(*(n for n in groups if n > 1))
    return Division(_sizes(call, args[0], args[1], names), letters, ["bihd", "bjxd", "bjxv", *grads], divisor)


def _sizes(call: Call, q: Any, k: Any, names: Sequence[str]) -> dict[str, int]:
    sizes = {"b": q.shape[0], "i": q.shape[1], "h": q.shape[2], "x": k.shape[2], "j": k.shape[1]}
    if call.rules.tiles or "page_table" in names:
        del sizes["i"], sizes["j"]  # whose lists count blocks of rows and keys from the first of all, or pages of keys
    return sizes


def _letters(name: str, x: Array, q: Array, k: Array) -> str:
    """Of an operand `[1|B, 1|H, 1|Sq, 1|Sk]`; the last two axes of a block mask's are no sequences, and each device
    needs all of what a function reads."""
    if is_read(name):
        return "1" * x.ndim
    if name in SERVED:  # of which the table goes by sequences, and scales go by key heads
        b = "b" if name == "page_table" and x.shape[0] == q.shape[0] > 1 else "1"
        return f"{b}{'x' if x.shape[1] > 1 else '1'}11"
    full = (q.shape[0], q.shape[2], *((0, 0) if name in BLOCK_LISTS else (q.shape[1], k.shape[1])))
    return "".join(letter if n == m > 1 else "1" for letter, n, m in zip("bhij", x.shape, full, strict=True))


def _whole_batches(names: Sequence[str], operands: Sequence[Array], batch: int) -> list[Array]:
    """Operands whose batch axis has a period of its own, repeated: their batches must divide as all others do."""
    fixed = lambda name: is_read(name) or name in SERVED
    parts = [not fixed(n) and 1 < x.shape[0] < batch for n, x in zip(names, operands, strict=True)]
    return [for_every_batch(x, batch) if p else x for p, x in zip(parts, operands, strict=True)]


def _divided(name: str, maths, own_share, args, what: Division, params) -> list[Array]:
    whole = _whole_mesh.get()

    def partition(mesh: Mesh, arg_shapes, result_shapes):
        plan = Plan.of(mesh, what, arg_shapes, result_shapes)
        made = plan.made(what, result_shapes)
        results = [NamedSharding(mesh, PartitionSpec(*(names or None for names in each))) for each in made]
        operands = tuple(NamedSharding(mesh, plan.spec(letters)) for letters in what.operands)

        def computed(*own):
            with jax.sharding.use_abstract_mesh(_NO_MESH):  # nothing is divided any further
                return own_share(plan, made, *own)

        return whole or mesh, computed, results, operands

    call = custom_partitioning(lambda *args: maths(*args, **params))
    call.def_partition(partition, decode_shardings=True, sharding_rule=lambda mesh, *_: _rule(what, mesh))
    return named(call, name, params)(*args)


def _rule(what: Division, mesh: Mesh) -> tuple[str, dict[str, Any]]:
    """The call in Shardy's notation, an einsum whose query heads are pairs (key head, head of its group).

    A mesh axis that does not divide the key heads would divide such a pair in two ways at once, which a PartitionSpec
    cannot say. On a mesh with one, query heads and key heads are divided each by themselves.
    """
    sizes = what.sizes
    group = sizes["h"] // sizes["x"]
    pairs = group > 1 and sizes["x"] > 1 and all(sizes["x"] % n == 0 for n in mesh.shape.values())
    query = {True: "(x g)", False: "x" if group == 1 else "h"}[pairs]
    ones = itertools.count()

    def factors(letters: str) -> str:
        return " ".join(query if x == "h" else f"u{next(ones)}" if x in ("1", WHOLE) else x for x in letters)

    sides = [", ".join(map(factors, side)) for side in (what.operands, what.results)]
    factor_sizes = {"g": group} if pairs else {}
    whole = tuple(letter for letter in "idjv" if letter not in sizes)
    return " -> ".join(sides), {"need_replication_factors": whole, **factor_sizes}
