"""What the results say, computed from them: where ours is faster, where it is slower, and how sure that is.

Of each case there is a ratio, how many times faster ours is than the other, with the 20th and 80th percentile of the
turns. Ours is called faster where both percentiles are above 1, that is where it was faster in at least four of five
turns; slower where both are below; else the case is undecided, whatever its median.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from .figures import Case, labels
from .results import Record, parse_case

FASTER, SLOWER, UNDECIDED = "faster", "slower", "undecided"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than the other in one case."""

    case: str
    middle: float
    low: float
    high: float
    turns: int | None = None
    """How many ratios of neighbours it is the median of; None: it is of medians that were not timed by turns."""

    @property
    def verdict(self) -> str:
        """One of the three words."""
        return FASTER if self.low > 1 else SLOWER if self.high < 1 else UNDECIDED

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours with one other, over some cases."""

    what: str
    """What they do."""
    ours: str
    other: str
    ratios: tuple[Ratio, ...]
    rival: bool = True
    """Whether the other is not ours; else it is another choice that we had."""

    def count(self, verdict: str) -> int:
        """Cases of a verdict."""
        return sum(r.verdict == verdict for r in self.ratios)

    def of(self, verdict: str) -> list[Ratio]:
        """Those cases, the most telling first."""
        return sorted(
            (r for r in self.ratios if r.verdict == verdict), key=lambda r: abs(math.log(r.middle)), reverse=True
        )

    @property
    def typical(self) -> float:
        """Geometric mean of the medians."""
        return math.exp(statistics.fmean(math.log(r.middle) for r in self.ratios))

    @property
    def range(self) -> tuple[Ratio, Ratio]:
        """The least and the largest."""
        ordered = sorted(self.ratios, key=lambda r: r.middle)
        return ordered[0], ordered[-1]

    @property
    def sure(self) -> str:
        """How often each case ran, and how far its turns lay apart."""
        turns = [r.turns for r in self.ratios if r.turns is not None]
        width = statistics.median((r.high - r.low) / r.middle for r in self.ratios)
        ran = f"{_span(min(turns), max(turns))} turns" if turns else "not timed by turns"
        few, ends = ("only ", "all of them span") if turns and max(turns) < 5 else ("", "p20 to p80 spans")
        return f"{few}{ran}; {ends} {100 * width:.0f}% of the median"


def _span(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def between(records: Iterable[Record], ours: str, other: str, keep: Callable[[Case], bool] = lambda c: True):
    """The ratios of two providers, where both have times.

    Where the two were not timed by turns the ratio is of their medians, and its ends are of the percentiles that are
    furthest apart: rather undecided than wrong.
    """
    found = {r.key: r for r in records if r.ok and r.ms and keep(parse_case(r.case))}
    cases = [case for case, provider in found if provider == ours and (case, other) in found]
    titles = labels([parse_case(case) for case in cases])
    made = (_ratio(found[case, ours], found[case, other], title) for case, title in zip(cases, titles, strict=True))
    return tuple(r for r in made if r is not None)


def _ratio(ours: Record, other: Record, case: str) -> Ratio | None:
    for r, of, upside_down in ((ours, other, False), (other, ours, True)):
        if r.baseline == of.provider and r.times_faster and r.times_faster_p20 and r.times_faster_p80:
            ends = r.times_faster, r.times_faster_p20, r.times_faster_p80
            if upside_down:
                ends = 1 / ends[0], 1 / ends[2], 1 / ends[1]
            return Ratio(case, *ends, turns=r.samples)
    if not (ours.ms and ours.ms_p20 and ours.ms_p80 and other.ms and other.ms_p20 and other.ms_p80):
        return None
    return Ratio(case, other.ms / ours.ms, other.ms_p20 / ours.ms_p80, other.ms_p80 / ours.ms_p20)


def compare(what: str, ours: str, other: str, ratios: Iterable[Ratio], *, rival: bool = True) -> tuple[Comparison, ...]:
    """A comparison; none without ratios."""
    ratios = tuple(ratios)
    return (Comparison(what, ours, other, ratios, rival),) if ratios else ()


def headline(comparisons: Sequence[Comparison]) -> str:
    """All comparisons with others in a sentence, and which of them ours loses."""
    others = [c for c in comparisons if c.rival]
    n = sum(len(c.ratios) for c in others)
    if not n:
        return "Nothing here was compared with anybody else's."
    faster, slower, undecided = (sum(c.count(v) for c in others) for v in (FASTER, SLOWER, UNDECIDED))
    lost = []
    for what in dict.fromkeys(c.what for c in others if c.count(SLOWER)):
        same = [c for c in others if c.what == what]
        lost.append(f"{what} ({sum(c.count(SLOWER) for c in same)} of {sum(len(c.ratios) for c in same)})")
    said = (
        f"Against others, of {n} cases ours is faster in {faster}, slower in {slower}, undecided in {undecided}, where "
        "fewer than four of five turns went one way."
    )
    return said + (f" Slower: {'; '.join(lost)}." if lost else "")
