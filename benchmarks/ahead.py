"""What XLA makes of attention over eight H100s, compiled without one: memory, schedule, collectives, time to compile.

    python -m benchmarks.ahead [ring all_gather ulysses plain] [--tokens 65536] [--order zigzag]

A forward and backward pass of 32 query heads and 8 key heads of width 128 in bfloat16, causal; "plain" is
`flash_attention` under jit with rows and keys divided. A line of JSON for each. Needs JAX's CUDA plugin, and the ptxas
that Triton carries; no GPU.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA's compiler asks of a GPU: NVIDIA's figures of the H100 SXM5, and the libraries' versions."""


def devices(folder: str, topology: str = "1x1x8"):
    """GPUs that can be compiled for, and not run on. folder: where CUDA's ptxas is to be found, which is made."""
    import triton

    binaries = Path(folder) / "bin"
    binaries.mkdir()
    (binaries / "ptxas").symlink_to(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={folder}"
    os.environ.pop("JAX_PLATFORMS", None)
    from jax.experimental.topologies import get_topology_desc

    return get_topology_desc("", "cuda", target_config=H100, topology=topology).devices


def gradient(method: str, mesh, order: str):
    """A function (q, k, v, do) -> gradients."""
    import jax

    from jax_flash_attn2 import context_parallel_attention, flash_attention

    def attention(q, k, v):
        options = {"causal": True, "implementation": "triton"}
        if method == "plain":
            return flash_attention(q, k, v, **options)
        return context_parallel_attention(q, k, v, axis="sequence", mesh=mesh, method=method, order=order, **options)

    return jax.jit(lambda q, k, v, do: jax.vjp(attention, q, k, v)[1](do))


def compiled(method: str, gpus, tokens: int, order: str):
    """The compiled program, and how long tracing (kernels included) and compiling it took, in seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jax_flash_attn2 import gpu_target

    mesh = Mesh(np.array(gpus), ("sequence",))
    placed = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    q, k = (jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16, sharding=placed) for heads in (32, 8))
    with gpu_target(compute_capability=90):
        began = time.perf_counter()
        lowered = gradient(method, mesh, order).lower(q, k, k, q)
        traced = time.perf_counter()
        program = lowered.compile()
    return program, traced - began, time.perf_counter() - traced


_SEEN = re.compile(
    r"= (?:\(.*?\)|\S+) (custom-call|while|(?:collective-permute|all-gather|reduce-scatter|all-to-all)\S*)\("
)


def schedule(text: str) -> dict[str, list[str]]:
    """Of a compiled program, by computations: kernels, loops and collectives, in the order in which they are begun."""
    made: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if begins := re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = begins[1]
        elif (found := _SEEN.search(line)) and (found[1] != "custom-call" or "triton_kernel_call" in line):
            made.setdefault(name, []).append("kernel" if found[1] == "custom-call" else found[1])
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=["ring", "all_gather", "ulysses", "plain"])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--order", default="zigzag")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        gpus = devices(folder)
        import jax
        import triton

        for method in args.methods:
            program, traced, took = compiled(method, gpus, args.tokens, args.order)
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            line: dict[str, Any] = {
                "jax": jax.__version__,
                "triton": triton.__version__,
                "method": method,
                "tokens": args.tokens,
                "order": args.order,
                "devices": len(gpus),
            }
            line |= {"temporary MiB": round(memory, 1), "trace s": round(traced, 1), "compile s": round(took, 1)}
            print(json.dumps(line | {"schedule": schedule(program.as_text())}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
