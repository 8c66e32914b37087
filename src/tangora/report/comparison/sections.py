"""The parts of a comparison's page: what each says, its table and its figures."""

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np

from tangora.report import formats
from tangora.report.comparison.alignment import last_values
from tangora.report.comparison.curves import evaluation_curves, judged, loss_curves
from tangora.report.comparison.figures import (
    curves_figure,
    loss_figure,
    sweep_figure,
    time_figure,
    without_legend,
)
from tangora.report.comparison.flatness import flatness_figure, flatness_notes, flatness_table, has_flatness
from tangora.report.comparison.further import rate_verdict, speed_verdict
from tangora.report.comparison.pareto import COSTS, has_front, pareto_charts
from tangora.report.comparison.setup import busy_sentences
from tangora.report.comparison.tables import Column, columns
from tangora.report.layout import Cell, Chart, Grid, Section, cell, number_cell, plain
from tangora.report.records import Comparison, Forgetting
from tangora.report.statistics.intervals import estimate
from tangora.report.statistics.robustness import Robustness, robustness
from tangora.report.statistics.speed import Speed, speeds
from tangora.report.statistics.summary import BASELINE, CEILING, Row

_BAND = "the band reaches from the smallest to the largest seed"


def results_section(comparison: Comparison, rows: Sequence[Row]) -> Section:
    """Show how good each recipe is."""
    shown = [column for column in columns(comparison) if not column.cost]
    caption = "Each recipe at the learning rate that is best on validation data."
    grid = _grid("results", caption, shown, rows)
    return Section("results", "Results", grid=grid, notes=_notes(rows, comparison))


def _grid(name: str, caption: str, wanted: Sequence[Column], rows: Sequence[Row]) -> Grid:
    shown = [column for column in wanted if any(column.cell(row) != formats.MISSING for row in rows)]
    return Grid(
        name=name,
        caption=caption,
        headers=[column.header for column in shown if not column.beneath],
        rows=[_cells(shown, row) for row in rows],
    )


def _cells(shown: Sequence[Column], row: Row) -> list[Cell]:
    cells: list[Cell] = []
    for column in shown:
        text = column.cell(row)
        if not column.beneath:
            cells.append(Cell([text], column.value(row)))
        elif text != formats.MISSING:
            cells[-1] = Cell([*cells[-1].lines, text], cells[-1].value)
    return cells


