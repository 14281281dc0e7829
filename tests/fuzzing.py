"""What `fuzz.py` draws, and what must hold of it: values that hurt, and ways to call, on top of `cases.drawn`.

A draw is a `Draw`: a case, how it is called, and what the arrays of each call hold; or a call of ragged rows or of
pages. `check` raises where a result is not the definition's. With TRITON_INTERPRET=1 the kernels are called.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paged_cases
from cases import FACTORS, Case, possible
from checks import (
    KERNELS,
    assert_near,
    assert_same_bits,
    compiled,
    definition,
    flash_function,
    in_float64,
    operands,
    results,
)
from fuzz_values import VALUES, Inputs
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash_attn2 import context_parallel_attention, from_order, to_order, varlen_attention
from jax_flash_attn2.gpu import interpret

Results = dict[str, np.ndarray]
Call = Callable[[list[Inputs]], list[Results]]
"""The results of as many copies of the case's inputs as the way takes at once."""

# How the call is made: what a case becomes is compiled once, and then called with several values.


def _own(case: Case, **options: Any) -> Callable:
    """The call, of what runs here: kernels in a process that interprets them."""
    return flash_function(case, **({"implementation": "triton"} if interpret.enabled() else {}) | options)


def _single(function: Callable[..., Results]) -> Call:
    return lambda copies: [function(*x) for x in copies]


def _plain(case: Case) -> Call:
    return _single(compiled(functools.partial(results, _own(case))))


def _eager(case: Case) -> Call:
    function = functools.partial(results, _own(case))
    return _single(lambda *x: jax.tree.map(np.asarray, function(*jax.tree.map(jnp.asarray, x))))


def _higher(case: Case) -> Call:
    return _single(compiled(functools.partial(results, _own(case, higher_order=True))))


def _remat(case: Case) -> Call:
    return _single(compiled(functools.partial(results, jax.checkpoint(_own(case)))))


def _stacked(shape: tuple[int, ...], mapped: Callable[[Callable], Callable]) -> Callable[[Case], Call]:
    """All copies in one call, stacked in this shape."""

    def way(case: Case) -> Call:
        function = compiled(mapped(functools.partial(results, _own(case))))

        def call(copies: list[Inputs]) -> list[Results]:
            made = function(*jax.tree.map(lambda *x: np.stack(x).reshape(*shape, *np.shape(x[0])), *copies))
            flat = {name: y.reshape(len(copies), *y.shape[len(shape) :]) for name, y in made.items()}
            return [{name: y[n] for name, y in flat.items()} for n in range(len(copies))]

        return call

    return way


def _by_hand(function: Callable) -> Callable:
    """A copy to each device of a mesh."""
    own = lambda y: y.reshape(y.shape[1:])  # where there is nothing, y[0] would not say that devices differ
    one = lambda x: jax.tree.map(lambda y: y[None], function(*jax.tree.map(own, x)))
    return lambda *x: jax.shard_map(one, mesh=_mesh(2), in_specs=P("a"), out_specs=P("a"))(x)


def _mesh(*shape: int) -> jax.sharding.Mesh:
    count = int(np.prod(shape))
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, tuple("ab"[: len(shape)]), axis_types=types, devices=jax.devices()[:count])


def _sharded(case: Case) -> Call:
    """Batch, heads, rows or keys of whatever they divide, over four devices, as GSPMD finds them."""
    function, mesh = compiled(functools.partial(results, _own(case))), _mesh(2, 2)

    def placed(name: str, a: Any):
        if name == "keep":
            return a
        axes = [None] * np.ndim(a)
        for axis, mesh_axis in zip([i for i, n in enumerate(np.shape(a)) if n % 2 == 0 and n], "ab", strict=False):
            axes[axis] = mesh_axis
        return jax.device_put(a, NamedSharding(mesh, P(*axes)))

    return _single(lambda *x: function(*({name: placed(name, a) for name, a in group.items()} for group in x)))


ORDERED = {"q": -3, "k": -3, "v": -3, "o": -3, "lse": -1} | dict.fromkeys(
    ("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions"), -1
)
"""The axis of tokens of what has one."""


