"""One static picture of a comparison, or of several tasks, for a README."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tangora.report import formats
from tangora.report.comparison.curves import loss_curves, rate_ticks, sweeps, worst_value
from tangora.report.comparison.forest import drawn_interval, forest_reach
from tangora.report.drawing.styles import MATPLOTLIB_DASHES, MATPLOTLIB_MARKERS, Style, recipe_styles
from tangora.report.files import write_atomic
from tangora.report.records import Comparison
from tangora.report.statistics.summary import BASELINE, Row, summarize
from tangora.report.statistics.tasks import Duel, TaskMatrix

_BAND_OPACITY = 0.15
_TITLE_LETTERS = 34


def save_picture(comparison: Comparison, path: str | Path) -> Path:
    """Draw training losses and the learning-rate sweep side by side, and write them as PNG."""
    # Here, because matplotlib takes a second to import. A Figure of its own draws without pyplot's global state.
    from matplotlib.figure import Figure

    rows = summarize(comparison)
    styles = recipe_styles(row.recipe for row in rows)
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, comparison, rows, styles)
    _draw_sweeps(right, comparison, rows, styles)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, handlelength=3.2)
    figure.suptitle(_plain(comparison.title), fontsize="large", fontweight="bold")
    return _written(figure, path)


def save_study_picture(comparisons: Mapping[str, Comparison], found: TaskMatrix, path: str | Path) -> Path:
    """Draw how far every recipe is from LoRA on every task, side by side, and write it as PNG.

    Better is always right, so a loss runs from right to left. Hollow marks are within noise.
    """
    from matplotlib.figure import Figure

    recipes = [name for name in reversed(found.recipes) if name != BASELINE]  # the best one at the top
    styles = recipe_styles(found.recipes)
    size = (max(3.2 * len(found.tasks) + 1.4, 6.0), 1.2 + 0.25 * len(recipes))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    columns = figure.subplots(1, len(found.tasks), squeeze=False, sharey=True)[0]
    lines = {name: line for line, name in enumerate(recipes)}
    for axes, task in zip(columns, found.tasks, strict=True):
        _draw_forest(axes, [duel for duel in found.against_lora if duel.task == task], lines, styles)
        what = f"test {_plain(comparisons[task].metric)} minus {BASELINE}'s (right: better)"
        _decorate(axes, what, "", textwrap.fill(_plain(comparisons[task].title), _TITLE_LETTERS))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    columns[0].set_yticks(range(len(recipes)), [_plain(name) for name in recipes])
    columns[0].set_ylim(-0.7, len(recipes) - 0.3)
    return _written(figure, path)


def _draw_forest(
    axes: Any, duels: Sequence[Duel], lines: Mapping[str, int], styles: Mapping[str, Style]
) -> None:
    axes.axvline(0, color="#808080", linestyle=(0, (4, 3)), linewidth=1)
    if not duels:
        return
    reach, better = forest_reach(duels), 1 if duels[0].higher_is_better else -1
    for duel in duels:
        style, line = styles[duel.ours], lines[duel.ours]
        fill = style.color if duel.outcome in ("win", "loss") else "white"
        if abs(duel.difference) > reach:
            side = 1 if duel.difference > 0 else -1
            marker = ">" if side == better else "<"
            axes.plot(side * 0.97 * reach, line, marker, color=style.color, markerfacecolor=fill)
            continue
        axes.plot(drawn_interval(duel), (line, line), color=style.color, linewidth=1.4)
        marker = MATPLOTLIB_MARKERS[style.marker]
        axes.plot(duel.difference, line, marker, color=style.color, markerfacecolor=fill, markersize=6)
    axes.set_xlim(-better * reach, better * reach)
    axes.locator_params(axis="x", nbins=4)


def _written(figure: Any, path: str | Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return write_atomic(path, picture.getvalue())


def _draw_losses(axes: Any, comparison: Comparison, rows: Sequence[Row], styles: dict[str, Style]) -> None:
    for curve in loss_curves(comparison, rows):
        style = styles[curve.recipe]
        dash = MATPLOTLIB_DASHES[style.dash]
        axes.plot(curve.steps, curve.smooth, color=style.color, linestyle=dash)
        if curve.num_seeds > 1:
            axes.fill_between(
                curve.steps, curve.low, curve.high, color=style.color, alpha=_BAND_OPACITY, linewidth=0
            )
    _decorate(axes, "optimizer step", "training loss", "Training at the best learning rate")


def _draw_sweeps(axes: Any, comparison: Comparison, rows: Sequence[Row], styles: dict[str, Style]) -> None:
    shown = sweeps(comparison, rows)
    floor = worst_value(shown, higher_is_better=comparison.higher_is_better)
    for sweep in shown:
        style = styles[sweep.recipe]
        finished = [(point.learning_rate, point.mean) for point in sweep.points if point.mean is not None]
        diverged = [point.learning_rate for point in sweep.points if point.num_diverged]
        chosen = [pair for pair in finished if pair[0] == sweep.chosen]
        axes.plot(
            *_unzip(finished),
            color=style.color,
            linestyle=MATPLOTLIB_DASHES[style.dash],
            marker=MATPLOTLIB_MARKERS[style.marker],
            markersize=5,
            label=_plain(sweep.recipe),
        )
        axes.plot(*_unzip(chosen), "o", markersize=12, markerfacecolor="none", markeredgecolor=style.color)
        axes.plot(diverged, [floor] * len(diverged), "x", color=style.color, markersize=8, markeredgewidth=2)
    axes.set_xscale("log")
    ticks = rate_ticks(shown)
    axes.set_xticks(ticks, [formats.learning_rate(rate) for rate in ticks])
    axes.minorticks_off()
    _decorate(
        axes,
        "learning rate (ring: chosen, cross: diverged)",
        f"validation {comparison.metric}",
        "Learning-rate sweep",
    )


def _decorate(axes: Any, x_title: str, y_title: str, title: str) -> None:
    axes.set_xlabel(x_title)
    axes.set_ylabel(_plain(y_title))
    axes.set_title(title, fontsize="medium")
    axes.grid(visible=True, color="#808080", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _unzip(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _plain(text: str) -> str:
    # Keep matplotlib from reading dollars as formulas, and a leading underscore as "not in the legend".
    return text.replace("$", r"\$").lstrip("_")
