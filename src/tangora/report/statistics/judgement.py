"""From the records of a comparison to one row per recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from tangora._checks import InputError
from tangora.report.run_records import Comparison, Record, TimeSplit
from tangora.report.statistics.intervals import ALPHA, Interval, Over, corrected_p_values
from tangora.report.statistics.samples import Sample, compare_samples, contrast, gap_closed, sample
from tangora.report.statistics.selection import (
    Edge,
    best_learning_rate,
    grid_edge,
    group_by_recipe,
    judged_runs,
    metric_value,
    num_failed,
    num_steps,
    sweep_points,
)

BASELINE = "lora"
CEILING = "full"


@dataclass(frozen=True)
class Row:
    """The result of one recipe at its best learning rate.

    Means are over the finished runs at the chosen learning rate; None stands for what was not measured.
    """

    recipe: str
    metric: str
    higher_is_better: bool
    num_runs: int
    num_diverged: int
    num_failed: int
    """Runs that neither finished nor diverged."""
    num_learning_rates: int
    learning_rate: float | None = None
    """Chosen by the validation metric, never by test; None if no run finished."""
    num_out_of_memory: int = 0
    """Failed runs that ran out of memory."""
    edge: Edge | None = None
    """The end of the grid at which the chosen learning rate lies, if it does."""
    test: float | None = None
    interval: Interval | None = None
    """95 %, as all intervals."""
    interval_over: Over | None = None
    difference: float | None = None
    """`test` minus that of ``lora``, paired where seeds and test examples agree."""
    difference_interval: Interval | None = None
    p_value: float | None = None
    """Two-sided; None for a single seed, and where all seeds of single numbers show the same difference."""
    p_corrected: float | None = None
    """By Holm's correction for all recipes but ``full``, whose difference is a question of its own."""
    versus_full: float | None = None
    versus_full_interval: Interval | None = None
    gap_closed: float | None = None
    """`difference` as a share of that of ``full``, where full fine-tuning is significantly better than LoRA."""
    gap_closed_interval: Interval | None = None
    gap_closed_missing: str | None = None
    """Why there is no `gap_closed`."""
    validation: float | None = None
    validation_loss: float | None = None
    num_seeds: int = 0
    """Number of seeds that `test` is the mean of."""
    time: TimeSplit | None = None
    """Median of each part over the runs."""
    seconds: float | None = None
    seconds_range: Interval | None = None
    step_milliseconds: float | None = None
    """Time of the optimizer per step."""
    step_milliseconds_range: Interval | None = None
    optimizer_state_bytes: int | None = None
    peak_bytes: int | None = None
    """The largest over the seeds."""
    trainable_parameters: int | None = None

    @property
    def side(self) -> int:
        """1 where the recipe is significantly better than LoRA, -1 where it is worse, else 0."""
        return side_of(self.difference, self.p_corrected, higher_is_better=self.higher_is_better)


@dataclass(frozen=True)
class Judgement:
    """A comparison, what it says of each recipe, and what that is computed from."""

    comparison: Comparison
    rows: list[Row]
    """The best recipe first."""
    samples: dict[str, Sample]
    """Test scores of the recipes that have any."""
    recorded: dict[str, list[Record]]
    """All runs of each recipe."""
    runs: dict[str, list[Record]]
    """Those behind the results, of the recipes that have any."""


def summarize(comparison: Comparison) -> list[Row]:
    """Choose each recipe's learning rate on validation data, and judge it on test data."""
    return judge(comparison).rows


def judge(comparison: Comparison) -> Judgement:
    """Summarize, and keep what is needed for further comparisons."""
    recorded = group_by_recipe(comparison)
    _check_metric(comparison)
    # Nothing of the test metric, which must not take part in the choice of the learning rate.
    rows = [_choose(records, comparison) for records in recorded.values()]
    runs = {row.recipe: judged_runs(recorded[row.recipe], row.learning_rate) for row in rows}
    samples = {
        recipe: found for recipe, judged in runs.items() if (found := sample(judged, comparison.metric))
    }
    rows = [
        replace(row, **_costs(runs[row.recipe], row.metric), **_test_results(row.recipe, samples))
        for row in rows
    ]
    rows = sorted(_with_gap(_with_correction(rows), samples), key=_rank)
    return Judgement(comparison, rows, samples, recorded, runs_behind(comparison, rows))


def runs_behind(comparison: Comparison, rows: Sequence[Row]) -> dict[str, list[Record]]:
    """Gather the runs that the results are computed from, of the recipes that have any."""
    groups = group_by_recipe(comparison)
    runs = {row.recipe: judged_runs(groups[row.recipe], row.learning_rate) for row in rows}
    return {recipe: records for recipe, records in runs.items() if records}


def _check_metric(comparison: Comparison) -> None:
    finished = [record for record in comparison.records if record.status == "finished"]
    known = sorted({name for record in finished for name in record.metrics.get("validation", {})})
    if finished and comparison.metric not in known:
        raise InputError(
            f"metric must be one that the runs have on validation data ({', '.join(known) or 'none'}); "
            f"got {comparison.metric!r}"
        )


