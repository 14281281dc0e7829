"""The example that serves: every way of keeping keys and values writes what recomputation does."""

import re

import generate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

SMALL = (
    *("--width=16", "--heads=2", "--rounds=1"),
    *("--prompts=5", "--longest=24", "--new=12", "--slots=2", "--chunk=7"),
)


@pytest.fixture(autouse=True)
def as_people_write():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_texts_are_equal_and_one_that_is_not_is_seen(monkeypatch, capsys):
    """With a way among them that sees one key too few. Weights are drawn: what a model of a few steps writes, any other
    writes too."""
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    monkeypatch.setattr(generate, "train", lambda model, *_: jax.tree.map(draw, model.first))
    broken = lambda q, k, v, lengths: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths - 1)
    monkeypatch.setattr(generate, "by_jax_nn", broken)
    assert generate.main(SMALL) == 1
    out = capsys.readouterr().out
    equal = dict(re.findall(r"^  (\S+) .* (\d) of 5 texts equal", out, re.MULTILINE))
    assert {name: equal[name] for name in ("recompute", "dense", "paged")} == dict.fromkeys(
        equal.keys() - {"jax.nn"}, "5"
    )
    assert equal["jax.nn"] != "5"
    assert "Texts DIFFER." in out
    texts = re.search(r"goes on '(.*)'", out)
    assert texts
    assert len(set(texts[1])) > 1  # not one character again and again


def test_pages_come_back():
    """Of two slots, all pages are free at the end, and no two sequences ever hold the same one."""
    args = generate.parsed(SMALL)
    prompts, counts = [np.arange(n) for n in (20, 3, 24, 9)], [12, 2, 7, 1]
    them = generate.Scheduler(prompts, counts, args)
    assert len(them.free) == args.slots * args.pages
    steps = 0
    while them.busy:
        them.join()
        (tokens, before), starts, lengths = them.batch()
        own = np.diff(starts)
        assert own.sum() <= len(tokens) == len(before) <= args.slots + args.chunk
        for slot, it in enumerate(them.slots):
            if it is not None:
                assert (
                    it.text[lengths[slot] - own[slot] : lengths[slot]]
                    == tokens[starts[slot] : starts[slot + 1]].tolist()
                )
        held = them.table[them.table >= 0].tolist()
        assert len({*held, *them.free}) == len(held) + len(them.free) == args.slots * args.pages
        them.take(np.full(args.slots, 5))
        assert all(len(it.text) == it.prompt for it in them.slots if it is not None and it.reads)
        steps += 1
    assert [them.done[i] for i in range(4)] == [[5] * n for n in counts]
    assert steps < sum(map(len, prompts)) // args.chunk + sum(counts)  # prompts are read while others decode


def test_the_dense_cache_is_read_as_jax_nn_reads_it():
    """Rows of their own lengths."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, 2, 8)), jnp.float32) for n in (1, 20, 20))
    lengths = jnp.int32([1, 20, 7])
    np.testing.assert_allclose(
        generate.by_flash(q, k, v, lengths), generate.by_jax_nn(q, k, v, lengths), atol=1e-5, rtol=1e-5
    )
