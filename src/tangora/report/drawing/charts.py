"""Figures of an experiment as interactive charts, one for each panel, so that a narrow page can stack them."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from tangora.report.drawing.panels import Figure, Heatmap, Panel, Series
from tangora.report.drawing.pictures import MAX_MARKED, drawable, figure_styles
from tangora.report.drawing.plots import empty_figure, label_text
from tangora.report.drawing.styles import Style
from tangora.report.layout import Chart, plain

_BAND_OPACITY = 0.15
_TRANSPARENT = "rgba(0,0,0,0)"
_HEIGHT = 400


def charts(figure: Figure) -> list[Chart]:
    """Make the charts of a figure."""
    styles = figure_styles(figure)
    return [
        Chart(f"{figure.name}-{number}", panel.title, "", plain(panel_figure(panel, styles)))
        for number, panel in enumerate(figure.panels, start=1)
    ]


def panel_figure(panel: Panel, styles: Mapping[str, Style]) -> go.Figure:
    """Draw one panel."""
    figure = empty_figure(label_text(panel.xlabel), panel.ylabel)
    figure.update_layout(height=_HEIGHT)
    figure.update_xaxes(**_axis(panel.xscale))
    figure.update_yaxes(**_axis(panel.yscale))
    if panel.heatmap is not None:
        figure.add_trace(_heat(panel.heatmap))
    for series in panel.series:
        figure.add_traces(_traces(drawable(series, panel), styles[series.name]))
    figure.update_layout(showlegend=len(panel.series) > 1)
    return figure


def _axis(scale: str) -> dict[str, Any]:
    return {"type": "log", "exponentformat": "power", "dtick": None} if scale == "log" else {"type": "linear"}


def _heat(heatmap: Heatmap) -> go.Heatmap:
    label = label_text(heatmap.label)
    return go.Heatmap(
        x=heatmap.x,
        y=heatmap.y,
        z=heatmap.z,
        colorscale="Cividis",
        colorbar={"title": {"text": label, "side": "right"}, "thickness": 14},
        hovertemplate=f"%{{x:.3g}}, %{{y:.3g}}<br>{label}: %{{z:.3g}}<extra></extra>",
    )


def _traces(series: Series, style: Style) -> list[go.Scatter]:
    name = label_text(series.name)
    marked = series.style == "points" or (series.style == "line" and len(series.x) <= MAX_MARKED)
    line = go.Scatter(
        x=series.x,
        y=series.y,
        name=name,
        legendgroup=name,
        mode="markers" if series.style == "points" else "lines+markers" if marked else "lines",
        line={
            "color": style.color,
            "dash": "dash" if series.style == "dashed" else style.dash,
            "width": 2,
        },
        marker={
            "color": style.color,
            "symbol": style.marker,
            "size": 9 if series.style == "points" else 6,
        },
        hovertemplate=f"{name}<br>%{{x:.4g}}: %{{y:.4g}}<extra></extra>",
    )
    return [*_band(series, style, name), line]


def _band(series: Series, style: Style, name: str) -> list[go.Scatter]:
    if series.low is None or series.high is None:
        return []
    edges = [
        (x, low, high)
        for x, low, high in zip(series.x, series.low, series.high, strict=True)
        if None not in (x, low, high)
    ]
    if not edges:
        return []
    x, low, high = (list(values) for values in zip(*edges, strict=True))
    return [
        go.Scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            fill="toself",
            fillcolor=style.faded(_BAND_OPACITY),
            line={"width": 0, "color": _TRANSPARENT},
            mode="lines",
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
        )
    ]
