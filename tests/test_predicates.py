"""Predicates: what each means, how they combine, and what they refuse."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import run

from jax_flash_attn2 import flash_attention
from jax_flash_attn2.masks import (
    BlockMask,
    Predicate,
    all_of,
    any_of,
    causal,
    dense_attention,
    dilated,
    documents,
    evaluate,
    from_dense,
    negate,
    padding,
    prefix_lm,
    sinks,
    sliding_window,
)

RNG = np.random.default_rng(0)
B, H, SQ, SK = 2, 3, 7, 10
I, J = np.arange(SQ)[:, None], np.arange(SK)
Q_IDS, KV_IDS = np.array([[0, 0, 1, 1, 1, -1, -1], [2, 2, 2, 0, 0, 0, -2]]), RNG.integers(-1, 3, (2, SK))
REAL = RNG.random((B, SK)) < 0.7
DENSE = RNG.random((B, H, SQ, SK)) < 0.5


def arange(n):
    return np.arange(n, dtype=np.int32)


def dense(predicate, shape=(B, H, SQ, SK)):
    return evaluate(predicate, *map(arange, shape))


def same_documents(q_ids, kv_ids):
    return (q_ids[:, None, :, None] == kv_ids[:, None, None]) & (q_ids >= 0)[:, None, :, None]


def lower(b, h, i, j):
    return j <= i


# Predicates, and what they mean in NumPy.
MEANINGS = {
    "causal": (lambda: causal(), I >= J),
    "causal, aligned to the end": (lambda: causal(SK - SQ), J <= I + SK - SQ),
    "causal, behind": (lambda: causal(-2), J <= I - 2),
    "window": (lambda: sliding_window(2, 1), (I - 2 <= J) & (J <= I + 1)),
    "window, of the past": (lambda: sliding_window(2), (I - 2 <= J) & (J <= I)),
    "window, shifted": (lambda: sliding_window(1, 0, 3), (I + 2 <= J) & (J <= I + 3)),
    "window without left": (lambda: sliding_window(None, 1), J <= I + 1),
    "window without right": (lambda: sliding_window(2, None), I - 2 <= J),
    "window without bounds": (lambda: sliding_window(None, None, 2**30), I + J >= 0),
    "window of all there is": (lambda: sliding_window(2**40, 2**40), I + J >= 0),
    "documents": (lambda: documents(Q_IDS, KV_IDS), same_documents(Q_IDS, KV_IDS)),
    "documents of one batch": (lambda: documents(Q_IDS[0], KV_IDS), same_documents(Q_IDS[:1], KV_IDS)),
    "documents of int64": (lambda: documents(Q_IDS[1], KV_IDS[1].astype(np.int64)), same_documents(Q_IDS, KV_IDS)[1:]),
    "documents on the device": (lambda: documents(*map(jnp.asarray, (Q_IDS, KV_IDS))), same_documents(Q_IDS, KV_IDS)),
    "prefix": (lambda: prefix_lm(4), (J <= I) | (J < 4)),
    "prefix, aligned to the end": (lambda: prefix_lm(4, SK - SQ), (J <= I + SK - SQ) | (J < 4)),
    "prefixes": (lambda: prefix_lm(np.array([3, 0])), (J <= I) | (np.array([3, 0])[:, None, None, None] > J)),
    "0-d prefix": (lambda: prefix_lm(jnp.int32(3)), (J <= I) | (J < 3)),
    "dilated": (lambda: dilated(2, 2), np.isin(I - J, (0, 2, 4))),
    "dilated, shifted": (lambda: dilated(1, 3, 2), np.isin(I + 2 - J, (0, 3))),
    "sinks": (lambda: sinks(3), J + 0 * I < 3),
    "padding": (lambda: padding(REAL), REAL[:, None, None]),
    "padding of integers": (lambda: padding(2 * REAL[0].astype(np.int8)), REAL[:1, None, None]),
    "dense": (lambda: from_dense(DENSE), DENSE),
    "dense, broadcast": (lambda: from_dense(jnp.asarray(DENSE[0, :, :, :1])), DENSE[:1, :, :, :1]),
    "dense, of nothing": (lambda: from_dense(np.ones((SQ, 0), bool)), False),
    "a function": (lambda: all_of(lower), I >= J),
    "a function of all four": (lambda: any_of(lambda b, h, i, j: (b + h + i + j) % 2 == 0), None),
    "a constant": (lambda: all_of(lambda b, h, i, j: True), True),
    "all": (lambda: all_of(causal(), sliding_window(2), padding(REAL)), (I >= J) & (I - J <= 2) & REAL[:, None, None]),
    "all of none": (lambda: all_of(), True),
    "any": (lambda: any_of(sinks(2), sliding_window(1), lower), (J < 2) | (I >= J)),
    "any of none": (lambda: any_of(), False),
    "negated": (lambda: negate(causal()), I < J),
    "negated function": (lambda: negate(lower), I < J),
    "operators": (lambda: causal() & (sliding_window(2) | sinks(1)) & ~padding(REAL), None),
    "function on the left": (lambda: lower & sliding_window(2) & ~(lower | sinks(1)), False),
}
MEANINGS["a function of all four"] = (
    MEANINGS["a function of all four"][0],
    sum(np.ogrid[:B, :H, :SQ, :SK]) % 2 == 0,
)
MEANINGS["operators"] = (
    MEANINGS["operators"][0],
    (I >= J) & ((I - J <= 2) | (J < 1)) & ~REAL[:, None, None],
)


@pytest.mark.parametrize("name", MEANINGS)
def test_predicates(name):
    """Each is what NumPy says it is; traced indices and traced arrays make no difference."""
    build, want = MEANINGS[name]
    want = np.broadcast_to(want, (B, H, SQ, SK))
    got = run(evaluate, build(), *map(arange, (B, H, SQ, SK)))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, want)
    if " " not in name:  # one of each kind; without jit each step is compiled by itself, which takes a while
        np.testing.assert_array_equal(dense(build()), want)


@pytest.mark.parametrize("name", ["documents", "operators", "prefixes", "a function of all four"])
def test_any_indices(name):
    """A block of a mask is that part of it, whatever the order."""
    build, want = MEANINGS[name]
    want = np.broadcast_to(want, (B, H, SQ, SK))
    b, h, i, j = np.array([1]), np.array([2, 0]), np.array([6, 0, 3]), np.array([9, 2, 2, 5])
    np.testing.assert_array_equal(run(evaluate, build(), b, h, i, j), want[np.ix_(b, h, i, j)])
    assert jax.eval_shape(evaluate, build(), arange(0), h, i, j).shape == (0, 2, 3, 4)


def test_indices_beyond_the_end():
    b, h, i, j = np.array([1, 2]), np.array([2, 3]), arange(3), arange(4)
    assert not run(evaluate, documents(Q_IDS, KV_IDS), b, h, i + SQ, j).any()
    assert not run(evaluate, documents(Q_IDS, KV_IDS), b, h, i, j + SK).any()
    seen = run(evaluate, padding(REAL) | from_dense(DENSE), b, h, i, j)
    np.testing.assert_array_equal(seen[0, 0], REAL[1, :4] | DENSE[1, 2, :3, :4])
    np.testing.assert_array_equal(seen[0, 1], np.broadcast_to(REAL[1, :4], (3, 4)))
    assert not seen[1].any()


def test_rows_are_read_once():
    """Evaluated over Q * K elements, ids are gathered Q + K times."""

    def equations(jaxpr):
        for eqn in jaxpr.eqns:
            yield from equations(eqn.params["jaxpr"]) if "jaxpr" in eqn.params else (eqn,)

    jaxpr = jax.make_jaxpr(evaluate)(documents(Q_IDS, KV_IDS), *map(arange, (B, 1, SQ, SK)))
    gathers = [eqn.outvars[0].aval.size for eqn in equations(jaxpr) if eqn.primitive.name == "gather"]
    assert sorted(gathers) == sorted([B * SQ, B * SK])


def test_equality():
    """By value where all is static, by identity where there are arrays."""

    def static():
        return causal(1) & (sliding_window(3, None) | sinks(2)) & ~dilated(1, 2) & prefix_lm(5) & lower

    assert static() == static()
    assert hash(static()) == hash(static())
    assert causal() != causal(1)
    assert causal() & sinks(1) != sinks(1) & causal()
    assert negate(negate(causal())) == causal()
    assert all_of(causal(), all_of(sinks(1), sinks(2))) == all_of(causal(), sinks(1), sinks(2))
    ids = documents(Q_IDS)
    assert ids == ids
    assert ids != documents(Q_IDS)
    assert ids & causal() == ids & causal()
    assert hash(ids & causal()) == hash(ids & causal())
    assert padding(REAL) != padding(REAL)
    assert len({static(), static(), ids, documents(Q_IDS)}) == 3
    assert "int32" in repr(ids)


def test_predicates_as_arguments():
    """A jitted function is traced anew for another structure, not for other arrays."""
    traces = []

    @jax.jit
    def count(predicate):
        traces.append(predicate)
        return dense(predicate).sum()

    for ids in (Q_IDS, Q_IDS[::-1].copy()):
        assert count(documents(ids) & causal()) == dense(documents(ids) & causal()).sum()
    assert len(traces) == 1
    assert repr(traces[0])
    count(documents(Q_IDS) & causal(1))
    assert len(traces) == 2


def test_own_class():
    """Parameters of one's own, with operators and equality."""

    @dataclasses.dataclass(frozen=True)
    class Stride(Predicate):
        n: int

        def __call__(self, b, h, i, j):
            return (i - j) % self.n == 0

    np.testing.assert_array_equal(
        dense(Stride(3) & causal()), np.broadcast_to((I >= J) & ((I - J) % 3 == 0), DENSE.shape)
    )
    assert Stride(3) & causal() == Stride(3) & causal()
    with pytest.raises(NotImplementedError, match=r"Predicate must define __call__"):
        dense(Predicate())


