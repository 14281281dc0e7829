"""`Mask` against NumPy arrays of weights: every way to hold one, both modes, outside jit and under it."""

import dataclasses
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash_attn2.masks import Mask

SHAPE = (2, 3, 4, 5)
# Of two masks, or of a mask and what it is applied to.
SHAPES = [(SHAPE, SHAPE), ((1, 3, 4, 5), SHAPE), ((2, 1, 4, 5), SHAPE)]
KINDS = ("dense", "sparse", "full", "empty")
DTYPES = (np.bool_, np.float32, np.float16)
ROOM = 3  # what a sparse mask has beyond its entries


pytestmark = pytest.mark.usefixtures("compiled_quickly")


few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Held:
    """A mask to be drawn: what it is can be told from the fields, what it should be is `weights`."""

    kind: str
    dtype: type
    seed: int
    share: float

    def weights(self, shape):
        """In eighths, so that no sum is rounded."""
        rng = np.random.default_rng(self.seed)
        share = {"full": 1, "empty": 0}.get(self.kind, self.share)
        shown = rng.random(shape) < share
        return (shown * (1 if self.kind == "full" else rng.integers(1, 9, shape) / 8)).astype(self.dtype)

    def mask(self, shape):
        if self.kind in ("full", "empty"):
            return getattr(Mask, self.kind)(shape, self.dtype)
        weights = self.weights(shape)
        if self.kind == "dense":
            return Mask.from_dense(weights)
        # Room for all weights, so that how many are drawn does not decide the shapes.
        return Mask.from_indices(shape, *entries(weights, weights.size + ROOM))


def entries(weights, size):
    """`indices`, `ptr` and `data`, with junk in what is unused."""
    flat = weights.reshape(-1, weights.shape[-1])
    indices, data = np.full(size, 2**31 - 1, np.int32), np.ones(size, weights.dtype)
    at = np.nonzero(flat)
    indices[: at[0].size], data[: at[0].size] = at[1], flat[at]
    return indices, np.concatenate([[0], np.cumsum((flat != 0).sum(1))]).astype(np.int32), data


HELD = st.builds(
    Held, st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.9])
)
MODES = st.sampled_from(["dense", "sparse"])


def weighed(x, weights, inverse):
    """The definition."""
    hidden, dtype = weights == 0, np.promote_types(x.dtype, weights.dtype)
    x, weights = x.astype(dtype), weights.astype(dtype)
    return np.where(hidden, 0, x / np.where(hidden, 1, weights) if inverse else x * weights)


@jax.jit
def read(mask):
    return mask.to_dense(), mask.to_indices(mask.size or 200), mask.density()


@hypothesis.given(HELD, st.sampled_from([SHAPE, (1, 2, 1, 9)]), st.booleans())
@few
def test_reads(held, shape, traced):
    mask, want = held.mask(shape), held.weights(shape)
    dense, listed, density = read(mask) if traced else (mask.to_dense(), mask.to_indices(), mask.density())
    assert (mask.kind, mask.shape, mask.dtype) == (held.kind, shape, held.dtype)
    assert (dense.dtype, listed.kind, listed.dtype, listed.indices.dtype) == (held.dtype, "sparse", held.dtype, "int32")
    np.testing.assert_array_equal(dense, want)
    np.testing.assert_array_equal(listed.to_dense(), want)
    indices, ptr, data = entries(want, np.count_nonzero(want))
    np.testing.assert_array_equal(listed.ptr, ptr)
    np.testing.assert_array_equal(np.asarray(listed.indices)[: ptr[-1]], indices)
    np.testing.assert_array_equal(np.asarray(listed.data)[: ptr[-1]], data)
    assert traced or listed.size == ptr[-1]
    np.testing.assert_allclose(density, (want != 0).mean(), rtol=1e-6)


def sized(mask, size):
    """A dense mask as a list with so much room, as traced ones must be made."""
    return mask if size is None or mask.kind != "dense" else mask.to_indices(size)


def weigh(mask, x, mode, size):
    mask = sized(mask, size)
    return mask.apply(x, mode), mask.apply_inverse(x, mode)


weigh_traced = jax.jit(weigh, static_argnames=("mode", "size"))


