"""`explain` counts what runs, and `supported` agrees with the call."""

import types

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash_attn2 as fa
from jax_flash_attn2 import explain, flash_attention, gpu_target, masks, supported

T, DOCUMENTS = 8192, 12
X = jax.device_put(np.zeros((1, T, 2, 64), jnp.bfloat16))
SEGMENTS = jax.device_put((np.arange(T, dtype=np.int32) * DOCUMENTS // T)[None])


def visited(**options):
    return [p.visited for p in explain(X, X, X, causal=True, **options).passes]


def test_packed_documents_on_a_gpu():
    """Twelve documents in 8192 tokens meet at most 16% of the tiles that one does, in every kernel."""
    with gpu_target(compute_capability=90):
        dense, packed = visited(), visited(q_segment_ids=SEGMENTS)
    assert len(dense) == 3
    assert all(few <= 0.16 * many for few, many in zip(packed, dense, strict=True)), (packed, dense)


def test_packed_documents_on_xla():
    """Of tiles of the same size."""
    config = fa.Config(256, 256)
    dense, packed = (visited(implementation="xla", config=config, **o) for o in ({}, {"q_segment_ids": SEGMENTS}))
    assert len(dense) == 2
    assert all(few <= 0.16 * many for few, many in zip(packed, dense, strict=True)), (packed, dense)


@pytest.mark.thorough
def test_packed_documents_hold_no_logits():
    """Neither on XLA nor on a GPU is anything [T, T] in the module."""

    def loss(q, k, v, ids):
        return flash_attention(q, k, v, causal=True, q_segment_ids=ids).astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    assert f"{T},{T}" not in grad.lower(X, X, X, SEGMENTS).compile().as_text()
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda13_plugin")
    with gpu_target(compute_capability=90):
        assert f"{T}x{T}" not in grad.trace(X, X, X, SEGMENTS).lower(lowering_platforms=("cuda",)).as_text()


def test_text():
    with gpu_target(compute_capability=80):
        result = explain(X, X, X, causal=True, config=fa.Config(64, 64))
    assert repr(result) == str(result)
    forward = result.passes[0]
    blocks = T // 64
    assert forward.visited == 2 * blocks * (blocks + 1) // 2
    assert forward.masked == 2 * blocks
    assert forward.flops == forward.visited * 64 * 64 * 2 * 2 * 64
    assert "triton on sm_80\n  an enclosing gpu_target names it" in str(result)
    assert "ptr-block: 16512 of 32768 tiles visited (50.4%), 256 through the mask" in str(result)


def test_tiles_of_a_zigzag():
    """Of two devices that hold the first and the last quarter of a sequence, and the second and the third, each visits
    half of its tiles, and as many as the other: one that held a half of it would visit a quarter, or three."""
    x, quarters = jnp.zeros((1, 512, 1, 64), jnp.bfloat16), np.arange(1024, dtype=np.int32).reshape(4, 256)
    every = jnp.zeros((1, 1024, 1, 64), jnp.bfloat16)
    visited = []
    for held in ((0, 3), (1, 2)):
        given = {"q_positions": quarters[held, :].ravel(), "kv_positions": quarters.ravel(), "causal": True}
        with gpu_target(compute_capability=80):
            visited.append(explain(x, every, every, config=fa.Config(64, 64), **given).passes[0])
    assert [p.visited for p in visited] == [68, 68]
    assert [p.masked for p in visited] == [8, 8]
    assert visited[0].tiles == 128


def test_passes_of_a_bias():
    """Its gradient has a kernel of its own unless nothing is summed for it."""
    x = jnp.zeros((2, 64, 2, 64), jnp.bfloat16)
    with gpu_target(compute_capability=90):
        whole, shared = (explain(x, x, x, jnp.zeros((b, 2, 64, 64))) for b in (2, 1))
    assert [p.name for p in whole.passes] == ["fwd", "dq", "dkdv"]
    assert [p.name for p in shared.passes] == ["fwd", "dq", "dkdv", "dbias"]
    assert "fwd   128x32 warps 4 stages 3 block-ptr overlaps: " in str(whole)


def test_reasons():
    x = jnp.zeros((1, 64, 2, 16))
    why = {
        "need a GPU": explain(x, x, x),
        "was asked for": explain(x, x, x, implementation="xla"),
        "differentiates it to any order": explain(x, x, x, higher_order=True),
    }
    for reason, result in why.items():
        assert result.implementation == "xla"
        assert reason in str(result)
    with gpu_target(compute_capability=90):
        assert explain(x, x, x).implementation == "triton"
        with jax.enable_x64(True):
            y = x.astype(jnp.float64)
            assert "no float64" in str(explain(y, y, y))


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_gpu_is_there(monkeypatch, platform):
    """AMD's needs no compute capability; of NVIDIA's there is none here."""
    pytest.importorskip("jax_triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    backend = types.SimpleNamespace(platform_version=f"PJRT C API\n{platform} 60300")
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: backend)
    x = jnp.zeros((1, 64, 2, 16))
    assert supported(x, x, x) == (platform == "rocm")
    if platform == "rocm":
        assert explain(x, x, x).where == "AMD GPU"


def test_traced_data_is_said_to_be_unknown():
    def f(ids):
        x = jnp.zeros((1, 64, 2, 16))
        assert explain(x, x, x, q_segment_ids=ids, config=fa.Config(16, 16)).passes[0].visited is None
        return ids

    jax.jit(f)(jnp.zeros((1, 64), jnp.int32))


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_what_hides_nothing_may_be_unknown(implementation):
    """Seeds, what a score function reads, and lengths, which an offset follows from."""
    if implementation:
        pytest.importorskip("jax_triton")
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 16), jnp.float32) for n in (64, 128))
    table = jnp.ones(2)
    options = {
        "window_size": 20, "causal_alignment": "bottom_right", "dropout_rate": 0.1, "dropout_seed": 1,
        "score_mod": lambda s, b, h, i, j: s * table[h], "config": fa.Config(16, 16), "implementation": implementation,
    }  # fmt: skip
    with gpu_target(compute_capability=90):
        by_shapes = explain(q, k, k, **options)
        q, k = (jnp.zeros(x.shape) for x in (q, k))
        assert [p.visited for p in by_shapes.passes] == [p.visited for p in explain(q, k, k, **options).passes]
    assert by_shapes.passes[0].visited is not None


