"""Printed results of the commands: tables, sentences, and the paths of files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.markup import escape

from tangora._checks import InputError
from tangora._folders import RunFolder
from tangora.cli.output import console
from tangora.experiments.compare import Outcome
from tangora.experiments.curvature.measurement import CurvatureFiles
from tangora.experiments.diagnose_task import DiagnosisFiles
from tangora.experiments.run.saving import Proof
from tangora.report import (
    Comparison,
    Record,
    Row,
    diagnosis_sentences,
    diagnosis_tables,
    formats,
    missing_sentence,
    recommendation_sentence,
    rich_table,
    study_verdict,
    summarize,
    verdict,
)
from tangora.report.comparison.benchmark_table import rich_benchmarks, unjudged_sentences
from tangora.report.comparison.end_points import flatness_sentences, has_flatness, rich_flatness
from tangora.report.curvature import curvature_sentences, curvature_tables
from tangora.report.statistics.judgement import judge
from tangora.report.terminal_table import TerminalTable


def print_run(record: Record, output: Path) -> None:
    """Print what a run measured."""
    names = dict.fromkeys(key for split in record.metrics.values() for key in split)
    values = [[split.get(name) for split in record.metrics.values()] for name in names]
    table = TerminalTable(
        f"{record.recipe}, learning rate {record.learning_rate:g}, seed {record.seed}",
        ["", *("test, before" if split == "before" else split for split in record.metrics)],
        [[name, *map(formats.metric, row)] for name, row in zip(names, values, strict=True)],
    )
    console.print(table)
    if record.status != "finished":
        raise InputError(f"training {record.status}: {record.error}; try a smaller learning rate")
    for line in benchmark_lines(record, output):
        console.print(escape(line))
    if record.flatness is not None:
        console.print(f"gap      {record.flatness.gap:.4f}, test loss minus training loss")
        _print_found([], flatness_sentences(record.flatness))
    folder = RunFolder(output)
    saved = next((path for path in (folder.adapter, folder.model) if path.exists()), output)
    _print_files(("saved", saved), ("metrics", folder.metrics))


def benchmark_lines(record: Record, output: Path) -> list[str]:
    """Write what a run reached on benchmarks, a line for each."""
    lines = []
    for name, found in record.benchmarks.items():
        if found.value is None:
            file = RunFolder(output).benchmarks / f"{name}.jsonl"
            said = f"{found.num_examples} programs in {file}, not run; --execute-code runs them in a sandbox"
        else:
            error = found.stderr.get(found.metric or "")
            margin = "" if error is None else f" ± {error:.4f}"
            said = (
                f"{found.metric} {found.value:.4f}{margin} ({formats.plural(found.num_examples, 'example')})"
            )
        lines.append(f"{name}  {said}")
    return lines


def print_outcome(outcome: Outcome) -> None:
    """Print the table and the verdict of a comparison."""
    for sentence in verdict(print_tables(outcome.comparison)):
        console.print(escape(sentence))
    if advice := recommendation_sentence(outcome.recommendation):
        console.print(escape(advice))
    _print_files(("report", outcome.report))
    _print_missing(outcome.comparison)
    if outcome.adapter is not None:
        console.print(f"adapter  {escape(str(outcome.adapter))} ({escape(adapter_words(outcome))})")
    if outcome.proof is not None:
        console.print(_proof_line(outcome.proof))
    if outcome.failed:
        names = ", ".join(record.id for record in outcome.failed)
        console.print(
            f"failed   {formats.plural(len(outcome.failed), 'run')} ({escape(names)}); --retry runs them again"
        )


def adapter_words(outcome: Outcome) -> str:
    """Name the recipe of the adapter, and say why it is not the recommended one, if so."""
    name, advice = outcome.adapter_recipe or "", outcome.recommendation
    if advice is None or not advice.decided or advice.recipe == name:
        return name
    return f"{name}; {advice.recipe}, which is recommended, has no adapter"


def print_tables(comparison: Comparison) -> list[Row]:
    """Print the table of a comparison, and that of the flatness where it was measured; return the rows."""
    judged = judge(comparison)
    console.print(rich_table(judged.rows, comparison))
    if (benchmarks := rich_benchmarks(judged)) is not None:
        console.print(benchmarks)
    for sentence in unjudged_sentences(comparison):
        console.print(escape(sentence))
    if has_flatness(comparison):
        console.print(rich_flatness(judged))
    return judged.rows


def _proof_line(proof: Proof) -> str:
    """Return the sentence on whether plain PEFT computes with the saved adapter what the trained model did."""
    difference = f"largest difference {proof.difference:.1e}"
    if proof.holds:
        return f"proof    plain PEFT on the original base gives the trained model's logits: {difference}"
    return (
        "proof    failed: plain PEFT on the original base does not give the trained model's logits: "
        f"{difference}, but rounding explains only {proof.allowed:.1e}; do not use this adapter"
    )


def _print_missing(comparison: Comparison) -> None:
    """Say what has not been run, if anything."""
    if sentence := missing_sentence(comparison):
        console.print(sentence)


def print_tasks(comparisons: Mapping[str, Comparison], report: Path) -> None:
    """Print the table of every task and what they say together."""
    for comparison in comparisons.values():
        if comparison.records:
            console.print(rich_table(summarize(comparison), comparison))
        _print_missing(comparison)
    _print_found([], study_verdict(comparisons))
    _print_files(("report", report))


def print_curvature(files: CurvatureFiles) -> None:
    """Print the tables and the findings of a measurement of curvature."""
    record = files.record
    count = (
        f"{formats.plural(record.products, 'matrix–vector product')} over "
        f"{formats.plural(record.num_examples, 'example')}"
    )
    _print_found(curvature_tables(record), [*curvature_sentences(record), count])
    pictures = [("picture", path) for path in files.pictures if path.suffix == ".png"]
    _print_files(("report", files.page), ("numbers", files.record_path), *pictures)


def print_diagnosis(files: DiagnosisFiles) -> None:
    """Print the tables and the findings of a diagnosis."""
    diagnosis = files.record.diagnosis
    _print_found(diagnosis_tables(diagnosis), diagnosis_sentences(diagnosis))
    _print_files(("report", files.page), ("plan", files.plan), ("numbers", files.record_path))


def _print_found(tables: Iterable[TerminalTable], sentences: Iterable[str]) -> None:
    for table in tables:
        console.print(table)
    for sentence in sentences:
        console.print(escape(sentence))


def _print_files(*files: tuple[str, Path]) -> None:
    for what, path in files:
        console.print(f"{what:<8} {escape(str(path))}")
