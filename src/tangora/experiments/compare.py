"""`tangora compare`: recipes, each with its own sweep of learning rates, on one task.

The learning rate is chosen on validation data with the first seed; the chosen one is repeated with the other seeds,
and only test results are reported. Every run has a record of its own, so an interrupted comparison goes on where it
stopped.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, field_validator

from tangora._checks import InputError
from tangora.experiments.logs import log_to
from tangora.experiments.run import Stage, Watcher, execute, load_run_task, verify_adapter
from tangora.experiments.settings import RunSettings, TaskSettings, claim_folder
from tangora.recipes import recipe
from tangora.report import (
    Comparison,
    Record,
    best_learning_rate,
    load_record,
    save_json,
    save_picture,
    summarize,
    sweep_points,
    write_csv,
    write_page,
)
from tangora.training.data import Task


class CompareSettings(TaskSettings):
    """Recipes, learning rates and seeds on one task."""

    recipes: list[str] = Field(min_length=1, description="Names of the methods.")
    learning_rates: dict[str, list[float]] = Field(
        default_factory=dict, description="Grid by recipe; default: the recipe's own."
    )
    seeds: list[int] = Field(
        default=[0, 1, 2], min_length=1, description="The first one sweeps, all are reported."
    )
    title: str = Field(default="Comparison", description="Heading of the report.")

    @field_validator("recipes")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("recipes must differ from each other")
        return [recipe(name).name for name in names]

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, grids: dict[str, list[float]]) -> dict[str, list[float]]:
        for name, grid in grids.items():
            if not grid or min(grid) <= 0:
                raise ValueError(f"learning_rates of {name} must be positive numbers; got {grid}")
        return {recipe(name).name: sorted(grid) for name, grid in grids.items()}

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
        """The metric that decides: accuracy for classification, else the loss."""
        return "accuracy" if self.kind == "classification" else "loss"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    settings: RunSettings
    stage: Stage

    @property
    def id(self) -> str:
        """Name of its record."""
        return f"{self.settings.recipe}-lr{self.settings.peak:g}-seed{self.settings.seed}"


@dataclass
class CompareWatcher:
    """What a comparison tells about its progress; subclass and override."""

    total: int = field(default=0, init=False)

    def plan(self, total: int) -> None:
        """Hear how many runs there will be."""
        self.total = total

    def begin(self, cell: Cell) -> Watcher:
        """Hear that a run begins.

        Args:
            cell: The run.

        Returns:
            Who watches it.
        """
        del cell
        return Watcher()

    def end(self, cell: Cell, record: Record) -> None:
        """Hear that a run has ended, or had ended earlier."""


@dataclass(frozen=True)
class Outcome:
    """What a comparison leaves behind.

    Attributes:
        comparison: All records.
        report: The page.
        adapter: The best adapter, or ``None`` if no method with an adapter finished.
        adapter_recipe: The method that it comes from.
        difference: Largest difference of logits between the trained model and plain PEFT with that adapter on the
            untouched base.
    """

    comparison: Comparison
    report: Path
    adapter: Path | None
    adapter_recipe: str | None
    difference: float | None


def compare(
    settings: CompareSettings,
    output: str | Path,
    *,
    command: str = "tangora.compare(...)",
    watcher: CompareWatcher | None = None,
) -> Outcome:
    """Run a comparison, or what is missing of it, and write its report.

    The output folder holds ``settings.json``, ``comparison.json`` and ``records/``, ``summary.csv``, ``report.html``,
    ``picture.png``, ``adapter/`` (the best one) and ``runs/`` with every run's own files.

    Args:
        settings: What to compare.
        output: Output folder.
        command: What repeats it, for the report.
        watcher: Hears of the progress.

    Returns:
        Records, report and best adapter.

    Raises:
        InputError: If something in the settings cannot be used, or the folder belongs to another configuration.
    """
    folder, watcher = Path(output), watcher or CompareWatcher()
    task = load_run_task(_run_settings(settings, settings.recipes[0], 1.0, 0))
    settings = settings.model_copy(update={"kind": task.kind})
    claim_folder(folder, settings)
    sweep = list(_sweep(settings))
    watcher.plan(len(sweep) + len(settings.recipes) * (len(settings.seeds) - 1))
    with log_to(folder / "log.txt"):
        records = [_run_or_read(cell, task, folder, watcher) for cell in sweep]
        records += [_run_or_read(cell, task, folder, watcher) for cell in _finals(settings, records)]
    comparison = Comparison(
        title=settings.title,
        command=command,
        metric=settings.metric,
        higher_is_better=settings.metric != "loss",
        settings=settings.model_dump(mode="json"),
        records=records,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    save_json(comparison.model_copy(update={"records": []}), folder / "comparison.json")
    page = write_report(comparison, folder)
    with log_to(folder / "log.txt"):
        return Outcome(comparison, page, *_best_adapter(comparison, task, folder))


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the table, the picture and the page of a comparison.

    Args:
        comparison: All records.
        folder: Its output folder.

    Returns:
        The page, ``report.html``.
    """
    write_csv(summarize(comparison), folder / "summary.csv")
    save_picture(comparison, folder / "picture.png")
    return write_page(comparison, folder / "report.html")


