"""Predicates are told apart by what they do, and the cache of block masks is bounded: no stale mask, no growth."""

import dataclasses
import functools
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.base.lru import CacheInfo, Lru
from jax_flash_attn2.masks import (
    BlockMask,
    Predicate,
    block_mask_cache,
    causal,
    documents,
    evaluate,
    from_dense,
    padding,
    sinks,
    sliding_window,
)
from jax_flash_attn2.masks.block import cached

T = 40
SHAPE = (2, 2, T, T)
I, J = np.arange(T)[:, None], np.arange(T)
Q = jnp.asarray(np.random.default_rng(0).standard_normal((2, T, 2, 8)), jnp.float32)

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(autouse=True)
def empty():
    """The cache, with nothing in it."""
    block_mask_cache.clear()
    yield block_mask_cache
    block_mask_cache.clear()


def shown(predicate):
    """What `flash_attention` would look at."""
    return np.broadcast_to(cached(predicate, *SHAPE).to_dense(), SHAPE)[0, 0]


class Reach:
    """Not a predicate, but one of its methods is."""

    def __init__(self, n):
        self.n = n

    def near(self, b, h, i, j):
        return abs(i - j) <= self.n

    def __call__(self, b, h, i, j):
        return self.near(b, h, i, j)


@pytest.mark.parametrize(
    "of", [lambda x: x.near, lambda x: x, lambda x: causal() & x.near], ids=["bound", "called", "&"]
)
def test_attributes_that_change(of):
    """The mask is of what the object holds now; and the same again is found again."""
    reach = Reach(3)
    for n in (3, 5, 3):
        reach.n = n
        want = abs(I - J) <= n
        want = want & (J <= I) if of(reach) is not reach and not hasattr(of(reach), "__self__") else want
        np.testing.assert_array_equal(shown(of(reach)), want)
        np.testing.assert_array_equal(np.asarray(evaluate(of(reach), *map(np.arange, SHAPE)))[0, 0], want)
    assert block_mask_cache.info()[:2] == (1, 2)


