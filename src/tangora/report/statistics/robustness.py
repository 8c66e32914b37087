"""How much a recipe depends on its learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tangora.report.run_records import Comparison, Record
from tangora.report.statistics.judgement import CEILING, Row
from tangora.report.statistics.selection import SweepPoint, group_by_recipe, sweep_points

_Stability = Literal["finished", "diverged", "not tried"]

TOLERANCE = 0.02
"""How much worse than the best, relative to it, still counts as as good."""

NEAR = 1.3
"""Factor within which a learning rate that was tried stands for one that was not."""

_TEST_FACTOR = 3.0
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Robustness:
    """What a recipe's sweep says about its learning rate, by the validation metric that decides.

    "Within 2 %" is relative to the best value of the recipe's own sweep: with a best loss of 0.50 up to 0.51, with a
    best accuracy of 0.90 down to 0.882 (1.8 percentage points).
    """

    recipe: str
    learning_rate: float
    low: float
    """Smallest learning rate of the unbroken range around the best within 2 % of it and without divergence."""
    high: float
    open_low: bool
    """Whether the range ends only because no smaller learning rate was tried."""
    open_high: bool
    full_rate: float | None
    """The rate tried that is nearest to full fine-tuning's best, if within a factor of 1.3."""
    full_carries_over: bool | None
    """Whether it is within 2 % of the best; None if none so near was tried, and for full fine-tuning."""
    tripled_rate: float | None
    """The rate tried that is nearest to 3 times the best, if within a factor of 1.3."""
    tripled: _Stability
    """What happened there: all runs that say something finished, or some diverged."""

    @property
    def width(self) -> float:
        """The factor between the largest and the smallest learning rate of the range; 1 for the best alone."""
        return self.high / self.low

    @property
    def single(self) -> bool:
        """Whether no other learning rate was tried, so that nothing is known of a range."""
        return self.open_low and self.open_high and self.width == 1


def robustness(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Robustness]:
    """Measure how much each recipe depends on its learning rate."""
    groups = group_by_recipe(comparison)
    full_rate = next((row.learning_rate for row in rows if row.recipe == CEILING), None)
    return {
        row.recipe: _robustness(row, groups[row.recipe], full_rate)
        for row in rows
        if row.learning_rate is not None
    }


def _robustness(row: Row, records: Sequence[Record], full_rate: float | None) -> Robustness:
    best = row.learning_rate
    assert best is not None
    # Learning rates whose runs all failed for reasons of their own say nothing.
    points = [p for p in sweep_points(records, row.metric) if p.mean is not None or p.num_diverged]
    good = _good(points, best, higher_is_better=row.higher_is_better)
    index = [point.learning_rate for point in points].index(best)
    first, last = index, index
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(points) - 1 and good[last + 1]:
        last += 1
    carried = None if row.recipe == CEILING or full_rate is None else _nearest(points, full_rate)
    tripled_rate, tripled = _at_triple(records, best)
    return Robustness(
        recipe=row.recipe,
        learning_rate=best,
        low=points[first].learning_rate,
        high=points[last].learning_rate,
        open_low=first == 0,
        open_high=last == len(points) - 1,
        full_rate=None if carried is None else points[carried].learning_rate,
        full_carries_over=None if carried is None else good[carried],
        tripled_rate=tripled_rate,
        tripled=tripled,
    )


def _good(points: Sequence[SweepPoint], best: float, *, higher_is_better: bool) -> list[bool]:
    sign = 1.0 if higher_is_better else -1.0
    top = next(
        sign * point.mean for point in points if point.learning_rate == best and point.mean is not None
    )
    worst = top - TOLERANCE * abs(top) * (1 + _ROUNDING)
    # The best itself is good even where every learning rate diverged for some seed.
    return [
        point.learning_rate == best
        or (point.mean is not None and sign * point.mean >= worst and not point.num_diverged)
        for point in points
    ]


def _nearest(points: Sequence[SweepPoint], rate: float) -> int | None:
    index = min(range(len(points)), key=lambda i: _distance(points[i].learning_rate, rate))
    return index if _is_near(points[index].learning_rate, rate) else None


def _at_triple(records: Sequence[Record], best: float) -> tuple[float | None, _Stability]:
    # Shorter trials that finished say nothing about a whole run; one that diverged does.
    telling = [
        r for r in records if r.status == "diverged" or (r.status == "finished" and r.stage != "trial")
    ]
    target = _TEST_FACTOR * best
    near = [r for r in telling if _is_near(r.learning_rate, target)]
    if not near:
        return None, "not tried"
    rate = min((r.learning_rate for r in near), key=lambda found: _distance(found, target))
    diverged = any(r.status == "diverged" for r in near if r.learning_rate == rate)
    return rate, "diverged" if diverged else "finished"


def _distance(ours: float, theirs: float) -> float:
    return abs(math.log(ours / theirs))


def _is_near(ours: float, theirs: float) -> bool:
    return _distance(ours, theirs) <= math.log(NEAR) * (1 + _ROUNDING)
