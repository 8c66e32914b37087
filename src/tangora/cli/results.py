"""What commands print: progress, tables, sentences, and where the files are."""

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from tangora._checks import InputError
from tangora.cli.output import console
from tangora.experiments.compare import CompareWatcher, Outcome, StudyOutcome
from tangora.experiments.comparison.sweep import Cell
from tangora.experiments.curvature.measurement import CurvatureFiles
from tangora.experiments.diagnose.measure import DiagnosisFiles
from tangora.experiments.run.execute import Watcher
from tangora.experiments.run.proof import Proof
from tangora.report import (
    Comparison,
    Record,
    diagnosis_tables,
    findings,
    missing_sentence,
    recommendation_sentence,
    rich_table,
    study_verdict,
    summarize,
    verdict,
)
from tangora.report.comparison.end_points import flatness_sentences, has_flatness, rich_flatness
from tangora.report.curvature import curvature_tables
from tangora.report.curvature import findings as curvature_findings


def watcher_of(bars: Progress, bar: TaskID, note: Callable[[str], None] | None = None) -> Watcher:
    """Let a bar follow a run.

    Args:
        bars: What draws it.
        bar: Which.
        note: Called with sentences about the data; by default they are printed.

    Returns:
        What the run tells its phases and steps.
    """
    return Watcher(
        phase=lambda name: bars.update(bar, note=name),
        note=note or (lambda sentence: bars.console.print(escape(sentence), soft_wrap=True)),
        length=lambda steps: bars.update(bar, total=steps),
        step=lambda step, loss: bars.update(bar, completed=step, note=f"loss {loss:.3f}"),
    )


class ComparisonBars(CompareWatcher):
    """One bar for the comparison, and one for each run that is going on."""

    def __init__(self, bars: Progress):
        super().__init__()
        self._bars = bars
        self.begun = self.ended = 0
        self._runs = bars.add_task("runs", total=None, note="")
        self._steps: dict[str, TaskID] = {}
        self._told: set[str] = set()

    @property
    def next_time(self) -> str:
        """What the same command does after an interruption."""
        return f"goes on: {self.ended} of {self.total} runs are done" if self.ended else "begins again"

    def plan(self, total: int) -> None:
        """Hear how many runs there are."""
        super().plan(total)
        self._bars.update(self._runs, total=total)

    def begin(self, cell: Cell) -> Watcher:
        """Draw a bar for a run.

        Args:
            cell: The run that begins.

        Returns:
            What moves the bar.
        """
        self.begun += 1
        self._steps[cell.id] = self._bars.add_task(cell.id, total=cell.settings.steps, note="")
        return watcher_of(self._bars, self._steps[cell.id], self._tell_once)

    def _tell_once(self, sentence: str) -> None:
        # every run says it, as every run has a process of its own
        if sentence not in self._told:
            self._told.add(sentence)
            self._bars.console.print(escape(sentence), soft_wrap=True)

    def end(self, cell: Cell, record: Record) -> None:
        """Count the run, and say if it failed."""
        self.ended += 1
        if cell.id in self._steps:
            self._bars.remove_task(self._steps.pop(cell.id))
        self._bars.advance(self._runs)
        if record.status != "finished":
            what = f"{cell.id} {record.status.replace('_', ' ')}: {record.error or ''}"
            self._bars.console.print(escape(what))


def print_run(record: Record, output: Path) -> None:
    """Print what a run measured.

    Args:
        record: The run.
        output: Its folder.

    Raises:
        InputError: If it did not finish.
    """
    table = Table(
        title=f"{record.recipe}, learning rate {record.learning_rate:g}, seed {record.seed}", box=None
    )
    for heading in ("", *record.metrics):
        shown = "test, before" if heading == "before" else heading
        table.add_column(shown, justify="right" if heading else "left")
    for name in dict.fromkeys(key for split in record.metrics.values() for key in split):
        cells = (split.get(name) for split in record.metrics.values())
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in cells))
    console.print(table)
    if record.status != "finished":
        raise InputError(f"training {record.status}: {record.error}; try a smaller learning rate")
    if record.flatness is not None:
        console.print(f"gap      {record.flatness.gap:.4f}, test loss minus training loss")
        for sentence in flatness_sentences(record.flatness):
            console.print(escape(sentence))
    saved = next((output / name for name in ("adapter", "model") if (output / name).exists()), output)
    console.print(f"saved    {escape(str(saved))}")
    console.print(f"metrics  {escape(str(output / 'metrics.jsonl'))}")


