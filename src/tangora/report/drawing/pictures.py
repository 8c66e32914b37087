"""Figures of an experiment as PNG or SVG files."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tangora.report.drawing.panels import Figure, Numbers, Panel, Series
from tangora.report.drawing.styles import MATPLOTLIB_DASHES, MATPLOTLIB_MARKERS, Style, series_styles
from tangora.report.files import write_atomic

MAX_MARKED = 12
"""Curves of at most so many points show them."""

_BAND_OPACITY = 0.15
_WIDTH, _HEIGHT, _LEGEND_ROW = 4.4, 3.7, 0.24
_LETTERS_PER_INCH = 12
_FEW_DECADES = 2.2


def figure_styles(figure: Figure) -> dict[str, Style]:
    """Give every series of a figure its style."""
    return series_styles(series.name for panel in figure.panels for series in panel.series)


def save_pictures(
    figures: Sequence[Figure], folder: str | Path, *, kinds: Sequence[Literal["png", "svg"]] = ("png",)
) -> list[Path]:
    """Draw figures and write each as ``<name>.png``."""
    return [
        write_atomic(Path(folder) / f"{figure.name}.{kind}", picture)
        for figure in figures
        for kind, picture in _pictures(figure, kinds)
    ]


def _pictures(figure: Figure, kinds: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    # Here, because matplotlib takes a second to import. A Figure of its own draws without pyplot's global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    styles = figure_styles(figure)
    width = max(_WIDTH * len(figure.panels), 6.0)
    fit = max(1, int(width * _LETTERS_PER_INCH / (8 + max(map(len, styles), default=1))))
    rows = -(-len(styles) // fit)
    columns = -(-len(styles) // max(rows, 1))
    drawing = Drawing(figsize=(width, _HEIGHT + 0.35 + _LEGEND_ROW * rows), dpi=150, layout="constrained")
    all_axes = drawing.subplots(1, len(figure.panels), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, panel in zip(all_axes, figure.panels, strict=True):
        handles = _draw_panel(drawing, axes, panel, styles) | handles
    if len(handles) > 1:
        ordered = [(handles[name], _plain(name)) for name in styles]
        drawing.legend(
            *zip(*ordered, strict=True),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize="small",
            handlelength=2.6,
        )
    drawing.suptitle(_plain(figure.title), fontsize="large", fontweight="bold")
    for kind in kinds:
        picture = io.BytesIO()
        # no time of writing and no random names: the same figure gives the same bytes
        with rc_context({"svg.hashsalt": figure.name}):
            drawing.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        drawing.set_layout_engine(
            "none"
        )  # what the first one has laid out stays, and is the larger part of the work
        yield kind, picture.getvalue()


def _draw_panel(drawing: Any, axes: Any, panel: Panel, styles: Mapping[str, Style]) -> dict[str, Any]:
    if panel.heatmap is not None:
        heatmap = panel.heatmap
        mesh = axes.pcolormesh(
            _floats(heatmap.x),
            _floats(heatmap.y),
            [_floats(row) for row in heatmap.z],
            cmap="cividis",
            shading="nearest",
            rasterized=True,
        )
        drawing.colorbar(mesh, ax=axes, label=_plain(heatmap.label))
    handles = {
        series.name: _draw_series(axes, drawable(series, panel), styles[series.name])
        for series in panel.series
    }
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if getattr(panel, f"{name}scale") == "log":
            getattr(axes, f"set_{name}scale")("log")
            _tick_logarithms(axis)
    axes.set_xlabel(_plain(panel.xlabel))
    axes.set_ylabel(_plain(panel.ylabel))
    axes.set_title(_plain(panel.title), fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.heatmap is None:
        axes.grid(visible=True, color="#808080", alpha=0.25, linewidth=0.6)
    return handles


def _draw_series(axes: Any, series: Series, style: Style) -> Any:
    x, y = _floats(series.x), _floats(series.y)
    marker = MATPLOTLIB_MARKERS[style.marker]
    dash = "dash" if series.style == "dashed" else style.dash
    if series.low is not None and series.high is not None:
        axes.fill_between(
            x,
            _floats(series.low),
            _floats(series.high),
            color=style.color,
            alpha=_BAND_OPACITY,
            linewidth=0,
        )
    (line,) = axes.plot(
        x,
        y,
        color=style.color,
        linestyle="none" if series.style == "points" else MATPLOTLIB_DASHES[dash],
        linewidth=1.6,
        marker=marker if series.style == "points" or _few(series) else "none",
        markersize=6 if series.style == "points" else 4,
    )
    return line


def drawable(series: Series, panel: Panel) -> Series:
    """Leave out what a logarithmic axis has no place for."""
    return replace(
        series,
        x=_positive(series.x) if panel.xscale == "log" else series.x,
        **{
            key: _positive(values)
            for key in ("y", "low", "high")
            if panel.yscale == "log" and (values := getattr(series, key)) is not None
        },
    )


def _positive(values: Numbers) -> Numbers:
    return tuple(value if value is not None and value > 0 else None for value in values)


def _tick_logarithms(axis: Any) -> None:
    # matplotlib's own labels of minor ticks overlap when an axis spans one or two decades
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if low > 0 and math.log10(high / low) < _FEW_DECADES:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _few(series: Series) -> bool:
    return series.style == "line" and len(series.x) <= MAX_MARKED


def _floats(values: Numbers) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _plain(text: str) -> str:
    # Keep matplotlib from reading dollars as formulas, and a leading underscore as "not in the legend".
    return text.replace("$", r"\$").lstrip("_")
