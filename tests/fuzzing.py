"""What `fuzz.py` draws, and what must hold of it: values that hurt, and ways to call, on top of `cases.drawn`.

A draw is a `Draw`: a case, what its arrays hold, and how the call is made. `check` raises where the result is not the
definition's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FACTORS, Case, possible
from checks import assert_near, assert_same_bits, flash, flash_function, operands, results, run
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

Inputs = dict[str, Any]


# What arrays hold. Each takes the case and its inputs, as drawn from the normal distribution, and returns others.


def _times(*names: str, factor: Callable[[Any], float]) -> Callable[[Case, Inputs], Inputs]:
    def values(case: Case, x: Inputs) -> Inputs:
        scaled = lambda a: (a.astype(np.float32) * factor(case)).astype(a.dtype)
        return x | {name: scaled(x[name]) for name in names}

    return values


def _largest(case: Case, x: Inputs) -> Inputs:
    """The largest numbers that half precision has, in both signs; what is summed for a gradient stays within it."""
    end = lambda a: (np.sign(a.astype(np.float32)) * 65504).astype(a.dtype)
    return x | {"k": end(x["k"]), "q": x["q"] * np.asarray(1e-3, x["q"].dtype)}


def _equal(case: Case, x: Inputs) -> Inputs:
    """Rows are each other's equal, and keys."""
    same = lambda a: np.broadcast_to(a[..., :1, :, :], a.shape).copy()
    return x | {name: same(x[name]) for name in "qk" if x[name].shape[-3]}


def _spikes(case: Case, x: Inputs) -> Inputs:
    """One key that outshines all others, and one that none sees beside them."""
    if not x["k"].shape[-3]:
        return x
    k = x["k"].copy()
    k[..., 0, :, :] *= np.asarray(40, k.dtype)
    k[..., -1, :, :] *= np.asarray(-40, k.dtype)
    return x | {"k": k}


def _empty(case: Case, x: Inputs) -> Inputs:
    """Lengths of 0, where there are lengths."""
    none = {name: np.zeros_like(x[name]) for name in ("q_lengths", "kv_lengths") if x[name] is not None}
    return x | {name: np.where(np.arange(a.size).reshape(a.shape) % 2, x[name], a) for name, a in none.items()}


def _hiding(case: Case, x: Inputs) -> Inputs:
    """A bias of -inf in every third place, and of what is next to it in others."""
    if x["bias"] is None:
        return x
    place = np.arange(x["bias"].size).reshape(x["bias"].shape)
    lowest = -1e38 if x["bias"].dtype != np.float16 else -np.inf
    return x | {
        "bias": np.where(place % 3 == 1, -np.inf, np.where(place % 7 == 2, lowest, x["bias"])).astype(x["bias"].dtype)
    }


VALUES: dict[str, Callable[[Case, Inputs], Inputs]] = {
    "normal": lambda case, x: x,
    "small": _times("q", "k", "v", "do", "dlse", factor=lambda case: 1e-3 if case.dtype == "float16" else 1e-12),
    "large logits": _times("q", factor=lambda case: 100),
    "largest": _largest,
    "equal": _equal,
    "spikes": _spikes,
    "empty": _empty,
    "hiding": _hiding,
}


