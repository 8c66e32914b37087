"""Which recipe to use: the cheapest of those that are not significantly worse than the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tangora.report.records import Comparison
from tangora.report.statistics.intervals import ALPHA, Interval, holm
from tangora.report.statistics.judgement import Row, judge
from tangora.report.statistics.samples import Sample, difference

SAME_COST = 1.05
"""Ratio of two median times, or of two memories, within which they count as equal."""


@dataclass(frozen=True)
class Recommendation:
    """A recipe to use, and why."""

    recipe: str
    learning_rate: float
    """The best, chosen on validation data."""
    decided: bool
    """Whether test results of several seeds decided; else it is the best on validation data."""
    best: str
    """The recipe with the best test result among those with several seeds; without any, `recipe`."""
    candidates: tuple[str, ...]
    """Those that are not significantly worse than `best`, which is one of them, the cheapest first."""
    difference: float | None = None
    """Test metric of `recipe` minus that of `best`; None where they are the same."""
    difference_interval: Interval | None = None
    swept: bool = True
    """Whether each candidate, and what is worse, had more than one learning rate to choose from."""
    seconds: float | None = None
    """Median time per run of `recipe`; None where a busy machine made times say nothing."""
    least_seconds: float | None = None
    """The smallest of all candidates; times within 5 % of it count as equal."""


def recommendation(comparison: Comparison) -> Recommendation | None:
    """Choose a recipe from the records of a comparison."""
    return recommend(*judge(comparison), timed=has_comparable_times(comparison))


def has_comparable_times(comparison: Comparison) -> bool:
    """Return whether no run of a comparison shared its machine with other work, as far as is known."""
    return not any(record.load is not None and record.load.busy for record in comparison.records)


def recommend(
    rows: Sequence[Row], samples: Mapping[str, Sample], *, timed: bool = True
) -> Recommendation | None:
    """Choose the cheapest recipe that is not significantly worse than the best.

    Every recipe with several seeds is compared with the one that has the best test result, paired over seeds and
    examples; those with a p-value of at least 0.05 after Holm's correction, and the best itself, are the candidates.
    The cheapest has the smallest median time per run, the initialization included; of those within 5 % of it, the
    smallest memory; of those within 5 % of that, the best test result.
    """
    known = [row if timed else replace(row, seconds=None) for row in rows if row.learning_rate is not None]
    tested = [row for row in known if row.recipe in samples and len(samples[row.recipe].seeds) > 1]
    if not tested:
        return _by_validation(known)
    best, *others = tested
    differences = {row.recipe: difference(samples[row.recipe], samples[best.recipe]) for row in others}
    p_values = {name: found.p_value for name, found in differences.items() if found.p_value is not None}
    corrected = dict(zip(p_values, holm([*p_values.values()]), strict=True))
    candidates = _cheapest_first([best, *(row for row in others if corrected.get(row.recipe, 1.0) >= ALPHA)])
    chosen = candidates[0]
    assert chosen.learning_rate is not None
    found = differences.get(chosen.recipe)
    return Recommendation(
        recipe=chosen.recipe,
        learning_rate=chosen.learning_rate,
        decided=True,
        best=best.recipe,
        candidates=tuple(row.recipe for row in candidates),
        difference=found and found.value,
        difference_interval=found and found.interval,
        swept=all(row.num_learning_rates > 1 for row in tested),
        seconds=chosen.seconds,
        least_seconds=min((row.seconds for row in candidates if row.seconds is not None), default=None),
    )


def _by_validation(rows: Sequence[Row]) -> Recommendation | None:
    known = [row for row in rows if row.validation is not None]
    if not known:
        return None
    best = max(known, key=lambda row: (row.validation or 0.0) * (1 if row.higher_is_better else -1))
    assert best.learning_rate is not None
    return Recommendation(
        best.recipe, best.learning_rate, decided=False, best=best.recipe, candidates=(), seconds=best.seconds
    )


def _cheapest_first(rows: Sequence[Row]) -> list[Row]:
    left, ordered = list(rows), []
    while left:
        equal = left
        for cost in (_seconds, _memory):
            limit = SAME_COST * min(map(cost, equal))
            equal = [row for row in equal if cost(row) <= limit]
        ordered.append(equal[0])
        left.remove(equal[0])
    return ordered


def _seconds(row: Row) -> float:
    return math.inf if row.seconds is None else row.seconds


def _memory(row: Row) -> float:
    # where no peak is known, the optimizer's state is what recipes differ in
    known = row.optimizer_state_bytes if row.peak_bytes is None else row.peak_bytes
    return math.inf if known is None else known