@hypothesis.given(HELD, st.sampled_from(SHAPES), st.sampled_from([np.float32, np.float16]), MODES, st.booleans())
@few
def test_applies(held, shapes, dtype, mode, traced):
    shape, onto = shapes
    x = np.random.default_rng(held.seed).standard_normal(onto).astype(dtype)
    size = math.prod(shape) if mode == "sparse" else None  # whatever is drawn, so that little is compiled
    results = (weigh_traced if traced else weigh)(held.mask(shape), x, mode, size)
    for y, inverse in zip(results, (False, True), strict=True):
        assert (y.dtype, y.shape) == (dtype, onto)
        np.testing.assert_allclose(y, weighed(x, held.weights(shape), inverse), rtol=4 * np.finfo(dtype).eps)


def merge(a, b, mode, size):
    merged = sized(a, size).merge(sized(b, size), mode)
    return merged if size is None or merged.kind == "full" else merged.to_indices(size)


merge_traced = jax.jit(merge, static_argnames=("mode", "size"))


@hypothesis.given(HELD, HELD, st.sampled_from(SHAPES), st.booleans(), MODES, st.booleans())
@few
def test_merges(held, other, shapes, swap, mode, traced):
    a, b = shapes[::-1] if swap else shapes
    size = math.prod(np.maximum(a, b)) if mode == "sparse" else None
    mask = (merge_traced if traced else merge)(held.mask(a), other.mask(b), mode=mode, size=size)
    weights, added = held.weights(a), other.weights(b)
    dtype = np.promote_types(weights.dtype, added.dtype)
    want = weights | added if dtype.kind == "b" else np.minimum(weights.astype(dtype) + added.astype(dtype), 1)
    assert (mask.dtype, mask.shape) == (dtype, want.shape)
    if "full" in (held.kind, other.kind):
        assert mask.kind == "full"
    elif "empty" not in (held.kind, other.kind) or mode == "sparse":
        assert (mask.kind, mask.size) == (mode, want.size)
    np.testing.assert_array_equal(mask.to_dense(jnp.float32), want)


def test_sizes_are_found():
    """Outside jit as many as there are, under it as many as there is room for."""
    a, b = (Held("sparse", np.float32, seed, 0.5).mask(SHAPE) for seed in (0, 1))
    mask = a.merge(b, "sparse")
    assert mask.size == np.count_nonzero(mask.to_dense())
    assert a.to_indices().size == np.count_nonzero(a.to_dense())
    assert jax.eval_shape(lambda a, b: a.merge(b, "sparse"), a, b).size == a.size + b.size


ROW_INDICES = np.array([[4, 0, -1, 4], [-1, -1, -1, -1], [1, 2, 3, 0], [2, 2, 2, 2]], np.int32).reshape(1, 2, 2, 4)
ROW_DATA = (np.arange(16).reshape(1, 2, 2, 4) % 4 + 1).astype(np.float32) / 8


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("data", [None, ROW_DATA, ROW_DATA > 0.2], ids=["ones", "weights", "bool"])
def test_row_indices(data, traced):
    """Negative ones are unused, and what a row names more than once is summed and clipped."""
    shape = (1, 2, 2, 6)
    make = lambda indices, data: Mask.from_row_indices(shape, indices, data)
    mask = (jax.jit(make) if traced else make)(ROW_INDICES, data)
    dtype = np.dtype(np.float32) if data is None else data.dtype
    want = np.zeros((4, 7), np.float32)
    rows = np.arange(4)[:, None]
    np.add.at(want, (rows, ROW_INDICES.reshape(4, 4)), 1 if data is None else data.reshape(4, 4).astype(np.float32))
    want = np.minimum(want[:, :6], 1).reshape(shape).astype(dtype)  # the last column took what is unused
    assert (mask.dtype, mask.overflow) == (dtype, None)
    assert mask.size == (16 if traced else 7)  # (4, 0), (), (1, 2, 3, 0) and (2)
    np.testing.assert_array_equal(mask.to_dense(), want)
    roomy = Mask.from_row_indices(shape, ROW_INDICES, data, size=30)
    assert roomy.size == 30
    np.testing.assert_array_equal(roomy.to_dense(), want)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("canonical", [False, True])
