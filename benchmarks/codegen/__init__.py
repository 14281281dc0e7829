"""The machine code of every tuned kernel, compiled for GPUs that need not be there: `python -m benchmarks.codegen`.

points.py: which kernels · compile.py: one of them, as it is launched · sass.py: reads what comes out · rules.py: what
must hold of it, and the baseline that it is held to · roofline.py: how fast that could be · command.py: the table.
"""


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks codegen`."""
    from .command import main  # a GPU machine, which reads `points` alone, may have none of what it imports

    return main(argv)
