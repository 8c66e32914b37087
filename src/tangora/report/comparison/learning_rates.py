"""Dependence of each recipe on its learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Panel, Series, Style, decades, recipe_styles
from tangora.report.layout import Section
from tangora.report.report_table import Table, cell, number
from tangora.report.run_records import Record
from tangora.report.statistics.judgement import BASELINE, CEILING, Judgement, Row
from tangora.report.statistics.selection import SweepPoint, sweep_points

_MAX_TICKS = 9
_Stability = Literal["finished", "diverged", "not tried"]

_TOLERANCE = 0.02  # how much worse than the best, relative to it, still counts as as good
_NEAR = 1.3  # factor within which a learning rate that was tried stands for one that was not
_TEST_FACTOR = 3.0
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Robustness:
    """Robustness of a recipe to its learning rate, by the validation metric of the sweep.

    "Within 2 %" is relative to the best value of the recipe's own sweep: with a best loss of 0.50 up to 0.51, with a
    best accuracy of 0.90 down to 0.882 (1.8 percentage points).
    """

    recipe: str
    learning_rate: float
    low: float
    """Smallest learning rate of the unbroken range around the best within 2 % of it and without divergence."""
    high: float
    open_low: bool
    """Whether the range ends only because no smaller learning rate was tried."""
    open_high: bool
    full_rate: float | None
    """The rate tried that is nearest to full fine-tuning's best, if within a factor of 1.3."""
    full_carries_over: bool | None
    """Whether it is within 2 % of the best; None if none so near was tried, and for full fine-tuning."""
    tripled_rate: float | None
    """The rate tried that is nearest to 3 times the best, if within a factor of 1.3."""
    tripled: _Stability
    """Stability there: all runs finished, or some diverged."""
    tripled_value: float | None
    """Validation metric there, mean over the runs that finished."""

    @property
    def width(self) -> float:
        """The factor between the largest and the smallest learning rate of the range; 1 for the best alone."""
        return self.high / self.low

    @property
    def single(self) -> bool:
        """Whether no other learning rate was tried, so that nothing is known of a range."""
        return self.open_low and self.open_high and self.width == 1


def robustness(judged: Judgement) -> dict[str, Robustness]:
    """Measure how much each recipe depends on its learning rate."""
    full_rate = next((row.learning_rate for row in judged.rows if row.recipe == CEILING), None)
    return {
        row.recipe: _robustness(row, judged.recorded[row.recipe], full_rate)
        for row in judged.rows
        if row.learning_rate is not None
    }


def _robustness(row: Row, records: Sequence[Record], full_rate: float | None) -> Robustness:
    best = row.learning_rate
    assert best is not None
    # Learning rates whose runs all failed for reasons of their own say nothing.
    points = [p for p in sweep_points(records, row.metric) if p.mean is not None or p.num_diverged]
    good = _good(points, best, higher_is_better=row.higher_is_better)
    rates = _rates(points)
    first = last = rates.index(best)
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(points) - 1 and good[last + 1]:
        last += 1
    carried = None if row.recipe == CEILING or full_rate is None else _nearest(rates, full_rate)
    tripled_rate, tripled = _at_triple(records, best)
    return Robustness(
        recipe=row.recipe,
        learning_rate=best,
        low=points[first].learning_rate,
        high=points[last].learning_rate,
        open_low=first == 0,
        open_high=last == len(points) - 1,
        full_rate=carried,
        full_carries_over=None if carried is None else good[rates.index(carried)],
        tripled_rate=tripled_rate,
        tripled=tripled,
        tripled_value=next((point.mean for point in points if point.learning_rate == tripled_rate), None),
    )


def _good(points: Sequence[SweepPoint], best: float, *, higher_is_better: bool) -> list[bool]:
    sign = 1.0 if higher_is_better else -1.0
    top = next(
        sign * point.mean for point in points if point.learning_rate == best and point.mean is not None
    )
    worst = top - _TOLERANCE * abs(top) * (1 + _ROUNDING)
    # The best itself is good even where every learning rate diverged for some seed.
    return [
        point.learning_rate == best
        or (point.mean is not None and sign * point.mean >= worst and not point.num_diverged)
        for point in points
    ]


def _nearest(rates: Sequence[float], wanted: float) -> float | None:
    nearest = min(rates, key=lambda rate: abs(math.log(rate / wanted)), default=None)
    near = nearest is not None and abs(math.log(nearest / wanted)) <= math.log(_NEAR) * (1 + _ROUNDING)
    return nearest if near else None