def test_indices(canonical, traced):
    """Keys in any order and more than once, unless it is promised that they are not."""
    shape, ptr = (1, 1, 3, 6), np.array([0, 3, 3, 5])  # int64
    indices = np.array([0, 2, 5, 1, 4, 77], np.int32) if canonical else np.array([5, 0, 5, 4, 1, 77], np.int32)
    make = lambda indices, ptr: Mask.from_indices(shape, indices, ptr, dtype=jnp.float16, canonical=canonical)
    mask = (jax.jit(make) if traced else make)(indices, ptr)
    assert mask.size == 6
    np.testing.assert_array_equal(mask.ptr, [0, 3, 3, 5] if canonical else [0, 2, 2, 4])
    want = np.zeros((3, 6), np.float16)
    want[0, [0, 2, 5] if canonical else [0, 5]] = want[2, [1, 4]] = 1
    np.testing.assert_array_equal(mask.to_dense(), want[None, None])


def test_from_dense_with_a_size():
    weights = Held("dense", np.float32, 0, 0.5).weights(SHAPE)
    mask = Mask.from_dense(weights, size=120)
    assert (mask.kind, mask.size) == ("sparse", 120)
    np.testing.assert_array_equal(mask.to_dense(), weights)


def test_astype():
    weights = Held("dense", np.float32, 0, 0.5).weights(SHAPE)
    for mask in (Mask.from_dense(weights), Mask.from_dense(weights).to_indices()):
        assert mask.astype(bool).dtype == bool
        np.testing.assert_array_equal(mask.astype(bool).to_dense(), weights != 0)
        np.testing.assert_array_equal(mask.to_dense(jnp.bfloat16), weights.astype(jnp.bfloat16))


def test_is_a_pytree():
    """Arrays are leaves, what they mean is static, and a mask may be an argument, a result, a constant and a carry."""
    weights = Held("dense", np.float32, 0, 0.5).weights(SHAPE)
    dense = Mask.from_dense(weights)
    listed = dense.to_indices()
    assert [len(jax.tree.leaves(m)) for m in (dense, listed, Mask.full(SHAPE), Mask.empty(SHAPE))] == [1, 3, 0, 0]
    doubled = jax.jit(lambda: listed.merge(dense.to_indices(), "sparse"))()  # constants
    np.testing.assert_array_equal(doubled.to_dense(), np.minimum(2 * weights, 1))
    held, _ = jax.lax.scan(lambda m, _: (m.merge(listed), None), dense, length=3)
    np.testing.assert_array_equal(held.to_dense(), np.minimum(4 * weights, 1))
    assert jax.eval_shape(lambda m: m.to_indices(7), dense).indices.shape == (7,)
    assert repr(listed) == f"Mask([2, 3, 4, 5], sparse, float32, size={listed.size})"
    assert repr(Mask.empty(SHAPE, bool)) == "Mask([2, 3, 4, 5], empty, bool)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_hidden_is_zero_whatever_is_there(kind, mode):
    held = Held(kind, np.float32, 3, 0.5)
    weights = held.weights(SHAPE)
    x = np.where(weights == 0, np.nan, 2).astype(np.float32)
    x[..., 0] = np.where(weights[..., 0] == 0, np.inf, 2)
    np.testing.assert_array_equal(held.mask(SHAPE).apply(x, mode), 2 * weights)
    np.testing.assert_array_equal(np.isfinite(held.mask(SHAPE).apply_inverse(x, mode)), np.ones(SHAPE, bool))


@pytest.mark.parametrize("shape", [(0, 1, 2, 3), (1, 1, 0, 3), (1, 2, 3, 0)])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_nothing(shape, mode):
    mask = Mask.from_dense(np.ones(shape, np.float32))
    assert mask.apply(np.ones(shape, np.float32), mode).shape == shape
    assert mask.merge(mask.to_indices(), mode).to_dense().shape == shape
    assert (mask.density(), Mask.full(shape).density()) == (0, 0)


def test_places_beyond_int32():
    """Rows and keys are kept apart: 3 * 2**30 weights cannot be numbered."""
    shape = (1, 1, 3, 2**30)
    a, b = (
        Mask.from_row_indices(shape, np.array(keys, np.int32).reshape(1, 1, 3, 2), np.full((1, 1, 3, 2), 0.25, "f"))
        for keys in ([[0, 2**30 - 1], [-1, -1], [7, 2**30 - 1]], [[5, 1], [2**30 - 1, 3], [7, -1]])
    )
    mask = a.merge(b, "sparse")
    np.testing.assert_array_equal(mask.ptr, [0, 4, 6, 8])
    np.testing.assert_array_equal(mask.indices, [0, 1, 5, 2**30 - 1, 3, 2**30 - 1, 7, 2**30 - 1])
    np.testing.assert_array_equal(mask.data, [0.25] * 6 + [0.5, 0.25])
    np.testing.assert_allclose(mask.density(), 8 / (3 * 2**30))


