"""Arrays whose types say how they lie on a mesh: divided along explicit axes, or varying over manual ones."""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_callers_mesh: contextvars.ContextVar[Any] = contextvars.ContextVar("callers_mesh", default=None)


def on_auto_axes(function: Callable[[Any], Any], arrays: Any, types: Callable[[Any], Any]) -> Any:
    """`function(arrays)`, on a mesh with explicit axes too: XLA divides what is done, results get the types they are
    told.

    Args:
      function: of a pytree, to a pytree of arrays.
      arrays: a pytree.
      types: the PartitionSpecs of the results, of the results; asked for only where there are explicit axes.
    """
    mesh = next((mesh for x in jax.tree.leaves(arrays) if (mesh := explicit_mesh(x)) is not None), None)
    if mesh is None:
        return function(arrays)
    outside = _callers_mesh.set(mesh)
    try:
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
            results = function(freed(arrays))
    finally:
        _callers_mesh.reset(outside)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.sharding.reshard(
        results, jax.tree.map(lambda spec: NamedSharding(mesh, spec), types(results), is_leaf=is_spec)
    )


def freed(arrays: Any) -> Any:
    """Arrays without the types that say how they are divided."""
    free = lambda x: x if explicit_mesh(x) is None else jax.sharding.reshard(x, PartitionSpec())
    return jax.tree.map(free, arrays)


def as_called(function: Callable[[], Any]) -> Any:
    """function(), which runs code of the caller's among the caller's own arrays: on the mesh outside of `on_auto_axes`.
    What it returns is `freed`."""
    mesh = _callers_mesh.get()
    if mesh is None:
        return function()
    with jax.sharding.use_abstract_mesh(mesh):
        results = function()
    return freed(results)


def explicit_mesh(x: Any) -> Any:
    """The mesh over whose explicit axes x is laid out, by its type; None: there is none."""
    if not isinstance(x, jax.Array):
        return None
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty or not mesh.explicit_axes else mesh


def spec_of(x: Any) -> tuple[Any, ...]:
    """How each axis of x is divided, by its type; None: not at all, or not explicitly."""
    spec = jax.typeof(x).sharding.spec if explicit_mesh(x) is not None else ()
    return (*spec, *(None,) * (len(x.shape) - len(spec)))


def vary_alike(operands: Any) -> Any:
    """Within `shard_map`: operands that are the same on all devices of a mesh axis over which others vary, said to vary
    over it too. That sums their gradients over it, which is what they are owed."""
    leaves, tree = jax.tree.flatten(operands)
    own_axes = [varying(jax.typeof(x)) for x in leaves]
    every = frozenset().union(*own_axes)
    if not every:
        return operands
    leaves = [
        x if own == every else jax.lax.pcast(x, tuple(sorted(every - own)), to="varying")
        for x, own in zip(leaves, own_axes, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def outside_jit_too(attention: Callable[..., Any]) -> Callable[..., Any]:
    """A `jax.custom_vjp` with symbolic zeros, whose first argument is static, within a `shard_map` that is not under
    `jit` too: JAX has no such zeros there, so that it becomes a program."""
    program = jax.jit(attention, static_argnums=0)

    @functools.wraps(attention)
    def called(static: Any, *args: Any) -> Any:
        try:
            return attention(static, *args)
        except NotImplementedError as error:
            if "symbolic_zeros" not in str(error):
                raise
        return program(static, *args)

    return called


def varying(aval: Any) -> frozenset[str]:
    """The manual mesh axes over which an array varies."""
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()))
