"""What a comparison is to do: its settings, and the runs that they call for, given those that have ended.

`due` is a pure function of settings and records, so a comparison that was cut off anywhere goes on as if it had not
been: nothing else remembers where it was.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tangora._checks import InputError, check_choice
from tangora.experiments.settings import RunSettings, Settings, TaskSettings, validated
from tangora.recipes import recipe
from tangora.report import Record, best_learning_rate, sweep_points
from tangora.report.records import Stage
from tangora.report.statistics.selection import Edge, grid_edge, trial_points
from tangora.training.models import Kind

JUDGES: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "loss"),
    "causal": ("loss", "exact_match"),
}
"""What may decide a comparison; the first one does by default."""

_RATIO = 3.0
"""Between a lone learning rate and the next one beyond it."""

_LARGEST_RATIO = 10.0
"""A coarser grid is not extended by steps as coarse."""


class CompareSettings(TaskSettings):
    """Recipes, learning rates and seeds on one task."""

    recipes: list[str] = Field(min_length=1, description="Names of the methods.")
    learning_rates: dict[str, list[float]] = Field(
        default_factory=dict, description="Grid by recipe; default: the recipe's own."
    )
    seeds: list[int] = Field(
        default=[0, 1, 2], min_length=1, description="The first ones sweep, all are reported."
    )
    sweep_seeds: int = Field(
        default=1,
        ge=1,
        description="Seeds that try all learning rates; the mean over them chooses. More choose with less noise.",
    )
    extend: int = Field(
        default=0,
        ge=0,
        description="Learning rates to add beyond the end of a grid while the best one lies there.",
    )
    refine: int = Field(
        default=0,
        ge=0,
        description="Rounds of learning rates halfway (geometrically) between the best and the next.",
    )
    halving: int | None = Field(
        default=None,
        ge=2,
        description="Successive halving: shorter trials first, of which the best one in so many goes on to as many "
        "times the steps. Saves time; leave it off for final numbers.",
    )
    judge_by: Literal["accuracy", "loss", "exact_match"] | None = Field(
        default=None,
        description="What chooses learning rates and decides: accuracy (classification), exact_match (generated "
        "answers) or loss; default: accuracy where there are classes, else loss.",
    )
    title: str = Field(default="Comparison", description="Heading of the report.")

    @field_validator("recipes")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("recipes must differ from each other")
        return [recipe(name).name for name in names]

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ from each other; got {seeds}")
        return seeds

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, grids: dict[str, list[float]]) -> dict[str, list[float]]:
        for name, grid in grids.items():
            if not grid or min(grid) <= 0:
                raise ValueError(f"learning_rates of {name} must be positive numbers; got {grid}")
        return {recipe(name).name: sorted(set(grid)) for name, grid in grids.items()}

    @model_validator(mode="after")
    def _enough_seeds(self) -> "CompareSettings":
        if self.sweep_seeds > len(self.seeds):
            raise ValueError(
                f"sweep_seeds must be at most {len(self.seeds)}, all seeds; got {self.sweep_seeds}"
            )
        return self

    @model_validator(mode="after")
    def _one_way(self) -> "CompareSettings":
        if self.halving is not None and (self.extend or self.refine):
            raise ValueError(
                "halving drops learning rates that extend and refine would look beside; choose one"
            )
        return self

    def grown_from(self, found: Mapping[str, Any]) -> set[str]:
        """Tell in which keys this comparison asks for more: further recipes with grids of their own, further seeds.

        Args:
            found: Settings of what was compared before, as JSON holds them.

        Returns:
            Which of ``recipes``, ``learning_rates`` and ``seeds`` keep everything that was there.
        """
        recipes, seeds, grids = found["recipes"], found["seeds"], found["learning_rates"]
        same_grids = all(grids.get(name) == self.learning_rates.get(name) for name in recipes)
        kept = {
            "recipes": set(recipes) <= set(self.recipes),
            "learning_rates": same_grids,
            "seeds": seeds == self.seeds[: len(seeds)],
        }
        return {key for key, holds in kept.items() if holds}

    def grid(self, name: str) -> list[float]:
        """Return the learning rates of a recipe.

        Args:
            name: The recipe.

        Returns:
            Its grid, ascending.
        """
        return self.learning_rates.get(name) or list(recipe(name).learning_rates)

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.judge_by or JUDGES[self.kind or "causal"][0]

    @property
    def higher_is_better(self) -> bool:
        """Whether that metric is to be maximized."""
        return self.metric != "loss"

    def run(self, name: str, rate: float, seed: int, steps: int | None = None) -> RunSettings:
        """Return the settings of one run.

        Args:
            name: The recipe.
            rate: Learning rate.
            seed: Seed.
            steps: Other than those of the comparison.

        Returns:
            Its settings.
        """
        own = {"recipe": name, "learning_rate": rate, "seed": seed, "steps": steps or self.steps}
        shared = {key: getattr(self, key) for key in TaskSettings.model_fields}
        shared["exact_match"] = self.exact_match or self.judge_by == "exact_match"
        if (
            recipe(name).adapter is None
        ):  # nothing to be aligned, whole models as snapshots, steps below bfloat16's
            shared |= {"measure_every": None, "measure_gradient": None, "dtype": "float32"}
        return RunSettings.model_validate(shared | own)


class PlanSettings(Settings):
    """Several comparisons that share what is not said for each task."""

    title: str = "Study"
    tasks: dict[str, CompareSettings] = Field(min_length=1)

    @field_validator("tasks")
    @classmethod
    def _file_names(cls, tasks: dict[str, CompareSettings]) -> dict[str, CompareSettings]:
        for name in tasks:
            if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name[0] == ".":
                raise ValueError(f"tasks need names of letters, digits, '-', '_' and '.'; got {name!r}")
        return tasks


def read_plan(
    values: Mapping[str, Any], flags: Mapping[str, Any] | None = None, source: str = ""
) -> CompareSettings | PlanSettings:
    """Make the settings of one comparison, or of several where there are ``tasks``.

    Args:
        values: By key, as in a plan's file; each of the ``tasks`` overrides what stands outside.
        flags: Override both.
        source: Where they come from, for messages.

    Returns:
        The settings.

    Raises:
        InputError: Naming the first bad key, its value and what is allowed.
    """
    flags, tasks = dict(flags or {}), values.get("tasks")
    if "tasks" not in values:
        return validated(CompareSettings, {**values} | flags, source)
    if not isinstance(tasks, dict) or not all(isinstance(own, dict) for own in tasks.values()):
        raise InputError(f"{f'{source}: ' if source else ''}tasks must be settings by name; got {tasks!r}")
    titles = {"title": title} if (title := flags.pop("title", values.get("title"))) else {}
    shared = {key: value for key, value in values.items() if key not in ("tasks", "title")}
    made = {
        str(name): validated(
            CompareSettings, {"title": str(name)} | shared | own | flags, f"{source}: {name}".lstrip(": ")
        )
        for name, own in tasks.items()
    }
    return validated(PlanSettings, {"tasks": made} | titles, source)


def chosen_tasks(
    settings: CompareSettings | PlanSettings, names: str | None
) -> CompareSettings | PlanSettings:
    """Leave out tasks of a plan, to run it in pieces.

    Args:
        settings: The plan.
        names: Tasks, separated by commas; ``None`` for all.

    Returns:
        A smaller plan, whose folders are those of the whole.

    Raises:
        InputError: If there is no such task, or the plan has only one.
    """
    if names is None:
        return settings
    if isinstance(settings, CompareSettings):
        raise InputError(f"tasks chooses from a plan with several tasks; got {names!r} for one without")
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        check_choice("tasks", name, tuple(settings.tasks))
    return settings.model_copy(update={"tasks": {name: settings.tasks[name] for name in wanted}})


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    settings: RunSettings
    stage: Stage

    @property
    def id(self) -> str:
        """Name of its record."""
        short = f"-steps{self.settings.steps}" if self.stage == "trial" else ""
        return f"{self.settings.recipe}-lr{self.settings.peak:g}-seed{self.settings.seed}{short}"


def due(settings: CompareSettings, records: Sequence[Record]) -> list[Cell]:
    """List the runs that have to be made now.

    Args:
        settings: What to compare; ``kind`` must be known.
        records: Of the runs that have ended, well or badly.

    Returns:
        Runs without a record that depend on none of each other; empty when the comparison is complete.
    """
    known = {record.id: record for record in records}
    return [
        cell
        for name in settings.recipes
        for cell in _wanted(_Sweep(settings, name, known))
        if cell.id not in known
    ]


def planned(settings: CompareSettings, records: Sequence[Record]) -> int:
    """Count the runs of a comparison as far as they can be foreseen.

    Args:
        settings: What to compare.
        records: Of the runs that have ended.

    Returns:
        Runs that ended and those that are still wanted; more may follow from extending and refining grids.
    """
    known = {record.id: record for record in records}
    total = 0
    for name in settings.recipes:
        sweep = _Sweep(settings, name, known)
        cells = list(_wanted(sweep))
        undecided = any(cell.stage != "final" and cell.id not in known for cell in cells)
        total += len(cells) + (len(settings.seeds) - settings.sweep_seeds if undecided else 0)
    return total


class _Sweep:
    """What is known of one recipe's runs."""

    def __init__(self, settings: CompareSettings, name: str, known: dict[str, Record]):
        self.settings, self.name, self.known = settings, name, known

    def cells(self, rates: Sequence[float], stage: Stage = "sweep", steps: int | None = None) -> list[Cell]:
        seeds = self.settings.seeds[: self.settings.sweep_seeds]
        return [
            Cell(self.settings.run(self.name, rate, seed, steps), stage) for rate in rates for seed in seeds
        ]

    def records(self, cells: Sequence[Cell]) -> list[Record] | None:
        # None if one of the runs has not ended
        found = [self.known.get(cell.id) for cell in cells]
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