def test_gradients():
    """In dense mode of every weight, in sparse mode of those that are stored; of x; never NaN."""
    weights = Held("dense", np.float32, 1, 0.5).weights(SHAPE)
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    shown = weights != 0

    def total(weights, x, inverse):
        mask = Mask.from_dense(weights)
        return (mask.apply_inverse(x) if inverse else mask.apply(x)).sum()

    dw, dx = jax.grad(total, (0, 1))(weights, x, False)
    np.testing.assert_allclose(dw, x)
    np.testing.assert_allclose(dx, weights)
    dw, dx = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)(weights, x, True)
    safe = np.where(shown, weights, 1)
    np.testing.assert_allclose(dw, np.where(shown, -x / safe**2, 0), rtol=1e-6)
    np.testing.assert_allclose(dx, np.where(shown, 1 / safe, 0), rtol=1e-6)

    listed = Mask.from_dense(weights).to_indices()
    ddata, dx = jax.grad(lambda m, x: m.apply(x, "sparse").sum(), (0, 1), allow_int=True)(listed, x)
    np.testing.assert_allclose(ddata.data, x[shown])
    np.testing.assert_allclose(dx, weights)
    other = Mask.from_dense(np.full(SHAPE, 0.0625, np.float32)).to_indices()
    merged = lambda data, mode: dataclasses.replace(listed, data=data).merge(other, mode)
    for mode, weight in (("dense", lambda m: m.to_dense()), ("sparse", lambda m: m.data)):
        dw = jax.grad(lambda data, mode=mode, weight=weight: weight(merged(data, mode)).sum())(listed.data)
        np.testing.assert_allclose(dw, weights[shown] < 1)  # clipped where it is 1 already


WEIGHTS = Held("dense", np.float32, 5, 0.5).weights(SHAPE)
COUNT = np.count_nonzero(WEIGHTS)


@pytest.mark.parametrize("size", [COUNT - 1, COUNT, WEIGHTS.size])
def test_overflow(size):
    """One entry too many: an error outside jit; under it a flag and NaN, and an error once it is out."""
    over = size < COUNT
    dense = Mask.from_dense(WEIGHTS)
    if over:
        with pytest.raises(ValueError, match=f"at least the number of entries, {COUNT}, got {size}"):
            dense.to_indices(size)

    @jax.jit
    def listed(dense):
        mask = dense.to_indices(size)
        ones = jnp.ones(SHAPE)
        more = mask.merge(dense.to_indices(WEIGHTS.size), "sparse").to_indices(COUNT)
        uses = [
            mask.to_dense(),
            mask.apply(ones),
            mask.apply(ones, "sparse"),
            mask.apply_inverse(ones),
            more.to_dense(),
        ]
        uses += [mask.merge(dense).to_indices(COUNT).apply(ones, "sparse"), mask.broadcast_to(SHAPE).to_dense()]
        return mask, [*uses, mask.density()]

    mask, uses = listed(dense)
    assert (mask.overflow is None) if size == WEIGHTS.size else mask.overflow == over
    assert all(bool(jnp.isnan(y).all()) == over for y in uses)
    if over:
        for use in (Mask.density, Mask.to_dense, lambda m: m.merge(m, "sparse"), lambda m: m.apply(WEIGHTS)):
            with pytest.raises(ValueError, match="more entries than its size"):
                use(mask)
    else:
        np.testing.assert_array_equal(mask.to_dense(), WEIGHTS)
        np.testing.assert_array_equal(uses[4], np.minimum(2 * WEIGHTS, 1))


