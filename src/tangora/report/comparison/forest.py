"""How far every recipe is from LoRA on a task, with what certainty: one line per recipe."""

from collections.abc import Sequence
from statistics import median

import plotly.graph_objects as go

from tangora.report import formats
from tangora.report.comparison.figures import without_legend
from tangora.report.drawing.plots import empty_figure, label_text
from tangora.report.drawing.styles import Style
from tangora.report.layout import Chart, plain
from tangora.report.statistics.intervals import Interval
from tangora.report.statistics.summary import BASELINE
from tangora.report.statistics.tasks import Duel

_GREY = "#808080"
_OUTER = 4


def forest_chart(number: int, duels: Sequence[Duel], styles: dict[str, Style]) -> Chart:
    """Draw the differences from LoRA on one task."""
    # Plotly draws the first line at the bottom.
    ordered = sorted(duels, key=lambda duel: duel.difference, reverse=not duels[0].higher_is_better)
    reach = forest_reach(ordered)
    figure = without_legend(empty_figure(f"test metric minus {BASELINE}'s", ""))
    figure.update_layout(height=110 + 26 * len(ordered))
    figure.update_xaxes(range=[-reach, reach], nticks=5, tickformat="+~g")
    figure.update_yaxes(type="category", showgrid=False)
    figure.add_vline(0, line={"color": _GREY, "dash": "dash", "width": 1.5})
    figure.add_traces([_mark(duel, styles[duel.ours], reach) for duel in ordered])
    side = "Right" if ordered[0].higher_is_better else "Left"
    says = formats.listing(f"{duel.ours} {_told(duel)}" for duel in reversed(ordered))
    return Chart(f"differences-{number}", ordered[0].task, f"{side} is better.", plain(figure), f"{says}.")


def forest_reach(duels: Sequence[Duel]) -> float:
    """Choose how much of the axis is drawn on both sides of zero."""
    ends = [max(map(abs, drawn_interval(duel))) for duel in duels]
    return 1.05 * (min(max(ends), _OUTER * median(ends)) or 1.0)


def drawn_interval(duel: Duel) -> Interval:
    """Return a difference's interval, which is the difference itself where there is none."""
    return duel.interval or (duel.difference, duel.difference)


def _told(duel: Duel) -> str:
    noise = f" ({formats.interval(duel.interval, sign=True)})" if duel.interval else ""
    return f"{formats.difference(duel.difference)}{noise}"


def _mark(duel: Duel, style: Style, reach: float) -> go.Scatter:
    inside = abs(duel.difference) <= reach
    low, high = drawn_interval(duel) if inside else (duel.difference, duel.difference)
    beyond = "triangle-right" if duel.difference > 0 else "triangle-left"
    hollow = "" if duel.outcome in ("win", "loss") else "-open"
    return go.Scatter(
        x=[duel.difference if inside else reach * (0.98 if duel.difference > 0 else -0.98)],
        y=[label_text(duel.ours)],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - duel.difference],
            "arrayminus": [duel.difference - low],
            "thickness": 1.5,
            "width": 4,
            "visible": inside and duel.interval is not None,
        },
        mode="markers",
        meta=duel.ours,
        marker={
            "symbol": (style.marker if inside else beyond) + hollow,
            "size": 11,
            "color": style.color,
            "line": {"width": 2, "color": style.color},
        },
        hovertemplate=f"{label_text(duel.ours)}<br>{_told(duel)}<extra></extra>",
    )