def print_outcome(outcome: Outcome) -> None:
    """Print the table and the verdict of a comparison.

    Args:
        outcome: The comparison.
    """
    rows = summarize(outcome.comparison)
    console.print(rich_table(rows, outcome.comparison))
    if has_flatness(outcome.comparison):
        console.print(rich_flatness(outcome.comparison, rows))
    for sentence in verdict(rows):
        console.print(escape(sentence))
    if advice := recommendation_sentence(outcome.recommendation):
        console.print(escape(advice))
    console.print(f"report   {escape(str(outcome.report))}")
    print_missing(outcome.comparison)
    if outcome.adapter is not None:
        console.print(f"adapter  {escape(str(outcome.adapter))} ({outcome.adapter_recipe})")
    if outcome.proof is not None:
        console.print(proof_line(outcome.proof))
    if outcome.failed:
        names = ", ".join(record.id for record in outcome.failed)
        console.print(f"failed   {len(outcome.failed)} runs ({escape(names)}); --retry makes them again")


def proof_line(proof: Proof) -> str:
    """Return the sentence on whether plain PEFT computes with the saved adapter what the trained model did."""
    difference = f"largest difference {proof.difference:.1e}"
    if proof.holds:
        return f"proof    plain PEFT on the untouched base gives the trained model's logits: {difference}"
    return (
        "proof    failed: plain PEFT on the untouched base does not give the trained model's logits: "
        f"{difference}, and rounding explains {proof.allowed:.1e}; do not use this adapter"
    )


def print_missing(comparison: Comparison) -> None:
    """Say what has not been run, if anything.

    Args:
        comparison: The comparison.
    """
    if sentence := missing_sentence(comparison):
        console.print(sentence)


def print_study(study: StudyOutcome) -> None:
    """Print the table of every task and what they say together.

    Args:
        study: The comparisons.
    """
    print_tasks({name: outcome.comparison for name, outcome in study.outcomes.items()}, study.report)


def print_tasks(comparisons: Mapping[str, Comparison], report: Path) -> None:
    """Print the table of every task and what they say together.

    Args:
        comparisons: By task.
        report: The page over all of them.
    """
    for comparison in comparisons.values():
        if comparison.records:
            console.print(rich_table(summarize(comparison), comparison))
        print_missing(comparison)
    for sentence in study_verdict(comparisons):
        console.print(escape(sentence))
    console.print(f"report   {escape(str(report))}")


def print_curvature(files: CurvatureFiles) -> None:
    """Print the tables and the findings of a measurement of curvature.

    Args:
        files: The measurement and where it was written.
    """
    record = files.record
    for table in curvature_tables(record):
        console.print(table)
    for sentence in curvature_findings(record):
        console.print(escape(sentence))
    console.print(f"{record.products} products with the matrix over {record.num_examples} examples")
    console.print(f"report   {escape(str(files.page))}")
    console.print(f"numbers  {escape(str(files.record_path))}")
    for picture in files.pictures:
        if picture.suffix == ".png":
            console.print(f"picture  {escape(str(picture))}")


def print_diagnosis(files: DiagnosisFiles) -> None:
    """Print the tables and the findings of a diagnosis.

    Args:
        files: The diagnosis and where it was written.
    """
    diagnosis = files.record.diagnosis
    for table in diagnosis_tables(diagnosis):
        console.print(table)
    for sentence in findings(diagnosis):
        console.print(escape(sentence))
    console.print(f"report   {escape(str(files.page))}")
    console.print(f"plan     {escape(str(files.plan))}")
    console.print(f"numbers  {escape(str(files.record_path))}")
