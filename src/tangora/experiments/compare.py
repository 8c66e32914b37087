"""`tangora compare`: recipes, each with its own sweep of learning rates, on one task or several.

The learning rate is chosen on validation data with the first seed; the chosen one is repeated with the other seeds,
and only test results are reported. Every run has a process and a record of its own, so an interrupted
comparison continues at the same point.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import median

from tangora._checks import InputError, check_choice, check_kind, check_path
from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.adapters.folder import replace_folder, scratch_beside
from tangora.experiments.comparison.best_adapter import by_preference
from tangora.experiments.comparison.engine import Engine
from tangora.experiments.comparison.plan import JUDGES, CompareSettings, PlanSettings
from tangora.experiments.comparison.pool import Pool, num_cores
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.sweep import Trial, due, planned
from tangora.experiments.comparison.worker import DiskFullError, Limits
from tangora.experiments.folders import check_origin, claimed, one_line_errors
from tangora.experiments.process import check_configuration, check_one_process, log_to, tell_user
from tangora.experiments.provenance import origin_of
from tangora.experiments.run.answering import judged
from tangora.experiments.run.preparing import check_against_data, check_recipes, load_base, sized
from tangora.experiments.run.saving import Proof, verify_adapter
from tangora.experiments.settings import RunSettings
from tangora.report import (
    Comparison,
    Published,
    Recommendation,
    Record,
    load_record,
    recommendation,
    save_json,
    save_picture,
    summarize,
    write_csv,
    write_measured,
    write_page,
    write_study,
)
from tangora.report.comparison.benchmark_table import write_benchmarks
from tangora.report.comparison.recommendation import recommend
from tangora.report.statistics.judgement import judge
from tangora.training.callbacks import check_trackers
from tangora.training.data import Task
from tangora.training.devices import visible_gpus


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison: all records, the page, and the adapter to use with its recipe and proof, if any."""

    comparison: Comparison
    report: Path
    adapter: Path | None = None
    adapter_recipe: str | None = None
    proof: Proof | None = None

    @property
    def failed(self) -> list[Record]:
        """Runs that failed or ran out of memory; divergence is a result."""
        return [each for each in self.comparison.records if each.status in ("failed", "out_of_memory")]

    @property
    def proven(self) -> bool:
        """Whether the adapter to use, if there is one, does what the trained model did."""
        return self.proof is None or self.proof.holds

    @cached_property
    def recommendation(self) -> Recommendation | None:
        """The cheapest recipe that is not significantly worse than the best."""
        return recommendation(self.comparison)


def compare(
    settings: CompareSettings,
    output: str | Path,
    *,
    command: str = "tangora.compare(...)",
    progress: Progress | None = None,
    resources: Resources | None = None,
) -> Outcome:
    """Run a comparison, or what is missing of it, and write its report.

    The output folder holds ``settings.json``, ``comparison.json`` and ``records/``, ``summary.csv``, ``report.html``,
    ``picture.png``, ``adapter/`` and ``runs/`` with every run's own files; where runs are measured on their way also
    ``through-training.csv`` and ``through-training.png``. ``adapter/`` is that of the recommended recipe, of the seed
    with the best validation metric; where that recipe has no adapter, of the next one that has.

    Args:
        command: Command that repeats it, for the report.
        progress: Called as ``progress("runs", done, total)`` when a run has ended, and as
            ``progress("NAME: what", done, total)`` with the optimizer steps of every run, as `train` does; ``what``
            ends with the status of its record.
        resources: This machine, or a cluster if it names one; default: this machine, with one run at a time for each
            GPU, or one.

    Returns:
        Records, report and the adapter to use. If the time limit was reached, those of the finished runs: the same
        call continues.

    Raises:
        InputError: If something in the settings cannot be used, which is known before the first run; if the folder
            belongs to another configuration or is in use, the data or the model changed since it was begun, a
            launcher has started several processes, or the disk is full. What has finished is kept.
    """
    check_kind("settings", settings, CompareSettings, "a CompareSettings")
    folder = ComparisonFolder(check_path("output", output))
    with _started(command, progress, resources, [settings]) as runner:
        return runner.run(*runner.prepared(settings, folder))


@dataclass(frozen=True)
class StudyOutcome:
    """The results of comparisons on several tasks, by task, and the page over all of them."""

    outcomes: dict[str, Outcome]
    report: Path