REFUSED = {
    "causal(1.5)": (lambda: causal(1.5), TypeError, "offset must be an integer"),
    "causal(True)": (lambda: causal(True), TypeError, "offset must be an integer"),
    "causal(array)": (lambda: causal(jnp.int32(1)), TypeError, "for a traced one write the predicate as a function"),
    "causal(2**40)": (lambda: causal(2**40), ValueError, "offset must be within"),
    "window(-1)": (lambda: sliding_window(-1), ValueError, r"left must be at least 0 or None \(no bound\), got -1"),
    "window(right=x)": (lambda: sliding_window(1, "x"), TypeError, "right must be an integer or None"),
    "dilated(1, 0)": (lambda: dilated(1, 0), ValueError, "dilation must be at least 1, got 0"),
    "sinks(-1)": (lambda: sinks(-1), ValueError, "size must be at least 0"),
    "prefix of floats": (lambda: prefix_lm(np.ones(2)), TypeError, r"prefix must be an array of integers \[B\]"),
    "documents of a list": (lambda: documents([1, 2]), TypeError, r"q_ids must be an array of integers \[B, Sq\]"),
    "documents of floats": (lambda: documents(Q_IDS, KV_IDS * 1.0), TypeError, "kv_ids must be .* float64"),
    "documents [1, 1, S]": (lambda: documents(Q_IDS[None]), ValueError, "q_ids must have axes"),
    "documents 2 and 3": (lambda: documents(Q_IDS, np.zeros((3, 5), int)), ValueError, "one batch size"),
    "padding of floats": (lambda: padding(REAL * 1.0), TypeError, "booleans or integers"),
    "dense of integers": (lambda: from_dense(DENSE * 1), TypeError, "of numbers, mask != 0"),
    "dense of 5 axes": (lambda: from_dense(DENSE[None]), ValueError, "mask must have axes"),
    "all of an array": (lambda: all_of(DENSE), TypeError, "a dense mask is a predicate through from_dense"),
    "& 3": (lambda: causal() & 3, TypeError, "unsupported operand"),
    "a number": (lambda: dense(lambda b, h, i, j: j), TypeError, r"<lambda> \(.*:\d+\) must return a bool, got .*in"),
    "nothing": (lambda: dense(lambda b, h, i, j: None), TypeError, "must return a bool, got None"),
    "a number within": (lambda: dense(causal() & (lambda b, h, i, j: j)), TypeError, "must return a bool"),
    "a row": (lambda: dense(lambda b, h, i, j: jnp.asarray(REAL)[b]), ValueError, "must return a single bool"),
    "2-D indices": (lambda: evaluate(causal(), I, arange(1), arange(2), arange(2)), ValueError, "b must have axes"),
    "float indices": (lambda: evaluate(causal(), arange(1), arange(1), arange(2), np.ones(2)), TypeError, "j must be"),
}  # fmt: skip