def _notes(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    resampled = sorted({row.interval_over for row in rows if row.interval_over})
    direction = "Higher" if comparison.higher_is_better else "Lower"
    notes = [
        f"{direction} {comparison.metric} is better. Learning rates are chosen on validation data, never on test.",
        (
            "Beneath a number: its 95 % interval, and the p-value of no difference. ↑ ↓ beside a learning rate: it "
            f"lies at the high or low end of its grid. vs {BASELINE}, vs {CEILING}: difference in test "
            f"{comparison.metric}. Gap closed: the difference from {BASELINE} as a share of {CEILING} minus {BASELINE}."
        ),
        *(
            f"No share of the gap is given: {reason}."
            for reason in sorted({row.gap_closed_missing for row in rows if row.gap_closed_missing})
        ),
    ]
    if resampled:
        notes.append(
            f"Intervals are Student's t over {formats.listing(resampled)}, paired in differences where seeds agree; "
            "few seeds make them wide. Significant means p below 0.05 after Holm's correction for the number of "
            "recipes; with a single seed no difference is called significant."
        )
    return notes


def costs_section(comparison: Comparison, rows: Sequence[Row]) -> Section:
    """Show what each recipe costs, and what is bought with it."""
    recipe, *others = columns(comparison)
    grid = _grid(
        "costs",
        "Time and optimizer step: median over the seeds, beneath it the smallest and the largest. Memory: the largest.",
        [recipe, *(c for c in others if c.cost)],
        rows,
    )
    charts = pareto_charts(rows)
    dotted = (
        "Dotted: the recipes that no other one beats at the same or a lower cost. "
        if any(has_front(rows, cost) for cost in COSTS)
        else ""
    )
    notes = [f"{dotted}Bars: 95 % intervals."] if charts else []
    return Section(
        "costs",
        "Quality and cost",
        sentences=busy_sentences(comparison, rows),
        grid=grid,
        notes=notes,
        charts=charts,
        keyed=True,
    )


def time_section(rows: Sequence[Row]) -> Section:
    """Show where the time went."""
    totals = [f"{row.recipe} {formats.seconds(row.seconds)}" for row in rows if row.seconds is not None]
    chart = Chart(
        "time",
        "Where the time went",
        "Seconds per run at the best learning rate; of each part the median over the seeds.",
        plain(time_figure(rows)),
        f"Seconds per run: {formats.listing(totals)}" if totals else "",
    )
    return Section("time-title", chart.title, charts=[chart])


def curve_sections(comparison: Comparison, rows: Sequence[Row]) -> list[Section]:
    """Show how the runs went."""
    losses = loss_curves(comparison, rows)
    loss = Chart(
        "loss",
        "Training loss",
        f"Mean over the seeds at each recipe's best learning rate, lightly smoothed; {_BAND}. Point at a line for the "
        "raw value.",
        plain(without_legend(loss_figure(comparison, rows))),
        last_values(losses) if losses else "",
    )
    charts = []
    for metric in dict.fromkeys(("loss", comparison.metric)):
        if curves := evaluation_curves(comparison, rows, metric):
            figure = curves_figure(curves, rows, "", keyed=True)
            charts.append(Chart(f"evaluation-{len(charts)}", metric, "", plain(figure), last_values(curves)))
    sections = [Section("loss-title", loss.title, charts=[loss], keyed=True)] if losses else []
    if charts:
        notes = [f"Mean over the seeds at each recipe's best learning rate; {_BAND}."]
        sections.append(
            Section("evaluations", "Validation during training", charts=charts, notes=notes, keyed=True)
        )
    return sections


def sweep_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show how each recipe depends on its learning rate."""
    if not any(row.num_learning_rates > 1 for row in rows):
        return None
    best = "highest" if comparison.higher_is_better else "lowest"
    found = robustness(comparison, rows)
    chosen = [f"{name} {formats.learning_rate(item.learning_rate)}" for name, item in found.items()]
    chart = Chart(
        "sweep",
        "Learning-rate sweep",
        f"Mean validation {comparison.metric} over the seeds, with bars from the smallest to the largest. A "
        f"ring marks the chosen learning rate ({best} mean); a cross marks runs that diverged, which have no "
        "value and are drawn at the worst one.",
        plain(without_legend(sweep_figure(comparison, rows))),
        f"Chosen: {formats.listing(chosen)}" if chosen else "",
    )
    grid = Grid(
        name="robustness",
        caption="How much a recipe depends on its learning rate.",
        headers=[
            "recipe",
            "best rate",
            "rates within 2 %",
            "largest / smallest",
            f"at {CEILING}'s best rate",
            "at 3 times its best",
        ],
        rows=[_robustness_cells(item) for item in found.values()],
    )
    notes = [
        (
            "Rates within 2 %: the learning rates around the best, without a gap and without divergence, whose "
            f"validation {comparison.metric} is at most 2 % (relative) worse than the best. “Or more”, “or less”: the "
            "range ends because no further rate was tried."
        ),
        (
            f"The last two columns show the tried rate that is nearest to {CEILING}'s best rate and to 3 times the "
            "recipe's own, within a factor of 1.3: whether its result is within 2 % of the recipe's best, and whether "
            "training finished."
        ),
    ]
    return Section(
        "sweep-title",
        chart.title,
        sentences=rate_verdict(found),
        grid=grid if found else None,
        notes=notes if found else [],
        charts=[chart],
        keyed=True,
    )


def _robustness_cells(item: Robustness) -> list[Cell]:
    carries = {True: "within 2 %", False: "worse", None: formats.MISSING}[item.full_carries_over]
    bound = "at least " if item.open_low or item.open_high else ""
    width = formats.MISSING if item.width == 1 else f"{bound}{item.width:.3g}"
    return [
        cell(item.recipe, item.recipe),
        cell(formats.learning_rate(item.learning_rate), item.learning_rate),
        cell(_good_rates(item), item.low),
        cell(width, item.width),
        number_cell(item.full_rate, carries, formats.learning_rate(item.full_rate)),
        number_cell(item.tripled_rate, item.tripled, formats.learning_rate(item.tripled_rate)),
    ]


def _good_rates(item: Robustness) -> str:
    low, high = formats.learning_rate(item.low), formats.learning_rate(item.high)
    if item.single:
        return f"{low}, the only one tried"
    if item.width == 1:
        return f"{low}{' or less' if item.open_low else ' or more' if item.open_high else ' only'}"
    return f"{low}{' or less' if item.open_low else ''} to {high}{' or more' if item.open_high else ''}"


def speed_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show how soon each recipe trains as far as LoRA."""
    found = speeds(comparison, rows)
    if not found:
        return None
    lora = found[BASELINE]
    grid = Grid(
        name="speed",
        caption=f"Until {BASELINE}'s final {lora.quality}, {formats.metric(lora.target)}, is reached.",
        headers=["recipe", "optimizer steps", "time", f"time, {BASELINE} = 1", "seeds that reach it"],
        rows=[_speed_cells(item, lora) for item in found.values()],
    )
    notes = [
        (
            "Over the seeds that reach it, each recipe at its own best learning rate: mean of the steps, median of the "
            "times. Time: the initialization, and training steps at the run's average speed, without evaluations."
        ),
        f"Differences in this table have not been tested for significance. {_averaged(lora)}".strip(),
    ]
    return Section("speed", f"Speed to {BASELINE}'s quality", speed_verdict(found), grid, notes)


def _averaged(lora: Speed) -> str:
    if lora.window is None:
        return ""
    return f"Training losses are means over {formats.plural(lora.window, 'step')}."


def _speed_cells(item: Speed, lora: Speed) -> list[Cell]:
    steps = formats.MISSING if item.steps is None else f"{item.steps:.0f}"
    ratio = item.seconds / lora.seconds if item.seconds is not None and lora.seconds else None
    return [
        cell(item.recipe, item.recipe),
        cell(steps, item.steps),
        cell(formats.seconds(item.seconds), item.seconds),
        cell(formats.MISSING if ratio is None else f"{ratio:.2f}", ratio),
        cell(f"{item.num_reached} of {item.num_seeds}", item.num_reached),
    ]


def forgetting_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show what training did to unrelated text."""
    found = {
        recipe: [run.forgetting for run in runs if run.forgetting]
        for recipe, runs in judged(comparison, rows).items()
    }
    found = {recipe: items for recipe, items in found.items() if items}
    if not found:
        return None
    parts: dict[str, Callable[[Forgetting], float]] = {
        "loss before": lambda item: item.before,
        "loss after": lambda item: item.after,
        "rise": lambda item: item.rise,
    }
    grid = Grid(
        name="forgetting",
        caption="Loss per token, in nats, on text unrelated to the task.",
        headers=["recipe", *parts, "seeds"],
        rows=[
            [
                cell(recipe, recipe),
                *(_mean_cell([part(item) for item in items]) for part in parts.values()),
                cell(str(len(items)), len(items)),
            ]
            for recipe, items in found.items()
        ],
    )
    texts = sorted({formats.plural(item.num_texts, "text") for items in found.values() for item in items})
    notes = [
        f"Over {formats.listing(texts)}. Beneath a number: 95 % interval of the mean, Student's over the seeds."
    ]
    return Section("forgetting", "Forgetting", grid=grid, notes=notes)


def _mean_cell(values: Sequence[float]) -> Cell:
    mean = fmean(values)
    estimated = estimate(np.array(values)[:, None])
    return number_cell(
        mean, formats.metric(mean), formats.interval(estimated.interval if estimated else None)
    )


def flatness_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """Show how flat the loss is where the runs ended."""
    if not has_flatness(comparison):
        return None
    headers, lines = flatness_table(comparison, rows)
    grid = Grid(
        name="flatness",
        caption="How flat the loss is at the end of the runs behind the results, next to the generalisation gap.",
        headers=headers,
        rows=[[_text_cell(line) for line in cells] for cells in lines],
    )
    chart = Chart(
        "flatness-gap",
        "Flatness and generalisation gap",
        "Each run behind the results. Runs of one recipe differ only in their seeds; a trend over so few recipes "
        "proves no cause.",
        plain(without_legend(flatness_figure(comparison, rows))),
    )
    return Section(
        "flatness", "End points", grid=grid, notes=flatness_notes(comparison), charts=[chart], keyed=True
    )


def _text_cell(lines: Sequence[str]) -> Cell:
    first = lines[0].replace(formats.MINUS, "-")
    return Cell(lines, None if first == formats.MISSING else first)