def test_closures_and_arrays_that_change():
    n, ids = 3, np.arange(T) // 10
    near = lambda b, h, i, j: abs(i - j) <= n
    same = lambda b, h, i, j: jnp.asarray(ids)[i] == jnp.asarray(ids)[j]
    np.testing.assert_array_equal(shown(near), abs(I - J) <= 3)
    np.testing.assert_array_equal(shown(same), I // 10 == J // 10)
    n = 7
    ids[:] = np.arange(T) // 20
    np.testing.assert_array_equal(shown(near), abs(I - J) <= 7)
    np.testing.assert_array_equal(shown(same), I // 20 == J // 20)


def test_written_anew():
    """What does the same is the same, whoever wrote it; what differs in a constant, a type or an array is not."""
    first, *others = (cached(lambda b, h, i, j: (j <= i) & (i - j < 5), *SHAPE) for _ in range(3))
    assert all(mask is first for mask in others)
    assert cached(lambda b, h, i, j: (j <= i) & (i - j < 6), *SHAPE) is not first
    by_ids = lambda ids: lambda b, h, i, j: ids[i] == ids[j]
    a, b = jnp.arange(T) // 10, jnp.arange(T) // 20
    assert cached(by_ids(a), *SHAPE) is cached(by_ids(a), *SHAPE)
    np.testing.assert_array_equal(shown(by_ids(b)), I // 20 == J // 20)
    long = np.arange(4000) % 7  # of which a text would show the ends only
    odd = lambda b, h, i, j: jnp.asarray(long)[j + 1980] == 9
    for n in (9, 8):
        long[2000] = n
        assert shown(odd)[0, 20] == (n == 9)


@dataclasses.dataclass(frozen=True)
class Same(Predicate):
    """A predicate with a field that has no hash."""

    ids: object

    def __call__(self, b, h, i, j):
        ids = jnp.asarray(self.ids)
        return ids[i] == ids[j]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, list], ids=["numpy", "jax", "list"])
def test_fields_without_hash(kind):
    ids = kind(np.arange(T, dtype=np.int32) // 10)
    want = I // 10 == J // 10
    np.testing.assert_array_equal(shown(Same(ids)), want)
    np.testing.assert_array_equal(shown(Same(ids) & causal()), want & (J <= I))
    got = jax.jit(lambda q: flash_attention(q, q, q, mask=Same(ids)))(Q)
    np.testing.assert_allclose(got, flash_attention(Q, Q, Q, mask=want), rtol=1e-5, atol=2e-6)
    assert block_mask_cache.info()[:2] == (1, 2)
    if kind is not jnp.asarray:
        ids[0] = 3
        assert shown(Same(ids))[0, 35]


KNOWN = {
    "causal": lambda: causal() & (sliding_window(5) | sinks(2)),
    "documents": lambda: documents(np.arange(T) // 10),
    "documents of jax": lambda: documents(jax.device_put(np.arange(T) // 10)),
    "function": lambda: lambda b, h, i, j: j <= i,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_while_something_is_traced(name):
    """Under jit, vmap and grad a predicate of constants makes the block mask that it makes outside."""
    predicate, masks = KNOWN[name](), []

    def loss(x):
        masks.append(BlockMask.from_predicate(predicate, (1, 1, T, T)))
        return jnp.where(masks[-1].to_dense()[0, 0], x, 0).sum()

    x = jnp.ones((T, T))
    loss(x)
    for under in (jax.jit(loss), jax.grad(loss), jax.jit(jax.grad(loss))):
        under(x)
    jax.vmap(loss)(x[None])
    first, *others = masks
    assert len(others) == 4
    for mask in others:
        assert not any(isinstance(y, jax.core.Tracer) for y in jax.tree.leaves(mask))
        jax.tree.map(np.testing.assert_array_equal, mask, first)
    jax.jit(lambda x: BlockMask.from_mask(np.tri(T, dtype=bool)[None, None]).row_ends + x)(1)


def test_tracers_are_said():
    """A block mask that really depends on traced values says so, and what to do; with sizes given it is made. Attention
    evaluates such a function where it masks, and keeps nothing."""

    def make(n, **sizes):
        return BlockMask.from_predicate(lambda b, h, i, j: j < n, (1, 1, T, T), **sizes).to_dense(jnp.float32)

    with pytest.raises(ValueError, match=r"depends on traced values, .* pass max_tiles and max_parts"):
        jax.jit(make)(7)
    for mask, x in ((lambda n: lambda b, h, i, j: j < n, 7), (documents, jnp.arange(T) // 9)):
        got = jax.jit(lambda x, mask=mask: flash_attention(Q, Q, Q, mask=mask(x)))(x)
        np.testing.assert_allclose(got, flash_attention(Q, Q, Q, mask=mask(x)), rtol=1e-5, atol=2e-6)
    block_mask_cache.clear()
    np.testing.assert_array_equal(jax.jit(lambda n: make(n, max_tiles=4, max_parts=4))(7)[0, 0], (J < 7) | (I < 0))
    assert block_mask_cache.info().currsize == 0


def test_lists_in_numpy_are_those_under_jit():
    """What is known is built by NumPy, what is traced on the device: lists and tiles are the same."""
    seen = np.random.default_rng(2).random((2, 2, 150, 210)) < np.array([0, 0.01, 0.9, 1]).reshape(2, 2, 1, 1)
    make = functools.partial(BlockMask.from_mask, block_m=32, block_n=32, max_tiles=35, max_parts=140)
    known, traced = make(seen), jax.jit(make)(seen)
    for name in ("row_ends", "col_ends"):
        np.testing.assert_array_equal(getattr(known, name), getattr(traced, name))
    for name in ("row_tiles", "col_tiles"):  # the tiles; bits that are alike are stored once where they are known
        ours, theirs = (np.asarray(getattr(mask, name)) for mask in (known, traced))
        np.testing.assert_array_equal(ours[..., 0], theirs[..., 0])
        np.testing.assert_array_equal(ours[..., 1] >= 0, theirs[..., 1] >= 0)
    for mask in (known, traced):
        np.testing.assert_array_equal(mask.to_dense(), seen)


def test_block_masks_are_bounded_by_bytes(monkeypatch):
    """What a mask and its predicate hold counts; the least recently used go; nothing that is too large is kept."""
    dense = np.random.default_rng(1).random((5, 1, 1, T, T)) < 0.5
    of = [from_dense(x) for x in dense]
    one = cached(of[0], *SHAPE)
    size = sum(x.nbytes for x in jax.tree.leaves(one)) + dense[0].nbytes
    assert block_mask_cache.info() == CacheInfo(0, 1, 256, 1, size)
    on_device = jax.device_put(dense[1])
    cached(lambda b, h, i, j: on_device[0, 0, i, j], *SHAPE)
    assert block_mask_cache.info().nbytes == 2 * size
    monkeypatch.setattr(block_mask_cache, "max_bytes", 3 * size + 1)
    assert cached(of[0], *SHAPE) is one
    for predicate in of[2:]:
        cached(predicate, *SHAPE)
    info = block_mask_cache.info()
    assert (info.currsize, info.nbytes) == (3, 3 * size)
    assert cached(of[0], *SHAPE) is not one  # which had gone
    monkeypatch.setattr(block_mask_cache, "max_bytes", size - 1)
    assert cached(of[1], *SHAPE) is not cached(of[1], *SHAPE)


def test_arrays_of_equal_contents_are_one_program():
    """Arrays are arguments of what is compiled, so that other ids do not compile anew."""
    from jax_flash_attn2.masks.sources import _words

    cached(documents(np.arange(T) // 10), *SHAPE)
    before = _words._cache_size()
    for n in (7, 9):
        cached(documents(np.arange(T) // n), *SHAPE)
        cached(padding(np.arange(T) < n) & documents(np.arange(T) // n), *SHAPE)
    assert _words._cache_size() == before + 1


def test_lru():
    cache, made = Lru(2, 10), []

    def get(key, size=1):
        return cache.get(key, lambda: made.append(key) or (key, size), lambda value: value[1])

    for key in (1, 2, 1, 3, 1, 2):  # 3 pushes 2 out, and 2 then 3
        assert get(key) == (key, 1)
    assert made == [1, 2, 3, 2]
    assert cache.info() == (2, 4, 2, 2, 2)
    get(4, 9)
    assert cache.info()[3:] == (2, 10)
    get(5, 11)  # is not kept, and nothing goes for it
    assert cache.info()[3:] == (2, 10)
    get(6, 10)
    assert cache.info()[3:] == (1, 10)
    assert get(6) == (6, 10)
    cache.get(6, lambda: (6, 2), lambda value: value[1], usable=lambda value: False)
    assert cache.info()[3:] == (1, 2)
    cache.clear()
    assert cache.info() == (0, 0, 2, 0, 0)


def test_lru_of_what_fails():
    """An error is the caller's; who waits for it tries by himself, and nothing is held."""
    cache, start, results = Lru(2, 10), threading.Barrier(4), []

    def fails():
        raise ValueError("no")

    def ask():
        start.wait()
        try:
            cache.get("key", fails, lambda value: 1)
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == ["no"] * 4
    assert cache.info() == (0, 4, 2, 0, 0)
    assert cache.get("key", lambda: "value", lambda value: 1) == "value"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_while_something_is_made():
    """The child, in which nobody is at it any more and nobody holds the lock, makes it itself."""
    cache, begun, go_on = Lru(2, 10), threading.Event(), threading.Event()
    make = lambda: begun.set() or (go_on.wait() and 1)
    thread = threading.Thread(target=lambda: cache.get("key", make, lambda _: 1))
    thread.start()
    begun.wait()
    with cache._lock:
        child = os.fork()
        if not child:
            try:
                signal.alarm(20)
                assert cache.get("key", lambda: 2, lambda _: 1) == 2
                os._exit(0)
            finally:
                os._exit(1)
    go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get("key", lambda: 2, lambda _: 1) == 1
