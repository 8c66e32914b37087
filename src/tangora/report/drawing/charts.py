"""Figures as interactive charts, one for each panel, so that a narrow page can stack them.

Text, axes and grids have no colour of their own: the page gives them one that fits.
"""

import html
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from tangora.report.drawing.panels import (
    BAND_OPACITY,
    GREY,
    Figure,
    Heatmap,
    Numbers,
    Panel,
    Series,
    Style,
    whole_step,
)
from tangora.report.drawing.pictures import drawable, figure_styles, is_marked
from tangora.report.layout import Chart, Section

_HEIGHT = 400
_TRANSPARENT = "rgba(0,0,0,0)"
_MARKER_SIZES = {"points": 10, "rings": 18, "crosses": 11}
_SYMBOLS = {"rings": "circle-open", "crosses": "x-thin"}


def label_text(name: str) -> str:
    """Make any text safe inside of a figure."""
    # Plotly reads a little HTML in its labels, and ``%{...}`` in hover templates.
    return html.escape(name, quote=False).replace("%{", "%\N{ZERO WIDTH SPACE}{")


def empty_figure(x_title: str, y_title: str) -> go.Figure:
    """Make a figure that takes its colours from the page."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "height": 440,
            "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
            "paper_bgcolor": _TRANSPARENT,
            "plot_bgcolor": _TRANSPARENT,
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "xaxis": axis | {"title": {"text": label_text(x_title)}},
            "yaxis": axis | {"title": {"text": label_text(y_title), "standoff": 8}},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "itemwidth": 40,
            },
            "hovermode": "closest",
        }
    )


def figure_json(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as JSON can hold it."""
    return json.loads(figure.to_json() or "{}")


def figure_section(figure: Figure) -> Section:
    """Give a figure a part of a page to itself."""
    styles = figure_styles(figure)
    charts = [
        panel_chart(f"{figure.name}-{number}", panel, styles=styles)
        for number, panel in enumerate(figure.panels, start=1)
    ]
    return Section(f"{figure.name}-title", figure.title, charts=charts, caption=figure.caption)


def panel_chart(
    name: str, panel: Panel, caption: str = "", says: str = "", styles: Mapping[str, Style] | None = None
) -> Chart:
    """Make the chart of one panel."""
    return Chart(name, panel.title, caption, figure_json(panel_figure(panel, styles or {})), says)


def panel_figure(panel: Panel, styles: Mapping[str, Style]) -> go.Figure:
    """Draw one panel."""
    figure = empty_figure(panel.xlabel, panel.ylabel)
    keyed = any(series.look is not None for series in panel.series)
    figure.update_layout(height=_HEIGHT, showlegend=not keyed and len(panel.series) > 1)
    figure.update_xaxes(**_axis(panel.xscale))
    figure.update_yaxes(**_axis(panel.yscale))
    if panel.xticks is not None:
        figure.update_xaxes(tickvals=list(panel.xticks), ticktext=list(panel.xticks.values()))
    if panel.xwhole:
        figure.update_xaxes(tick0=0, dtick=whole_step(panel))
    if panel.xrange is not None:
        figure.update_xaxes(range=panel.xrange)
    if panel.rows:
        names = [label_text(name) for name in panel.rows]
        figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, showgrid=False)
        figure.update_yaxes(range=[-0.7, len(names) - 0.3])
        figure.add_vline(0, line={"color": GREY, "dash": "dash", "width": 1.5})
    if panel.heatmap is not None:
        figure.add_trace(_heat(panel.heatmap))
    for series in panel.series:
        drawn = _rounded(series) if series.style == "smooth" else series
        figure.add_traces(_traces(drawable(drawn, panel), series.look or styles[series.name]))
    return figure.update_layout(panel.layout)


def _rounded(series: Series) -> Series:
    # Digits that nobody can see are most of a page.
    def short(values: Numbers | None) -> Numbers | None:
        return values and [None if value is None else float(f"{value:.5g}") for value in values]

    arrays = {name: short(getattr(series, name)) for name in ("y", "low", "high", "data")}
    return replace(series, **arrays)


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
    line = {
        "color": style.color,
        "dash": {"dashed": "dash", "steps": "dot"}.get(series.style, style.dash),
        "width": style.width,
        "shape": "hv" if series.style == "steps" else None,
    }
    symbol = _SYMBOLS.get(series.style, style.marker + ("" if style.filled else "-open"))
    drawn = go.Scatter(
        x=series.x,
        y=series.y,
        customdata=series.data,
        name=name,
        legendgroup=name,
        meta=series.name if series.look else None,  # by which the key of the page hides it
        mode="markers"
        if series.style in _MARKER_SIZES
        else "lines+markers"
        if is_marked(series)
        else "lines",
        line=line,
        marker={
            "color": style.color,
            "symbol": symbol,
            "size": _MARKER_SIZES.get(series.style, 8 if series.bars else 6),
            "line": {"width": 3 if series.style == "crosses" else 2, "color": style.color}
            if symbol.endswith(("-open", "-thin"))
            else None,
        },
        hovertemplate=f"{name}<br>{series.hover or '%{x:.4g}: %{y:.4g}'}<extra></extra>",
        hoverinfo="skip" if series.style in {"rings", "steps"} else None,
    )
    if series.style in {"rings", "steps"}:
        drawn.hovertemplate = None
    if series.bars:
        drawn[f"error_{series.bars}"] = _error_bars(getattr(series, series.bars), series.low, series.high)
        return [drawn]
    return [*_band(series, style, name), drawn]


def _error_bars(middle: Numbers, low: Numbers, high: Numbers) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [end - value for end, value in zip(high, middle, strict=True)],
        "arrayminus": [value - end for end, value in zip(low, middle, strict=True)],
        "visible": low != high,
        "thickness": 1.5,
        "width": 4,
    }


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
    band = go.Scatter(
        x=x + x[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=style.faded(BAND_OPACITY),
        line={"width": 0, "color": _TRANSPARENT},
        mode="lines",
        legendgroup=name,
        meta=series.name if series.look else None,
        showlegend=False,
        hoverinfo="skip",
    )
    return [band]
