"""Costs of each recipe: time, if the machine was free, and memory; and the recipes on the Pareto front."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import plotly.graph_objects as go

from tangora.report import formats
from tangora.report.drawing.charts import empty_figure, figure_json, label_text, panel_chart
from tangora.report.drawing.panels import GREY, Panel, Series, Style, decades, recipe_styles
from tangora.report.layout import Chart, Section
from tangora.report.report_table import Cell, Table, number
from tangora.report.run_records import Record
from tangora.report.statistics.judgement import Judgement, Row

_UNEQUAL = 2.0  # ratio of the longest to the median run that other work on the machine is a likely cause of
_LOG_FROM = 20  # ratio of the largest cost to the smallest
_FRONT = Style(GREY, "dot", "circle", 1.5)
TIME_PARTS = {
    "start": ("initialization", "x"),
    "forward_backward": ("forward and backward", ""),
    "optimizer": ("optimizer step", "/"),
    "evaluation": ("evaluation", "."),
}


@dataclass(frozen=True)
class Cost:
    """Something that a run costs."""

    name: str
    title: str
    field: str
    """Attribute of a row; None where it was not measured."""
    write: Callable[[float | None], str]
    unit: str = ""
    """After the numbers of the axis, which plotly shortens by powers of 1000."""

    def of(self, row: Row) -> float | None:
        """Look up the cost of a recipe."""
        return getattr(row, self.field)


COSTS = (
    Cost("seconds", "time per run", "seconds", formats.seconds, "s"),
    Cost("memory", "peak memory", "peak_bytes", formats.size, "B"),
    Cost("trained", "trainable parameters", "trainable_parameters", formats.count),
    Cost("state", "optimizer state", "optimizer_state_bytes", formats.size, "B"),
)
_COSTS: dict[str, Callable[[Row], Cell | str]] = {
    "recipe": lambda row: row.recipe,
    "time per run": lambda row: number(
        row.seconds, formats.seconds, formats.span(row.seconds_range, formats.seconds)
    ),
    "optimizer step": lambda row: number(
        row.step_milliseconds,
        formats.milliseconds,
        formats.span(row.step_milliseconds_range, formats.milliseconds),
    ),
    "optimizer state": lambda row: number(row.optimizer_state_bytes, formats.size),
    "peak memory": lambda row: number(row.peak_bytes, formats.size),
    "trained": lambda row: number(row.trainable_parameters, formats.count),
}


def costs_table(rows: Sequence[Row]) -> Table:
    """Make the table of what each recipe costs."""
    caption = (
        "Time and optimizer step: median over the seeds, below it the smallest and the largest. "
        "Memory: the largest."
    )
    return Table.of("costs", caption, rows, _COSTS).filled()


def costs_section(judged: Judgement) -> Section:
    """Show what each recipe costs, and what is bought with it."""
    rows = judged.rows
    fronts = [(cost, best) for cost in COSTS if (best := front(rows, cost))]
    charts = []
    for cost, best in fronts:
        names = formats.listing(f"{row.recipe} ({formats.metric(row.test)})" for row in best)
        says = f"Recipes for which no cheaper recipe is at least as good, cheapest first: {names}"
        charts.append(panel_chart(f"pareto-{cost.name}", pareto_panel(rows, cost), says=says))
    drawn = any(_has_length(best, cost) for cost, best in fronts)
    dotted = "Dotted line: recipes that no other recipe beats at the same or a lower cost. " if drawn else ""
    bars = "Bars: 95 % intervals." if charts and any(row.interval for row in rows) else ""
    return Section(
        "costs",
        "Quality and cost",
        sentences=busy_sentences(judged.runs),
        table=costs_table(rows),
        notes=[f"{dotted}{bars}".strip()] if dotted or bars else [],
        charts=charts,
        keyed=True,
    )


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """Find the recipes that no other one beats in quality without costing more, or in cost without being worse."""
    points = [(point, row) for row in rows if (point := _point(row, cost)) is not None]
    best = [
        (point, row)
        for point, row in points
        if not any(other[0] <= point[0] and other[1] <= point[1] for other, _ in points if other != point)
    ]
    return [row for _, row in sorted(best, key=lambda pair: (pair[0], pair[1].recipe))]


def _has_length(best: Sequence[Row], cost: Cost) -> bool:
    return len({_point(row, cost) for row in best}) > 1


def _point(row: Row, cost: Cost) -> tuple[float, float] | None:
    # Both as costs: smaller is better.
    value = cost.of(row)
    if value is None or row.test is None:
        return None
    return value, -row.test if row.higher_is_better else row.test


def pareto_panel(rows: Sequence[Row], cost: Cost) -> Panel:
    """Draw the test metric against a cost."""
    styles = recipe_styles(row.recipe for row in rows)
    shown = [row for row in rows if _point(row, cost) is not None]
    best = front(rows, cost)
    series = [_mark(row, cost, styles[row.recipe]) for row in shown]
    if _has_length(best, cost):
        line = Series(
            "", [cost.of(row) for row in best], [row.test for row in best], style="steps", look=_FRONT
        )
        series.insert(0, line)
    values = [value for row in shown if (value := cost.of(row)) is not None]
    title, ylabel = cost.title.capitalize(), f"test {rows[0].metric}"
    if values and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        ticks = {tick: _short(tick, cost.unit) for tick in decades(min(values), max(values))}
        return Panel(title, "", ylabel, series, xscale="log", xticks=ticks, layout={"height": 300})
    axis = {"tickformat": "~s", "ticksuffix": cost.unit, "nticks": 5, "rangemode": "tozero"}
    return Panel(title, "", ylabel, series, layout={"height": 300, "xaxis": axis})


def _short(value: float, unit: str) -> str:
    thousands = min(max(int(math.log10(value) // 3), 0), 4)
    gap = " " if unit or thousands else ""
    return f"{value / 1000**thousands:g}{gap}{('', 'k', 'M', 'G', 'T')[thousands]}{unit}"


def _mark(row: Row, cost: Cost, style: Style) -> Series:
    low, high = row.interval or (row.test, row.test)
    return Series(
        row.recipe,
        [cost.of(row)],
        [row.test],
        [low],
        [high],
        style="points",
        bars="y",
        look=style,
        hover=f"{formats.metric(row.test)}, {cost.write(cost.of(row))}",
    )


def time_section(rows: Sequence[Row]) -> Section:
    """Show where the time went."""
    totals = [f"{row.recipe} {formats.seconds(row.seconds)}" for row in rows if row.seconds is not None]
    chart = Chart(
        "time",
        "Time by part",
        "Seconds per run at the best learning rate; the median over the seeds for each part.",
        figure_json(time_figure(rows)),
        f"Seconds per run: {formats.listing(totals)}" if totals else "",
    )
    return Section("time-title", chart.title, charts=[chart])


def time_figure(rows: Sequence[Row]) -> go.Figure:
    """Draw where the time of each recipe's runs went."""
    styles = recipe_styles(row.recipe for row in rows)
    # Plotly draws the first bar at the bottom.
    timed = [row for row in reversed(rows) if row.time]
    figure = empty_figure("seconds per run", "")
    figure.update_layout(barmode="stack", height=150 + 34 * len(timed), legend={"traceorder": "normal"})
    figure.update_yaxes(type="category", showgrid=False)
    for part, (title, pattern) in TIME_PARTS.items():
        for row in timed:
            figure.add_trace(
                _bar(row.recipe, getattr(row.time, part), title, styles[row.recipe].color, pattern)
            )
        if timed:
            # An empty grey bar for the legend, which explains the patterns in no recipe's colour.
            figure.add_trace(_bar(timed[0].recipe, None, title, GREY, pattern))
    return figure


