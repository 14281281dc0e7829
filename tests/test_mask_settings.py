"""Masks under JAX's settings: nothing sent to the device unasked, no ranks promoted, no jit; on explicit mesh axes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_flash_attn2 import flash_attention, masks
from jax_flash_attn2.masks import BlockMask, LocalMasker, Mask, SinkMasker, TopKMasker, dense_attention, evaluate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SHAPE = (2, 2, 6, 9)
RNG = np.random.default_rng(0)
WEIGHTS = np.where(RNG.random(SHAPE) < 0.5, RNG.random(SHAPE), 0).astype(np.float32)
IDS = RNG.integers(0, 3, (2, 9)).astype(np.int32)


@functools.cache
def given():
    """Arrays on the device, and masks of them, made before anything is forbidden."""
    put = jax.device_put
    dense = Mask.from_dense(put(WEIGHTS))
    x = {
        "w": dense.dense, "dense": dense, "sparse": dense.to_indices(), "bool": dense.astype(bool),
        "ids": put(IDS), "q_ids": put(IDS[:, :6]), "real": put(IDS > 0), "prefix": put(IDS[:, 0]),
        "seen": put(WEIGHTS > 0), "index": [put(np.arange(n, dtype=np.int32)) for n in SHAPE],
        "q": put(RNG.standard_normal((2, 6, 2, 8)).astype(np.float32)),
        "k": put(RNG.standard_normal((2, 9, 2, 8)).astype(np.float32)),
        "rows": put(RNG.integers(-1, 9, (2, 2, 6, 3)).astype(np.int32)),
    }  # fmt: skip
    x["kinds"] = [dense, x["sparse"], x["bool"], Mask.full(SHAPE), Mask.empty(SHAPE)]
    return x


def attend(x, mask, function=flash_attention, **options):
    o, pull = jax.vjp(lambda q: function(q, x["k"], x["k"], mask=mask, **options), x["q"])
    return o, pull(o)


def weighed(x, name):
    return [getattr(m, name)(x["w"], mode) for m in x["kinds"] for mode in ("dense", "sparse")]


def local():
    return masks.causal() & (masks.sliding_window(3) | masks.sinks(1)) & ~masks.dilated(2, 2)


USES = {
    "evaluate": lambda x: [
        evaluate(p, *x["index"])
        for p in (
            local(), masks.prefix_lm(3) | masks.prefix_lm(x["prefix"]), lambda b, h, i, j: j % 3 == h,
            masks.padding(x["real"]) & masks.padding(x["ids"]), masks.from_dense(x["seen"]),
            masks.documents(x["q_ids"], x["ids"]),
        )
    ],
    "block masks": lambda x: [
        (m.tiles(), m.to_dense(), m.density())
        for m in (BlockMask.from_predicate(local(), SHAPE), *(BlockMask.from_mask(m) for m in x["kinds"][:2]))
    ],
    "attention": lambda x: [
        attend(x, m) for m in (local(), lambda b, h, i, j: j <= i + h, BlockMask.from_mask(x["dense"]), *x["kinds"])
    ],
    "dense attention": lambda x: [
        *(attend(x, m, dense_attention) for m in (None, local(), x["seen"], x["dense"])),
        attend(x, None, dense_attention, causal=True),
        attend(x, None, dense_attention, window_size=3, bias=x["w"], softmax_scale=0.3),
    ],
    "weights": lambda x: [
        Mask.from_dense(x["w"]), x["dense"].to_indices(), x["dense"].to_indices(300),
        *(m.to_dense(jnp.float16) for m in x["kinds"]), *(m.astype(bool) for m in x["kinds"]),
        *(m.to_indices() for m in x["kinds"]), *(m.density() for m in x["kinds"]),
    ],
    "indices": lambda x: [
        Mask.from_indices(SHAPE, x["sparse"].indices, x["sparse"].ptr, x["sparse"].data),
        Mask.from_indices(SHAPE, x["sparse"].indices, x["sparse"].ptr),
        Mask.from_row_indices(SHAPE, x["rows"]), Mask.from_row_indices(SHAPE, x["rows"], size=400),
    ],
    "apply": lambda x: weighed(x, "apply"),
    "apply_inverse": lambda x: weighed(x, "apply_inverse"),
    "merge": lambda x: [a.merge(b, mode) for a in x["kinds"] for b in x["kinds"][:2] for mode in ("dense", "sparse")],
    "maskers": lambda x: [
        *(LocalMasker(3)(x["dense"], implementation=i) for i in ("sparse", "broadcast", "triangle")),
        *(SinkMasker(3)(x["dense"], implementation=i) for i in ("sparse", "dense")),
        *(TopKMasker(3)(x["dense"], q=x["q"], k=x["k"], implementation=i) for i in ("sparse", "dense")),
        *(TopKMasker(3)(x["dense"], q=x["q"], k=x["k"], allowed=a) for a in (x["bool"], x["seen"])),
    ],
    "builders": lambda x: [
        masks.make_causal_mask(x["q"], padding_mask=x["q_ids"], segment_ids=x["q_ids"], sliding_window=3),
        masks.causal_mask_tril(x["q"], padding_mask=x["q_ids"]), masks.causal_mask_comparison(x["q"]),
        masks.MaskCache().causal(6, 9, dtype=jnp.float32),
    ],
}  # fmt: skip

SETTINGS = {
    "transfers": lambda: jax.transfer_guard("disallow"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no jit": jax.disable_jit,
}


@pytest.mark.in_thirds
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("use", USES)
def test_settings(use, setting):
    """Every use of masks on arrays that are on the device; and what comes of it is what comes without the setting."""
    x = given()
    want = USES[use](x)
    masks.block_mask_cache.clear()
    with SETTINGS[setting]():
        got = USES[use](x)
    exact = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-6)
    jax.tree.map(lambda a, b: exact(*(np.asarray(y).astype(np.float32) for y in (a, b))), got, want)


# Meshes with explicit axes, which `jax.make_mesh` makes unless it is told otherwise.

MASKERS = {
    "local": (LocalMasker(3), ("sparse", "broadcast", "triangle")),
    "sink": (SinkMasker(2), ("sparse", "dense")),
    "top k": (TopKMasker(3), ("sparse", "dense")),
}


@pytest.mark.in_thirds
@pytest.mark.parametrize(
    ("name", "named"), [("local", False), ("sink", True), ("top k", False), ("top k", True)], ids=str
)
def test_maskers_on_explicit_axes(name, named):
    """In and out of jit, the mask is that of one device, a dense one divided as the queries are."""
    masker, implementations = MASKERS[name]
    grid = jax.make_mesh((2, 2, 2), ("b", "h", "s"))
    q, k = (RNG.standard_normal((2, 8, h, 4)).astype(np.float32) for h in (4, 2))
    weights = (RNG.random((2, 4, 8, 8)) < 0.1).astype(np.float32)
    specs = ("b", "s", "h", None), ("b", None, "h", None), ("b", "h", "s", None)
    placed = [
        jax.device_put(x, NamedSharding(grid, PartitionSpec(*s))) for x, s in zip((q, k, weights), specs, strict=True)
    ]

    def find(q, k, weights, implementation):
        of = {"q": q, "k": k} if name == "top k" else {}
        previous = Mask.from_dense(weights)
        previous = previous.to_indices(257) if implementation == "sparse" else previous
        return masker(previous, **of, implementation=implementation)

    for implementation in implementations:
        want = find(q, k, weights, implementation).to_dense()
        for function in (find, jax.jit(find, static_argnums=3)):
            with jax.set_mesh(grid) if named else contextlib.nullcontext():
                mask = function(*placed, implementation)
            if mask.kind == "dense":
                assert jax.typeof(mask.dense).sharding.spec == PartitionSpec("b", "h", "s", None)
            np.testing.assert_array_equal(jax.tree.map(jnp.asarray, jax.device_get(mask)).to_dense(), want)
