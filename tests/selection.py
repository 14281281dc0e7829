"""Which tests `make test` leaves to `make test-all`: what is marked `thorough`, and two thirds of the combinations of
options, of the shapes of a bias, and of what is marked `in_thirds`. And a third of any tests, for a row of
`matrix.toml`.

Which third is run changes from day to day; the Makefile picks it, and the header of the run names it, so that a run can
be repeated (`make test THIRD=2`).
"""

import re
import zlib

THIRDS = ("0", "1", "2")


def add_option(parser):
    parser.addoption(
        "--third", choices=THIRDS, help="run this third of the combinations of options, and nothing marked `thorough`"
    )
    parser.addoption("--part", choices=THIRDS, help="run this third of the tests, whatever they are")


def header(config):
    third = config.getoption("--third")
    if part := config.getoption("--part"):
        return f"third {part} of these tests"
    return "every test" if third is None else f"third {third} of the combinations (make test THIRD={third})"


def kept(item, third: str) -> bool:
    """Whether a test is in this third: those with the case `pair_07` are in third 7 mod 3, those with `bias_hq`, one of
    the shapes that a bias may have, and others that are `in_thirds`, in one that the name decides."""
    if item.get_closest_marker("thorough"):
        return False
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    cases = [getattr(x, "name", None) or "" for x in params]
    numbers = [int(found[1]) for name in cases if (found := re.fullmatch(r"pair_(\d+)", name))]
    shapes = [found[1] for name in cases if (found := re.fullmatch(r"bias_([bhqk-]+)", name))]
    numbers += [sum(1 << i for i, axis in enumerate("bhqk") if axis in shape) for shape in shapes]
    if not numbers and item.get_closest_marker("in_thirds"):
        numbers = [zlib.crc32(item.name.encode())]
    return all(number % len(THIRDS) == int(third) for number in numbers)


def in_part(item, part: str) -> bool:
    """Whether a test is in this third of all, which its name decides."""
    return zlib.crc32(item.nodeid.encode()) % len(THIRDS) == int(part)


def select(config, items):
    third, part = config.getoption("--third"), config.getoption("--part")
    chosen = [x for x in items if (third is None or kept(x, third)) and (part is None or in_part(x, part))]
    left_out = [*set(items) - set(chosen)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen
