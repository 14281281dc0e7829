"""A few random calls, and what is kept of many (`make fuzz`)."""

import json

import fuzz
import pytest


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1000, 1001])
def test_a_few(seed):
    result = fuzz.batch(seed, 4)
    assert not result["failures"], result


def test_what_failed_runs_again(tmp_path, monkeypatch, capsys):
    """The last result of each batch counts; those that failed, and those not yet run, are left."""
    kept = tmp_path / "fuzz.jsonl"
    fine = {"size": 50, "seconds": 1, "counted": {"jit, normal": 50}, "failures": []}
    wrong = fine | {"failures": [{"number": 2007, "draw": "Draw(7)", "error": "AssertionError: dq"}]}
    lines = [fine | {"seed": 0}, wrong | {"seed": 1}, wrong | {"seed": 2}, fine | {"seed": 1}]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(fuzz, "KEPT", kept)
    found = fuzz.kept()
    assert fuzz.left(found, draws=200, size=50) == [2, 3]
    assert fuzz.report(found) == 1
    out = capsys.readouterr().out
    assert out.startswith("150 draws in 3 batches, 1 of them with a fault\n")
    assert "batch 2, 2007:\n  Draw(7)\n  AssertionError: dq" in out


def test_a_batch_goes_on(monkeypatch):
    """First what failed; then what it had not come to, until it has its calls."""
    ran, faulty = [], {3001, 3003}

    def one(number, counted, *, shrink):
        ran.append(number)
        if number in faulty:
            return [{"number": number, "draw": "", "error": "wrong"}]
        counted["jit, normal"] += 1
        return []

    monkeypatch.setattr(fuzz, "one", one)
    monkeypatch.setattr(fuzz, "MOST", 2)
    first = fuzz.batch(3, 4)
    assert ran == [3000, 3001, 3002, 3003]
    ran.clear()
    faulty.clear()
    second = fuzz.batch(3, 6, before=first)
    assert ran == [3001, 3003, 3004, 3005]
    assert (second["counted"], second["failures"], second["next"]) == ({"jit, normal": 6}, [], 3006)
