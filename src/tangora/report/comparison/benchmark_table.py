"""Results on benchmarks of lm-eval: on the page, in a terminal and as CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tangora.report import formats
from tangora.report.layout import Section
from tangora.report.record_files import write_atomic
from tangora.report.report_table import Cell, Table, cell, csv_text, number
from tangora.report.run_records import Benchmark, Comparison, Record
from tangora.report.statistics.intervals import Interval, corrected_p_values
from tangora.report.statistics.judgement import BASELINE, CEILING, Judgement
from tangora.report.statistics.samples import Sample, benchmark_sample, compare_samples, contrast
from tangora.report.terminal_table import TerminalTable

_AVERAGE = "average"


@dataclass(frozen=True)
class BenchmarkScore:
    """A recipe's mean over seeds on one benchmark."""

    benchmark: str
    recipe: str
    metric: str
    value: float
    interval: Interval | None
    num_seeds: int
    num_examples: int | None
    """None for the average over benchmarks."""
    difference: float | None = None
    """`value` minus that of ``lora``, paired where seeds and examples agree."""
    difference_interval: Interval | None = None
    p_corrected: float | None = None
    """By Holm's correction for all recipes but ``full`` on all benchmarks."""


def has_benchmarks(comparison: Comparison) -> bool:
    """Tell whether a comparison was run with ``--benchmarks``."""
    return any(record.benchmarks for record in comparison.records)


def unjudged_sentences(comparison: Comparison) -> list[str]:
    """Name the benchmarks whose programs were only written down."""
    names = {
        name: None
        for record in comparison.records
        for name, found in record.benchmarks.items()
        if found.metric is None
    }
    if not names:
        return []
    sentence = (
        f"Programs for {formats.listing(names)} were generated and not run: they are in the folders benchmarks of the "
        "runs, and --execute-code runs them in a sandbox."
    )
    return [sentence]


def benchmark_scores(judged: Judgement) -> list[BenchmarkScore]:
    """Estimate what every recipe reached on every benchmark, and on average over those that it has."""
    samples = _samples(judged.runs)
    duels = {
        (name, recipe): compare_samples(ours, found[BASELINE])
        for name, found in samples.items()
        if BASELINE in found
        for recipe, ours in found.items()
        if recipe != BASELINE
    }
    asked = {key: duel.p_value for key, duel in duels.items() if key[1] != CEILING}
    corrected = {key: duel.p_value for key, duel in duels.items()} | corrected_p_values(asked)
    scores = []
    for name, found in samples.items():
        for recipe, ours in found.items():
            first = next(
                (run.benchmarks[name] for run in judged.runs[recipe] if name in run.benchmarks), None
            )
            estimated, duel = contrast((1.0, ours)), duels.get((name, recipe))
            scores.append(
                BenchmarkScore(
                    benchmark=name,
                    recipe=recipe,
                    metric=_written(first) if first else "",
                    value=ours.mean,
                    interval=estimated.interval if estimated else None,
                    num_seeds=len(ours.seeds),
                    num_examples=first.num_examples if first else None,
                    difference=duel.value if duel else None,
                    difference_interval=duel.interval if duel else None,
                    p_corrected=corrected.get((name, recipe)),
                )
            )
    return scores


def _samples(runs: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Sample]]:
    # by benchmark, and by recipe
    names = dict.fromkeys(name for behind in runs.values() for run in behind for name in run.benchmarks)
    by_name = {
        name: {recipe: one for recipe, behind in runs.items() if (one := benchmark_sample(behind, name))}
        for name in names
    }
    by_name = {name: found for name, found in by_name.items() if found}
    if len(by_name) < 2 or not _alike(runs, by_name):
        return by_name
    shared = [recipe for recipe in runs if all(recipe in found for found in by_name.values())]
    averages = {}
    for recipe in shared:
        parts = [found[recipe] for found in by_name.values()]
        if len({part.seeds for part in parts}) == 1:
            means = np.mean([part.scores.mean(axis=1) for part in parts], axis=0)
            averages[recipe] = Sample(parts[0].seeds, means[:, None])
    return by_name | ({_AVERAGE: averages} if averages else {})


