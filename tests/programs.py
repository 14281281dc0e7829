"""What a compiled program sends, read from its text: XLA's own, for the devices that it was compiled for."""

import math
import re
from collections import Counter

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (collective-permute|all-gather|all-to-all|reduce-scatter|all-reduce|collective-broadcast|"
    r"ragged-all-to-all)(?:-start)?\("
)
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(text: str, devices: int) -> Counter:
    """Of the text of a compiled program, how often a device takes part in each: `{(kind, bytes sent): count}`.

    What is in a loop counts as often as that runs. Bytes are those that a device sends at least: all of a message, and
    all but its own part of what is gathered, scattered or exchanged.
    """
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            computations[name].append(line)

    def count(name: str) -> Counter:
        made = Counter()
        for line in computations[name]:
            if found := _COLLECTIVE.search(line):
                made[found[2], _bytes_sent(found[2], _size(found[1]), devices)] += 1
                continue
            for how, names in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", names):
                    own = count(called)
                    if own and " while(" in line:
                        assert how == "body", "a collective in a loop's condition"
                        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                        own = Counter({key: n * int(trips[1]) for key, n in own.items()})
                    assert not (own and how.startswith("branch")), "a collective that may be left out"
                    made += own
        return made

    return count(entry)


def _size(shape: str) -> int:
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(_ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in parts)


def _bytes_sent(kind: str, result: int, devices: int) -> int:
    """Of the size of a collective's result."""
    others = devices - 1
    return {
        "collective-permute": result,
        "all-gather": result * others // devices,
        "all-to-all": result * others // devices,
        "reduce-scatter": result * others,
        "all-reduce": 2 * result * others // devices,
    }[kind]
