"""Differences from LoRA on every task with their intervals, one line per recipe."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Figure, Panel, Series, Style, recipe_styles
from tangora.report.drawing.pictures import save_pictures
from tangora.report.layout import Section
from tangora.report.statistics.intervals import Interval
from tangora.report.statistics.judgement import BASELINE
from tangora.report.statistics.tasks import Duel, TaskMatrix

_OUTER = 4
_TITLE_LETTERS = 34


def differences_section(found: TaskMatrix, styles: Mapping[str, Style]) -> Section | None:
    """Show every task's differences from LoRA."""
    charts = []
    for task in found.tasks:
        duels = [duel for duel in found.against_lora if duel.task == task]
        if not duels:
            continue
        # the first row is at the bottom
        ordered = sorted(duels, key=lambda duel: duel.difference, reverse=not duels[0].higher_is_better)
        panel = _panel(task, f"test metric minus {BASELINE}'s", ordered, [d.ours for d in ordered], styles)
        side = "Right" if duels[0].higher_is_better else "Left"
        says = formats.listing(f"{duel.ours} {_told(duel)}" for duel in reversed(ordered))
        charts.append(panel_chart(f"differences-{len(charts) + 1}", panel, f"{side} is better.", f"{says}."))
    note = (
        f"Test metric minus {BASELINE}'s, with 95 % intervals that are not corrected for the number of recipes. "
        "Filled marks are wins and losses after the correction, hollow ones are not significant; triangles at the edge "
        "lie beyond it."
    )
    return Section("differences", f"Against {BASELINE}", charts=charts, notes=[note]) if charts else None


def save_differences(found: TaskMatrix, folder: Path) -> Path:
    """Draw the differences of all tasks side by side, and write ``picture.png``.

    Better is always right, so a loss runs from right to left. Hollow marks are within noise.
    """
    figure = differences_figure(found)
    size = 3.2 + 1.4 / len(figure.panels), 1.2 + 0.25 * len(figure.panels[0].rows)
    return save_pictures([figure], folder, size=size)[0]


def differences_figure(found: TaskMatrix) -> Figure:
    """Arrange the differences of all tasks side by side, the best recipe at the top."""
    recipes = [name for name in reversed(found.recipes) if name != BASELINE]
    styles = recipe_styles(found.recipes)
    panels = []
    for task, judged in found.tasks.items():
        duels = [duel for duel in found.against_lora if duel.task == task]
        what = f"test {judged.comparison.metric} minus {BASELINE}'s (right: better)"
        title = textwrap.fill(judged.comparison.title, _TITLE_LETTERS)
        reverse = not judged.comparison.higher_is_better
        panels.append(_panel(title, what, duels, recipes, styles, reverse=reverse))
    return Figure("picture", "", "", panels)


def _panel(
    title: str,
    xlabel: str,
    duels: Sequence[Duel],
    rows: Sequence[str],
    styles: Mapping[str, Style],
    *,
    reverse: bool = False,
) -> Panel:
    end = _reach(duels) if duels else 1.0
    ends = (end, -end) if reverse else (-end, end)
    return Panel(
        title,
        xlabel,
        "",
        [_mark(duel, rows.index(duel.ours), styles[duel.ours], ends) for duel in duels],
        rows=rows,
        xrange=ends,
        layout={"height": 110 + 26 * len(rows), "xaxis": {"nticks": 5, "tickformat": "+~g"}},
    )


def _reach(duels: Sequence[Duel]) -> float:
    # how much of the axis is drawn on both sides of zero: one recipe far off must not hide the others
    ends = [max(map(abs, _noise(duel))) for duel in duels]
    return 1.05 * (min(max(ends), _OUTER * median(ends)) or 1.0)


def _noise(duel: Duel) -> Interval:
    return duel.interval or (duel.difference, duel.difference)


def _told(duel: Duel) -> str:
    noise = f" ({formats.interval(duel.interval, sign=True)})" if duel.interval else ""
    return f"{formats.difference(duel.difference)}{noise}"


def _mark(duel: Duel, row: int, style: Style, ends: tuple[float, float]) -> Series:
    x, (low, high) = duel.difference, _noise(duel)
    left, right = ends
    if abs(x) > abs(right):
        beyond = right if x * right > 0 else left
        x = low = high = 0.98 * beyond
        style = replace(style, marker="triangle-right" if beyond == right else "triangle-left")
    if duel.outcome not in ("win", "loss"):
        style = style.hollow()
    return Series(
        duel.ours, [x], [row], [low], [high], style="points", bars="x", look=style, hover=_told(duel)
    )
