"""From the records of a comparison to one row per recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from tangora._checks import InputError
from tangora.report.records import Comparison, Record, TimeSplit
from tangora.report.statistics.intervals import ALPHA, Estimate, Interval, Over, holm
from tangora.report.statistics.samples import Sample, contrast, gap_closed, sample
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

    Attributes:
        recipe: Name of the recipe.
        metric: The metric that decides.
        higher_is_better: Whether the metric is to be maximized.
        learning_rate: Chosen by the validation metric, never by test; None if no run finished.
        edge: The end of the grid at which the chosen learning rate lies, if it does.
        test: Test metric, mean over the seeds.
        interval: 95 % interval of `test`, from `intervals.estimate`.
        interval_over: What the interval would have change: seeds, test examples, or both.
        difference: `test` minus that of ``lora``.
        difference_interval: Its 95 % interval, paired where seeds and test examples agree.
        p_value: Two-sided, of no difference from ``lora``; None for a single seed, and where all seeds
            of single numbers show the same difference.
        p_corrected: `p_value` by Holm's correction for all recipes of the comparison but ``full``, whose difference
            is a question of its own.
        versus_full: `test` minus that of ``full``.
        versus_full_interval: Its 95 % interval.
        gap_closed: `difference` as a share of that of ``full``; None unless full fine-tuning is significantly better
            than LoRA.
        gap_closed_interval: Its 95 % interval, which accounts for the noise of both differences.
        gap_closed_missing: Why there is no `gap_closed`.
        validation: Validation metric, mean over the seeds.
        validation_loss: Validation loss, mean over the seeds.
        num_seeds: Seeds that `test` is the mean of.
        num_runs: All runs of the recipe.
        num_diverged: Those that diverged.
        num_failed: Those that failed for any other reason.
        num_out_of_memory: Those of them that ran out of memory.
        num_learning_rates: Size of the grid.
        time: Seconds per run, the median of each part.
        seconds: The same in all, median over the runs.
        seconds_range: The shortest and the longest run.
        step_milliseconds: Optimizer time per optimizer step, in milliseconds, median over the runs.
        step_milliseconds_range: The smallest and the largest.
        optimizer_state_bytes: Tensors in the optimizer's state.
        peak_bytes: Peak memory during training, the largest over the seeds.
        trainable_parameters: Number of trained parameters.
    """

    recipe: str
    metric: str
    higher_is_better: bool
    num_runs: int
    num_diverged: int
    num_failed: int
    num_learning_rates: int
    learning_rate: float | None = None
    num_out_of_memory: int = 0
    edge: Edge | None = None
    test: float | None = None
    interval: Interval | None = None
    interval_over: Over | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    p_value: float | None = None
    p_corrected: float | None = None
    versus_full: float | None = None
    versus_full_interval: Interval | None = None
    gap_closed: float | None = None
    gap_closed_interval: Interval | None = None
    gap_closed_missing: str | None = None
    validation: float | None = None
    validation_loss: float | None = None
    num_seeds: int = 0
    time: TimeSplit | None = None
    seconds: float | None = None
    seconds_range: Interval | None = None
    step_milliseconds: float | None = None
    step_milliseconds_range: Interval | None = None
    optimizer_state_bytes: int | None = None
    peak_bytes: int | None = None
    trainable_parameters: int | None = None


def summarize(comparison: Comparison) -> list[Row]:
    """Choose each recipe's learning rate on validation data, and judge it on test data."""
    return judge(comparison)[0]


def judge(comparison: Comparison) -> tuple[list[Row], dict[str, Sample]]:
    """Summarize, and keep the test scores for further comparisons."""
    by_recipe = group_by_recipe(comparison)
    _check_metric(comparison)
    rows = [_row(records, comparison) for records in by_recipe.values()]
    samples = {
        row.recipe: found
        for row in rows
        if (found := sample(judged_runs(by_recipe[row.recipe], row.learning_rate), comparison.metric))
    }
    rows = [_with_test(row, samples.get(row.recipe)) for row in rows]
    rows = _with_correction([_with_differences(row, samples) for row in rows])
    return sorted(_with_gap(rows, samples), key=_rank), samples


def _check_metric(comparison: Comparison) -> None:
    finished = [record for record in comparison.records if record.status == "finished"]
    known = sorted({name for record in finished for name in record.metrics.get("validation", {})})
    if finished and comparison.metric not in known:
        raise InputError(
            f"metric must be one that the runs have on validation data ({', '.join(known) or 'none'}); "
            f"got {comparison.metric!r}"
        )