LENGTHS = {
    "rows": (documents(Q_IDS[:, :-1], KV_IDS), "q_ids of documents must have shape [B or 1, Sq] = (2, 7)"),
    "keys": (documents(Q_IDS, KV_IDS[:, 1:]), "kv_ids of documents must have shape [B or 1, Sk] = (2, 10)"),
    "batches": (documents(np.zeros((4, SQ), int), np.zeros((4, SK), int)), "got shape (4, 7)"),
    "prefixes": (prefix_lm(np.arange(3)), "prefix must have shape [B or 1] = (2,)"),
    "padding": (padding(REAL[:, 1:]), "mask of padding must have shape [B or 1, Sk] = (2, 10)"),
    "dense": (from_dense(DENSE[:, :2]), "mask of from_dense must have shape [B or 1, H or 1, Sq or 1, Sk or 1]"),
    "within": (causal() & (sinks(1) | ~padding(REAL[:, 1:])), "as the mask [B, H, Sq, Sk] is (2, 3, 7, 10)"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_arrays_of_other_lengths_are_refused(name):
    """Wherever a mask of some shape is made of a predicate."""
    predicate, message = LENGTHS[name]
    q, k = jnp.ones((B, SQ, H, 8)), jnp.ones((B, SK, H, 8))
    for make in (
        lambda: flash_attention(q, k, k, mask=predicate),
        lambda: dense_attention(q, k, k, mask=predicate),
        lambda: BlockMask.from_predicate(predicate, (B, H, SQ, SK)),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def test_has_no_truth():
    """`and`, `or` and `not` would drop one of two predicates, or both."""
    for ask in (
        lambda: causal() and sinks(3),
        lambda: causal() or sinks(3),
        lambda: not (causal() & sinks(3)),
        lambda: 1 if all_of(lower) else 2,
    ):
        with pytest.raises(TypeError, match=r"neither true nor false, got .* combine predicates by &, \| and ~"):
            ask()


IDS, LISTED = Q_IDS[0], [int(n) for n in Q_IDS[0]]
TRACED = {
    "a list": (lambda b, h, i, j: LISTED[i] == LISTED[j], "make jnp.asarray of it"),
    "an array of NumPy": (lambda b, h, i, j: IDS[i] == IDS[j], "make jnp.asarray of it"),
    "one of two axes": (lambda b, h, i, j: REAL[b, j], "make jnp.asarray of it"),
    "a function of NumPy": (lambda b, h, i, j: np.abs(i - j) < 3, "use jnp's functions"),
    "and": (lambda b, h, i, j: j <= i and j > 3, "use jnp.where, &, | and ~"),
    "if": (lambda b, h, i, j: True if j <= i else j < 3, "use jnp.where, &, | and ~"),
    "int": (lambda b, h, i, j: int(i) > 3, "use jnp.where, &, | and ~"),
}


@pytest.mark.parametrize("name", TRACED)
def test_indices_are_traced(name):
    """What cannot be done with them is said in words of masks, of a part of a predicate too."""
    for predicate in (TRACED[name][0], causal() & TRACED[name][0]):
        with pytest.raises(TypeError, match=f"<lambda>.* {re.escape(TRACED[name][1])}") as caught:
            dense(predicate)
        assert type(caught.value) is TypeError


@pytest.mark.parametrize("shape", [(1, 1, -4, 4), (1, 1, 4), (1, 1, 4, True), (1, 1, 4, 4.0)])
def test_shapes_are_four_lengths(shape):
    with pytest.raises(ValueError, match="shape must be four lengths"):
        BlockMask.from_predicate(causal(), shape)


def test_documents_beyond_int32():
    with pytest.raises(ValueError, match="q_ids must fit int32, got values from 0 to 4294967296"):
        documents(np.array([0, 2**32]))


def test_arrays_are_kept_as_they_are():
    """What NumPy's array holds when a predicate is made of it is what counts."""
    real, ids, shown = REAL.copy(), Q_IDS.copy(), DENSE.copy()
    predicates = padding(real), documents(ids, KV_IDS), from_dense(shown)
    before = [np.asarray(dense(p)) for p in predicates]
    for x in (real, ids, shown):
        x[:] = 0
    for p, want in zip(predicates, before, strict=True):
        np.testing.assert_array_equal(dense(p), want)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
