"""The choice of a learning rate, on validation data only, and of the runs that are then judged."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from tangora._checks import InputError
from tangora.report.run_records import Comparison, Record

Edge = Literal["low", "high"]


@dataclass(frozen=True)
class SweepPoint:
    """One learning rate of a recipe's sweep."""

    learning_rate: float
    validation: tuple[float, ...]
    """Validation metric of each finished run, by seed."""
    num_diverged: int
    num_failed: int
    """Runs that neither finished nor diverged."""

    @property
    def mean(self) -> float | None:
        """The mean validation metric of the finished runs, or None without any."""
        return fmean(self.validation) if self.validation else None


def group_by_recipe(comparison: Comparison) -> dict[str, list[Record]]:
    """Sort the records of a comparison into recipes."""
    if not comparison.records:
        raise InputError(f"the comparison {comparison.title!r} has no records yet")
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in comparison.records:
        groups[record.recipe].append(record)
    return {recipe: groups[recipe] for recipe in sorted(groups)}


def num_failed(records: Sequence[Record]) -> int:
    """Count the runs that neither finished nor diverged."""
    return sum(record.status not in ("finished", "diverged") for record in records)


def metric_value(record: Record, split: str, metric: str) -> float | None:
    """Look up a metric of a finished run."""
    value = record.metrics.get(split, {}).get(metric, math.nan)
    return value if record.status == "finished" and math.isfinite(value) else None


def sweep_points(records: Sequence[Record], metric: str) -> list[SweepPoint]:
    """Gather the sweep of one recipe.

    Only runs of stage ``sweep`` count when there are any: final runs exist at one learning rate only, so their
    seeds would compare that one with others on different terms. Runs of stage ``trial`` never do: they are shorter.
    """
    whole = [record for record in records if record.stage != "trial"]
    return trial_points([record for record in whole if record.stage == "sweep"] or whole, metric)


def trial_points(records: Sequence[Record], metric: str) -> list[SweepPoint]:
    """Gather all of some runs of one recipe by their learning rates."""
    rates = sorted({record.learning_rate for record in records})
    return [_point(rate, [r for r in records if r.learning_rate == rate], metric) for rate in rates]


def _point(rate: float, records: Sequence[Record], metric: str) -> SweepPoint:
    by_seed = sorted(records, key=lambda record: record.seed)
    values = [metric_value(record, "validation", metric) for record in by_seed]
    return SweepPoint(
        learning_rate=rate,
        validation=tuple(value for value in values if value is not None),
        num_diverged=sum(record.status == "diverged" for record in records),
        num_failed=num_failed(records),
    )


def best_learning_rate(points: Sequence[SweepPoint], *, higher_is_better: bool) -> float | None:
    """Choose a learning rate by its mean validation metric.

    A learning rate at which a seed diverged is chosen only when every other one diverged as well: the seeds that
    survived would flatter it. Ties go to the smaller learning rate.
    """
    sign = -1.0 if higher_is_better else 1.0
    keys = [
        (point.num_diverged > 0, sign * point.mean, point.learning_rate)
        for point in points
        if point.mean is not None
    ]
    return min(keys)[-1] if keys else None


def grid_edge(points: Sequence[SweepPoint], chosen: float | None) -> Edge | None:
    """Tell whether the sweep ended before the best learning rate was bracketed.

    Learning rates that diverged bracket; those whose runs all failed for other reasons say nothing.
    """
    known = [point.learning_rate for point in points if point.validation or point.num_diverged]
    if chosen is None or len(known) < 2:
        return None
    if chosen == min(known):
        return "low"
    return "high" if chosen == max(known) else None


def judged_runs(records: Sequence[Record], learning_rate: float | None) -> list[Record]:
    """Select the finished runs of one recipe that its test result is computed from.

    They are the final runs at the chosen learning rate, and the sweep runs there of other seeds if they trained
    for as many steps; without final runs, the sweep runs.
    """
    runs = [r for r in records if r.learning_rate == learning_rate and r.status == "finished"]
    finals = [record for record in runs if record.stage == "final"]
    lengths = {num_steps(record) for record in finals}
    sweeps = [r for r in runs if r.stage == "sweep" and (not finals or num_steps(r) in lengths)]
    by_seed = {record.seed: record for record in [*sweeps, *finals]}
    return [by_seed[seed] for seed in sorted(by_seed)]


def num_steps(record: Record) -> int:
    """Count the optimizer steps of a run."""
    return max((entry.step for entry in [*record.history, *record.evaluations]), default=0)