def compare_tasks(
    plan: PlanSettings,
    output: str | Path,
    *,
    command: str = "tangora.compare_tasks(...)",
    progress: Progress | None = None,
    resources: Resources | None = None,
) -> StudyOutcome:
    """Run comparisons on several tasks, or what is missing of them, and write a report on each and on all."""
    folder = ComparisonFolder(Path(output))
    with _started(command, progress, resources, plan.tasks.values()) as runner:
        _check_study(folder)
        # all is checked before the first run: a broken row in the last task must not cost a night
        prepared = {}
        for name, own in plan.tasks.items():
            try:
                prepared[name] = runner.prepared(own, ComparisonFolder(folder.path / name))
            except InputError as problem:
                raise InputError(f"{name}: {problem}") from problem
        outcomes = {name: runner.run(*each) for name, each in prepared.items()}
    comparisons = {name: outcome.comparison for name, outcome in outcomes.items()}
    return StudyOutcome(outcomes, write_study(comparisons, folder.report, plan.title, command))


def _check_study(folder: ComparisonFolder) -> None:
    with one_line_errors(folder.path):
        if folder.settings.exists():
            raise InputError(
                f"{folder.path} belongs to a single comparison or run, but a plan of several tasks "
                "creates one folder per task; choose another --output"
            )
        parts = [ComparisonFolder(path) for path in folder.path.iterdir()] if folder.path.is_dir() else []
        if parts and not any(part.settings.exists() for part in parts):
            raise InputError(
                f"{folder.path} exists but is not a tangora output folder; choose another --output"
            )


@contextmanager
def _started(
    command: str,
    progress: Progress | None,
    resources: Resources | None,
    comparisons: Iterable[CompareSettings],
) -> Iterator["_Runner"]:
    check_one_process("compare", "--jobs runs several processes in parallel, on all GPUs of a machine")
    check_configuration()
    resources = resources or Resources()
    with ExitStack() as held, engine_for(resources, comparisons, progress) as engine:
        yield _Runner(engine, held, resources, progress, command)


def engine_for(
    resources: Resources, comparisons: Iterable[CompareSettings], progress: Progress | None = None
) -> Engine:
    """Make the engine that resources name, for comparisons; a cluster's package is imported here only."""
    comparisons = list(comparisons)
    if resources.cluster is None:
        gpus = visible_gpus() if any(each.any_gpu for each in comparisons) else []
        jobs = resources.jobs or len(gpus) or 1
        threads = max(1, num_cores() // jobs) if jobs > 1 else None
        return Pool(jobs, Limits(threads, resources.max_memory), progress, gpus)
    for each in comparisons:
        if each.device not in (None, "cuda", "cpu"):
            raise InputError(f"device {each.device!r} belongs to this machine: omit it with a cluster")
    if resources.cluster == "ray":
        from tangora.experiments.comparison.on_ray import RayEngine

        return RayEngine(resources, progress)
    from tangora.experiments.comparison.on_slurm import SlurmEngine

    return SlurmEngine(resources, progress)


class _Runner:
    """Makes the runs of comparisons, one comparison after the other."""

    def __init__(
        self, engine: Engine, held: ExitStack, resources: Resources, progress: Progress | None, command: str
    ):
        self._engine, self._held = engine, held
        self._resources, self._progress, self._command = resources, progress, command
        self._began = time.monotonic()
        self._ended = 0
        self._totals: dict[Path, int] = {}

    def prepared(
        self, settings: CompareSettings, folder: ComparisonFolder
    ) -> tuple[CompareSettings, Task, ComparisonFolder, dict[str, Record]]:
        # reads the data, claims the folder, reads its records, and checks all that could fail in every run
        check_trackers(settings.report_to or ())
        settings, task = sized(settings, folder.path)
        settings = settings.model_copy(update={"kind": task.kind})
        each = [settings.run(name, settings.grid(name)[0], settings.seeds[0]) for name in settings.recipes]
        if settings.judge_by is not None:
            check_choice("judge_by", settings.judge_by, JUDGES[task.kind])
        for run in each:
            check_against_data(run, task)
        origin = origin_of(settings, task)
        self._held.enter_context(claimed(folder.path, settings, origin))
        found: dict[str, Record] = {}
        for path in sorted(folder.records.glob("*.json")):
            record = load_record(path)
            check_origin(folder.path, record.settings, origin)
            if self._resources.retry and record.status not in ("finished", "diverged"):
                path.unlink()
            else:
                found[record.id] = record
        if due(settings, [*found.values()]):
            # a GPU is the runs', but to quantize takes one
            looked_at = each[0].model_copy(update={} if each[0].load_in_4bit else {"device": "cpu"})
            task = check_recipes(each, task, load_base(looked_at, task))
            tell_user(*task.notes)
        self._count(folder, settings, [])
        return settings, task, folder, found

    def run(
        self, settings: CompareSettings, task: Task, folder: ComparisonFolder, found: dict[str, Record]
    ) -> Outcome:
        # makes all runs that are due, affordable and not found, and writes the report
        records: dict[str, Record] = {}
        late = False
        while True:
            self._count(folder, settings, [*records.values()])
            waiting = [
                trial for trial in due(settings, [*records.values()]) if trial.id not in self._engine.running
            ]
            known = [found.get(trial.id) or _left_record(folder, trial) for trial in waiting]
            records |= {record.id: self._counted(record) for record in known if record is not None}
            if any(known):
                continue
            for trial in waiting:
                if not self._engine.has_room:
                    break
                late = late or self._late(records)
                if late:
                    break
                self._engine.start(trial, task, folder)
            if not self._engine.running:
                break
            for record in self._next_ended():
                self._tell(f"{record.id}: {record.status}", len(record.history), len(record.history))
                records[record.id] = self._counted(record)
        ended = [records[name] for name in sorted(records)]
        return self._written(settings, task, folder, ended, [trial.id for trial in waiting])

    def _next_ended(self) -> list[Record]:
        try:
            return self._engine.wait()
        except DiskFullError as problem:
            raise InputError(
                f"{problem}; finished runs are kept: free some space and run the same command again"
            ) from problem

    def _late(self, records: dict[str, Record]) -> bool:
        if self._resources.max_hours is None:
            return False
        left = 3600 * self._resources.max_hours - (time.monotonic() - self._began)
        seconds = [record.time.total for record in records.values() if record.status == "finished"]
        return left < (median(seconds) if seconds else 0.0)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)

    def _count(self, folder: ComparisonFolder, settings: CompareSettings, records: Sequence[Record]) -> None:
        self._totals[folder.path] = planned(settings, records)
        self._tell("runs", self._ended, sum(self._totals.values()))

    def _counted(self, record: Record) -> Record:
        self._ended += 1
        if record.status != "finished":
            tell_user(f"{record.id} {record.status.replace('_', ' ')}: {record.error or ''}")
        return record

    def _written(
        self,
        settings: CompareSettings,
        task: Task,
        folder: ComparisonFolder,
        records: list[Record],
        missing: list[str],
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
            paper=settings.paper and Published(**settings.paper.model_dump()),
        )
        save_json(comparison.model_copy(update={"records": []}), folder.comparison)
        if not records:
            raise InputError(
                f"{folder.path}: --max-hours is too small: no run could start within the time limit; "
                "increase it"
            )
        page = write_report(comparison, folder)
        failed = [record for record in records if record.status != "finished"]
        if failed and len(failed) == len(records):
            raise InputError(
                f"no run finished; {failed[0].id} {failed[0].status.replace('_', ' ')}: {failed[0].error}; "
                f"{page} lists all of them, and --retry runs them again"
            )
        if missing:
            return Outcome(comparison, page)
        shutil.rmtree(folder.cluster, ignore_errors=True)
        if (scored := _judged(comparison, settings.judge, folder)) is not comparison:
            comparison, page = scored, write_report(scored, folder)
        with log_to(folder.log):
            return Outcome(comparison, page, *_best_adapter(comparison, task, folder))


