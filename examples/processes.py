"""Start a program as several processes on this host, and watch them: when one dies, no other waits for it."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRACE = 5
"""Seconds that the others have to say what they saw of a death, before they are killed."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment():
    """Ours, on CPU, and without a number of devices in XLA_FLAGS, which JAX refuses beside its own setting."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONUNBUFFERED": "1"}


def run_all(commands):
    """Run the commands at once; True if all end well. Process 0 writes to our terminal, others when they fail.

    When one ends with an error or is killed, the others have `GRACE` seconds; then they are killed. None outlives us,
    but for a SIGKILL of ours.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so through finally
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(len(commands))]
        children = []
        try:
            for rank, command in enumerate(commands):
                with logs[rank].open("wb") as log:
                    where = {} if rank == 0 else {"stdout": log, "stderr": log}
                    children.append(subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, **where))
            return _watched(children, logs)
        finally:
            for child in children:
                child.kill()
                child.wait()


def _watched(children, logs):
    running, failed = dict(enumerate(children)), None
    while running:
        time.sleep(0.05)
        for rank, child in list(running.items()):
            if child.poll() is None:
                continue
            del running[rank]
            if child.returncode == 0:
                continue
            if failed is None:
                failed = time.monotonic()
                _say("")  # a bar of process 0 may not have ended its line
            later = f"{time.monotonic() - failed:.1f} s after the first that failed"
            _say(f"process {rank} {_ending(child.returncode)}, {later}")
            for line in _reason(logs[rank]):
                _say(f"  | {line}")
        if failed and time.monotonic() - failed > GRACE:
            for rank in running:
                _say(f"process {rank} is killed: it still ran {GRACE} s after")
            return False
    return failed is None


def _ending(code):
    return f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def _reason(log, count=2, width=300):
    """Lines that name an error, of Python or of JAX's service; else the last ones."""
    lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()]
    named = [x for x in lines if "Error: " in x or "Terminating process" in x]
    return [x[:width] for x in (named or lines)[-count:]]


def _say(line):
    print(line, file=sys.stderr, flush=True)
