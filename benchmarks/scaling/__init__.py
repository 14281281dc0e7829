"""What each way to divide attention over devices costs, on paper: `python -m benchmarks.scaling`, for docs/scaling.md.

cases.py: a call and how it is divided · counts.py: what a device sends, holds and computes · tiles.py: which tiles it
visits · machine.py: how fast H100s do these, with sources, and so a time · page.py: tables and plot.
"""


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks scaling`."""
    from .page import main

    return main(argv)