def _left_record(folder: ComparisonFolder, trial: Trial) -> Record | None:
    # of a run that an earlier command left on a cluster, and that has ended since
    path = folder.record_of(trial.id)
    return load_record(path) if path.exists() else None


def write_report(comparison: Comparison, folder: ComparisonFolder) -> Path:
    """Write the table, the pictures and the page of a comparison."""
    judged = judge(comparison)
    write_csv(judged.rows, folder.summary)
    write_benchmarks(judged, folder.benchmarks)
    save_picture(comparison, folder.picture)
    write_measured(judged, folder)
    return write_page(comparison, folder.report)


def _judged(comparison: Comparison, judge: Sequence[str] | None, folder: ComparisonFolder) -> Comparison:
    # those alone that are reported: a judge may cost money
    rates = {row.recipe: row.learning_rate for row in summarize(comparison)} if judge else {}
    scored = {}
    for record in comparison.records:
        if rates.get(record.recipe) == record.learning_rate:
            found = judged(record, judge, folder.run(record.id))
            if found is not record:
                scored[record.id] = found
                save_json(found, folder.record_of(record.id))
    records = [scored.get(record.id, record) for record in comparison.records]
    return comparison.model_copy(update={"records": records}) if scored else comparison


def _best_adapter(
    comparison: Comparison, task: Task, folder: ComparisonFolder
) -> tuple[Path | None, str | None, Proof | None]:
    found = judge(comparison)
    for record in by_preference(found, recommend(found)):
        source = folder.run(record.id)
        if source.adapter.exists():
            with scratch_beside(folder.adapter) as scratch:
                replace_folder(shutil.copytree(source.adapter, scratch), folder.adapter)
            # a record of an older version lacks what has been added since
            values = {k: value for k, value in record.settings.items() if k in RunSettings.model_fields}
            proof = verify_adapter(RunSettings(**values), task, source.path)
            return folder.adapter, record.recipe, proof
    return None, None, None