@pytest.mark.parametrize("room", [COUNT - 1, COUNT], ids=["over", "fits"])
@pytest.mark.parametrize("make", ["resized", "merged", "row indices", "indices"])
def test_overflow_elsewhere(make, room):
    """Wherever a size is given."""
    indices, ptr, data = (jnp.asarray(x) for x in entries(WEIGHTS, COUNT))
    listed = Mask.from_indices(SHAPE, indices, ptr, data)
    row_indices = np.where(WEIGHTS != 0, np.arange(SHAPE[3], dtype=np.int32), -1)
    result = {
        "resized": lambda listed, ptr, row_indices: listed.to_indices(COUNT + 1).to_indices(room),
        "merged": lambda listed, ptr, row_indices: listed.merge(listed, "sparse").to_indices(room),
        "row indices": lambda listed, ptr, row_indices: Mask.from_row_indices(SHAPE, row_indices, size=room),
        "indices": lambda listed, ptr, row_indices: Mask.from_indices(SHAPE, indices[:room], ptr),
    }[make]
    over = room < COUNT
    mask, dense = jax.jit(lambda *x: (m := result(*x), m.to_dense()))(listed, ptr, row_indices)
    assert mask.overflow == over
    assert np.isnan(dense).all() == np.isnan(mask.data).all() == over
    assert mask.ptr[-1] == room
    if over:
        with pytest.raises(ValueError, match=r"at least the number of entries|at most the size of indices"):
            result(listed, ptr, row_indices)
    else:
        np.testing.assert_array_equal(result(listed, ptr, row_indices).to_dense(), dense)


def test_overflow_of_bools():
    """They cannot be NaN, and so the flag goes with them until they meet what can."""
    dense = Mask.from_dense(WEIGHTS != 0)

    @jax.jit
    def uses(dense):
        mask = dense.to_indices(3)
        ones = jnp.ones(SHAPE)
        both = mask.merge(dense)
        return [
            mask.apply(ones), mask.apply_inverse(ones, "sparse"), mask.to_dense(jnp.float16), both.apply(ones),
            both.density(), mask.astype(jnp.float32).data, both.astype(jnp.float32).dense,
            Mask.empty(SHAPE).merge(mask).data,
        ]  # fmt: skip

    assert all(jnp.isnan(y).all() for y in uses(dense))
    with pytest.raises(TypeError, match="a bool array cannot, got a bool mask"):
        jax.jit(lambda m: m.to_dense())(jax.jit(lambda m: m.to_indices(3))(dense))


