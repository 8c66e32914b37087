"""The runs that a comparison calls for, given those that have ended.

`due` is a pure function of settings and records, so a comparison that was cut off anywhere goes on as if it had not
been: nothing else remembers where it was.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tangora.experiments.comparison.plan import CompareSettings
from tangora.experiments.settings import RunSettings
from tangora.recipes import recipe
from tangora.report import Record, best_learning_rate, sweep_points
from tangora.report.run_records import Stage
from tangora.report.statistics.selection import Edge, grid_edge, trial_points

_RATIO = 3.0
"""Between a lone learning rate and the next one beyond it."""

_LARGEST_RATIO = 10.0
"""A coarser grid is not extended by steps as coarse."""


@dataclass(frozen=True)
class Trial:
    """One run that a comparison plans."""

    settings: RunSettings
    stage: Stage
    before: bool = False
    """Whether it also measures the base model, for all."""

    @property
    def id(self) -> str:
        """Name of its record."""
        settings = self.settings
        length = f"steps{settings.steps}" if settings.epochs is None else f"epochs{settings.epochs:g}"
        short = f"-{length}" if self.stage == "trial" else ""
        return f"{settings.recipe}-lr{settings.peak_learning_rate:g}-seed{settings.seed}{short}"


def due(settings: CompareSettings, records: Sequence[Record]) -> list[Trial]:
    """List the runs that have to be made now."""
    known = {record.id: record for record in records}
    wanted = [trial for name in settings.recipes for trial in _wanted(_Sweep(settings, name, known))]
    # all begin with the same base model, which one of them measures
    first = next((trial for trial in wanted if trial.stage != "trial"), None)
    return [replace(trial, before=trial is first) for trial in wanted if trial.id not in known]


def planned(settings: CompareSettings, records: Sequence[Record]) -> int:
    """Count the runs of a comparison as far as they can be foreseen."""
    known = {record.id: record for record in records}
    total = 0
    for name in settings.recipes:
        sweep = _Sweep(settings, name, known)
        trials = list(_wanted(sweep))
        undecided = any(trial.stage != "final" and trial.id not in known for trial in trials)
        total += len(trials) + (len(settings.seeds) - settings.sweep_seeds if undecided else 0)
    return total


class _Sweep:
    """State of one recipe's sweep."""

    def __init__(self, settings: CompareSettings, name: str, known: dict[str, Record]):
        self.settings, self.name, self.known = settings, name, known

    def trials(self, rates: Sequence[float], stage: Stage = "sweep", cut: int = 1) -> list[Trial]:
        seeds = self.settings.seeds[: self.settings.sweep_seeds]
        return [
            Trial(self.settings.run(self.name, rate, seed, cut), stage) for rate in rates for seed in seeds
        ]

    def records(self, trials: Sequence[Trial]) -> list[Record] | None:
        # None if one of the runs has not ended
        found = [self.known.get(trial.id) for trial in trials]
        return None if None in found else [record for record in found if record is not None]

    def best(self, records: Sequence[Record]) -> float | None:
        points = sweep_points(records, self.settings.metric)
        return best_learning_rate(points, higher_is_better=self.settings.higher_is_better)

    def edge(self, rates: Sequence[float], records: Sequence[Record]) -> Edge | None:
        # the end of the grid beyond which a better learning rate may lie
        if all(record.status == "diverged" for record in records):
            return "low"
        if len(rates) == 1:
            return "high"
        return grid_edge(sweep_points(records, self.settings.metric), self.best(records))


def _wanted(sweep: _Sweep) -> Iterator[Trial]:
    # all runs of a recipe as far as the records tell them, those that have ended included
    settings = sweep.settings
    if settings.halving is None:
        shorter, rates = [], _adapted(sweep)
    else:
        shorter, rates = _halved(sweep)
    yield from shorter
    if rates is None:
        return
    trials = sweep.trials(rates)
    yield from trials
    records = sweep.records(trials)
    best = sweep.best(records) if records is not None else None
    if best is not None:
        for seed in settings.seeds[settings.sweep_seeds :]:
            yield Trial(settings.run(sweep.name, best, seed), "final")


def _adapted(sweep: _Sweep) -> list[float]:
    # the grid, with what has been found to be worth adding
    settings = sweep.settings
    rates = settings.grid(sweep.name)
    if not recipe(sweep.name).trains:  # the rate does nothing
        return rates
    for _ in range(settings.extend):
        if (records := sweep.records(sweep.trials(rates))) is None:
            return rates
        if (edge := sweep.edge(rates, records)) is None:
            break
        rates = _extended(rates, edge)
    for _ in range(settings.refine):
        if (records := sweep.records(sweep.trials(rates))) is None:
            return rates
        if (best := sweep.best(records)) is None:
            break
        rates = _refined(rates, best)
    return rates


def _extended(rates: list[float], edge: Edge) -> list[float]:
    low, high = (
        (rates[0], rates[0] * _RATIO) if len(rates) == 1 else (rates[:2] if edge == "low" else rates[-2:])
    )
    ratio = min(high / low, _LARGEST_RATIO)
    return [_rounded(low / ratio), *rates] if edge == "low" else [*rates, _rounded(rates[-1] * ratio)]


def _refined(rates: list[float], best: float) -> list[float]:
    at = rates.index(best)
    beside = rates[max(at - 1, 0) : at] + rates[at + 1 : at + 2]
    return sorted({*rates, *(_rounded(math.sqrt(best * other)) for other in beside)})


def _halved(sweep: _Sweep) -> tuple[list[Trial], list[float] | None]:
    # the shorter trials so far, and the rates that go on to the full number of steps once these have ended
    settings, eta = sweep.settings, sweep.settings.halving or 2
    rates = settings.grid(sweep.name)
    rounds = math.floor(math.log(len(rates), eta) + 1e-9)
    if not recipe(sweep.name).trains:
        rounds = 0
    shorter: list[Trial] = []
    for left in range(rounds, 0, -1):
        trials = sweep.trials(rates, "trial", eta**left)
        shorter += trials
        if (records := sweep.records(trials)) is None:
            return shorter, None
        rates = _leading(records, settings.metric, math.ceil(len(rates) / eta), settings.higher_is_better)
        if not rates:
            return shorter, []
    return shorter, rates


def _leading(records: Sequence[Record], metric: str, count: int, higher_is_better: bool) -> list[float]:
    sign = -1.0 if higher_is_better else 1.0
    # as `best_learning_rate` orders them: where a seed diverged, the others would flatter
    ordered = sorted(
        (point.num_diverged > 0, sign * point.mean, point.learning_rate)
        for point in trial_points(records, metric)
        if point.mean is not None
    )
    return sorted(rate for _, _, rate in ordered[:count])


def _rounded(rate: float) -> float:
    # three digits: the same rate has the same name however it was computed
    return float(f"{rate:.3g}")
