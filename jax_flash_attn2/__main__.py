"""`python -m jax_flash_attn2`: what is installed, and what would run here; what to put into a report of a bug.

`python -m jax_flash_attn2 cache [show | verify | clear]`: the kernels that are kept on disk.
"""

import argparse
import collections
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from .base import versions
from .base.version import VERSION
from .call.explain import explained
from .gpu import store

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "flax", "equinox", "numpy")
SETTINGS = ("JAX_", "XLA_", "TRITON_", "FLASH_ATTN_", "CUDA_VISIBLE_DEVICES")
"""What the names of environment variables begin with that change what runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, or says what is installed; its exit status."""
    parser = argparse.ArgumentParser(
        "python -m jax_flash_attn2", description="Without a command: what is installed, and what would run here."
    )
    commands = parser.add_subparsers(title="commands")
    cache = commands.add_parser(
        "cache",
        help="the compiled kernels that are kept on disk",
        description=f"The compiled kernels that are kept on disk. {store.FOLDER} names another folder for them, or "
        f"off; {store.SIZE} how many MiB they may take together ({store.DEFAULT_MIB}).",
    )
    cache.add_argument(
        "what",
        nargs="?",
        choices=("show", "verify", "clear"),
        default="show",
        help="show: what is there (if nothing is named). verify: read every kernel, set aside those that are damaged; "
        "exit status 1 if there were any. clear: remove them all.",
    )
    options = parser.parse_args(arguments)
    if "what" not in options:
        print("\n".join(f"{name:11}{text}" for name, text in about()))
        return 0
    kept = store.current()
    if kept is None:
        print(f"No kernels are kept: {store.FOLDER} is off, or there is no home folder.")
        return 0
    if (why := kept.refused()) is not None:
        print(
            f"{kept.folder} is not used, as {why}. Set {store.FOLDER} to a folder that only you may write to, or "
            f"to off."
        )
        return 1
    return {"show": show, "verify": verify, "clear": clear}[options.what](kept)


def about() -> Iterator[tuple[str, str]]:
    """Names and values: versions, devices, what a plain call would run, where kernels are kept, settings."""
    yield "version", f"{VERSION}, in {os.path.dirname(__file__)}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        yield package, versions.installed(package) or "not installed"
    for newer in versions.untested(*versions.KERNELS):
        yield "newer", newer
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    yield "devices", ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    q = jnp.zeros((1, 16, 1, 64), jnp.bfloat16)
    try:
        would = explained(q, q, q)
        yield "runs", f"{would.implementation} on {would.where}: {'; '.join(would.reasons)}"
    except (ImportError, ValueError) as error:  # a GPU without what its kernels need, or too old for them
        yield "runs", f"nothing: {error}"
    kept = store.current()
    if kept is None:
        yield "kernels", "not kept"
    elif (why := kept.refused()) is not None:
        yield "kernels", f"not kept in {kept.folder}: {why}"
    else:
        yield "kernels", f"kept in {kept.folder}"
    for name in sorted(x for x in os.environ if x.startswith(SETTINGS)):
        yield "setting", f"{name}={os.environ[name]}"


def show(kept: store.Store) -> int:
    """Prints where the kernels are, how many of each there are, their sizes and when they were last used."""
    kernels, aside = kept.entries(), kept.entries(store.ASIDE)
    print(f"folder     {kept.folder}")
    total = sum(entry.size for entry in (*kernels, *aside)) / 2**20
    print(f"kernels    {len(kernels)}, {total:.1f} of at most {kept.limit // 2**20} MiB")
    print(f"set aside  {len(aside)}")
    if kernels:
        print(f"\n{'kernel':28}{'GPU':14}{'Triton':10}{'number':>7}{'KiB':>8}   last used")
    for kind, entries in sorted(_by_kind(kernels).items()):
        name, target, triton = kind
        size = sum(entry.size for entry in entries) / 2**10
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(entry.used for entry in entries)))
        print(f"{name:28}{target:14}{triton:10}{len(entries):7}{size:8.0f}   {used}")
    return 0


def _by_kind(kernels: Sequence[store.Entry]) -> dict[tuple[str, str, str], list[store.Entry]]:
    kinds = collections.defaultdict(list)
    for entry in kernels:
        try:
            meta = store.read(entry.path)[0]["meta"]
            kind = (meta["name"], meta["shown"]["target"], meta["shown"]["triton"])
        except (OSError, KeyError, store.Damaged):
            kind = ("(cannot be read: verify)", "", "")
        kinds[kind].append(entry)
    return kinds


def verify(kept: store.Store) -> int:
    """Reads every kernel, and says which were set aside."""
    bad = kept.verify()
    for path, why in bad:
        print(f"{path} was set aside: {why}")
    print(f"{len(kept.entries())} kernels are whole, {len(bad)} were not, in {kept.folder}")
    return 1 if bad else 0


def clear(kept: store.Store) -> int:
    """Removes them all."""
    print(f"{kept.clear()} files were removed from {kept.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