# How the call is made: functions of a draw that return pairs of a case's inputs and what came of them.


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call."""

    case: Case
    values: str
    way: str

    def inputs(self, copy: int = 0) -> Inputs:
        """The arrays; of several copies of the call each has its own."""
        case = dataclasses.replace(self.case, name=f"{self.case.name} {copy}") if copy else self.case
        return VALUES[self.values](self.case, case.inputs())


def _plain(draw: Draw):
    x = draw.inputs()
    yield x, flash(draw.case, x)


def _eager(draw: Draw):
    x = draw.inputs()
    function = functools.partial(results, flash_function(draw.case))
    yield x, jax.tree.map(np.asarray, function(*jax.tree.map(jnp.asarray, operands(draw.case, x))))


def _higher(draw: Draw):
    x = draw.inputs()
    yield x, flash(draw.case, x, higher_order=True)


def _remat(draw: Draw):
    x = draw.inputs()
    function = jax.checkpoint(flash_function(draw.case))
    yield x, run(functools.partial(results, function), *operands(draw.case, x))


def _copies(draw: Draw, mapped: Callable[[Callable], Callable], shape: tuple[int, ...]):
    """The call of stacked copies of the arrays, each a draw of its own."""
    count = int(np.prod(shape))
    inputs = [draw.inputs(copy) for copy in range(count)]
    given = [operands(draw.case, x) for x in inputs]
    stacked = jax.tree.map(lambda *x: np.stack(x).reshape(*shape, *np.shape(x[0])), *given)
    made = run(mapped(functools.partial(results, flash_function(draw.case))), *stacked)
    for copy, x in enumerate(inputs):
        yield x, {name: y.reshape(count, *y.shape[len(shape) :])[copy] for name, y in made.items()}


def _vmap(draw: Draw):
    return _copies(draw, jax.vmap, (2,))


def _vmaps(draw: Draw):
    return _copies(draw, lambda f: jax.vmap(jax.vmap(f)), (2, 2))


def _scan(draw: Draw):
    return _copies(draw, lambda f: lambda *x: jax.lax.map(lambda own: f(*own), x), (2,))


def _sharded(draw: Draw):
    """Batch, heads, rows or keys of whatever they divide, over four devices, as GSPMD finds them."""
    x = draw.inputs()
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def placed(name: str, a: Any):
        if a is None or name == "keep":
            return a
        axes = [None] * np.ndim(a)
        for axis, mesh_axis in zip([i for i, n in enumerate(np.shape(a)) if n % 2 == 0 and n], "ab", strict=False):
            axes[axis] = mesh_axis
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))

    given = [{name: placed(name, a) for name, a in group.items()} for group in operands(draw.case, x)]
    yield x, run(functools.partial(results, flash_function(draw.case)), *given)


def _unread(draw: Draw):
    """NaN behind the lengths changes no bit."""
    x = draw.inputs()
    dirty = {name: None if a is None else np.array(a) for name, a in x.items()}
    for names, length in ((("q", "do"), "q_lengths"), (("k", "v"), "kv_lengths")):
        if x[length] is not None:
            for name in names:
                behind = np.arange(x[name].shape[-3]) >= np.broadcast_to(x[length], draw.case.batch)[..., None]
                dirty[name][behind] = np.nan
    clean = flash(draw.case, x)
    assert_same_bits(clean, flash(draw.case, dirty))
    yield x, clean


WAYS = {
    "jit": _plain,
    "eager": _eager,
    "higher_order": _higher,
    "remat": _remat,
    "vmap": _vmap,
    "vmap of vmap": _vmaps,
    "scan": _scan,
    "sharded": _sharded,
    "unread": _unread,
}
ALONE = ("vmap", "vmap of vmap", "scan")
"""Ways in which copies run, whose dropout and functions count other batches than the definition of one does."""


def check(draw: Draw) -> None:
    """Raises an AssertionError where a result is not near the definition's, or what the package raises."""
    for inputs, got in WAYS[draw.way](draw):
        assert_near(draw.case, got, inputs, only=FORWARD if draw.values == "largest" else None)


FORWARD = ("o", "lse", "max_logits")
"""Of the largest numbers in half precision gradients cancel to what the rounding of ds leaves."""


BATCHES = ((2,), (), (3,), (2, 1), (1, 2, 2))
EVERY = FACTORS | {"head_dim": (16, 40, 1, 59), "dtype": ("float32", "float32", "float16", "bfloat16")}


@st.composite
def draws(draw: Any) -> Draw:
    """Any of them that go together; the plainest first, which is what a failure shrinks to."""
    way, values = draw(st.sampled_from([*WAYS])), draw(st.sampled_from([*VALUES]))
    length = st.integers(0, 48)
    options = {name: draw(st.sampled_from(choices)) for name, choices in EVERY.items() if name != "seqlens"}
    heads, kv_heads = options.pop("many_heads")
    options |= {"v_dim": draw(st.sampled_from((None, 24))), "batch": draw(st.sampled_from(BATCHES))}
    if not possible(options.items()):
        options["alignment"] = "top_left"
    if way in ALONE:
        options["dropout"] = 0.0
    if values == "largest":
        options["dtype"] = "float16"
    if values == "equal":  # in half precision what cancels exactly is left with the rounding of ds
        options["dtype"] = "float32"
    if values == "hiding" and not options["bias"]:
        options["bias"] = "hqk"
    if way == "unread" or values == "empty":
        options["lengths"] = options["lengths"] or "qk"
    rows, keys = draw(length), draw(length)
    if not rows or not keys:  # the definition has no scores there, nor block masks a tile
        options |= {"score": "", "mask": options["mask"].rpartition(":")[2]}
    name = f"drawn {draw(st.integers(0, 9))}"
    case = Case(name, rows, keys, heads=heads, kv_heads=kv_heads, **options)
    return Draw(case, values, way)