def _at_triple(records: Sequence[Record], best: float) -> tuple[float | None, _Stability]:
    # Shorter trials that finished say nothing about a whole run; one that diverged does.
    telling = [
        r for r in records if r.status == "diverged" or (r.status == "finished" and r.stage != "trial")
    ]
    rate = _nearest([r.learning_rate for r in telling], _TEST_FACTOR * best)
    if rate is None:
        return None, "not tried"
    diverged = any(r.status == "diverged" for r in telling if r.learning_rate == rate)
    return rate, "diverged" if diverged else "finished"


def sweep_section(judged: Judgement) -> Section | None:
    """Show how each recipe depends on its learning rate."""
    if not any(row.num_learning_rates > 1 for row in judged.rows):
        return None
    comparison, found = judged.comparison, robustness(judged)
    best = "highest" if comparison.higher_is_better else "lowest"
    chosen = [f"{name} {formats.learning_rate(item.learning_rate)}" for name, item in found.items()]
    panel = sweep_panel(judged)
    chart = panel_chart(
        "sweep",
        panel,
        f"{_plotted(judged)} A ring marks the chosen learning rate ({best} mean); an x marks runs that diverged, "
        "which have no value and are drawn at the worst one.",
        f"Chosen: {formats.listing(chosen)}" if chosen else "",
    )
    if not found:
        return Section("sweep-title", panel.title, charts=[chart], keyed=True)
    table = Table.of(
        "robustness",
        "Sensitivity to the learning rate.",
        found.values(),
        {
            "recipe": lambda item: item.recipe,
            "best rate": lambda item: number(item.learning_rate, formats.learning_rate),
            "rates within 2 %": lambda item: cell(_good_rates(item), value=item.low),
            "largest / smallest": lambda item: cell(
                formats.MISSING if item.width == 1 else _width(item), value=item.width
            ),
            f"at {CEILING}'s best rate": lambda item: cell(
                {True: "within 2 %", False: "worse", None: formats.MISSING}[item.full_carries_over],
                formats.learning_rate(item.full_rate),
                value=item.full_rate,
            ),
            "at 3 times its best": lambda item: cell(
                {"finished": "no divergence"}.get(item.tripled, item.tripled),
                formats.learning_rate(item.tripled_rate),
                _value_there(item, comparison.metric),
                value=item.tripled_rate or "",
            ),
        },
    )
    notes = [
        (
            "Rates within 2 %: the learning rates around the best, without a gap and without divergence, whose "
            f"validation {comparison.metric} is at most 2 % (relative) worse than the best. “Or more”, "
            "“or less”: no further rate was tried in that direction."
        ),
        (
            f"The last two columns show the tried rate that is nearest to {CEILING}'s best rate and to 3 times the "
            "recipe's own, within a factor of 1.3: whether its result is within 2 % of the recipe's best, and whether "
            f"training diverged, with the validation {comparison.metric} that it reached."
        ),
    ]
    return Section("sweep-title", panel.title, rate_verdict(found), table, notes, [chart], keyed=True)


def _plotted(judged: Judgement) -> str:
    metric = judged.comparison.metric
    if any(len(p.validation) > 1 for found in judged.recorded.values() for p in sweep_points(found, metric)):
        return f"Mean validation {metric} over the seeds, with bars from the smallest to the largest."
    return f"Validation {metric}, of one seed."


def _value_there(item: Robustness, metric: str) -> str:
    return formats.MISSING if item.tripled_value is None else f"{metric} {formats.metric(item.tripled_value)}"


def sweep_panel(judged: Judgement, xlabel: str = "learning rate") -> Panel:
    """Draw the validation metric against the learning rate."""
    comparison, rows, styles = judged.comparison, judged.rows, recipe_styles(judged.recorded)
    points = {row.recipe: sweep_points(judged.recorded[row.recipe], row.metric) for row in rows}
    # the height at which diverged runs are marked, since they have none of their own
    values = [value for found in points.values() for point in found for value in point.validation]
    worst = (min if comparison.higher_is_better else max)(values, default=0.0)
    series = [
        drawn
        for row in rows
        for drawn in _sweep(row.recipe, points[row.recipe], row.learning_rate, worst, styles[row.recipe])
    ]
    drawn = {p.learning_rate for found in points.values() for p in found if p.validation or p.num_diverged}
    ticks = {rate: formats.learning_rate(rate) for rate in rate_ticks(sorted(drawn))}
    return Panel(
        "Learning-rate sweep",
        xlabel,
        f"validation {comparison.metric}",
        series,
        xscale="log",
        xticks=ticks,
        layout={"height": 440},
    )


