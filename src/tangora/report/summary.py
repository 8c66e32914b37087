"""From the records of a comparison to one row per recipe."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

import numpy as np

from tangora._checks import InputError
from tangora.report.bootstrap import Interval, Scores, difference_interval, mean_interval
from tangora.report.records import Comparison, Record, TimeSplit
from tangora.report.selection import (
    Edge,
    best_learning_rate,
    grid_edge,
    judged_runs,
    metric_value,
    num_steps,
    sweep_points,
)

Resampled = Literal["seeds and examples", "examples", "seeds"]

BASELINE = "lora"
CEILING = "full"

# What a float32 accuracy, or one rounded to four decimals, may differ by from the mean of `correct`.
_SAME_METRIC = 1e-4


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
        interval: 95 % bootstrap interval of `test`.
        interval_over: What the interval resamples.
        difference: `test` minus that of ``lora``.
        difference_interval: Its 95 % interval, paired where seeds and test examples agree.
        gap_closed: `difference` as a share of that of ``full``; None unless full fine-tuning is better than LoRA
            by more than noise.
        validation: Validation metric, mean over the seeds.
        validation_loss: Validation loss, mean over the seeds.
        num_seeds: Seeds that `test` is the mean of.
        num_runs: All runs of the recipe.
        num_diverged: Those that diverged.
        num_failed: Those that failed.
        num_learning_rates: Size of the grid.
        time: Seconds per run.
        step_milliseconds: Optimizer time per optimizer step, in milliseconds.
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
    edge: Edge | None = None
    test: float | None = None
    interval: Interval | None = None
    interval_over: Resampled | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    gap_closed: float | None = None
    validation: float | None = None
    validation_loss: float | None = None
    num_seeds: int = 0
    time: TimeSplit | None = None
    step_milliseconds: float | None = None
    optimizer_state_bytes: int | None = None
    peak_bytes: int | None = None
    trainable_parameters: int | None = None


@dataclass(frozen=True)
class _Sample:
    """Test scores of one recipe: seeds x test examples, or seeds x 1."""

    seeds: tuple[int, ...]
    scores: Scores


def summarize(comparison: Comparison, *, seed: int = 0) -> list[Row]:
    """Choose each recipe's learning rate on validation data, and judge it on test data.

    Args:
        comparison: The runs.
        seed: Of the bootstrap; the same seed gives the same rows.

    Returns:
        One row per recipe, best test metric first, then the recipes without one by name.

    Raises:
        InputError: If there are no records, or finished runs but none with the comparison's metric.
    """
    by_recipe = group_by_recipe(comparison)
    _check_metric(comparison)
    rows = {recipe: _row(records, comparison) for recipe, records in by_recipe.items()}
    samples = {
        recipe: sample
        for recipe, records in by_recipe.items()
        if (sample := _sample(judged_runs(records, rows[recipe].learning_rate), comparison.metric))
    }
    judged = [_with_test(row, samples.get(row.recipe), seed) for row in rows.values()]
    compared = _with_differences(judged, samples, seed)
    return sorted(compared, key=_rank)


def group_by_recipe(comparison: Comparison) -> dict[str, list[Record]]:
    """Sort the records of a comparison into recipes.

    Args:
        comparison: The runs.

    Returns:
        Recipe name to its runs; names in alphabetical order.

    Raises:
        InputError: If there are no records.
    """
    if not comparison.records:
        raise InputError(f"the comparison {comparison.title!r} has no records yet")
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in comparison.records:
        groups[record.recipe].append(record)
    return {recipe: groups[recipe] for recipe in sorted(groups)}


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
        num_failed=sum(record.status == "failed" for record in records),
        num_learning_rates=len(points),
        learning_rate=chosen,
        edge=grid_edge(points, chosen),
    )
    runs = judged_runs(records, chosen)
    return _with_costs(row, runs) if runs else row


def _with_costs(row: Row, runs: Sequence[Record]) -> Row:
    steps = sum(num_steps(run) for run in runs)
    optimizer_seconds = sum(run.time.optimizer for run in runs)
    peaks = [run.memory.peak_bytes for run in runs if run.memory.peak_bytes is not None]
    parts = TimeSplit.model_fields
    return replace(
        row,
        validation=_mean_metric(runs, row.metric),
        validation_loss=_mean_metric(runs, "loss"),
        time=TimeSplit(**{part: fmean(getattr(run.time, part) for run in runs) for part in parts}),
        step_milliseconds=1000 * optimizer_seconds / steps if steps else None,
        optimizer_state_bytes=max(run.memory.optimizer_state_bytes for run in runs),
        peak_bytes=max(peaks, default=None),
        trainable_parameters=max(run.trainable_parameters for run in runs),
    )


def _mean_metric(runs: Sequence[Record], metric: str) -> float | None:
    values = [metric_value(run, "validation", metric) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _sample(runs: Sequence[Record], metric: str) -> _Sample | None:
    tested = [(run, value) for run in runs if (value := metric_value(run, "test", metric)) is not None]
    if not tested:
        return None
    seeds = tuple(run.seed for run, _ in tested)
    answers = [run.correct for run, _ in tested if run.correct]
    means = np.array([value for _, value in tested])
    if len(answers) == len(tested) and len({len(answer) for answer in answers}) == 1:
        scores = np.array(answers, dtype=np.float64)
        # Other metrics (a loss, macro F1) are no means of `correct`: their examples cannot be resampled by it.
        if np.abs(scores.mean(axis=1) - means).max() <= _SAME_METRIC:
            return _Sample(seeds, scores)
    return _Sample(seeds, means[:, None])


def _with_test(row: Row, sample: _Sample | None, seed: int) -> Row:
    if sample is None:
        return row
    return replace(
        row,
        test=float(sample.scores.mean()),
        interval=mean_interval(sample.scores, seed=seed),
        interval_over=_resampled(sample.scores),
        num_seeds=len(sample.seeds),
    )


def _resampled(scores: Scores) -> Resampled | None:
    num_seeds, num_examples = scores.shape
    if num_examples == 1:
        return "seeds" if num_seeds > 1 else None
    return "seeds and examples" if num_seeds > 1 else "examples"


def _with_differences(rows: Sequence[Row], samples: dict[str, _Sample], seed: int) -> list[Row]:
    baseline = samples.get(BASELINE)
    if baseline is None:
        return list(rows)
    compared = [
        _with_difference(row, samples[row.recipe], baseline, seed)
        if row.recipe in samples and row.recipe != BASELINE
        else row
        for row in rows
    ]
    ceiling = next((row for row in compared if row.recipe == CEILING), None)
    if ceiling is None or not leads(ceiling) or ceiling.difference is None:
        return compared
    gap = ceiling.difference
    return [
        row if row.difference is None else replace(row, gap_closed=row.difference / gap) for row in compared
    ]


def _with_difference(row: Row, sample: _Sample, baseline: _Sample, seed: int) -> Row:
    paired = sample.seeds == baseline.seeds and sample.scores.shape == baseline.scores.shape
    interval = difference_interval(sample.scores, baseline.scores, paired=paired, seed=seed)
    difference = float(sample.scores.mean() - baseline.scores.mean())
    return replace(row, difference=difference, difference_interval=interval)


def leads(row: Row) -> bool:
    """Tell whether a recipe is better than LoRA by more than noise.

    Args:
        row: The recipe's row.

    Returns:
        Whether the whole interval of the difference is on the better side of zero.
    """
    if row.difference_interval is None:
        return False
    low, high = row.difference_interval
    return low > 0 if row.higher_is_better else high < 0


def trails(row: Row) -> bool:
    """Tell whether a recipe is worse than LoRA by more than noise.

    Args:
        row: The recipe's row.

    Returns:
        Whether the whole interval of the difference is on the worse side of zero.
    """
    if row.difference_interval is None:
        return False
    low, high = row.difference_interval
    return high < 0 if row.higher_is_better else low > 0


def _rank(row: Row) -> tuple[bool, float, str]:
    if row.test is None:
        return True, 0.0, row.recipe
    return False, -row.test if row.higher_is_better else row.test, row.recipe