def _bar(recipe: str, length: float | None, part: str, color: str, pattern: str) -> go.Bar:
    shape = {"shape": pattern, "fillmode": "overlay", "fgcolor": "#ffffff", "size": 6, "solidity": 0.35}
    return go.Bar(
        x=[length],
        y=[label_text(recipe)],
        meta=None if length is None else recipe,
        name=part,
        orientation="h",
        marker={"color": color, "pattern": shape, "line": {"width": 0}},
        showlegend=length is None,
        hovertemplate=f"%{{y}}<br>{part}: %{{x:.2f}} s<extra></extra>",
    )


def busy_sentences(judged: Mapping[str, Sequence[Record]]) -> list[str]:
    """Warn where times of the runs behind the results may be too long because something else used the machine."""
    return formats.sentences(_loaded([run for runs in judged.values() for run in runs]), _unequal(judged))


def _loaded(runs: Sequence[Record]) -> str | None:
    busy = [run.load for run in runs if run.load is not None and run.load.busy]
    if not busy:
        return None
    worst = max(busy, key=lambda load: max(load.before, load.after) / load.processors)
    return (
        f"The machine was busy during {len(busy)} of {formats.plural(len(runs), 'run')} behind the results (load "
        f"average up to {max(worst.before, worst.after):.1f} on {formats.plural(worst.processors, 'processor')}): "
        "times are too long, and not comparable between recipes."
    )


def _unequal(judged: Mapping[str, Sequence[Record]]) -> str | None:
    # records of older versions do not know the load
    parts = []
    for recipe, runs in judged.items():
        seconds = [run.time.total for run in runs]
        if len(seconds) > 1 and max(seconds) > _UNEQUAL * max(median(seconds), min(seconds)):
            parts.append(f"{recipe} ({formats.span((min(seconds), max(seconds)), formats.seconds)})")
    if not parts:
        return None
    return (
        f"Equal runs of {formats.listing(parts)} took very different times. The machine was probably "
        "busy with other work, so compare times with care."
    )