def _sweep(
    recipe: str, points: Sequence[SweepPoint], chosen: float | None, worst: float, look: Style
) -> list[Series]:
    finished = [point for point in points if point.validation]
    ring = [point for point in finished if point.learning_rate == chosen]
    diverged = [point for point in points if point.num_diverged]
    hover = "learning rate %{x}"
    curve = Series(
        recipe,
        _rates(finished),
        [point.mean for point in finished],
        [min(point.validation) for point in finished],
        [max(point.validation) for point in finished],
        bars="y",
        look=look,
        hover=f"{hover}: %{{y:.4f}}<br>%{{customdata}}",
        data=[_told(point) for point in finished],
    )
    rings = Series(recipe, _rates(ring), [point.mean for point in ring], style="rings", look=look)
    crosses = Series(
        recipe,
        _rates(diverged),
        [worst] * len(diverged),
        style="crosses",
        look=look,
        hover=f"{hover}<br>%{{customdata}}",
        data=[_told(point) for point in diverged],
    )
    return [curve, *(marks for marks in (rings, crosses) if marks.x)]


def _rates(points: Sequence[SweepPoint]) -> list[float]:
    return [point.learning_rate for point in points]


def _told(point: SweepPoint) -> str:
    parts = [formats.plural(len(point.validation), "finished run")]
    if point.num_diverged:
        parts.append(f"{point.num_diverged} diverged")
    if point.num_failed:
        parts.append(f"{point.num_failed} failed")
    return ", ".join(parts)


def rate_ticks(rates: Sequence[float]) -> list[float]:
    """Choose the learning rates to write below the sweep."""
    return list(rates) if len(rates) <= _MAX_TICKS else decades(rates[0], rates[-1])


def _good_rates(item: Robustness) -> str:
    low, high = formats.learning_rate(item.low), formats.learning_rate(item.high)
    if item.single:
        return f"{low}, the only rate tried"
    if item.width == 1:
        return f"{low}{' or less' if item.open_low else ' or more' if item.open_high else ' only'}"
    return f"{low}{' or less' if item.open_low else ''} to {high}{' or more' if item.open_high else ''}"


def rate_verdict(found: Mapping[str, Robustness]) -> list[str]:
    """Say how much the recipes depend on their learning rates."""
    items = list(found.values())
    return formats.sentences(_widths(items), _carried(items), _tripled(items))


def _widths(found: Sequence[Robustness]) -> str | None:
    # A range that ends with the grid may go on: it is a lower bound, and said to be one.
    swept = [item for item in found if not item.single]
    if not swept:
        return None
    widest = max(swept, key=lambda item: item.width)
    if widest.width == 1:
        return "No recipe is within 2 % of its best result at any other learning rate that was tried."
    lora = next((item for item in swept if item.recipe == BASELINE and item is not widest), None)
    text = (
        f"{widest.recipe} has the widest range of learning rates within 2 % of its best result: the largest is "
        f"{_width(widest)} times the smallest"
    )
    if lora is None:
        return f"{text}."
    if lora.width == 1:
        return f"{text}. {BASELINE} has no second learning rate within 2 % of its best result."
    return f"{text}; for {BASELINE} {_width(lora)} times."


def _width(item: Robustness) -> str:
    return f"{'at least ' if item.open_low or item.open_high else ''}{item.width:.3g}"


def _carried(found: Sequence[Robustness]) -> str | None:
    near, far = ([item.recipe for item in found if item.full_carries_over is each] for each in (True, False))
    if not near and not far:
        return None
    own = f"within 2 % of {'its' if len(near or far) == 1 else 'their'} own best result"
    parts = [f"{_are(near)} {own}"] if near else []
    parts += [f"{_are(far)} not"] if near and far else [f"{_are(far)} not {own}"] if far else []
    return f"At the best learning rate of {CEILING}, {' and '.join(parts)}."


def _are(names: Sequence[str]) -> str:
    return f"{formats.listing(names)} {'is' if len(names) == 1 else 'are'}" if names else ""


def _tripled(found: Sequence[Robustness]) -> str | None:
    diverged = [item.recipe for item in found if item.tripled == "diverged"]
    tried = sum(item.tripled != "not tried" for item in found)
    if not tried:
        return None
    who = formats.listing(diverged) if diverged else "no recipe"
    verb = "diverge" if len(diverged) > 1 else "diverges"
    return f"At about 3 times its own best learning rate, {who} {verb} ({formats.plural(tried, 'recipe')} tried there)."