def _alike(runs: Mapping[str, Sequence[Record]], names: Mapping[str, Any]) -> bool:
    # shares of right answers have an average that means something, perplexities beside them have not
    found = [
        run.benchmarks[name]
        for behind in runs.values()
        for run in behind
        for name in names
        if name in run.benchmarks
    ]
    return all(each.higher_is_better and 0 <= (each.value or 0) <= 1 for each in found)


def _written(found: Benchmark) -> str:
    metric, _, filtered = (found.metric or "").partition(",")
    return metric if filtered == "none" else f"{metric} ({filtered})"


def benchmark_table(scores: Sequence[BenchmarkScore], recipes: Sequence[str]) -> Table:
    """Make the table of benchmarks, with a row for each recipe that has any."""
    by_key = {(score.benchmark, score.recipe): score for score in scores}
    headers = {score.benchmark: f"{score.benchmark} {score.metric}".strip() for score in scores}
    measured = [recipe for recipe in recipes if any(key[1] == recipe for key in by_key)]
    rows = [
        [cell(recipe), *(_score_cell(by_key.get((name, recipe))) for name in headers)] for recipe in measured
    ]
    caption = "Benchmarks of lm-eval, evaluated after training: mean over the seeds."
    return Table("benchmarks", caption, ["recipe", *headers.values()], rows)


def _score_cell(score: BenchmarkScore | None) -> Cell:
    if score is None:
        return cell(formats.MISSING)
    against = formats.MISSING
    if score.difference is not None:
        p_value = "" if score.p_corrected is None else f", {formats.p_value(score.p_corrected)}"
        against = f"{formats.difference(score.difference)} vs {BASELINE}{p_value}"
    return number(score.value, formats.metric, formats.interval(score.interval), against)


def benchmarks_section(judged: Judgement) -> Section | None:
    """Show what the recipes reached on benchmarks."""
    if not has_benchmarks(judged.comparison):
        return None
    scores = benchmark_scores(judged)
    sentences = unjudged_sentences(judged.comparison)
    if not scores:
        return Section("benchmarks", "Benchmarks", sentences=sentences)
    table = benchmark_table(scores, [row.recipe for row in judged.rows])
    sizes = {score.benchmark: score.num_examples for score in scores if score.num_examples is not None}
    notes = [
        (
            "Beneath a number: its 95 % interval over seeds and examples, and the difference from "
            f"{BASELINE}. p-values are corrected for all recipes on all benchmarks (Holm). Learning rates were chosen "
            "on validation data, not by these."
        ),
        f"Examples: {formats.listing(f'{size} of {name}' for name, size in sizes.items())}.",
    ]
    downloads = {"benchmarks.csv": _csv(scores)}
    return Section("benchmarks", "Benchmarks", sentences, table, notes, downloads=downloads)


def rich_benchmarks(judged: Judgement) -> TerminalTable | None:
    """Make the table of benchmarks for a terminal."""
    scores = benchmark_scores(judged)
    if not scores:
        return None
    return benchmark_table(scores, [row.recipe for row in judged.rows]).rich("Benchmarks", tight=True)


def write_benchmarks(judged: Judgement, path: Path) -> None:
    """Write every score, unrounded, where there is any."""
    if scores := benchmark_scores(judged):
        write_atomic(path, _csv(scores))


def _csv(scores: Sequence[BenchmarkScore]) -> str:
    return csv_text([_flat(score) for score in scores])


def _flat(score: BenchmarkScore) -> dict[str, Any]:
    cells = asdict(score)
    for name in ("interval", "difference_interval"):
        low, high = cells.pop(name) or (None, None)
        cells |= {f"{name}_low": low, f"{name}_high": high}
    return cells