def _context(case: Case) -> Call:
    """The sequence over two devices, by a method and in an order that the name decides."""
    number = zlib.crc32(case.name.encode())
    methods = ["all_gather", "ring" if "block" not in case.mask_kind else "all_gather"]
    methods += ["ulysses"] * (case.heads % 2 == 0)
    method, order = methods[number % len(methods)], ("contiguous", "zigzag", "striped")[number // 8 % 3]

    def turned(name: str, x: Any, turn: Callable) -> Any:
        name = name.removeprefix("d")
        if name in ORDERED:
            return turn(x, 2, order, ORDERED[name])
        if name == "bias" or (name == "mask" and not case.mask_kind):
            lengths = (case.seqlen_q, case.seqlen_k)
            axes = tuple(axis for axis, n in zip((-2, -1), lengths, strict=True) if x.shape[axis] == n > 1)
            return turn(x, 2, order, axes) if axes else x
        return x

    whole = functools.partial(
        context_parallel_attention, axis="a", mesh=_mesh(2), method=method, order=order, **case.static
    )
    function = compiled(functools.partial(results, flash_function(case, attend=whole)))

    def call(*x: dict) -> Results:
        there = ({name: turned(name, a, to_order) for name, a in group.items()} for group in x)
        return {name: np.asarray(turned(name, a, from_order)) for name, a in function(*there).items()}

    return _single(call)


def _twice(case: Case) -> Call:
    """The derivative of results and gradients, along q, k and v themselves, in float64."""

    def second(function: Callable) -> Callable:
        def along(inner, given, cotangents):
            tangents = {name: x if name in "qkv" else jnp.zeros_like(x) for name, x in inner.items()}
            return jax.jvp(lambda inner: results(function, inner, given, cotangents), (inner,), (tangents,))[1]

        return compiled(along)

    ours, theirs = second(_own(case, higher_order=True)), second(definition(case))

    def call(*x: dict) -> Results:
        with jax.enable_x64(True):
            x = [in_float64(group) for group in x]
            got, want = ours(*x), theirs(*x)
        for name, y in want.items():
            size = np.abs(want["d" + name.removeprefix("d")] if name[0] == "d" else y).max(initial=1e-3)
            np.testing.assert_allclose(got[name], y, rtol=1e-8, atol=1e-9 * size, err_msg=f"second derivative: {name}")
        return {}

    return _single(call)


WAYS: dict[str, tuple[int, Callable[[Case], Call]]] = {
    "jit": (1, _plain),
    "eager": (1, _eager),
    "higher_order": (1, _higher),
    "twice": (1, _twice),
    "remat": (1, _remat),
    "vmap": (2, _stacked((2,), jax.vmap)),
    "vmap of vmap": (4, _stacked((2, 2), lambda f: jax.vmap(jax.vmap(f)))),
    "scan": (2, _stacked((2,), lambda f: lambda *x: jax.lax.map(lambda own: f(*own), x))),
    "shard_map": (2, _stacked((2,), _by_hand)),
    "sharded": (1, _sharded),
    "context": (1, _context),
    "unread": (2, _plain),
    "poisoned": (2, _plain),
}
"""How many copies of the inputs a call takes, and the call."""
ALONE = ("vmap", "vmap of vmap", "scan", "shard_map")
"""Ways in which copies run, whose dropout and functions count other batches than the definition of one does."""
ON_XLA = ("eager", "higher_order", "twice", "context", "sharded", "shard_map")
"""Not with interpreted kernels: JAX's callbacks crash where several devices call at once (`shard_map`'s too)."""


def _unread(case: Case, x: Inputs) -> Inputs:
    """NaN behind the lengths."""
    dirty = {name: None if a is None else np.array(a) for name, a in x.items()}
    for names, length in ((("q", "do"), "q_lengths"), (("k", "v"), "kv_lengths")):
        if x[length] is not None:
            for name in names:
                behind = np.arange(x[name].shape[-3]) >= np.broadcast_to(x[length], case.batch)[..., None]
                dirty[name][behind] = np.nan
    return dirty


def _poisoned(case: Case, x: Inputs) -> Inputs:
    """NaN in the first row of the first head, in every batch."""
    q = x["q"].copy()
    q[..., :1, :1, :] = np.nan
    return x | {"q": q}


@dataclasses.dataclass(frozen=True)
class Draw:
    """A case, called in one way with several values."""

    case: Case
    way: str
    values: tuple[str, ...]

    def inputs(self, values: str, copy: int = 0) -> Inputs:
        """The arrays; of several copies of the call each has its own."""
        case = dataclasses.replace(self.case, name=f"{self.case.name} {copy}") if copy else self.case
        return VALUES[values](self.case, case.inputs())

    @property
    def kinds(self) -> list[str]:
        """What is counted, once for each call."""
        return [f"{self.way}, {values}" for values in self.values]

    def check(self) -> None:
        count, way = WAYS[self.way]
        call = way(self.case)
        for values in self.values:
            if self.way in SPOILED:
                clean = self.inputs(values)
                copies = [clean, SPOILED[self.way](self.case, clean)]
            else:
                copies = [self.inputs(values, n) for n in range(count)]
            made = call([operands(self.case, x) for x in copies])
            if self.way == "unread":
                assert_same_bits(*made)
            if self.way == "poisoned":
                by_bias = values == "hiding" or self.case.mask.startswith("weights")
                dense = bool(self.case.mask) and not self.case.mask_kind  # to which kernels add, as to a bias of -inf
                _only_the_first(*made, by_bias=by_bias or (dense and KERNELS))
            for x, got in zip(copies, made[:1] if self.way in SPOILED else made, strict=False):
                if got:
                    assert_near(self.case, got, x, decided=values == "huge logits")


SPOILED = {"unread": _unread, "poisoned": _poisoned}


def _only_the_first(clean: Results, got: Results, by_bias: bool) -> None:
    """The first row of the first head is NaN if it sees something; no bit of the others' o and lse is another. by_bias:
    it may also be NaN where a bias, or a mask's weights, which are one, hide all: -inf and NaN are NaN."""
    sees = np.isfinite(clean["lse"][..., :1, :1])
    if by_bias:
        sees = sees | np.isnan(got["lse"][..., :1, :1])
    np.testing.assert_array_equal(np.isnan(got["lse"][..., :1, :1]), sees)
    np.testing.assert_array_equal(np.isnan(got["o"][..., :1, :1, :]).all(-1), sees)
    for name, axes in (("o", (-3, -2)), ("lse", (-1, -2))):
        others = np.indices([got[name].shape[axis] for axis in axes]).any(0)
        x, y = (np.moveaxis(z[name], axes, (0, 1))[others] for z in (clean, got))
        np.testing.assert_array_equal(x, y, err_msg=name)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A call of `varlen_attention`: each row sees what the definition lets it see by its segment and position."""

    case: Case
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[str, ...]

    @property
    def kinds(self) -> list[str]:
        """As `Draw.kinds`."""
        return [f"varlen, {values}" for values in self.values]

    def check(self) -> None:
        starts = {
            f"cu_{name}_lens": np.cumsum([0, *n]).astype(np.int32) for name, n in zip("qk", self.sides, strict=True)
        }
        attend = functools.partial(varlen_attention, **_kept(self.case.static), **starts)
        attend = attend if not interpret.enabled() else functools.partial(attend, implementation="triton")
        function = compiled(functools.partial(results, flash_function(self.case, attend=attend)))
        for values in self.values:
            x = VALUES[values](self.case, self.case.inputs() | self._places())
            inner, given, cotangents = operands(self.case, x)
            assert_near(
                self.case, function(inner, {n: a for n, a in given.items() if n not in self._places()}, cotangents), x,
                decided=values == "huge logits",
            )  # fmt: skip

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.rows, self.keys

    def _places(self) -> Inputs:
        """Of rows and keys: whose they are, and where in it; the last row is at the last key. Nobody's are behind."""
        made = {}
        for name, own, total in zip(("q", "kv"), self.sides, (self.case.seqlen_q, self.case.seqlen_k), strict=True):
            ids = np.repeat(np.arange(len(own)), own)
            shift = np.subtract(self.keys, self.rows) if name == "q" else 0 * np.array(own)
            places = np.arange(len(ids)) - np.repeat(np.cumsum([0, *own])[:-1], own) + np.repeat(shift, own)
            behind = (0, total - len(ids))
            made[f"{name}_segment_ids"] = np.pad(ids, behind, constant_values=-1).astype(np.int32)
            made[f"{name}_positions"] = np.pad(places, behind).astype(np.int32)
            made[f"{name}_lengths"] = np.asarray(len(ids), np.int32)
        return made


def _kept(static: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in static.items() if not name.startswith(("causal_alignment", "dropout"))}


@dataclasses.dataclass(frozen=True)
class Paged:
    """A call of `paged_attention`, one of `paged_cases.draw`."""

    seed: int
    kinds = ("paged",)

    def check(self) -> None:
        paged_cases.check(self.seed, "triton" if interpret.enabled() else None)


BATCHES = ((2,), (), (3,), (2, 1), (1, 2, 2))
EVERY = FACTORS | {"head_dim": (16, 40, 1, 59), "dtype": ("float32", "float32", "float16", "bfloat16")}
CALLS = 4
"""With one compiled function."""
DOORS = ("dense",) * 17 + ("ragged", "ragged", "paged")


@st.composite
def draws(draw: Any) -> Draw | Ragged | Paged:
    """Any of them that go together; the plainest first, which is what a failure shrinks to."""
    door = draw(st.sampled_from(DOORS))
    if door == "paged":
        return Paged(draw(st.integers(0, 10**6)))
    way = draw(st.sampled_from([way for way in WAYS if way not in ON_XLA or not interpret.enabled()]))
    options = {name: draw(st.sampled_from(choices)) for name, choices in EVERY.items() if name != "seqlens"}
    heads, kv_heads = options.pop("many_heads")
    options |= {"v_dim": draw(st.sampled_from((None, 24)))}
    name, length = f"drawn {draw(st.integers(0, 9))}", st.integers(0, 48)
    values = tuple(draw(st.permutations([kind for kind in VALUES if _go_together(kind, options)]))[:CALLS])
    if door == "ragged":
        lengths = draw(st.lists(st.tuples(*(st.integers(0, 20),) * 2), max_size=5))
        rows, keys = tuple(zip(*lengths, strict=True)) or ((), ())
        options |= {"mask": "", "bias": "", "score": "", "lengths": "", "dropout": 0.0, "positions": "mixed"}
        options |= {"alignment": "top_left", "segments": "packed", "alibi": options["alibi"][-1:]}
        sizes = (sum(n) + draw(st.integers(0, 3)) for n in (rows, keys))
        case = Case(name, *sizes, batch=(), heads=heads, kv_heads=kv_heads, **options)
        return Ragged(case, rows, keys, tuple(kind for kind in values if kind not in ("empty", "last positions")))
    options |= {"batch": draw(st.sampled_from(BATCHES))}
    if not possible(options.items()):
        options["alignment"] = "top_left"
    if way in ALONE:
        options["dropout"] = 0.0
    if way in ("unread", "empty"):
        options["lengths"] = options["lengths"] or "qk"
    if way == "twice":
        options["dtype"], values = "float64", ("normal",)
        options["mask"] = options["mask"].replace("block_weights", "block").replace("weights:", "")  # of fp32
    if way == "poisoned":  # a sink is seen by a row that sees nothing
        options |= {"sinks": False, "lse": True}
        options["score"] = options["score"].replace("rows", "table")  # which hides without a look at the score
    rows, keys = draw(length), draw(length)
    if way == "context":  # shares, and halves of them
        rows, keys = (max(-(-n // 4) * 4, 4) for n in (rows, keys))
    if way in ("shard_map", "poisoned"):  # where there is nothing, `jnp.where` forgets that devices differ
        rows, keys = max(rows, 1), max(keys, 1)
    if not rows or not keys:  # the definition has no scores there, nor block masks a tile
        options |= {"score": "", "mask": options["mask"].rpartition(":")[2]}
    return Draw(Case(name, rows, keys, heads=heads, kv_heads=kv_heads, **options), way, values)


def _go_together(kind: str, options: dict[str, Any]) -> bool:
    """Whether a kind of values says something of a case, and the numbers of its dtype hold it."""
    return {
        "largest": options["dtype"] == "float16",
        # For kernels not where two keys are equal: then log(2) is lost beside lse (docs/limits.md).
        "huge logits": options["dtype"] == "float32"
        or (options["dtype"] == "bfloat16" and (options["head_dim"] > 1 or not KERNELS)),
        "hiding": bool(options["bias"]),
        "far": bool(options["bias"]),
        "empty": bool(options["lengths"]),
        "last positions": bool(options["positions"]),
    }.get(kind, True)
