"""Published numbers of the same methods, next to the results; they are part of no statistic."""

from collections.abc import Callable, Mapping, Sequence

from tangora.report import formats
from tangora.report.layout import Section
from tangora.report.report_table import Cell, Table, number
from tangora.report.run_records import Comparison
from tangora.report.statistics.judgement import judge

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
    here = _results(comparison)
    for column, numbers in comparison.paper.results.items():
        columns[f"{column}, published"] = lambda name, numbers=numbers: number(
            numbers.get(name), "{:g}".format
        )
        if here is not None:  # what the runs measure is the first column
            columns[f"{column}, here"] = lambda name, found=here: number(found.get(name), "{:.4g}".format)
            here = None
    return columns


def _results(comparison: Comparison) -> Mapping[str, float]:
    if not comparison.records:
        return {}
    scale = 100 if comparison.metric in _SHARES else 1
    return {row.recipe: scale * row.test for row in judge(comparison).rows if row.test is not None}
