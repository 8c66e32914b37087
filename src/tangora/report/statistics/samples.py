"""Test scores of recipes, and what is estimated from several of them together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from scipy.optimize import root_scalar

from tangora.report.run_records import Record
from tangora.report.statistics.intervals import Estimate, Interval, Scores, estimate
from tangora.report.statistics.selection import metric_value

# What a float32 metric, or one rounded to four decimals, may differ by from the mean over its examples.
_SAME_METRIC = 1e-4

_BOUNDS = {"accuracy": (0.0, 1.0), "exact_match": (0.0, 1.0), "loss": (0.0, math.inf)}


@dataclass(frozen=True)
class Sample:
    """Test scores of one recipe, between their smallest and largest possible value."""

    seeds: tuple[int, ...]
    scores: Scores
    """Seeds x test examples, or seeds x 1."""
    bounds: Interval = (-math.inf, math.inf)

    @property
    def mean(self) -> float:
        """The mean over seeds and examples."""
        return float(self.scores.mean())


def sample(runs: Sequence[Record], metric: str) -> Sample | None:
    """Gather the test scores of one recipe."""
    tested = [(run, value) for run in runs if (value := metric_value(run, "test", metric)) is not None]
    if not tested:
        return None
    seeds = tuple(run.seed for run, _ in tested)
    means = np.array([value for _, value in tested])
    bounds = _BOUNDS.get(metric, (-math.inf, math.inf))
    # Other metrics (macro F1) are no means over examples, and cannot be resampled by them.
    for field in ("correct", "scores"):
        scores = _by_example([getattr(run, field, None) for run, _ in tested])
        if _have_means(scores, means):
            return Sample(seeds, scores, bounds)
    return Sample(seeds, means[:, None], bounds)


def benchmark_sample(runs: Sequence[Record], name: str) -> Sample | None:
    """Gather what the runs of one recipe reached on a benchmark, by example where the metric is a mean over them."""
    found = {run.seed: run.benchmarks[name] for run in runs if name in run.benchmarks}
    values = {seed: each.value for seed, each in found.items() if each.value is not None}
    if not values or not all(map(math.isfinite, values.values())):
        return None
    means = np.array(list(values.values()))
    scores = _by_example([found[seed].scores for seed in values])
    if not _have_means(scores, means):
        return Sample(tuple(values), means[:, None])
    return Sample(tuple(values), scores, (0.0, 1.0) if _are_answers(scores) else (-math.inf, math.inf))


def _have_means(scores: Scores | None, means: Scores) -> TypeGuard[Scores]:
    return scores is not None and np.allclose(
        scores.mean(axis=1), means, rtol=_SAME_METRIC, atol=_SAME_METRIC
    )


def _by_example(recorded: Sequence[Any]) -> Scores | None:
    if not all(recorded) or len({len(scores) for scores in recorded}) > 1:
        return None
    scores = np.array(recorded, dtype=np.float64)
    return scores if np.isfinite(scores).all() else None


def contrast(*terms: tuple[float, Sample]) -> Estimate | None:
    """Estimate a weighted sum of recipes' mean scores.

    Recipes with the same seeds are paired over seeds, and all are over test examples: what a seed (its data order)
    or an example does to both cancels.
    """
    # Where only some recipes have scores of single examples, no pair of examples can be made.
    in_common = len({item.scores.shape[1] for _, item in terms}) == 1
    groups: dict[tuple[int, ...], Scores] = {}
    for weight, item in terms:
        scores = item.scores if in_common else item.scores.mean(axis=1, keepdims=True)
        groups[item.seeds] = groups.get(item.seeds, 0.0) + weight * scores
    unit = max(math.sqrt((item.scores**2).mean()) for _, item in terms)
    estimated = estimate(*groups.values(), unit=unit)
    if estimated is None:
        return None
    low, high = (
        sum(weight * item.bounds[(weight < 0) != end] for weight, item in terms if weight) for end in (0, 1)
    )
    return replace(
        estimated, bounds=(low, high), proportion=len(terms) == 1 and _are_answers(terms[0][1].scores)
    )


class Difference(NamedTuple):
    """One recipe's mean minus another's, and what is known of its noise."""

    value: float
    interval: Interval | None
    p_value: float | None


def compare_samples(ours: Sample, theirs: Sample) -> Difference:
    """Compare two recipes, paired where seeds or test examples agree."""
    found = contrast((1.0, ours), (-1.0, theirs))
    noise = (found.interval, found.p_value) if found else (None, None)
    return Difference(ours.mean - theirs.mean, *noise)


def _are_answers(scores: Scores) -> bool:
    return scores.shape[1] > 1 and bool(np.isin(scores, (0.0, 1.0)).all())


def gap_closed(ours: Sample, lora: Sample, full: Sample) -> tuple[float, Interval | None]:
    """Estimate which share of the gap between LoRA and full fine-tuning a recipe closes.

    The interval holds all shares for which ``ours - lora - share * (full - lora)`` is not significantly different from
    zero (without correction), so it accounts for the noise in the gap, and is not symmetric.

    Source:
        Fieller (1954), Journal of the Royal Statistical Society B 16, 175-185.
    """
    gap = full.mean - lora.mean
    share = (ours.mean - lora.mean) / gap

    def remaining(candidate: float) -> Estimate | None:
        return contrast((1.0, ours), (-candidate, full), (candidate - 1.0, lora))

    found = remaining(share)
    if found is None or found.over == "examples":
        return share, None

    def excess(candidate: float) -> float:
        found = remaining(candidate)
        # One share of all may leave the same number for each seed.
        return math.inf if found is None else abs(found.value) - found.margin

    step = found.margin / abs(gap)
    low, high = (_first_root(excess, share, sign * step) for sign in (-1, 1))
    return share, (low, high)


def _first_root(function: Callable[[float], float], start: float, step: float) -> float:
    # Far out the sign is that of the gap's own test, so the search ends.
    while function(start + step) < 0:
        step *= 2
    return root_scalar(function, bracket=(start, start + step), xtol=1e-6).root
