"""Quality against cost: which recipes no other one beats in both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tangora.report import formats
from tangora.report.comparison.figures import as_panel
from tangora.report.drawing.plots import empty_figure, label_text
from tangora.report.drawing.styles import Style, recipe_styles
from tangora.report.layout import Chart, plain
from tangora.report.statistics.summary import Row

_GREY = "#808080"
_LOG_FROM = 20  # ratio of the largest cost to the smallest


@dataclass(frozen=True)
class Cost:
    """Something that a run costs.

    Attributes:
        name: As an id.
        title: Its name and unit.
        value: Of a row, None where it was not measured.
        write: The value as text.
        unit: After the numbers of the axis, which plotly shortens by powers of 1000.
    """

    name: str
    title: str
    value: Callable[[Row], float | None]
    write: Callable[[float], str]
    unit: str = ""


COSTS = (
    Cost("seconds", "time per run", lambda row: row.seconds, formats.seconds, "s"),
    Cost("memory", "peak memory", lambda row: row.peak_bytes, lambda v: formats.size(int(v)), "B"),
    Cost(
        "trained",
        "trainable parameters",
        lambda row: row.trainable_parameters,
        lambda v: formats.count(int(v)),
    ),
    Cost(
        "state", "optimizer state", lambda row: row.optimizer_state_bytes, lambda v: formats.size(int(v)), "B"
    ),
)


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """Find the recipes that no other one beats in quality without costing more, or in cost without being worse."""
    known = [(row, _point(row, cost)) for row in rows]
    points = [(row, point) for row, point in known if point is not None]
    best = [
        (row, point)
        for row, point in points
        if not any(_beats(other, point) for _, other in points if other != point)
    ]
    return [row for row, _ in sorted(best, key=lambda pair: (pair[1], pair[0].recipe))]


def has_front(rows: Sequence[Row], cost: Cost) -> bool:
    """Tell whether a line through `front` has a length."""
    return len({_point(row, cost) for row in front(rows, cost)}) > 1


def _point(row: Row, cost: Cost) -> tuple[float, float] | None:
    # Both as costs: smaller is better.
    value = cost.value(row)
    if value is None or row.test is None:
        return None
    return value, -row.test if row.higher_is_better else row.test


def _beats(ours: tuple[float, float], theirs: tuple[float, float]) -> bool:
    return ours[0] <= theirs[0] and ours[1] <= theirs[1]


def pareto_figure(rows: Sequence[Row], cost: Cost) -> go.Figure:
    """Draw the test metric against a cost."""
    styles = recipe_styles(row.recipe for row in rows)
    shown = [row for row in rows if _point(row, cost) is not None]
    values = [value for row in shown if (value := cost.value(row)) is not None]
    figure = as_panel(empty_figure("", f"test {rows[0].metric}"))
    if values and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        ticks = _decades(min(values), max(values))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[_short(tick, cost.unit) for tick in ticks])
    else:
        figure.update_xaxes(tickformat="~s", ticksuffix=cost.unit, nticks=5, rangemode="tozero")
    if has_front(rows, cost):
        best = front(rows, cost)
        figure.add_trace(
            go.Scatter(
                x=[cost.value(row) for row in best],
                y=[row.test for row in best],
                mode="lines",
                line={"color": _GREY, "dash": "dot", "width": 1.5, "shape": "hv"},
                hoverinfo="skip",
            )
        )
    return figure.add_traces([_mark(row, cost, styles[row.recipe]) for row in shown])


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _short(value: float, unit: str) -> str:
    thousands = min(max(int(math.log10(value) // 3), 0), 4)
    gap = " " if unit or thousands else ""
    return f"{value / 1000**thousands:g}{gap}{('', 'k', 'M', 'G', 'T')[thousands]}{unit}"


def _mark(row: Row, cost: Cost, style: Style) -> go.Scatter:
    value = cost.value(row)
    assert value is not None
    assert row.test is not None
    low, high = row.interval or (row.test, row.test)
    text = f"{label_text(row.recipe)}<br>{formats.metric(row.test)}, {cost.write(value)}"
    return go.Scatter(
        x=[value],
        y=[row.test],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [high - row.test],
            "arrayminus": [row.test - low],
            "thickness": 1,
            "width": 3,
            "visible": row.interval is not None,
        },
        mode="markers",
        meta=row.recipe,
        marker={"symbol": style.marker, "size": 11, "color": style.color},
        hovertemplate=f"{text}<extra></extra>",
    )


def pareto_charts(rows: Sequence[Row]) -> list[Chart]:
    """Draw the test metric against every cost that was measured."""
    return [
        Chart(
            f"pareto-{cost.name}", cost.title.capitalize(), "", plain(pareto_figure(rows, cost)), _says(best)
        )
        for cost in COSTS
        if (best := front(rows, cost))
    ]


def _says(best: Sequence[Row]) -> str:
    names = formats.listing(f"{row.recipe} ({formats.metric(row.test)})" for row in best)
    return f"No other recipe is at least as good for less, cheapest first: {names}"
