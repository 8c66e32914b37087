"""Settings of a comparison, alone or as one of several tasks in a plan."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tangora._checks import InputError, check_choice, shown
from tangora._names import Kind
from tangora.experiments.comparison.paper import Paper, by_task
from tangora.experiments.settings import RunSettings, TaskSettings, check_adapted, check_named
from tangora.experiments.values import Seed, Settings, separated, validated
from tangora.recipes import recipe

JUDGES: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "loss"),
    "causal": ("loss", "exact_match"),
}
"""Metrics that can decide a comparison; the first one is the default."""


class CompareSettings(TaskSettings):
    """Recipes, learning rates and seeds on one task."""

    groups: ClassVar[Mapping[str, str]] = {
        **TaskSettings.groups,
        "recipes": "Method",
        "learning_rates": "Sweep and seeds",
        "title": "Output and resources",
    }
    aliases: ClassVar[Mapping[str, str]] = {
        **TaskSettings.aliases,
        "recipe": "recipes",
        "methods": "recipes",
        "learning_rate": "learning_rates",
        "lr": "learning_rates",
        "seed": "seeds",
        "metric": "judge_by",
    }

    recipes: list[str] = Field(
        min_length=1, description="Recipes to compare, separated by commas; see tangora list."
    )
    learning_rates: dict[str, list[float]] = Field(
        default_factory=dict,
        description="One search grid for all recipes, separated by commas; a YAML file can give one per recipe. "
        "Default: each recipe's own.",
    )
    seeds: list[Seed] = Field(
        default=[0, 1, 2],
        min_length=1,
        description="Seeds, separated by commas. The first ones run the sweep, all are reported.",
    )
    sweep_seeds: int = Field(
        default=1,
        ge=1,
        description="Number of seeds in the sweep; the mean over them selects the learning rate.",
    )
    extend: int = Field(
        default=0,
        ge=0,
        description=(
            "Maximum number of learning rates added beyond the end of a grid while the best one is at that "
            "end."
        ),
    )
    refine: int = Field(
        default=0,
        ge=0,
        description="Rounds of added learning rates halfway (geometrically) between the best and its neighbours.",
    )
    halving: int | None = Field(
        default=None,
        ge=2,
        description="Successive halving: shorter trials first; one in N continues with N times the steps. Saves time; "
        "not for final numbers.",
    )
    judge_by: Literal["accuracy", "loss", "exact_match"] | None = Field(
        default=None,
        description="Metric that selects learning rates and ranks recipes. Default: accuracy for classification, "
        "else loss; exact_match needs generated answers.",
    )
    title: str | None = Field(
        default=None, description="Heading of the report; default: recipes, data and model."
    )
    paper: Paper | None = Field(
        default=None,
        exclude=True,  # belongs to the report, and changes nothing of what is run
        description="Published results, shown beside these; only in a plan.",
    )

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Read lists that are given as text, and one grid for all recipes."""
        values = super().completed(values)
        for key, kind in (("recipes", str), ("seeds", int)):
            if key in values:
                values[key] = _listed(key, values[key], kind)
        rates = values.get("learning_rates")
        if isinstance(rates, (str, int, float, list)):
            grid = _listed("learning_rates", rates, float)
            values["learning_rates"] = dict.fromkeys(values.get("recipes", ()), grid)
        return values

    @field_validator("paper", mode="before")
    @classmethod
    def _published(cls, paper: Any) -> Any:
        return validated(Paper, paper, "paper") if isinstance(paper, dict) else paper

    @field_validator("recipes", mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        for value in values if isinstance(values, list) else [values]:
            check_named("recipes", value)
        return values

    @field_validator("recipes")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        names = [recipe(name).name for name in names]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"recipes must differ from each other; got {twice[0]} twice")
        return names

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
            if len({f"{rate:g}" for rate in grid}) < len(grid):  # as runs are named
                raise ValueError(f"learning_rates of {name} must differ from each other; got {grid}")
        return {recipe(name).name: sorted(grid) for name, grid in grids.items()}

    @model_validator(mode="after")
    def _comparable(self) -> "CompareSettings":
        if self.sweep_seeds > len(self.seeds):
            raise ValueError(
                f"sweep_seeds must be at most {len(self.seeds)}, all seeds; got {self.sweep_seeds}"
            )
        for name in self.recipes:
            check_adapted(self, recipe(name))
        if self.halving is not None and (self.extend or self.refine):
            raise ValueError("`halving` cannot be combined with `extend` or `refine`; omit one of them")
        return self

    def grown_from(self, found: Mapping[str, Any]) -> set[str]:
        """Tell in which keys this comparison asks for more: further recipes with grids of their own, further seeds."""
        recipes, seeds, grids = found["recipes"], found["seeds"], found["learning_rates"]
        same_grids = all(grids.get(name) == self.learning_rates.get(name) for name in recipes)
        kept = {
            "recipes": set(recipes) <= set(self.recipes),
            "learning_rates": same_grids,
            "seeds": seeds == self.seeds[: len(seeds)],
        }
        return {key for key, holds in kept.items() if holds}

    def grid(self, name: str) -> list[float]:
        """Return the learning rates of a recipe."""
        return self.learning_rates.get(name) or list(recipe(name).grid(self.kind))

    @property
    def heading(self) -> str:
        """The title, or what is compared, on what."""
        names = ", ".join(self.recipes) if len(self.recipes) <= 5 else f"{len(self.recipes)} recipes"
        return self.title or f"{names} on {Path(self.data).name} with {Path(self.model).name}"

    @property
    def generates(self) -> bool:
        """Whether its runs write answers."""
        return super().generates or self.judge_by == "exact_match"

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.judge_by or JUDGES[self.kind or "causal"][0]

    @property
    def higher_is_better(self) -> bool:
        """Whether that metric is to be maximized."""
        return self.metric != "loss"

    def run(self, name: str, rate: float, seed: int, cut: int = 1) -> RunSettings:
        """Return the settings of one run, of as many steps or of one in ``cut`` of them."""
        own = {
            "recipe": name,
            "learning_rate": rate,
            "seed": seed,
            "steps": self.steps and math.ceil(self.steps / cut),
            "epochs": self.epochs and self.epochs / cut,
        }
        shared = {key: getattr(self, key) for key in TaskSettings.model_fields}
        shared["exact_match"] = self.exact_match or self.judge_by == "exact_match"
        if recipe(name).adapter is None:
            # snapshots would be whole models, and steps lie below bfloat16's
            shared |= {"snapshots": False, "dtype": "float32"}
        return validated(RunSettings, shared | own)