def test_higher_order_skips_nothing():
    x = jnp.zeros((2, 64, 2, 16))
    passes = explain(x, x, x, window_size=8, higher_order=True, config=fa.Config(16, 16)).passes
    assert [(p.block_m, p.block_n, p.tiles, p.visited, p.masked) for p in passes] == [(16, 64, 16, 16, 16)] * 2
    assert passes[1].flops == 3 * passes[0].flops


@pytest.mark.parametrize("higher_order", [False, True])
def test_nothing_to_see(higher_order):
    x = jnp.zeros((1, 64, 2, 16))
    for q, k in ((x, x[:, :0]), (x[:, :0], x), (x[:0], x[:0])):
        assert [p.visited for p in explain(q, k, k, higher_order=higher_order).passes] == [0, 0]


def test_supported():
    x = jnp.zeros((1, 64, 2, 16))
    assert supported(x, x, x, causal=True, window_size=8)
    assert not supported(x, x, x, implementation="triton")  # no GPU here
    assert not supported(x, x, x[:, :3])
    assert not supported(x, x, x, mask=jnp.ones((64, 64)))
    with gpu_target(compute_capability=90):
        assert supported(x, x, x, implementation="triton")
        assert not supported(x, x, x, config={"fwd": fa.Config(overlaps=True)}, block_ptr=False)
        assert not supported(x, x, x, score_mod=lambda s, b, h, i, j: jax.lax.lgamma(s))


def test_explain_raises_what_the_call_would():
    x = jnp.zeros((1, 64, 2, 16))
    with pytest.raises(ValueError, match='implementation="triton" runs on GPUs'):
        explain(x, x, x, implementation="triton")
    with pytest.raises(TypeError, match="mask must have dtype bool"):
        explain(x, x, x, mask=jnp.ones((64, 64)))


def test_masks_by_head_are_counted_by_head():
    """On the XLA path key heads meet their own tiles; where query heads share one, what any of them sees."""
    tiles = np.random.default_rng(0).random((1, 4, 4, 4)) < 0.3
    mask = masks.BlockMask.from_tiles(jnp.asarray(tiles), (1, 4, 512, 512))
    q = jax.ShapeDtypeStruct((1, 512, 4, 16), jnp.float32)
    for kv_heads in (4, 2):
        k = jax.ShapeDtypeStruct((1, 512, kv_heads, 16), jnp.float32)
        met = tiles.reshape(kv_heads, -1, 4, 4).any(1).sum() * (4 // kv_heads)
        assert [p.visited for p in explain(q, k, k, mask=mask).passes] == [met, met]
        union = tiles.any((0, 1)).sum() * 4  # with a bias of one head, backward, as its gradient is summed over heads
        assert [p.visited for p in explain(q, k, k, jnp.zeros(512), mask=mask).passes] == [met, union]