def _row(records: Sequence[Record], comparison: Comparison) -> Row:
    # Everything but the test metric, which must not take part in the choice of the learning rate.
    points = sweep_points(records, comparison.metric)
    chosen = best_learning_rate(points, higher_is_better=comparison.higher_is_better)
    row = Row(
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
    runs = judged_runs(records, chosen)
    return _with_costs(row, runs) if runs else row


def _with_costs(row: Row, runs: Sequence[Record]) -> Row:
    seconds = [run.time.total for run in runs]
    steps = [1000 * run.time.optimizer / num for run in runs if (num := num_steps(run))]
    peaks = [run.memory.peak_bytes for run in runs if run.memory.peak_bytes is not None]
    parts = TimeSplit.model_fields
    return replace(
        row,
        validation=_mean_metric(runs, row.metric),
        validation_loss=_mean_metric(runs, "loss"),
        # medians: one run on a busy machine must not decide
        time=TimeSplit(**{part: median(getattr(run.time, part) for run in runs) for part in parts}),
        seconds=median(seconds),
        seconds_range=(min(seconds), max(seconds)),
        step_milliseconds=median(steps) if steps else None,
        step_milliseconds_range=(min(steps), max(steps)) if steps else None,
        optimizer_state_bytes=max(run.memory.optimizer_state_bytes for run in runs),
        peak_bytes=max(peaks, default=None),
        trainable_parameters=max(run.trainable_parameters for run in runs),
    )


def _mean_metric(runs: Sequence[Record], metric: str) -> float | None:
    values = [metric_value(run, "validation", metric) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _with_test(row: Row, found: Sample | None) -> Row:
    if found is None:
        return row
    estimated = contrast((1.0, found))
    row = replace(row, test=found.mean, num_seeds=len(found.seeds))
    if estimated is None:
        return row
    return replace(row, interval=estimated.interval, interval_over=estimated.over)


def _with_differences(row: Row, samples: dict[str, Sample]) -> Row:
    to_lora = _difference(row.recipe, BASELINE, samples)
    if to_lora is not None:
        difference, estimated = to_lora
        row = replace(row, difference=difference)
        if estimated is not None:
            row = replace(row, difference_interval=estimated.interval, p_value=estimated.p_value)
    to_full = _difference(row.recipe, CEILING, samples)
    if to_full is not None:
        difference, estimated = to_full
        row = replace(
            row, versus_full=difference, versus_full_interval=estimated.interval if estimated else None
        )
    return row


def _difference(ours: str, theirs: str, samples: dict[str, Sample]) -> tuple[float, Estimate | None] | None:
    if ours == theirs or ours not in samples or theirs not in samples:
        return None
    ours_sample, theirs_sample = samples[ours], samples[theirs]
    return ours_sample.mean - theirs_sample.mean, contrast((1.0, ours_sample), (-1.0, theirs_sample))


def _with_correction(rows: Sequence[Row]) -> list[Row]:
    p_values = {row.recipe: row.p_value for row in rows if row.p_value is not None}
    family = [recipe for recipe in p_values if recipe != CEILING]
    corrected = p_values | dict(zip(family, holm([p_values[recipe] for recipe in family]), strict=True))
    return [replace(row, p_corrected=corrected.get(row.recipe)) for row in rows]


def _with_gap(rows: Sequence[Row], samples: dict[str, Sample]) -> list[Row]:
    by_name = {row.recipe: row for row in rows}
    reason = _no_gap(by_name.get(CEILING), by_name.get(BASELINE))
    return [_with_share(row, samples, reason) if row.difference is not None else row for row in rows]


def _with_share(row: Row, samples: dict[str, Sample], reason: str | None) -> Row:
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
        return "the noise of the gap is not known: a single seed, or the same difference for every seed"
    if leads(full):
        return None
    if trails(full):
        return f"{CEILING} is worse than {BASELINE}"
    return f"{CEILING} is not significantly better than {BASELINE}"


def leads(row: Row) -> bool:
    """Tell whether a recipe is significantly better than LoRA."""
    return better_or_worse(row.difference, row.p_corrected, higher_is_better=row.higher_is_better) > 0


def trails(row: Row) -> bool:
    """Tell whether a recipe is significantly worse than LoRA."""
    return better_or_worse(row.difference, row.p_corrected, higher_is_better=row.higher_is_better) < 0


def better_or_worse(difference: float | None, p_value: float | None, *, higher_is_better: bool) -> int:
    """Tell on which side of zero a difference lies."""
    if difference is None or p_value is None or p_value >= ALPHA:
        return 0
    return 1 if (difference > 0) == higher_is_better else -1


def _rank(row: Row) -> tuple[bool, float, str]:
    if row.test is None:
        return True, 0.0, row.recipe
    return False, -row.test if row.higher_is_better else row.test, row.recipe
