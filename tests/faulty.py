"""What the processes that `faults.py` disturbs do: `python tests/faulty.py NAME ARGUMENTS`. Each ends with JSON.

Nothing is imported before it is needed: the sooner a process is where it shall be killed, the more of them die there.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def store_module() -> Any:
    """`jax_flash_attn2.gpu.store`, without the rest of the package, as it needs nothing of it."""
    spec = importlib.util.spec_from_file_location("store_alone", ROOT / "jax_flash_attn2" / "gpu" / "store.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def content(number: int) -> tuple[str, dict[str, Any], dict[str, bytes]]:
    """The key, the meta data and the parts of a kernel that is as good as any."""
    rng = random.Random(number)
    return f"kernel {number}", {"name": f"k{number}"}, {"ttir": rng.randbytes(4000), "binary": rng.randbytes(60_000)}


def keep(folder: str, first: str, count: str, form: str = "", longest: str = "") -> None:
    """Keeps kernels, one after the other; says how often each was there already and as it should be. longest: bytes
    that a file may have."""
    store = store_module()
    if longest:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(longest),) * 2)
    if form:
        store.FORMAT, store.MAGIC = int(form), b"jax_flash_attn2 kernel %d\n" % int(form)
    kept, found = store.Store(Path(folder), 2**30), 0
    print("ready", flush=True)
    for number in range(int(first), int(first) + int(count)):
        key, meta, parts = content(number)
        key = f"{key} of format {form}" if form else key
        got = kept.get(key)
        if got is None:
            kept.put(key, meta, parts)
        elif got != (meta, parts):
            raise AssertionError(f"{key} came back as another")
        else:
            found += 1
    print(json.dumps(found))


def lower(version: str = "") -> None:
    """Lowers a forward pass for an H100 and says what module that gave; kernels come from the cache, or go there."""
    import jax

    from jax_flash_attn2 import Config, flash_attention, gpu_target
    from jax_flash_attn2.gpu import cache

    if version:
        cache.VERSION = version
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), "bfloat16")
    config = Config(16, 16, num_warps=1, num_stages=1)
    print("ready", flush=True)
    with gpu_target(compute_capability=90):
        traced = jax.jit(lambda x: flash_attention(x, x, x, causal=True, config=config)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    print(json.dumps(hashlib.sha256(text.encode()).hexdigest()))


def digest(results: Any) -> str:
    """Of all bits of a pytree."""
    import jax
    import numpy as np

    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(results))).hexdigest()


def calls() -> list[Any]:
    """Functions of no arguments that use what threads share: caches of masks and programs, functions of callers."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_flash_attn2 import flash_attention, masks, paged_attention

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 200, 2, 16)), jnp.float32)
    pages = jnp.asarray(rng.standard_normal((8, 16, 2, 16)), jnp.float32)
    table, lengths = jnp.arange(8, dtype=jnp.int32).reshape(2, 4), jnp.array([30, 64], jnp.int32)
    near = masks.causal() & masks.sliding_window(40)
    dense = masks.causal_mask(200)
    block = masks.BlockMask.from_predicate(near, (1, 1, 200, 200))
    attend = jax.jit(flash_attention, static_argnames=("causal", "mask", "score_mod"))
    loss = lambda x, **options: (flash_attention(x, x, x, **options) ** 2).sum()
    return [
        lambda: attend(x, x, x, causal=True),
        lambda: flash_attention(x, x, x, mask=near),
        lambda: flash_attention(x, x, x, mask=dense),
        lambda: flash_attention(x, x, x, mask=block),
        lambda: flash_attention(x, x, x, mask=lambda b, h, i, j: (i + j) % 3 > 0),
        lambda: flash_attention(x, x, x, score_mod=lambda s, b, h, i, j: s - 0.1 * abs(i - j)),
        lambda: jax.grad(loss)(x, mask=near, dropout_rate=0.1, dropout_seed=3),
        lambda: jax.jit(jax.grad(lambda x: loss(x, window_size=9)))(x),
        lambda: paged_attention(x[0, :2], pages, pages, table, lengths),
    ]


def by_threads(count: str) -> None:
    """Every call, first by many threads at once, then by one: whether all have the same bits, and which."""
    every = calls()
    n, made, barrier = int(count), {}, threading.Barrier(int(count))

    def run(thread: int) -> None:
        barrier.wait()
        for number in range(len(every)):
            at = (number + thread) % len(every)
            made[thread, at] = digest(every[at]())

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = [digest(call()) for call in every]
    wrong = [at for at in range(len(every)) if {made.get((thread, at)) for thread in range(n)} != {want[at]}]
    print(json.dumps({"calls": len(made), "wrong": wrong, "bits": want}))


def by_forks(count: str) -> None:
    """Children that are forked after the import, while a thread is about to fill a cache; then the parent."""
    import jax_flash_attn2  # noqa: F401
    from jax_flash_attn2.masks import cache

    inside, leave = threading.Event(), threading.Event()

    def slow() -> str:
        inside.set()
        leave.wait()
        return "made"

    thread = threading.Thread(target=lambda: cache.causal_mask_cache.get("key", slow, lambda value: 1))
    thread.start()
    inside.wait()
    pipes = []
    for _ in range(int(count)):
        read, write = os.pipe()
        if os.fork() == 0:
            signal.alarm(100)
            with contextlib.suppress(BaseException):
                cache.causal_mask_cache.get("key", lambda: "made here", lambda value: 1)
                os.write(write, digest([call() for call in calls()]).encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
    children = [os.read(read, 100).decode() for read in pipes]
    leave.set()
    thread.join()
    print(json.dumps({"children": children, "parent": digest([call() for call in calls()])}))


def out_of_memory(mebibytes: str) -> None:
    """A call that wants more memory than there is; then one that does not."""
    import resource

    import jax
    import jax.numpy as jnp

    from jax_flash_attn2 import flash_attention

    small = jnp.ones((1, 64, 2, 16))
    before = digest(flash_attention(small, small, small))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(mebibytes) * 2**20,) * 2)
    one = jnp.ones((1, 1, 1, 128))

    def large(x):
        q = jnp.broadcast_to(x, (1, 2**22, 1, 128))
        return flash_attention(q, one, one)

    try:
        jax.block_until_ready(jax.jit(large)(one))
        error = "none"
    except Exception as caught:
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0]}"
    print(json.dumps({"error": error, "same": digest(flash_attention(small, small, small)) == before}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    globals()[sys.argv[1]](*sys.argv[2:])