X = np.ones(SHAPE, np.float32)
LISTED = entries(WEIGHTS, COUNT)
MESSAGES = {
    "dense type": (lambda: Mask.from_dense([[1]]), TypeError, "dense must be an array, got list"),
    "dense dtype": (lambda: Mask.from_dense(X.astype(int)), TypeError, "bool or floating, got int64; compare with 0"),
    "dense axes": (lambda: Mask.from_dense(X[0]), ValueError, "[B, H, Sq, Sk], got shape (3, 4, 5)"),
    "above 1": (lambda: Mask.from_dense(2 * X), ValueError, "weights in [0, 1], got 2.0 at (0, 0, 0, 0); clip"),
    "below 0": (lambda: Mask.from_dense(jnp.asarray(-X)), ValueError, "dense must have weights in [0, 1], got -1.0 at"),
    "NaN": (lambda: Mask.from_dense(X * np.nan), ValueError, "dense must have weights in [0, 1], got nan at"),
    "shape": (lambda: Mask.full((1, 2, 3)), ValueError, "four lengths (B, H, Sq, Sk), got (1, 2, 3)"),
    "negative shape": (lambda: Mask.full((1, 2, 3, -1)), ValueError, "four lengths"),
    "dtype": (lambda: Mask.empty(SHAPE, jnp.int32), TypeError, "dtype must be one of bool, float16"),
    "indices dtype": (lambda: Mask.from_indices(SHAPE, X, LISTED[1]), TypeError, "must be an array of integers"),
    "indices axes": (lambda: Mask.from_indices(SHAPE, LISTED[0][None], LISTED[1]), ValueError, "one axis [size]"),
    "int32": (
        lambda: Mask.from_indices(SHAPE, LISTED[0].astype(int) + 2**40, LISTED[1]), ValueError, "must fit int32",
    ),
    "ptr shape": (lambda: Mask.from_indices(SHAPE, LISTED[0], LISTED[1][1:]), ValueError, "(25,), got (24,)"),
    "ptr start": (lambda: Mask.from_indices(SHAPE, LISTED[0], LISTED[1] + 1), ValueError, "rise from 0, got 1 at 0;"),
    "ptr falls": (lambda: Mask.from_indices(SHAPE, LISTED[0], -LISTED[1]), ValueError, "ptr must rise from 0, got -"),
    "ptr end": (lambda: Mask.from_indices(SHAPE, LISTED[0][1:], LISTED[1]), ValueError, "ptr[-1] must be at most"),
    "range": (lambda: Mask.from_indices(SHAPE, LISTED[0] + 1, LISTED[1]), ValueError, "[0, Sk) = [0, 5), got 1 to 5"),
    "negative": (lambda: Mask.from_indices(SHAPE, LISTED[0] - 1, LISTED[1]), ValueError, "[0, 5), got -1 to 3"),
    "promise": (
        lambda: Mask.from_indices((1, 1, 2, 5), np.array([4, 3, 3]), np.array([0, 1, 3]), canonical=True), ValueError,
        "keys that ascend within each row, got 3 before 3 in row 1; leave it False",
    ),
    "data shape": (lambda: Mask.from_indices(SHAPE, *LISTED[:2], LISTED[2][1:]), ValueError, "must have the shape"),
    "data range": (lambda: Mask.from_indices(SHAPE, *LISTED[:2], LISTED[2] + 1), ValueError, "data must have weights"),
    "rows": (lambda: Mask.from_row_indices(SHAPE, ROW_INDICES), ValueError, "[*(2, 3, 4), n], got (1, 2, 2, 4)"),
    "row range": (lambda: Mask.from_row_indices((1, 2, 2, 4), ROW_INDICES), ValueError, "below Sk = 4, got 4"),
    "row size": (
        lambda: Mask.from_row_indices((1, 2, 2, 6), ROW_INDICES, size=6), ValueError, "number of entries, 7, got 6",
    ),
    "size": (lambda: Mask.from_dense(X, size=-1), ValueError, "size must be an int from 0 to 2147483647"),
    "full size": (lambda: Mask.full(SHAPE).to_indices(119), ValueError, "number of entries, 120, got 119"),
    "too many": (lambda: Mask.full((1, 1, 2**16, 2**16)).to_indices(), ValueError, "at most 2147483647"),
    "under jit": (
        lambda: jax.jit(lambda w: Mask.from_dense(w).to_indices())(X), ValueError, "must be given where a dense",
    ),
    "apply under jit": (
        lambda: jax.jit(lambda w: Mask.from_dense(w).apply(w, "sparse"))(X), ValueError, "size must be given",
    ),
    "mode": (lambda: Mask.full(SHAPE).apply(X, "sp"), ValueError, "\"sparse\" or \"dense\", got 'sp'"),
    "x type": (lambda: Mask.full(SHAPE).apply(1.0), TypeError, "x must be an array, got float"),
    "x dtype": (lambda: Mask.full(SHAPE).apply(X > 0), TypeError, "x must be floating, got bool"),
    "x shape": (lambda: Mask.full(SHAPE).apply(X[:1]), ValueError, "got (1, 3, 4, 5)"),
    "x axes": (lambda: Mask.full(SHAPE).apply(X[0]), ValueError, "got (3, 4, 5)"),
    "other": (lambda: Mask.full(SHAPE).merge(X), TypeError, "other must be a Mask, got ndarray; make one with"),
    "other shape": (lambda: Mask.full(SHAPE).merge(Mask.empty((2, 3, 4, 6))), ValueError, "got (2, 3, 4, 6)"),
    "broadcast": (lambda: Mask.full(SHAPE).broadcast_to((4, 3, 4, 5)), ValueError, "got (4, 3, 4, 5) for a mask of"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    f, error, message = MESSAGES[name]
    with pytest.raises(error, match=re.escape(message)):
        f()


def test_checks_are_of_what_is_known():
    """Tracers are not looked at; constants are, under jit too."""
    assert np.isnan(jax.jit(lambda w: Mask.from_dense(w).to_dense())(X * np.nan)).all()
    with pytest.raises(ValueError, match="weights in"):
        jax.jit(lambda: Mask.from_dense(2 * X).dense)()
    np.testing.assert_array_equal(jax.jit(lambda: Mask.from_dense(WEIGHTS).to_indices().to_dense())(), WEIGHTS)
    np.testing.assert_array_equal(jax.jit(lambda: Mask.from_indices(SHAPE, *LISTED).to_dense())(), WEIGHTS)
