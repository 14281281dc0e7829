"""`python -m benchmarks NAME [options]`: runs one benchmark; `python -m benchmarks NAME --help` says what it takes."""

import importlib
import sys

NAMES = {
    "mha": "forward and backward against jax.nn.dot_product_attention, over shapes and block sizes",
    "attention_mask": "the three builders of causal masks",
    "sparse_masks": "masks as indices or dense: apply, apply_inverse, merge, and the maskers",
    "block_masks": "block masks against dense causal attention, and against options that say the same",
    "components": "where the time of an attention layer goes, and what the mask cache saves",
    "sdpa": "iterations per second, and what each optimisation brings",
    "xla_path": "the XLA path in the numbers that the README quotes",
    "decode": "one query row or a few over a long cache, dense or in pages, against jax.nn and a mere reading",
    "cold_start": "what a new process pays: trace, lower and compile of each option, first calls without jit",
    "numerics": "errors against fp64, and those of the plain implementation; a model trained with both",
    "soak": "an hour of mixed calls in one process: memory, programs and caches, and their curves",
    "codegen": "the machine code of every tuned kernel",
    "scaling": "attention over many devices, on paper: the tables and the plot of docs/scaling.md",
    "ahead": "what XLA makes of attention over eight H100s, compiled without one",
    "gpu": "correctness of every tuned row and the most telling points, on a GPU (gpu.sh)",
    "gpu_smoke": "one small forward and backward of each width, on a GPU: the first thing to run there",
    "report": "all results as one HTML page",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\n" + "\n".join(f"  {name:15} {what}" for name, what in NAMES.items()))
        return 0
    name, *rest = argv
    if name not in NAMES:
        print(f"no benchmark {name!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    return importlib.import_module(f".{name}", __package__).main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
