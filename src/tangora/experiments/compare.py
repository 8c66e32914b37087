"""`tangora compare`: recipes, each with its own sweep of learning rates, on one task or several.

The learning rate is chosen on validation data with the first seed; the chosen one is repeated with the other seeds,
and only test results are reported. Every run has a process and a record of its own, so a comparison that was cut off
anywhere goes on where it stopped.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from tangora._checks import InputError, check_choice, check_kind, check_path
from tangora.adapters.folder import replace_folder, scratch_beside
from tangora.experiments.comparison.plan import JUDGES, CompareSettings, PlanSettings
from tangora.experiments.comparison.pool import Pool
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.sweep import Cell, due, planned
from tangora.experiments.comparison.worker import RUNS_FOLDER, DiskFullError, Limits, record_path
from tangora.experiments.folders import LOG, SETTINGS, check_origin, check_output, claimed, one_line_errors
from tangora.experiments.launcher import check_one_process
from tangora.experiments.logs import log_to
from tangora.experiments.run.checks import check_options, checked
from tangora.experiments.run.execute import Watcher
from tangora.experiments.run.loading import load_base, load_run_task, with_recorded_sizes, with_sizes
from tangora.experiments.run.origin import origin_of
from tangora.experiments.run.proof import Proof, verify_adapter
from tangora.experiments.settings import RunSettings
from tangora.report import (
    Comparison,
    Recommendation,
    Record,
    load_record,
    recommendation,
    save_json,
    save_picture,
    summarize,
    write_csv,
    write_page,
    write_study,
)
from tangora.report.run_records import COMPARISON_FILE, RECORDS_FOLDER
from tangora.training.callbacks import check_trackers
from tangora.training.data import Task
from tangora.training.devices import check_device


@dataclass
class CompareWatcher:
    """What a comparison tells about its progress; subclass and override."""

    total: int = field(default=0, init=False)

    def plan(self, total: int) -> None:
        """Hear how many runs there will be; again when a sweep has found more to do."""
        self.total = total

    def begin(self, cell: Cell) -> Watcher:
        """Hear that a run begins."""
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
        proof: How far the logits of plain PEFT with that adapter on the untouched base are from the trained model's.
    """

    comparison: Comparison
    report: Path
    adapter: Path | None = None
    adapter_recipe: str | None = None
    proof: Proof | None = None

    @property
    def failed(self) -> list[Record]:
        """Runs that failed or ran out of memory; one that diverged has told what it was made for."""
        return [each for each in self.comparison.records if each.status in ("failed", "out_of_memory")]

    @property
    def proven(self) -> bool:
        """Whether the best adapter, if there is one, does what the trained model did."""
        return self.proof is None or self.proof.holds

    @property
    def recommendation(self) -> Recommendation | None:
        """The cheapest recipe that is not significantly worse than the best."""
        return recommendation(self.comparison)


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
        command: What repeats it, for the report.
        watcher: Called with the progress.
        resources: What it may use; default: one run at a time, no limits.

    Returns:
        Records, report and best adapter. When time ran out, what there is so far: the same call goes on.

    Raises:
        InputError: If something in the settings cannot be used, which is known before the first run; if the folder
            belongs to another configuration or is in use, the data or the model changed since it was begun, a
            launcher has started several processes, or the disk is full. What has finished is kept.
    """
    check_one_process("compare", "--jobs makes several runs side by side")
    check_kind("settings", settings, CompareSettings, "a CompareSettings")
    folder, resources = check_path("output", output), resources or Resources()
    with ExitStack() as held, Pool(resources.jobs, Limits(gigabytes=resources.gigabytes)) as pool:
        runner = _Runner(pool, held, resources, watcher or CompareWatcher(), command)
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
    """Run comparisons on several tasks, or what is missing of them, and write a report on each and on all."""
    folder = Path(output)
    check_one_process("compare", "--jobs makes several runs side by side")
    resources = resources or Resources()
    _check_study(folder)
    with ExitStack() as held, Pool(resources.jobs, Limits(gigabytes=resources.gigabytes)) as pool:
        runner = _Runner(pool, held, resources, watcher or CompareWatcher(), command)
        # all is checked before the first run: a broken row in the last task must not cost a night
        prepared = {}
        for name, own in plan.tasks.items():
            try:
                prepared[name] = runner.prepare(own, folder / name)
            except InputError as problem:
                raise InputError(f"{name}: {problem}") from problem
        outcomes = {name: runner.run(*each) for name, each in prepared.items()}
    comparisons = {name: outcome.comparison for name, outcome in outcomes.items()}
    return StudyOutcome(outcomes, write_study(comparisons, folder / "report.html", plan.title, command))


def _check_study(folder: Path) -> None:
    with one_line_errors(folder):
        if (folder / SETTINGS).exists():
            raise InputError(
                f"{folder} belongs to one comparison or run, and a plan of several tasks makes a folder for each; "
                "choose another --output"
            )
        if folder.is_dir() and any(folder.iterdir()) and not any(folder.glob(f"*/{SETTINGS}")):
            raise InputError(f"{folder} exists and is no tangora output folder; choose another --output")


class _Runner:
    """Makes the runs of comparisons, one comparison after the other."""

    def __init__(
        self, pool: Pool, held: ExitStack, resources: Resources, watcher: CompareWatcher, command: str
    ):
        self._pool, self._held = pool, held
        self._resources, self._watcher, self._command = resources, watcher, command
        self._began = time.monotonic()
        self._totals: dict[Path, int] = {}

    def prepare(self, settings: CompareSettings, folder: Path) -> tuple[CompareSettings, Task, Path]:
        # reads the data, claims the folder, and checks all that could fail in every run
        check_output(folder)
        check_trackers(settings.report_to or ())
        check_device(settings.device)
        settings = with_recorded_sizes(settings, folder)
        task = load_run_task(settings.run(settings.recipes[0], 1.0, 0))
        settings = with_sizes(settings.model_copy(update={"kind": task.kind}), task)
        each = [settings.run(name, settings.grid(name)[0], settings.seeds[0]) for name in settings.recipes]
        if settings.judge_by is not None:
            check_choice("judge_by", settings.judge_by, JUDGES[task.kind])
        for run in each:
            check_options(run, task)
        origin = origin_of(settings, task)
        self._held.enter_context(claimed(folder, settings, origin))
        known = []
        for path in sorted((folder / RECORDS_FOLDER).glob("*.json")):
            record = load_record(path)
            check_origin(folder, record.settings, origin)
            if self._resources.retry and record.status not in ("finished", "diverged"):
                path.unlink()
            else:
                known.append(record)
        if due(settings, known):
            task = checked(each, task, load_base(each[0], task))
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
            title=settings.heading,
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
            raise InputError(
                f"no run finished; {failed[0].id}: {failed[0].error}; all are listed in {page}, and --retry makes them "
                "again"
            )
        if missing:
            return Outcome(comparison, page)
        with log_to(folder / LOG):
            return Outcome(comparison, page, *_best_adapter(comparison, task, folder))


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the table, the picture and the page of a comparison."""
    rows = summarize(comparison)
    write_csv(rows, folder / "summary.csv")
    save_picture(comparison, folder / "picture.png")
    return write_page(comparison, folder / "report.html")


def _best_adapter(
    comparison: Comparison, task: Task, folder: Path
) -> tuple[Path | None, str | None, Proof | None]:
    for row in summarize(comparison):
        runs = [
            r for r in comparison.records if r.recipe == row.recipe and r.learning_rate == row.learning_rate
        ]
        for record in runs:
            source = folder / RUNS_FOLDER / record.id
            if record.status == "finished" and (source / "adapter").exists():
                target = folder / "adapter"
                with scratch_beside(target) as scratch:
                    replace_folder(shutil.copytree(source / "adapter", scratch), target)
                # a record of an older version lacks what has been added since
                values = {k: value for k, value in record.settings.items() if k in RunSettings.model_fields}
                return target, row.recipe, verify_adapter(RunSettings(**values), task, source)
    return None, None, None