def _wanted(sweep: _Sweep) -> Iterator[Cell]:
    # all runs of a recipe as far as the records tell them, those that have ended included
    settings = sweep.settings
    if settings.halving is None:
        trials, rates = [], _adapted(sweep)
    else:
        trials, rates = _halved(sweep)
    yield from trials
    if rates is None:
        return
    cells = sweep.cells(rates)
    yield from cells
    records = sweep.records(cells)
    best = sweep.best(records) if records is not None else None
    if best is not None:
        for seed in settings.seeds[settings.sweep_seeds :]:
            yield Cell(settings.run(sweep.name, best, seed), "final")


def _adapted(sweep: _Sweep) -> list[float]:
    # the grid, with what has been found to be worth adding
    settings = sweep.settings
    rates = settings.grid(sweep.name)
    if not recipe(sweep.name).trains:  # the rate does nothing
        return rates
    for _ in range(settings.extend):
        if (records := sweep.records(sweep.cells(rates))) is None:
            return rates
        if (edge := sweep.edge(rates, records)) is None:
            break
        rates = _extended(rates, edge)
    for _ in range(settings.refine):
        if (records := sweep.records(sweep.cells(rates))) is None:
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


def _halved(sweep: _Sweep) -> tuple[list[Cell], list[float] | None]:
    # the trials so far, and the rates that go on to the full number of steps once the trials have ended
    settings, eta = sweep.settings, sweep.settings.halving or 2
    rates = settings.grid(sweep.name)
    rounds = math.floor(math.log(len(rates), eta) + 1e-9)
    if not recipe(sweep.name).trains:
        rounds = 0
    trials: list[Cell] = []
    for left in range(rounds, 0, -1):
        cells = sweep.cells(rates, "trial", max(1, math.ceil(settings.steps / eta**left)))
        trials += cells
        if (records := sweep.records(cells)) is None:
            return trials, None
        rates = _leading(records, settings.metric, math.ceil(len(rates) / eta), settings.higher_is_better)
        if not rates:
            return trials, []
    return trials, rates


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
