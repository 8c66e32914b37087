"""Interactive figures. Text, axes and grids have no colour of their own: the page gives them one that fits."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tangora.report import formats
from tangora.report.comparison.curves import (
    LossCurve,
    Sweep,
    Values,
    loss_curves,
    rate_ticks,
    sweeps,
    thin,
    worst_value,
)
from tangora.report.drawing.plots import empty_figure, label_text
from tangora.report.drawing.styles import Style, recipe_styles
from tangora.report.records import Comparison
from tangora.report.statistics.selection import SweepPoint
from tangora.report.statistics.summary import Row

_BAND_OPACITY = 0.15
_TRANSPARENT = "rgba(0,0,0,0)"
_GREY = "#808080"
_PANEL_HEIGHT = 300
_PARTS = {
    "start": ("start", "x"),
    "forward_backward": ("forward and backward", ""),
    "optimizer": ("optimizer step", "/"),
    "evaluation": ("evaluation", "."),
}


def loss_figure(comparison: Comparison, rows: Sequence[Row]) -> go.Figure:
    """Draw the training loss of each recipe at its best learning rate."""
    return curves_figure(loss_curves(comparison, rows), rows, "training loss", raw=True)


def curves_figure(
    curves: Sequence[LossCurve], rows: Sequence[Row], title: str, *, raw: bool = False, keyed: bool = False
) -> go.Figure:
    """Draw a quantity against the optimizer steps."""
    styles = recipe_styles(row.recipe for row in rows)
    figure = empty_figure("optimizer step", title)
    for curve in curves:
        figure.add_traces(_loss_traces(thin(curve), styles[curve.recipe], raw=raw))
    return as_panel(figure) if keyed else figure


def as_panel(figure: go.Figure) -> go.Figure:
    """Make a figure small, for several side by side with one key."""
    return without_legend(figure).update_layout(height=_PANEL_HEIGHT)


def without_legend(figure: go.Figure) -> go.Figure:
    """Take the legend from a figure that has a key beside it."""
    return figure.update_layout(showlegend=False)


def _loss_traces(curve: LossCurve, style: Style, *, raw: bool) -> list[go.Scatter]:
    name = label_text(curve.recipe)
    steps = curve.steps.astype(int).tolist()
    line = go.Scatter(
        x=steps,
        y=_short(curve.smooth),
        customdata=_short(curve.mean) if raw else None,
        name=name,
        meta=curve.recipe,
        legendgroup=name,
        mode="lines",
        line={"color": style.color, "dash": style.dash, "width": 2},
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4g}}{', raw %{customdata:.4g}' if raw else ''}<extra></extra>",
    )
    if curve.num_seeds == 1:
        return [line]
    band = go.Scatter(
        x=steps + steps[::-1],
        y=_short(curve.high) + _short(curve.low)[::-1],
        fill="toself",
        fillcolor=style.faded(_BAND_OPACITY),
        line={"width": 0, "color": _TRANSPARENT},
        mode="lines",
        meta=curve.recipe,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
    return [band, line]


def _short(values: Values) -> list[float]:
    # Digits that nobody can see are most of a page.
    return [float(f"{value:.5g}") for value in values]


def sweep_figure(comparison: Comparison, rows: Sequence[Row]) -> go.Figure:
    """Draw the validation metric against the learning rate."""
    styles = recipe_styles(row.recipe for row in rows)
    shown = sweeps(comparison, rows)
    floor = worst_value(shown, higher_is_better=comparison.higher_is_better)
    figure = empty_figure("learning rate", f"validation {comparison.metric}")
    ticks = rate_ticks(shown)
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[formats.learning_rate(rate) for rate in ticks])
    for sweep in shown:
        figure.add_traces(_sweep_traces(sweep, styles[sweep.recipe], floor))
    return figure


def _sweep_traces(sweep: Sweep, style: Style, floor: float) -> list[go.Scatter]:
    name = label_text(sweep.recipe)
    finished = [(point, point.mean) for point in sweep.points if point.mean is not None]
    diverged = [point for point in sweep.points if point.num_diverged]
    line = go.Scatter(
        x=[point.learning_rate for point, _ in finished],
        y=[mean for _, mean in finished],
        error_y=_spread(finished),
        name=name,
        meta=sweep.recipe,
        legendgroup=name,
        mode="lines+markers",
        line={"color": style.color, "dash": style.dash, "width": 2},
        marker={"symbol": style.marker, "size": 8, "color": style.color},
        text=[_point_text(point) for point, _ in finished],
        hovertemplate=f"{name}<br>learning rate %{{x}}: %{{y:.4f}}<br>%{{text}}<extra></extra>",
    )
    ring = [(point.learning_rate, mean) for point, mean in finished if point.learning_rate == sweep.chosen]
    marks = [
        _mark(
            sweep.recipe,
            ring,
            {"symbol": "circle-open", "size": 18, "color": style.color, "line": {"width": 2}},
        ),
        _mark(
            sweep.recipe,
            [(point.learning_rate, floor) for point in diverged],
            {
                "symbol": "x-thin",
                "size": 11,
                "color": style.color,
                "line": {"width": 3, "color": style.color},
            },
            [_point_text(point) for point in diverged],
        ),
    ]
    return [line, *(mark for mark in marks if mark.x)]


def _mark(
    recipe: str,
    places: Sequence[tuple[float, float]],
    marker: dict[str, Any],
    texts: Sequence[str] = (),
) -> go.Scatter:
    name = label_text(recipe)
    return go.Scatter(
        x=[rate for rate, _ in places],
        y=[value for _, value in places],
        mode="markers",
        marker=marker,
        meta=recipe,
        legendgroup=name,
        showlegend=False,
        text=texts,
        hovertemplate=f"{name}<br>learning rate %{{x}}<br>%{{text}}<extra></extra>" if texts else None,
        hoverinfo=None if texts else "skip",
    )


def _spread(finished: Sequence[tuple[SweepPoint, float]]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(point.validation) - mean for point, mean in finished],
        "arrayminus": [mean - min(point.validation) for point, mean in finished],
        "visible": any(len(point.validation) > 1 for point, _ in finished),
        "thickness": 1,
        "width": 3,
    }


def _point_text(point: SweepPoint) -> str:
    parts = [formats.plural(len(point.validation), "finished run")]
    if point.num_diverged:
        parts.append(f"{point.num_diverged} diverged")
    if point.num_failed:
        parts.append(f"{point.num_failed} failed")
    return ", ".join(parts)


def time_figure(rows: Sequence[Row]) -> go.Figure:
    """Draw where the time of each recipe's runs went."""
    styles = recipe_styles(row.recipe for row in rows)
    # Plotly draws the first bar at the bottom.
    timed = [row for row in reversed(rows) if row.time]
    figure = empty_figure("seconds per run", "")
    figure.update_layout(barmode="stack", height=150 + 34 * len(timed), legend={"traceorder": "normal"})
    figure.update_yaxes(type="category", showgrid=False)
    for part, (title, pattern) in _PARTS.items():
        bars = [
            _bar(row.recipe, getattr(row.time, part), title, styles[row.recipe].color, pattern)
            for row in timed
        ]
        # An empty grey bar for the legend, which explains the patterns in no recipe's colour.
        key = [_bar(row.recipe, None, title, _GREY, pattern) for row in timed[:1]]
        figure.add_traces([*bars, *key])
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
