"""Published numbers of the same methods, next to the results; they are part of no statistic."""

from collections.abc import Callable, Mapping, Sequence

from tangora.report import formats
from tangora.report.comparison.benchmark_table import benchmark_scores
from tangora.report.layout import Section
from tangora.report.report_table import Cell, Table, number
from tangora.report.run_records import Comparison
from tangora.report.statistics.judgement import Judgement, judge

_SHARES = {"accuracy", "exact_match"}
"""Metrics that papers print in percent."""


def published_section(comparisons: Sequence[Comparison]) -> Section | None:
    """Show published results of one or several tasks, next to the results of this comparison."""
    shown = [comparison for comparison in comparisons if comparison.paper is not None]
    if not shown:
        return None
    columns: dict[str, Callable[[str], Cell | str]] = {"recipe": str}
    for comparison in shown:
        own = _columns(comparison)
        if own.keys() & columns.keys():  # tasks of one table
            own = {f"{comparison.title}: {heading}": write for heading, write in own.items()}
        columns |= own
    papers = [comparison.paper for comparison in shown if comparison.paper is not None]
    names = dict.fromkeys(name for paper in papers for numbers in paper.results.values() for name in numbers)
    sources = dict.fromkeys(paper.source for paper in papers)
    return Section(
        "published",
        "Published results",
        table=Table.of("published", "Numbers of the paper, and of the runs on this page.", names, columns),
        notes=[
            f"Published: {formats.listing(sources)}.",
            (
                "The published numbers are from another setting (other learning rates, seeds, code and "
                "examples) and are part of no statistic on this page. Shares are in percent."
            ),
            *dict.fromkeys(note for paper in papers for note in paper.notes),
        ],
    )


def _columns(comparison: Comparison) -> dict[str, Callable[[str], Cell | str]]:
    assert comparison.paper is not None
    columns: dict[str, Callable[[str], Cell | str]] = {}
    judged = judge(comparison) if comparison.records else None
    here, measured = _results(judged), _benchmarks(comparison, judged)
    for column, numbers in comparison.paper.results.items():
        columns[f"{column}, published"] = lambda name, numbers=numbers: number(
            numbers.get(name), "{:g}".format
        )
        found = measured.get(column.casefold(), here)
        if found is not None:
            columns[f"{column}, here"] = lambda name, found=found: number(found.get(name), "{:.4g}".format)
        here = None  # what the runs measure is the first column, unless that is a benchmark
    return columns


def _benchmarks(comparison: Comparison, judged: Judgement | None) -> dict[str, dict[str, float]]:
    # by name in lower case; without results where programs were not run
    found = {name.casefold(): {} for name in comparison.settings.get("benchmarks") or ()}
    for score in benchmark_scores(judged) if judged else ():
        scale = 100 if 0 <= score.value <= 1 else 1
        found.setdefault(score.benchmark.casefold(), {})[score.recipe] = scale * score.value
    return found


def _results(judged: Judgement | None) -> Mapping[str, float]:
    if judged is None:
        return {}
    scale = 100 if judged.comparison.metric in _SHARES else 1
    return {row.recipe: scale * row.test for row in judged.rows if row.test is not None}
