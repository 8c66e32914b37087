"""Figures as PNG or SVG files."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tangora.report.drawing.panels import (
    BAND_OPACITY,
    DASHES,
    GREY,
    MARKERS,
    Figure,
    Numbers,
    Panel,
    Series,
    Style,
    series_styles,
)
from tangora.report.record_files import write_atomic

_MAX_MARKED = 12
_SIZE = (4.4, 3.7)
_MIN_WIDTH, _TITLE, _LEGEND_ROW = 6.0, 0.35, 0.24
_LETTERS_PER_INCH = 12
_FEW_DECADES = 2.2


def figure_styles(figure: Figure) -> dict[str, Style]:
    """Give every series of a figure its style."""
    every = [series for panel in figure.panels for series in panel.series]
    return series_styles(series.name for series in every) | {
        series.name: series.look for series in every if series.look is not None
    }


def save_pictures(
    figures: Sequence[Figure],
    folder: str | Path,
    *,
    kinds: Sequence[Literal["png", "svg"]] = ("png",),
    size: tuple[float, float] = _SIZE,
) -> list[Path]:
    """Draw figures, their panels of one size in inches, and write each as ``<name>.png``."""
    return [
        write_atomic(Path(folder) / f"{figure.name}.{kind}", picture)
        for figure in figures
        for kind, picture in _pictures(figure, kinds, size)
    ]


def _pictures(figure: Figure, kinds: Sequence[str], size: tuple[float, float]) -> Iterator[tuple[str, bytes]]:
    from matplotlib import rc_context

    drawing = draw_picture(figure, size)
    for kind in kinds:
        picture = io.BytesIO()
        # no time of writing and no random names: the same figure gives the same bytes
        with rc_context({"svg.hashsalt": figure.name}):
            drawing.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        # what the first one has laid out stays, and is the larger part of the work
        drawing.set_layout_engine("none")
        yield kind, picture.getvalue()


def draw_picture(figure: Figure, size: tuple[float, float] = _SIZE) -> Any:
    """Draw a figure with matplotlib."""
    # Here, because matplotlib takes a second to import. A Figure of its own draws without pyplot's global state.
    from matplotlib.figure import Figure as Drawing

    styles = figure_styles(figure)
    # rows have their names beside them
    named = () if any(panel.rows for panel in figure.panels) else tuple(styles)
    columns = min(figure.columns or len(figure.panels), len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    width = max(size[0] * columns, _MIN_WIDTH)
    fit = max(1, int(width * _LETTERS_PER_INCH / (8 + max(map(len, styles), default=1))))
    lines = -(-len(named) // fit)
    height = size[1] * rows + _TITLE * bool(figure.title) + _LEGEND_ROW * lines
    drawing = Drawing(figsize=(width, height), dpi=150, layout="constrained")
    shared = all(panel.rows for panel in figure.panels)
    all_axes = [*drawing.subplots(rows, columns, squeeze=False, sharey=shared).flat]
    for axes in all_axes[len(figure.panels) :]:
        axes.set_axis_off()
    all_axes = all_axes[: len(figure.panels)]
    handles: dict[str, Any] = {}
    for axes, panel in zip(all_axes, figure.panels, strict=True):
        for name, line in _draw_panel(drawing, axes, panel, styles).items():
            # a line that shows its marks tells more
            if name not in handles or handles[name].get_marker() == "none":
                handles[name] = line
    if len(handles) > 1 and named:
        drawing.legend(
            [handles[name] for name in named],
            [_plain(name) for name in named],
            loc="outside lower center",
            ncols=-(-len(named) // lines),
            frameon=False,
            fontsize="small",
            handlelength=2.6,
        )
    if figure.title:
        drawing.suptitle(_plain(figure.title), fontsize="large", fontweight="bold")
    return drawing


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
    if panel.rows:
        _name_rows(axes, panel.rows)
    handles: dict[str, Any] = {}
    for series in panel.series:
        line = _draw_series(axes, drawable(series, panel), series.look or styles[series.name])
        # of the lines of one name the legend shows the widest
        if series.name not in handles or line.get_linewidth() > handles[series.name].get_linewidth():
            handles[series.name] = line
    _scale(axes, panel)
    axes.set_xlabel(_plain(panel.xlabel))
    axes.set_ylabel(_plain(panel.ylabel))
    axes.set_title(_plain(panel.title), fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.heatmap is None:
        axes.grid(visible=True, axis="x" if panel.rows else "both", color=GREY, alpha=0.25, linewidth=0.6)
    return handles


def _name_rows(axes: Any, rows: Sequence[str]) -> None:
    axes.axvline(0, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)


def _scale(axes: Any, panel: Panel) -> None:
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if getattr(panel, f"{name}scale") == "log":
            getattr(axes, f"set_{name}scale")("log")
            _tick_logarithms(axis)
    if panel.xticks is not None:
        axes.set_xticks(list(panel.xticks), list(panel.xticks.values()))
        axes.minorticks_off()
    if panel.xwhole:
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if panel.xrange is not None:
        axes.set_xlim(panel.xrange)


def _draw_series(axes: Any, series: Series, style: Style) -> Any:
    x, y, color = _floats(series.x), _floats(series.y), style.color
    if series.style == "rings":
        return axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor=color)[0]
    if series.style == "crosses":
        return axes.plot(x, y, "x", markersize=8, markeredgewidth=2, color=color)[0]
    if series.low is not None and series.high is not None:
        ends = _floats(series.low), _floats(series.high)
        if series.bars == "x":
            axes.hlines(y, *ends, color=color, linewidth=1.4)
        elif series.bars is None:
            axes.fill_between(x, *ends, color=color, alpha=BAND_OPACITY, linewidth=0)
    points = series.style == "points"
    (line,) = axes.plot(
        x,
        y,
        color=color,
        linestyle="none" if points else DASHES["dash" if series.style == "dashed" else style.dash][1],
        linewidth=0.8 * style.width,
        marker=MARKERS[style.marker][1] if points or is_marked(series) else "none",
        markersize=6 if points else 4,
        markerfacecolor=color if style.filled else "white",
    )
    return line


def is_marked(series: Series) -> bool:
    """Tell whether a line shows its points."""
    return series.bars is not None or (series.style == "line" and len(series.x) <= _MAX_MARKED)


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


def _floats(values: Numbers) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _plain(text: str) -> str:
    # Keep matplotlib from reading dollars as formulas, and a leading underscore as "not in the legend".
    return text.replace("$", r"\$").lstrip("_")