def _listed(key: str, value: Any, kind: type) -> Any:
    # names and numbers come separated by commas from the command line
    value = separated(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if kind is str or not isinstance(value, list):
        return value
    return [_number(key, part, kind) if isinstance(part, str) else part for part in value]


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{key} must be numbers separated by commas; got {text!r}") from None


_NAMES_OF_FILES = {"report.html", "settings.json"}


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
            if name in _NAMES_OF_FILES:
                raise ValueError(
                    f"tasks must not be called {name!r}, which is the name of a file in the same folder"
                )
        return tasks


def read_plan(
    values: Mapping[str, Any],
    flags: Mapping[str, Any] | None = None,
    source: str = "",
    *,
    tiny: bool = False,
) -> CompareSettings | PlanSettings:
    """Make the settings of one comparison, or of several where there are ``tasks``.

    Args:
        values: The plan. Its block ``tiny`` is for the same plan as a stand-in, its block ``paper`` for the report.
        flags: Settings that override those of the plan, in every task.
        source: Name of the plan's file, for errors.
        tiny: Whether to read the plan's stand-in.
    """
    values = stand_in(values, source) if tiny else _without(values, "tiny")
    flags, tasks = dict(flags or {}), values.get("tasks")
    if "tasks" not in values:
        return validated(CompareSettings, CompareSettings.overridden(values, flags), source)
    _check_tasks(tasks, source)
    assert isinstance(tasks, dict)
    titles = {"title": title} if (title := flags.pop("title", values.get("title"))) else {}
    shared = _without(values, "tasks", "title", "paper")
    made = {
        str(name): validated(
            CompareSettings,
            {"title": str(name)} | CompareSettings.overridden(CompareSettings.overridden(shared, own), flags),
            f"{source}: {name}".lstrip(": "),
        )
        for name, own in tasks.items()
    }
    if (paper := values.get("paper")) is not None:
        paper = validated(Paper, paper, f"{source}: paper".lstrip(": "))
        columns = by_task(paper, {name: task.heading for name, task in made.items()}, source)
        made = {
            name: task.model_copy(update={"paper": columns.get(name, task.paper)})
            for name, task in made.items()
        }
    return validated(PlanSettings, {"tasks": made} | titles, source)


def stand_in(values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Return a plan with its block ``tiny`` over it: the same on models and data with which it ends in minutes.

    Tasks of the block take the place of the plan's; without any, its settings override those of all tasks. A setting
    that is null is as by default. Published results are left out, since nothing here can be compared with them.
    """
    place = f"{source}: " if source else ""
    block = values.get("tiny")
    if block is None:
        raise InputError(
            f"{place}tiny needs a block `tiny` with the settings that replace others; there is none"
        )
    if not isinstance(block, dict) or {"tiny", "paper"} & block.keys():
        raise InputError(
            f"{place}tiny must be settings by name, without `tiny` and `paper`; got {shown(block)}"
        )
    plan, tasks = _without(values, "tiny", "paper"), block.get("tasks")
    if "title" in plan:
        plan["title"] = f"{plan['title']} (stand-in)"
    if "tasks" not in block and "tasks" in plan:
        _check_tasks(plan["tasks"], source)
        own = _without(block, "title")
        tasks = {
            name: _given(CompareSettings.overridden(_without(task, "paper"), own))
            for name, task in plan["tasks"].items()
        }
    return _given(CompareSettings.overridden(plan, block) | {"tasks": tasks})


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check_tasks(tasks: Any, source: str) -> None:
    if not isinstance(tasks, dict) or not all(isinstance(own, dict) for own in tasks.values()):
        raise InputError(f"{f'{source}: ' if source else ''}tasks must be settings by name; got {tasks!r}")


def chosen_tasks(
    settings: CompareSettings | PlanSettings, names: str | None
) -> CompareSettings | PlanSettings:
    """Leave out tasks of a plan, to run it in pieces."""
    if names is None:
        return settings
    if isinstance(settings, CompareSettings):
        raise InputError(
            f"tasks selects from a plan with several tasks; got {names!r} for a plan without tasks"
        )
    wanted = separated(names)
    for name in wanted:
        check_choice("tasks", name, tuple(settings.tasks))
    return settings.model_copy(update={"tasks": {name: settings.tasks[name] for name in wanted}})