def _choose(records: Sequence[Record], comparison: Comparison) -> Row:
    points = sweep_points(records, comparison.metric)
    chosen = best_learning_rate(points, higher_is_better=comparison.higher_is_better)
    return Row(
        recipe=records[0].recipe,
        metric=comparison.metric,
        higher_is_better=comparison.higher_is_better,
        num_runs=len(records),
        num_diverged=sum(record.status == "diverged" for record in records),
        num_failed=num_failed(records),
        num_out_of_memory=sum(record.status == "out_of_memory" for record in records),
        num_learning_rates=len(points),
        learning_rate=chosen,
        edge=grid_edge(points, chosen),
    )


def _costs(runs: Sequence[Record], metric: str) -> dict[str, Any]:
    if not runs:
        return {}
    seconds = [run.time.total for run in runs]
    steps = [1000 * run.time.optimizer / num for run in runs if (num := num_steps(run))]
    peaks = [run.memory.peak_bytes for run in runs if run.memory.peak_bytes is not None]
    parts = TimeSplit.model_fields
    return {
        "validation": _mean_metric(runs, metric),
        "validation_loss": _mean_metric(runs, "loss"),
        # medians: one run on a busy machine must not decide
        "time": TimeSplit(**{part: median(getattr(run.time, part) for run in runs) for part in parts}),
        "seconds": median(seconds),
        "seconds_range": (min(seconds), max(seconds)),
        "step_milliseconds": median(steps) if steps else None,
        "step_milliseconds_range": (min(steps), max(steps)) if steps else None,
        "optimizer_state_bytes": max(run.memory.optimizer_state_bytes for run in runs),
        "peak_bytes": max(peaks, default=None),
        "trainable_parameters": max(run.trainable_parameters for run in runs),
    }


def _mean_metric(runs: Sequence[Record], metric: str) -> float | None:
    values = [metric_value(run, "validation", metric) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _test_results(recipe: str, samples: Mapping[str, Sample]) -> dict[str, Any]:
    if recipe not in samples:
        return {}
    ours = samples[recipe]
    found: dict[str, Any] = {"test": ours.mean, "num_seeds": len(ours.seeds)}
    if estimated := contrast((1.0, ours)):
        found |= {"interval": estimated.interval, "interval_over": estimated.over}
    if recipe != BASELINE and BASELINE in samples:
        value, interval, p_value = compare_samples(ours, samples[BASELINE])
        found |= {"difference": value, "difference_interval": interval, "p_value": p_value}
    if recipe != CEILING and CEILING in samples:
        value, interval, _ = compare_samples(ours, samples[CEILING])
        found |= {"versus_full": value, "versus_full_interval": interval}
    return found


def _with_correction(rows: Sequence[Row]) -> list[Row]:
    corrected = corrected_p_values({row.recipe: row.p_value for row in rows if row.recipe != CEILING})
    return [replace(row, p_corrected=corrected.get(row.recipe, row.p_value)) for row in rows]


def _with_gap(rows: Sequence[Row], samples: Mapping[str, Sample]) -> list[Row]:
    by_name = {row.recipe: row for row in rows}
    reason = _no_gap(by_name.get(CEILING), by_name.get(BASELINE))
    return [_with_share(row, samples, reason) if row.difference is not None else row for row in rows]


def _with_share(row: Row, samples: Mapping[str, Sample], reason: str | None) -> Row:
    if reason is not None:
        return replace(row, gap_closed_missing=reason)
    if row.recipe == CEILING:
        return replace(row, gap_closed=1.0)  # by definition, so it has no interval
    share, interval = gap_closed(samples[row.recipe], samples[BASELINE], samples[CEILING])
    return replace(row, gap_closed=share, gap_closed_interval=interval)


def _no_gap(full: Row | None, lora: Row | None) -> str | None:
    # Why no share of the gap can be given, if so.
    if full is None or full.test is None or lora is None or lora.test is None:
        return f"{CEILING} or {BASELINE} has no test result"
    if full.p_value is None:
        return "the uncertainty of the gap is unknown: a single seed, or the same difference for every seed"
    if full.side:
        return None if full.side > 0 else f"{CEILING} is worse than {BASELINE}"
    return f"{CEILING} is not significantly better than {BASELINE}"


def side_of(difference: float | None, p_value: float | None, *, higher_is_better: bool) -> int:
    """Tell on which side of zero a difference lies, significantly: 1 for the better one."""
    if difference is None or p_value is None or p_value >= ALPHA:
        return 0
    return 1 if (difference > 0) == higher_is_better else -1


def _rank(row: Row) -> tuple[bool, float, str]:
    if row.test is None:
        return True, 0.0, row.recipe
    return False, -row.test if row.higher_is_better else row.test, row.recipe
