"""Recipes against each other over several tasks: who wins where, and by more than chance over all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import stats

from tangora.report.statistics.intervals import Interval, corrected_p_values
from tangora.report.statistics.judgement import BASELINE, Judgement, side_of
from tangora.report.statistics.samples import compare_samples

DuelOutcome = Literal["win", "tie", "loss"]

MIN_TASKS = 5
"""Fewer tasks are too few for the chi-squared distribution of Friedman's statistic."""

_OUTCOMES: dict[int, DuelOutcome] = {1: "win", 0: "tie", -1: "loss"}


@dataclass(frozen=True)
class Duel:
    """Two recipes on one task."""

    task: str
    ours: str
    theirs: str
    difference: float
    """Test metric of ours minus theirs."""
    interval: Interval | None
    """95 %, not corrected; None for one seed, or equal ones, without scores of single examples."""
    p_value: float | None
    """Two-sided; None where the noise is not known: for a single seed, or as above."""
    p_corrected: float | None
    """By Holm's correction over the family that the duel belongs to."""
    higher_is_better: bool

    @property
    def outcome(self) -> DuelOutcome | None:
        """Win, tie or loss of the first recipe; all but a tie need a corrected p-value below 0.05."""
        if self.p_value is None:
            return None
        side = side_of(self.difference, self.p_corrected, higher_is_better=self.higher_is_better)
        return _OUTCOMES[side]

    def flipped(self) -> "Duel":
        """Return the same duel as seen by the other recipe."""
        interval = None if self.interval is None else (-self.interval[1], -self.interval[0])
        return replace(
            self, ours=self.theirs, theirs=self.ours, difference=-self.difference, interval=interval
        )


@dataclass(frozen=True)
class TaskMatrix:
    """Recipes on several tasks."""

    tasks: Mapping[str, Judgement]
    """By name."""
    recipes: tuple[str, ...]
    """Those with a test result on any task: best mean rank first, then those without one by name."""
    against_lora: tuple[Duel, ...]
    """Every other recipe against LoRA on every task: one family for Holm's correction."""
    pairs: tuple[Duel, ...]
    """Every pair of recipes on every task, each once: another family, much larger."""
    mean_ranks: dict[str, float]
    """By test metric (1 is best, ties share), of the recipes with a result on every task if there are two."""
    rank_p_value: float | None
    """Friedman's, of no difference between their ranks; None for fewer than 3 recipes or 5 tasks."""

    def duel_against_lora(self, task: str, recipe: str) -> Duel | None:
        """Look up what a recipe other than LoRA is against it."""
        return next((duel for duel in self.against_lora if (duel.task, duel.ours) == (task, recipe)), None)

    def duel(self, task: str, ours: str, theirs: str) -> Duel | None:
        """Look up a pair of recipes in either order."""
        for found in self.pairs:
            if found.task == task and {found.ours, found.theirs} == {ours, theirs}:
                return found if found.ours == ours else found.flipped()
        return None

    def count(self, ours: str, theirs: str) -> dict[DuelOutcome, int]:
        """Count over the tasks, with p-values corrected for all pairs."""
        return _count([self.duel(task, ours, theirs) for task in self.tasks])

    def count_against_lora(self, recipe: str) -> dict[DuelOutcome, int]:
        """Count over the tasks, with p-values corrected for the recipes against LoRA only."""
        return _count([duel for duel in self.against_lora if duel.ours == recipe])


def _count(duels: Sequence[Duel | None]) -> dict[DuelOutcome, int]:
    outcomes = [duel.outcome for duel in duels if duel is not None]
    return {outcome: outcomes.count(outcome) for outcome in _OUTCOMES.values()}


def matrix(tasks: Mapping[str, Judgement]) -> TaskMatrix:
    """Compare all recipes with LoRA and with each other, on every task.

    Two questions make two families of tests, each corrected over all its recipes and tasks: which recipe differs from
    LoRA, and which from which. The second has so many tests that few seeds decide little of it.
    """
    mean_ranks, rank_p_value = _ranking(list(tasks.values()))
    names = {recipe for task in tasks.values() for recipe in task.samples}
    ordered = sorted(names, key=lambda name: (name not in mean_ranks, mean_ranks.get(name, 0.0), name))
    others = [name for name in ordered if name != BASELINE]
    return TaskMatrix(
        tasks=tasks,
        recipes=tuple(ordered),
        against_lora=_duels(tasks, [(name, BASELINE) for name in others]),
        pairs=_duels(tasks, list(combinations(ordered, 2))),
        mean_ranks={name: mean_ranks[name] for name in ordered if name in mean_ranks},
        rank_p_value=rank_p_value,
    )


def _ranking(tasks: Sequence[Judgement]) -> tuple[dict[str, float], float | None]:
    names = sorted(set.intersection(*(set(task.samples) for task in tasks))) if tasks else []
    if len(names) < 2:
        return {}, None
    # Smaller is better, as in ranks.
    costs = np.array(
        [
            [(-1.0 if task.comparison.higher_is_better else 1.0) * task.samples[name].mean for name in names]
            for task in tasks
        ]
    )
    ranks = stats.rankdata(costs, axis=1)
    mean_ranks = dict(zip(names, ranks.mean(axis=0).tolist(), strict=True))
    if len(names) < 3 or len(tasks) < MIN_TASKS:
        return mean_ranks, None
    if np.ptp(ranks) == 0:  # all tied on every task
        return mean_ranks, 1.0
    return mean_ranks, float(stats.friedmanchisquare(*costs.T).pvalue)


def _duels(tasks: Mapping[str, Judgement], pairs: Sequence[tuple[str, str]]) -> tuple[Duel, ...]:
    duels = [
        _duel(name, task, ours, theirs)
        for name, task in tasks.items()
        for ours, theirs in pairs
        if ours in task.samples and theirs in task.samples
    ]
    corrected = corrected_p_values({index: duel.p_value for index, duel in enumerate(duels)})
    return tuple(replace(duel, p_corrected=corrected.get(index)) for index, duel in enumerate(duels))


def _duel(name: str, task: Judgement, ours: str, theirs: str) -> Duel:
    value, interval, p_value = compare_samples(task.samples[ours], task.samples[theirs])
    return Duel(name, ours, theirs, value, interval, p_value, None, task.comparison.higher_is_better)
