"""The example of several processes: their losses are those of one, a run goes on from its checkpoint, and no process
waits for a dead one."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import caching
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import train_long_context
from train_long_context import SLACK, TOLERANCE

EXAMPLE = str(Path(processes.__file__).with_name("train_long_context.py"))
SMALL = ("--steps=8", "--context=64", "--width=16", "--heads=4", "--layers=1", "--save-every=3", "--data=1")
QUICKLY = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(caching.XLA),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""As `conftest.py` sets for this process."""
STARTING = 240
"""Seconds, on a machine that does much else."""


class Started:
    """The example, or one process of it. What it starts ends with it: they are a session of their own."""

    def __init__(self, *options):
        command = [sys.executable, EXAMPLE, *SMALL, *map(str, options)]
        self.it = subprocess.Popen(
            command, env=processes.environment() | QUICKLY, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self.it.pid, signal.SIGKILL)
        self.it.communicate()

    def ended(self, within=STARTING):
        """Exit code, and what it printed."""
        out, err = self.it.communicate(timeout=within)
        return self.it.returncode, out, err


def run(*options):
    with Started(*options) as started:
        return started.ended()


def losses_of(file):
    made = json.loads(file.read_text())
    return made["first"], made["losses"]


def agrees(*options):
    """What a run that is compared with one process says."""
    code, out, err = run(*options)
    assert code == 0, out + err
    difference = float(re.search(r"The losses agree: largest difference (\S+) nats", out)[1])
    assert difference <= TOLERANCE / 10  # another order of sums in float32, eight steps long: some 1e-6
    return out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Two processes, four devices along the sequence: what is printed, and the losses."""
    file = tmp_path_factory.mktemp("uninterrupted") / "losses.json"
    out = agrees("--processes", 2, "--losses", file)
    first, losses = losses_of(file)
    assert first == 0
    assert len(losses) == 8
    return out, losses


def test_two_processes_train_like_one(uninterrupted):
    out, losses = uninterrupted
    assert "2 processes, 4 devices: 1 along data x 4 along sequence" in out
    rows = np.array(re.findall(r"^ +(\d+) +(\d+\.\d+) +(\d+\.\d+)$", out, re.MULTILINE), float)
    np.testing.assert_array_equal(rows[:, 0], np.arange(1, 9))
    np.testing.assert_allclose(rows[:, 1], losses, atol=1e-6)
    np.testing.assert_allclose(rows[:, 1], rows[:, 2], atol=TOLERANCE / 10)
    assert losses[-1] < losses[0] - 0.2  # and they learn


def die(count, how, victim, timeout, *options):
    """Start processes as a cluster does, with none to watch them: how long the others outlived the victim."""
    where = f"127.0.0.1:{processes.free_port()}"
    each = ("--processes", count, "--coordinator", where, "--timeout", timeout, f"--{how}", f"{victim}:8", *options)
    started = [Started(*each, "--rank", rank) for rank in range(count)]
    try:
        for line in started[victim].it.stderr:
            if "before step 8" in line:
                break
        died, ends = time.monotonic(), []
        for rank, other in enumerate(started):
            if rank != victim:
                code, _, err = other.ended(within=timeout + SLACK + died - time.monotonic())
                ends.append(time.monotonic() - died)
                assert code != 0
                assert "Gloo" in err or "JAX distributed service detected fatal errors" in err
        return ends
    finally:
        for one in started:
            one.__exit__()


def test_goes_on_where_a_dead_process_left_it(uninterrupted, tmp_path):
    """The coordinator kills itself: the other ends with an error, with none to watch it. Resumed, the losses are those
    of a run that none left."""
    save = ("--save", tmp_path / "checkpoints")
    assert max(die(2, "kill", 0, 20, *save)) <= 20 + SLACK
    code, out, err = run("--processes", 2, "--no-check", *save, "--resume", "--losses", tmp_path / "losses.json")
    assert code == 0, out + err
    first, losses = losses_of(tmp_path / "losses.json")
    assert first in (3, 6)  # 6 if it was on disk by then: it is written while training goes on
    np.testing.assert_array_equal(losses, uninterrupted[1][first:])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("count", "how", "victim", "timeout"),
    [(2, "kill", 1, 20), (2, "stop", 1, 10), (4, "kill", 0, 20), (4, "kill", 2, 20), (4, "stop", 0, 10)],
)
def test_none_waits_for_the_dead(count, how, victim, timeout):
    """Nor for the coordinator, nor for one that is only stopped, which none but the heartbeat finds."""
    ends = die(count, how, victim, timeout)
    print(f"the others ended after {', '.join(f'{x:.1f}' for x in ends)} s")
    assert max(ends) <= timeout + SLACK


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_four_processes_train_like_one(method):
    out = agrees("--processes", 4, "--data", 2, "--method", method)
    assert f"4 processes, 8 devices: 2 along data x 4 along sequence; context 64, {method}" in out


@pytest.mark.thorough
def test_goes_on_on_fewer_processes(tmp_path):
    """What four, of whom one died, left to two."""
    code, _, err = run("--processes", 4, "--data", 2, "--no-check", "--save", tmp_path, "--kill", "3:8")
    assert code == 1
    assert "process 3 was killed by SIGKILL" in err
    ends = re.findall(r"process \d (?:ended with code \d+|was killed by \w+), (\S+) s after", err)
    assert len(ends) == 4
    assert max(map(float, ends)) <= processes.GRACE + 1
    out = agrees("--processes", 2, "--save", tmp_path, "--resume")
    steps = [int(x) for x in re.findall(r"^ +(\d+) +\d+\.\d+ +\d+\.\d+$", out, re.MULTILINE)]
    assert steps in ([4, 5, 6, 7, 8], [7, 8])


def test_those_that_hang_are_killed(monkeypatch, capfd):
    """And nothing is left of them."""
    monkeypatch.setattr(processes, "GRACE", 0.5)
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    try:
        hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        fails = "import time; time.sleep(1); print('the reason'); raise SystemExit(3)"
        assert not processes.run_all([[sys.executable, "-c", x] for x in (hangs, fails)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 60
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        "",
        "process 1 ended with code 3, 0.0 s after the first that failed",
        "  | the reason",
        "process 0 is killed: it still ran 0.5 s after",
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int(out), 0)


def test_checkpoints_are_not_mixed_up(tmp_path):
    """One resumes from what is there, and starts anew only where nothing is."""
    args = argparse.Namespace(save=str(tmp_path), save_every=2, resume=True)
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        train_long_context.Checkpoints(args)
    args.resume = False
    one = train_long_context.Checkpoints(args)
    for done in range(1, 5):
        one.save_if_due(done, {"done": jnp.full((), done)})
    one.close()
    with pytest.raises(SystemExit, match="has checkpoints of 4 steps; go on with --resume"):
        train_long_context.Checkpoints(args)
    args.resume = True
    state, done = train_long_context.Checkpoints(args).newest_or({"done": jnp.zeros((), int)})
    assert (state["done"], done) == (4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resume", "--resume needs --save DIR"),
        ("--rank 1", "--rank and --coordinator belong together"),
        ("--kill 1", "--kill: invalid rank_and_step value: '1'"),
    ],
)
def test_messages(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *options.split()])
    with pytest.raises(SystemExit):
        train_long_context.main()
    assert message in capsys.readouterr().err
