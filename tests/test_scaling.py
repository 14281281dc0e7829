"""What benchmarks/scaling counts is what compiled programs send and what the package's tables of tiles say."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from benchmarks.scaling import counts, machine, page, tiles
from benchmarks.scaling.cases import Case, first_seen, segment_ids
from jax_flash_attn2.base.spec import Rules, Spec
from jax_flash_attn2.context.attention import context_parallel_attention
from jax_flash_attn2.context.orders import sequence_order
from jax_flash_attn2.tiles import spans

ROOT = pathlib.Path(__file__).parents[1]
SMALL = functools.partial(Case, kv_heads=4, head_dim=16, heads=8, itemsize=4)
DTYPES = {2: jnp.bfloat16, 4: jnp.float32}


def compiled(case: Case) -> dict[str, Any]:
    """The programs of both passes."""
    mesh = jax.make_mesh((case.devices,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    by_tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
    array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=by_tokens)
    q, k = (array(1, case.tokens, n, case.head_dim, dtype=DTYPES[case.itemsize]) for n in (case.heads, case.kv_heads))
    ids = () if case.document is None else (array(1, case.tokens, dtype=jnp.int32),)

    def attend(q, k, v, *ids):
        return context_parallel_attention(
            q, k, v, axis="context", mesh=mesh, method=case.method, order=case.order, causal=case.causal,
            window_size=None if case.window is None else (case.window, 0), head_groups=case.head_groups,
            q_segment_ids=ids[0] if ids else None,
        )  # fmt: skip

    saved = jax.eval_shape(lambda q, k, v, *ids: jax.vjp(lambda *x: attend(*x, *ids), q, k, v)[1], q, k, k, *ids)
    lowered = {
        "forward": jax.jit(attend).lower(q, k, k, *ids),
        "backward": jax.jit(lambda pull, do: pull(do)).lower(saved, q),
    }
    return {of: x.compile() for of, x in lowered.items()}


def found(case: Case) -> dict[str, Counter]:
    """What they send."""
    return {of: programs.collectives(x.as_text(), case.devices) for of, x in compiled(case).items()}


def counted(case: Case) -> dict[str, Counter]:
    made = {of: Counter() for of in counts.PASSES}
    for of, messages in made.items():
        for x in counts.sent(case, of):
            messages[x.kind, x.bytes] += x.count
    return made


SENT = {
    "ring_bf16": SMALL(256, 8, "ring", itemsize=2),
    "ring_full": SMALL(256, 8, "ring", "contiguous", causal=False),
    "ring_striped": SMALL(256, 8, "ring", "striped"),
    "ring_window": SMALL(256, 8, "ring", "contiguous", window=40),
    "ring_window_zigzag": SMALL(256, 8, "ring", window=10),
    "ring_window_loop": SMALL(256, 8, "ring", "contiguous", window=100),
    "ring_documents": SMALL(256, 8, "ring", document=50),
    "all_gather": SMALL(256, 8, "all_gather", itemsize=2),
    "all_gather_groups": SMALL(256, 8, "all_gather", head_groups=2),
    "all_gather_documents": SMALL(256, 8, "all_gather", "contiguous", document=50),
    "ulysses": SMALL(256, 8, "ulysses"),
    "ulysses_documents": SMALL(256, 8, "ulysses", heads=16, kv_heads=8, document=50),
}
SELDOM = ("ring_full", "ring_striped", "ring_window", "ring_documents", "all_gather_documents", "ulysses_documents")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.thorough] * (x in SELDOM)) for x in SENT])
def test_sent(name):
    assert found(SENT[name]) == counted(SENT[name])


MANY = [
    SMALL(1024, 64, "ring", itemsize=2),
    SMALL(2048, 64, "ring", "contiguous", window=60),
    SMALL(1024, 64, "all_gather", "striped", head_groups=4),
    SMALL(1024, 64, "ulysses", heads=64),
    SMALL(1024, 64, "ring", document=100),
]


@pytest.mark.thorough
def test_sent_among_many():
    """64 devices, in a process of their own."""
    code = "import test_scaling as t\nfor case in t.MANY: assert t.found(case) == t.counted(case), case"
    devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=64"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)


@pytest.mark.thorough
def test_held(compiled_fully):
    """What a ring holds does not grow with the number of devices, and what all_gather holds does as counted, or twice
    so, as the gradients are copied when they are put side by side."""

    def grown(method, of):
        cases = [Case(1024 * n, n, method, heads=16, kv_heads=16, head_dim=64, itemsize=4) for n in (4, 8)]
        cases = [dataclasses.replace(x, head_groups=4 if method == "all_gather" else None) for x in cases]
        less, more = (compiled(x)[of].memory_analysis().temp_size_in_bytes for x in cases)
        return more - less, counts.held(cases[1], of) - counts.held(cases[0], of)

    for of in counts.PASSES:
        assert abs(grown("ring", of)[0]) < 2**20
        real, expected = grown("all_gather", of)
        assert 0.9 * expected < real < 2.2 * expected


# Tiles.

BLOCK = 16
MASKS = {
    "causal": {},
    "window": {"window": 68},  # begins where some tile of 4 devices ends, striped
    "narrow": {"window": 17},  # likewise, contiguous
    "documents": {"document": 50},
    "full": {"causal": False},
}


def table(case: Case, rows: np.ndarray, keys: np.ndarray) -> int:
    """How many tiles the package's spans have, of rows and keys that are these tokens."""
    rules = Rules(case.window, 0 if case.causal else None)
    by = {"q": (1, 1, -1, 1), "kv": (1, 1, 1, -1)}
    operands = {
        f"{side}_positions": jnp.asarray(x, jnp.int32).reshape(by[side]) for side, x in (("q", rows), ("kv", keys))
    }
    if case.document is not None:
        ids = segment_ids(case.tokens, case.document)
        operands |= {
            f"{side}_segments": jnp.asarray(ids[x]).reshape(by[side]) for side, x in (("q", rows), ("kv", keys))
        }
    q, k = (jnp.zeros((1, len(x), 1, 8)) for x in (rows, keys))
    spec, starts = Spec.of(rules, q, k, k, operands), np.arange(0, len(rows), BLOCK)
    begin, _, _, end = np.moveaxis(np.asarray(_spans(spec, len(rows), len(keys), tuple(starts))(operands)), -1, 0)
    return int((end - begin).sum())


