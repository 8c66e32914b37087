"""The recipe to use, and why."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from tangora.report import formats
from tangora.report.run_records import Comparison
from tangora.report.statistics.intervals import ALPHA, Interval, corrected_p_values
from tangora.report.statistics.judgement import Judgement, Row, judge
from tangora.report.statistics.samples import compare_samples

_SAME_COST = 1.05
"""Ratio of two median times, or of two memories, within which they count as equal."""


_Criterion = Literal["time", "memory", "test result"]


class Choice(NamedTuple):
    """What chose among candidates."""

    recipe: str
    by: _Criterion
    """What told it from the last candidates beside it."""
    among: int
    """Number of the last candidates, which were equal in what was compared before."""


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
    memory: str | None = None
    """What was compared of its memory, in words; None where it is not known."""
    choice: Choice | None = None
    """What decided between several candidates."""


def recommendation(comparison: Comparison) -> Recommendation | None:
    """Choose a recipe from the records of a comparison."""
    return recommend(judge(comparison))


def recommend(found: Judgement) -> Recommendation | None:
    """Choose the cheapest recipe that is not significantly worse than the best.

    Every recipe with several seeds is compared with the one that has the best test result, paired over seeds and
    examples; those with a p-value of at least 0.05 after Holm's correction, and the best itself, are the candidates.
    The cheapest has the smallest median time per run, the initialization included; of those within 5 % of it, the
    smallest memory; of those within 5 % of that, the best test result. Times do not count where a run shared its
    machine with other work.
    """
    samples = found.samples
    busy = any(record.load is not None and record.load.busy for record in found.comparison.records)
    known = [
        replace(row, seconds=None) if busy else row for row in found.rows if row.learning_rate is not None
    ]
    tested = [row for row in known if row.recipe in samples and len(samples[row.recipe].seeds) > 1]
    if not tested:
        return _by_validation(known)
    best, *others = tested
    differences = {row.recipe: compare_samples(samples[row.recipe], samples[best.recipe]) for row in others}
    corrected = corrected_p_values({name: each.p_value for name, each in differences.items()})
    equal = [best, *(row for row in others if corrected.get(row.recipe, 1.0) >= ALPHA)]
    candidates = _cheapest_first(equal)
    chosen = candidates[0]
    assert chosen.learning_rate is not None
    difference = differences.get(chosen.recipe)
    return Recommendation(
        recipe=chosen.recipe,
        learning_rate=chosen.learning_rate,
        decided=True,
        best=best.recipe,
        candidates=tuple(row.recipe for row in candidates),
        difference=difference and difference.value,
        difference_interval=difference and difference.interval,
        swept=all(row.num_learning_rates > 1 for row in tested),
        seconds=chosen.seconds,
        memory=_memory_words(chosen),
        choice=_choose(equal) if len(equal) > 1 else None,
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
    left, ordered = {row.recipe: row for row in rows}, []
    while left:
        ordered.append(left.pop(_choose([*left.values()]).recipe))
    return ordered


def _choose(rows: Sequence[Row]) -> Choice:
    # rows are ordered by their test results: the first of those that cost the same is the best
    costs: dict[_Criterion, Callable[[Row], float]] = {"time": _seconds, "memory": _memory}
    for by, cost in costs.items():
        limit = _SAME_COST * min(map(cost, rows))
        equal = [row for row in rows if cost(row) <= limit]
        if len(equal) == 1:
            return Choice(equal[0].recipe, by, len(rows))
        rows = equal
    return Choice(rows[0].recipe, "test result", len(rows))


def _seconds(row: Row) -> float:
    return math.inf if row.seconds is None else row.seconds


def _memory(row: Row) -> float:
    # where no peak is known, the optimizer's state is what recipes differ in
    known = row.optimizer_state_bytes if row.peak_bytes is None else row.peak_bytes
    return math.inf if known is None else known


def _memory_words(row: Row) -> str | None:
    if row.peak_bytes is not None:
        return f"{formats.size(row.peak_bytes)} peak memory"
    if row.optimizer_state_bytes is not None:
        return f"{formats.size(row.optimizer_state_bytes)} optimizer state"
    return None


def recommendation_sentence(found: Recommendation | None) -> str | None:
    """Say which recipe to use, and why."""
    if found is None:
        return None
    use = f"use {found.recipe} at {formats.learning_rate(found.learning_rate)}"
    if not found.decided:
        return (
            "Recommendation: impossible with one seed per recipe, because differences cannot be "
            f"separated from noise; the best on validation data is {found.recipe} at "
            f"{formats.learning_rate(found.learning_rate)}."
        )
    if not found.swept:
        return (
            f"Recommendation: try more learning rates first; of the rates tried so far, {found.recipe} at "
            f"{formats.learning_rate(found.learning_rate)} is "
            f"{'the best' if found.recipe == found.best else 'not significantly worse than the best'}."
        )
    if found.choice is None:
        return (
            f"Recommendation: {use}, the best; every other recipe with several seeds is significantly worse."
        )
    busy = " The machine was too busy to compare times." if found.seconds is None else ""
    return f"Recommendation: {use}. {_level(found)}. {_reason(found, found.choice)}.{busy}"


def _level(found: Recommendation) -> str:
    # who are the candidates, and how far the chosen one is from the best of them
    if found.difference is None:
        others = len(found.candidates) - 1
        return (
            f"It has the best test result; {formats.plural(others, 'other recipe')} "
            f"{'is' if others == 1 else 'are'} not significantly worse"
        )
    noise = formats.interval(found.difference_interval, sign=True)
    known = "" if found.difference_interval is None else f", 95 % interval {noise}"
    return (
        f"It is not significantly worse than the best, {found.best} (difference "
        f"{formats.difference(found.difference)}{known})"
    )


def _reason(found: Recommendation, choice: Choice) -> str:
    number = len(found.candidates)
    if choice.by == "time":
        return f"Of these {number} recipes it is the fastest ({formats.seconds(found.seconds)} per run)"
    least = f"it needs the least memory ({found.memory})"
    if choice.by == "memory" and found.seconds is None:
        return f"Of these {number} recipes {least}"
    equal = "time" if choice.by == "memory" else "memory" if found.seconds is None else "time and memory"
    decides = least if choice.by == "memory" else "it has the best test result of them"
    some = f"These {number}" if choice.among == number else f"The {choice.among} cheapest of these {number}"
    return f"{some} recipes need the same {equal} (within 5 %); {decides}"
