"""What the long run looks at, and that other bits than before end it."""

import itertools

import numpy as np
import pytest
from matplotlib import image

from benchmarks import soak


def record(n, **more):
    same = {"resident_bytes": 300 * 2**20, "programs": 40, "block_masks": 9, "causal_masks": 3, "mask_bytes": 2**20}
    return {"seconds": 10.0 * n, "calls": 5 * n, "traces": 7 * n, "arrays": 11, "objects": 90_000} | same | more


LEAKING = [record(n, resident_bytes=(300 + n) * 2**20, programs=min(n, 4)) for n in range(1, 41)]


def test_grown():
    """From where the run was warm, a quarter of it, to its end; each the mean of a tenth of the run."""
    grown = soak.grown(LEAKING)
    assert grown["resident_bytes"] == (312.5 * 2**20, 338.5 * 2**20)
    assert grown["programs"] == (4, 4)
    assert not {"seconds", "calls", "traces"} & set(grown)


def test_tables():
    text = soak.tables(LEAKING)
    assert ["resident", "MiB", "312.5", "338.5", "8.32%"] in [line.split() for line in text.splitlines()]
    assert text.endswith("200 calls in 6.7 minutes; 1.4 functions traced for each")


def test_draw(tmp_path):
    soak.draw(LEAKING, tmp_path / "curve.png")
    picture = image.imread(tmp_path / "curve.png")
    assert picture.shape[:2] == (720, 1200)
    assert np.ptp(picture[..., :3]) > 0.5


def test_looks(monkeypatch):
    """Each has all that is counted."""
    monkeypatch.setattr(soak, "calls", lambda: {"steady": lambda n: np.full(9, n)})
    looks = [*itertools.islice(soak.run(60, 0), 3)]
    assert {*record(1)} == {*looks[0]}
    assert all(a["calls"] <= b["calls"] for a, b in itertools.pairwise(looks))
    assert looks[0]["resident_bytes"] > 2**20


def test_other_bits_end_it(monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(soak, "calls", lambda: {"drifts": lambda n: np.asarray(next(numbers))})
    with pytest.raises(ValueError, match=r"drifts of \d+ gave other bits than before, after \d+ calls"):
        next(soak.run(1, 60))