def _run_settings(settings: CompareSettings, name: str, lr: float, seed: int) -> RunSettings:
    shared = {key: getattr(settings, key) for key in TaskSettings.model_fields}
    return RunSettings(**shared, recipe=name, learning_rate=lr, seed=seed)


def _sweep(settings: CompareSettings) -> Iterator[Cell]:
    for name in settings.recipes:
        for lr in settings.grid(name):
            yield Cell(_run_settings(settings, name, lr, settings.seeds[0]), "sweep")


def _finals(settings: CompareSettings, records: list[Record]) -> Iterator[Cell]:
    for name in settings.recipes:
        own = [record for record in records if record.recipe == name]
        points = sweep_points(own, settings.metric)
        best = best_learning_rate(points, higher_is_better=settings.metric != "loss")
        if best is not None:
            for seed in settings.seeds[1:]:
                yield Cell(_run_settings(settings, name, best, seed), "final")


def _run_or_read(cell: Cell, task: Task, folder: Path, watcher: CompareWatcher) -> Record:
    path = folder / "records" / f"{cell.id}.json"
    if path.exists():
        record = load_record(path)
    else:
        run_folder = folder / "runs" / cell.id
        shutil.rmtree(run_folder, ignore_errors=True)  # a run without a record was cut off
        record = execute(
            cell.settings, task, run_folder, run_id=cell.id, stage=cell.stage, watcher=watcher.begin(cell)
        )
        save_json(record, path)
    watcher.end(cell, record)
    return record


def _best_adapter(
    comparison: Comparison, task: Task, folder: Path
) -> tuple[Path | None, str | None, float | None]:
    for row in summarize(comparison):
        runs = [
            r for r in comparison.records if r.recipe == row.recipe and r.learning_rate == row.learning_rate
        ]
        for record in runs:
            source = folder / "runs" / record.id
            if record.status == "finished" and (source / "adapter").exists():
                target = folder / "adapter"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source / "adapter", target)
                # a record of an older version lacks what has been added since
                values = {k: value for k, value in record.settings.items() if k in RunSettings.model_fields}
                return target, row.recipe, verify_adapter(RunSettings(**values), task, source)
    return None, None, None


def preset(name: str) -> CompareSettings:
    """Return the settings of a named comparison.

    Args:
        name: ``quickstart`` (minutes on two cores) or ``smoke`` (seconds).

    Returns:
        Its settings.

    Raises:
        InputError: If there is none of this name.
    """
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


PRESETS = {
    "quickstart": CompareSettings(
        title="MiniLM on BBC News",
        recipes=["full", "lora", "lora-ga", "lora-pro", "tangent"],
        learning_rates={
            "full": [1e-4, 3e-4, 1e-3],
            "lora": [1e-3, 3e-3, 1e-2],
            "lora-ga": [1e-4, 3e-4, 1e-3],
            "lora-pro": [1e-4, 3e-4, 1e-3],
            "tangent": [1e-4, 3e-4, 1e-3],
        },
        steps=36,
        batch_size=8,
        max_length=40,
        num_train=1000,
        num_validation=100,
        num_test=200,
        start_examples=16,
    ),
    "smoke": CompareSettings(
        title="MiniLM on BBC News, the smallest comparison",
        recipes=["lora", "tangent"],
        learning_rates={"lora": [3e-3], "tangent": [3e-4]},
        seeds=[0],
        steps=8,
        batch_size=8,
        max_length=32,
        num_train=200,
        num_validation=50,
        num_test=100,
    ),
}
"""Comparisons that run anywhere, on packaged models and data."""
