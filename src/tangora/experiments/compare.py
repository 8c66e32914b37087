"""`tangora compare`: recipes, each with its own sweep of learning rates, on one task or several.

The learning rate is chosen on validation data with the first seed; the chosen one is repeated with the other seeds,
and only test results are reported. Every run has a process and a record of its own, so a comparison that was cut off
anywhere goes on where it stopped.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from tangora._checks import InputError, check_choice, check_kind, check_path
from tangora.experiments.comparison.plan import JUDGES, CompareSettings, PlanSettings
from tangora.experiments.comparison.pool import Pool
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.sweep import Cell, due, planned
from tangora.experiments.comparison.worker import RUNS_FOLDER, DiskFullError, Limits, record_path
from tangora.experiments.launcher import check_one_process
from tangora.experiments.logs import log_to
from tangora.experiments.run.execute import Watcher
from tangora.experiments.run.loading import load_run_task
from tangora.experiments.run.proof import verify_adapter
from tangora.experiments.settings import RunSettings, claim_folder
from tangora.report import (
    Comparison,
    Record,
    load_record,
    save_json,
    save_picture,
    summarize,
    write_csv,
    write_page,
    write_study,
)
from tangora.report.records import COMPARISON_FILE, RECORDS_FOLDER
from tangora.training.data import Task
from tangora.training.tracking import check_trackers


@dataclass
class CompareWatcher:
    """What a comparison tells about its progress; subclass and override."""

    total: int = field(default=0, init=False)

    def plan(self, total: int) -> None:
        """Hear how many runs there will be; again when a sweep has found more to do."""
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
    adapter: Path | None = None
    adapter_recipe: str | None = None
    difference: float | None = None


def compare(
    settings: CompareSettings,
    output: str | Path,
    *,
    command: str = "tangora.compare(...)",
    watcher: CompareWatcher | None = None,
    resources: Resources | None = None,
) -> Outcome:
    """Run a comparison, or what is missing of it, and write its report.

    The output folder holds ``settings.json``, ``comparison.json`` and ``records/``, ``summary.csv``, ``report.html``,
    ``picture.png``, ``adapter/`` (the best one) and ``runs/`` with every run's own files.

    Args:
        settings: What to compare.
        output: Output folder.
        command: What repeats it, for the report.
        watcher: Hears of the progress.
        resources: What it may use; default: one run at a time, no limits.

    Returns:
        Records, report and best adapter. When time ran out, what there is so far: the same call goes on.

    Raises:
        InputError: If something in the settings cannot be used, the folder belongs to another configuration, a
            launcher has started several processes, or the disk is full; what has finished is kept.
    """
    check_one_process("compare", "--jobs makes several runs side by side")
    check_kind("settings", settings, CompareSettings, "a CompareSettings")
    folder, resources = check_path("output", output), resources or Resources()
    with Pool(resources.jobs, Limits(gigabytes=resources.gigabytes)) as pool:
        runner = _Runner(pool, resources, watcher or CompareWatcher(), command)
        prepared = runner.prepare(settings, folder)
        return runner.run(*prepared)


@dataclass(frozen=True)
class StudyOutcome:
    """What comparisons on several tasks leave behind.

    Attributes:
        outcomes: Of each task.
        report: The page over all of them.
    """

    outcomes: dict[str, Outcome]
    report: Path


def compare_tasks(
    plan: PlanSettings,
    output: str | Path,
    *,
    command: str = "tangora.compare_tasks(...)",
    watcher: CompareWatcher | None = None,
    resources: Resources | None = None,
) -> StudyOutcome:
    """Run comparisons on several tasks, or what is missing of them, and write a report on each and on all.

    Args:
        plan: The tasks.
        output: Output folder, with one folder like that of `compare` for each task.
        command: What repeats it, for the report.
        watcher: Hears of the progress.
        resources: What it may use; default: one run at a time, no limits.

    Returns:
        The outcomes.

    Raises:
        InputError: As `compare` does, before any run where a task's data or settings cannot be used.
    """
    folder = Path(output)
    check_one_process("compare", "--jobs makes several runs side by side")
    resources = resources or Resources()
    with Pool(resources.jobs, Limits(gigabytes=resources.gigabytes)) as pool:
        runner = _Runner(pool, resources, watcher or CompareWatcher(), command)
        # all data is read before the first run: a broken row in the last task must not cost a night
        prepared = {name: runner.prepare(own, folder / name) for name, own in plan.tasks.items()}
        outcomes = {name: runner.run(*each) for name, each in prepared.items()}
    comparisons = {name: outcome.comparison for name, outcome in outcomes.items()}
    return StudyOutcome(outcomes, write_study(comparisons, folder / "report.html", plan.title, command))


class _Runner:
    """Makes the runs of comparisons, one comparison after the other."""

    def __init__(self, pool: Pool, resources: Resources, watcher: CompareWatcher, command: str):
        self._pool, self._resources, self._watcher, self._command = pool, resources, watcher, command
        self._began = time.monotonic()
        self._totals: dict[Path, int] = {}

    def prepare(self, settings: CompareSettings, folder: Path) -> tuple[CompareSettings, Task, Path]:
        # reads the data and claims the folder
        check_trackers(settings.report_to or ())
        task = load_run_task(settings.run(settings.recipes[0], 1.0, 0))
        settings = settings.model_copy(update={"kind": task.kind})
        if settings.judge_by is not None:
            check_choice("judge_by", settings.judge_by, JUDGES[task.kind])
        claim_folder(folder, settings)
        if self._resources.retry:
            for path in sorted((folder / RECORDS_FOLDER).glob("*.json")):
                if load_record(path).status not in ("finished", "diverged"):
                    path.unlink()
        self._count(folder, settings, [])
        return settings, task, folder

    def run(self, settings: CompareSettings, task: Task, folder: Path) -> Outcome:
        # makes all runs that are due and affordable, and writes the report
        records: dict[str, Record] = {}
        late = False
        while True:
            self._count(folder, settings, [*records.values()])
            waiting = [
                cell for cell in due(settings, [*records.values()]) if cell.id not in self._pool.running
            ]
            known = [cell for cell in waiting if record_path(folder, cell).exists()]
            for cell in known:
                records[cell.id] = load_record(record_path(folder, cell))
                self._watcher.end(cell, records[cell.id])
            if known:
                continue
            for cell in waiting:
                if not self._pool.has_room:
                    break
                late = late or self._late(records)
                if late:
                    break
                self._pool.start(cell, task, folder, self._watcher.begin(cell))
            if not self._pool.running:
                break
            try:
                for cell, record in self._pool.wait():
                    records[cell.id] = record
                    self._watcher.end(cell, record)
            except DiskFullError as problem:
                raise InputError(
                    f"{problem}; what has finished is kept: free some space and give the same command again"
                ) from problem
        ended = [records[name] for name in sorted(records)]
        return self._written(settings, task, folder, ended, [cell.id for cell in waiting])

    def _late(self, records: dict[str, Record]) -> bool:
        if self._resources.hours is None:
            return False
        left = 3600 * self._resources.hours - (time.monotonic() - self._began)
        seconds = [record.time.total for record in records.values() if record.status == "finished"]
        return left < (median(seconds) if seconds else 0.0)

    def _count(self, folder: Path, settings: CompareSettings, records: Sequence[Record]) -> None:
        self._totals[folder] = planned(settings, records)
        self._watcher.plan(sum(self._totals.values()))

    def _written(
        self, settings: CompareSettings, task: Task, folder: Path, records: list[Record], missing: list[str]
    ) -> Outcome:
        comparison = Comparison(
            title=settings.title,
            command=self._command,
            metric=settings.metric,
            higher_is_better=settings.higher_is_better,
            settings=settings.model_dump(mode="json"),
            records=records,
            missing=missing,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        save_json(comparison.model_copy(update={"records": []}), folder / COMPARISON_FILE)
        if not records:
            raise InputError(f"{folder}: the time was over before a run had begun; give more hours")
        page = write_report(comparison, folder)
        failed = [record for record in records if record.status != "finished"]
        if failed and len(failed) == len(records):
            raise InputError(f"no run finished; {failed[0].id}: {failed[0].error}; all are listed in {page}")
        if missing:
            return Outcome(comparison, page)
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
    rows = summarize(comparison)
    write_csv(rows, folder / "summary.csv")
    save_picture(comparison, folder / "picture.png")
    return write_page(comparison, folder / "report.html")


def _best_adapter(
    comparison: Comparison, task: Task, folder: Path
) -> tuple[Path | None, str | None, float | None]:
    for row in summarize(comparison):
        runs = [
            r for r in comparison.records if r.recipe == row.recipe and r.learning_rate == row.learning_rate
        ]
        for record in runs:
            source = folder / RUNS_FOLDER / record.id
            if record.status == "finished" and (source / "adapter").exists():
                target = folder / "adapter"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source / "adapter", target)
                # a record of an older version lacks what has been added since
                values = {k: value for k, value in record.settings.items() if k in RunSettings.model_fields}
                return target, row.recipe, verify_adapter(RunSettings(**values), task, source)
    return None, None, None