@functools.lru_cache
def _spans(spec: Spec, rows: int, keys: int, starts: tuple[int, ...]):
    of = lambda operands: spans.query_spans(spec, operands, 1, rows, keys, np.array(starts), BLOCK, BLOCK)
    return jax.jit(of)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("tokens", [256, 96])  # the pieces of which are whole tiles, or not
def test_tiles(tokens, order, mask):
    """Of each device and each step of a ring, and of all keys gathered."""
    case = Case(tokens, 4, "ring", order, **MASKS[mask])
    held = sequence_order(tokens, 4, order).reshape(4, -1)
    steps = [run.first + run.step * i for run in case.runs for i in range(run.count)]
    want = [[table(case, held[d], held[(d - hop) % 4]) for d in range(4)] for hop in steps]
    np.testing.assert_array_equal(tiles.by_hop(case, BLOCK), want)
    want = [table(case, rows, np.arange(tokens)) for rows in held]
    np.testing.assert_array_equal(tiles.whole(case, BLOCK), want)


@pytest.mark.parametrize("mask", MASKS)
def test_what_all_see(mask):
    """The steps of a ring come to what one device visits, and so does what is gathered; pairs are those of a mask."""
    for order in ("contiguous", "zigzag"):
        case = Case(512, 4, "ring", order, **MASKS[mask])
        alone = tiles.one_device(case, BLOCK)
        assert tiles.by_hop(case, BLOCK).sum() == tiles.whole(case, BLOCK).sum() == alone
    row, key = np.mgrid[:512, :512]
    seen = (key <= row) | (not case.causal)
    if case.window is not None or case.document is not None:
        seen &= key >= first_seen(512, case.window, case.document)[row]
    if case.document is not None:
        ids = segment_ids(512, case.document)
        np.testing.assert_array_equal(seen, (key <= row) & (ids[row] == ids[key]))
    assert case.pairs == seen.sum()
    assert alone * BLOCK**2 >= case.pairs


@pytest.mark.parametrize("devices", [4, 16, 64])
def test_balance(devices):
    """Under causality, of the busiest device: its fair share in zigzag, nearly twice that in contiguous order, and
    striped in between; in each step of a ring, too."""
    busiest = {}
    for order in ("contiguous", "zigzag", "striped"):
        case = Case(devices * 4096, devices, "ring", order)
        fair = case.pairs / tiles.TILE**2 / devices
        steps = tiles.by_hop(case)
        busiest[order] = tiles.whole(case).max() / fair
        assert steps.max(1).sum() / fair == pytest.approx(busiest[order], rel=0.02)
        assert steps.sum(0).max() / fair == pytest.approx(busiest[order], rel=0.02)
        if order == "zigzag":
            assert (steps.max(1) == steps.min(1)).all()
    assert busiest["zigzag"] == pytest.approx(1, rel=0.05)
    assert busiest["contiguous"] == pytest.approx(2 - 1 / devices, rel=0.05)
    assert 1 < busiest["zigzag"] < busiest["striped"] < busiest["contiguous"]


# The page.


def test_page():
    """Its tables are what the script makes now."""
    text = (page.DOCS / "scaling.md").read_text()
    assert page.filled_in(text) == text


def test_model():
    """No time is less than that of the products alone; what is slower takes longer."""
    slow = machine.Machine(nic=machine.TRITON.nic / 4, gathering=machine.TRITON.gathering / 8)
    for method in ("ring", "all_gather", "ulysses"):
        for devices in (1, 8, 16, 32):
            case = Case(2**15, devices, method)
            assert machine.efficiency(case) <= 1
            assert devices > 1 or machine.efficiency(case) > 0.98
            for of in counts.PASSES:
                time, slower = (machine.time(case, of, x) for x in (machine.TRITON, slow))
                assert -1e-9 < time.exposed < time.sending + 1e-9
                assert (slower.total > time.total) == (devices > 8)
    assert not Case(2**20, 64, "ulysses").usable
