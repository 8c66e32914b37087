"""Gradient and curvature through training: small multiples, a table, a picture and a CSV file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from tangora.report import formats
from tangora.report.drawing.charts import panel_chart
from tangora.report.drawing.panels import Figure, Panel, Scale, Series, Style, recipe_styles
from tangora.report.drawing.pictures import save_pictures
from tangora.report.layout import Section
from tangora.report.report_table import Cell, Table, cell, csv_text
from tangora.report.run_records import Record
from tangora.report.statistics.judgement import Judgement

_CSV = "through-training.csv"
_COLUMNS, _PANEL_SIZE = 4, (3.3, 2.7)
_THIN = 0.8


@dataclass(frozen=True)
class _Quantity:
    """One of the small multiples."""

    title: str
    meaning: str
    scale: Scale = "linear"
    pictured: bool = True
    """Whether the picture shows it, too."""
    tabled: bool = True


_QUANTITIES = {
    "gradient_loss": _Quantity("Training loss", "On the examples used for the gradient.", tabled=False),
    "gradient_norm": _Quantity(
        "Gradient norm",
        "‖G‖ of all adapted layers together; G is the gradient of the whole weight, with every method.",
        "log",
    ),
    "gradient_norm_mean": _Quantity(
        "Gradient norm of a layer", "‖G‖ of one layer.", "log", pictured=False, tabled=False
    ),
    "gradient_effective_rank": _Quantity(
        "Effective rank", "Of G: exponential of the entropy of its singular values."
    ),
    "gradient_stable_rank": _Quantity("Stable rank", "Of G: ‖G‖² (Frobenius) over ‖G‖² (spectral)."),
    "captured_energy": _Quantity(
        "Captured energy κ",
        "Share of ‖G‖² in the tangent space: the gradient energy captured. Full fine-tuning uses all of it.",
    ),
    "reachable_energy": _Quantity(
        "Reachable energy",
        "Most that any adapter of the rank r could capture here: the share of the 2r leading singular values.",
        pictured=False,
    ),
    "gradient_norm_A": _Quantity(
        "Gradient norm of A", "It changes with the gauge (BR, R⁻¹A).", "log", pictured=False, tabled=False
    ),
    "gradient_norm_B": _Quantity(
        "Gradient norm of B", "It changes with the gauge (BR, R⁻¹A).", "log", pictured=False, tabled=False
    ),
    "weights_top_eigenvalue": _Quantity(
        "λ max over the weights", "Of the Hessian over all entries of the adapted layers’ weights.", "log"
    ),
    "weights_trace": _Quantity("Trace over the weights", "Of the same Hessian; an estimate."),
    "tangent_top_eigenvalue": _Quantity(
        "λ max in the tangent space", "Over the adapter's tangent space.", "log"
    ),
    "tangent_trace": _Quantity(
        "Trace in the tangent space", "Of the same Hessian; an estimate.", pictured=False
    ),
}

_NOTES = (
    (
        "Bold: mean over the seeds at each recipe’s best learning rate; thin: single seeds; band: from the 10th to the "
        "90th percentile of the layers. Norms and energies are those of all adapted layers together, ranks means over "
        "the layers."
    ),
    (
        "G is computed on examples drawn once per seed, in evaluation mode, and the Hessian on the "
        "first training examples: neither is that of a training batch."
    ),
)


def measured_points(run: Record) -> dict[int, dict[str, float]]:
    """Return all that was measured of a run on its way, by step and name.

    What both kinds of points measure, each on examples of its own, is taken from the trajectory where that has it.
    """
    found = {int(point["step"]): dict(point) for point in run.trajectory}
    known = {key for point in run.trajectory for key in point}
    for point in run.curvature:
        values = {"gradient_loss" if key == "loss" else key: value for key, value in point.items()}
        own = found.setdefault(int(point["step"]), {"step": point["step"]})
        own |= {key: value for key, value in values.items() if key not in known}
    return dict(sorted(found.items()))


def through_training_csv(judged: Judgement) -> str:
    """Write the measured points of the runs behind the results, one line each; empty if there are none."""
    lines = [
        {"recipe": recipe, "learning_rate": run.learning_rate, "seed": run.seed} | point | {"step": step}
        for recipe, runs in judged.runs.items()
        for run in runs
        for step, point in measured_points(run).items()
    ]
    return csv_text(lines) if lines else ""


def through_training_section(judged: Judgement, name: str = "through-training") -> Section | None:
    """Show how gradient and curvature changed; None if neither was measured."""
    panels = _panels(judged, name=name)
    if not panels:
        return None
    charts = [
        panel_chart(f"{name}-{key}", panel, _QUANTITIES[key].meaning, _last_values(panel))
        for key, panel in panels.items()
    ]
    return Section(
        name,
        "Gradient and curvature during training",
        table=_table(judged, name),
        charts=charts,
        keyed=True,
        notes=_NOTES,
        downloads={_CSV: through_training_csv(judged)},
    )


def save_through_training(judgements: Mapping[str, Judgement], path: str | Path) -> Path | None:
    """Draw the small multiples of one comparison, or of several by task, as PNG; None if nothing was measured."""
    path, panels = Path(path), []
    for task, judged in judgements.items():
        own = [panel for key, panel in _panels(judged).items() if _QUANTITIES[key].pictured]
        if len(judgements) > 1:
            own = [replace(panel, title=f"{task}: {panel.title.lower()}") for panel in own]
        panels += own
    if not panels:
        return None
    figure = Figure(path.stem, "", "", panels, columns=_COLUMNS)
    return save_pictures([figure], path.parent, size=_PANEL_SIZE)[0]


def _panels(judged: Judgement, name: str = "") -> dict[str, Panel]:
    looks = recipe_styles(judged.recorded)
    found = {}
    for key, quantity in _QUANTITIES.items():
        series = [
            drawn
            for recipe, runs in judged.runs.items()
            for drawn in _series(recipe, _points(runs, key), looks[recipe])
        ]
        if series:
            layout = {"height": 280} if name else {}
            found[key] = Panel(
                quantity.title,
                "optimizer step",
                "",
                series,
                yscale=quantity.scale,
                xwhole=True,
                layout=layout,
            )
    return found


def _points(runs: Sequence[Record], key: str) -> list[dict[int, dict[str, float]]]:
    # of each seed, what it measured of one quantity: its value, and the edges of its band
    names = {"y": key, "low": f"{key.removesuffix('_mean')}_low", "high": f"{key.removesuffix('_mean')}_high"}
    if key == "gradient_norm":  # no layer's norm is near that of all together
        del names["low"], names["high"]
    measured = [
        {
            step: {name: point[field] for name, field in names.items() if field in point}
            for step, point in measured_points(run).items()
            if key in point
        }
        for run in runs
    ]
    return [points for points in measured if points]


def _series(recipe: str, seeds: Sequence[Mapping[int, Mapping[str, float]]], look: Style) -> list[Series]:
    # thin lines first, so that the mean lies above them
    if not seeds:
        return []
    thin = [
        Series(
            recipe,
            list(points),
            [each["y"] for each in points.values()],
            style="smooth",
            look=look.thin(_THIN),
        )
        for points in seeds
    ]
    # only steps that every seed has: a mean over changing seeds would jump
    steps = [step for step in seeds[0] if all(step in points for points in seeds)]

    def mean(name: str) -> list[float] | None:
        values = [[points[step].get(name) for points in seeds] for step in steps]
        return [fmean(each) for each in values] if all(None not in each for each in values) else None  # pyright: ignore[reportArgumentType]

    bold = Series(
        recipe,
        steps,
        mean("y"),
        mean("low"),
        mean("high"),
        style="smooth",
        look=look,
        hover="step %{x}: %{y:.4g}",
    )
    return [*(thin if len(seeds) > 1 else []), *([bold] if steps else [])]


def _table(judged: Judgement, name: str) -> Table:
    columns: dict[str, Callable[[str], Cell | str]] = {"recipe": str}
    for key, quantity in _QUANTITIES.items():
        if quantity.tabled:
            columns[quantity.title] = partial(_way, judged, key)
    caption = "First → last value, means over the seeds; below, the extremes during training."
    return Table.of(name, caption, judged.runs, columns).filled()


def _way(judged: Judgement, key: str, recipe: str) -> Cell:
    bold = [*_series(recipe, _points(judged.runs[recipe], key), Style("", "", ""))][-1:]
    if not bold:
        return cell(formats.MISSING)
    values = dict(zip(bold[0].x, bold[0].y, strict=True))
    lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    first, *_, last = [*values, *values]
    return cell(
        f"{formats.significant(values[first])} → {formats.significant(values[last])}",
        *(
            f"{formats.significant(values[step])} at step {step}"
            for step in dict.fromkeys((lowest, highest))
            if step not in (first, last)
        ),
        value=values[last],
    )


def _last_values(panel: Panel) -> str:
    ends = {series.name: series.y[-1] for series in panel.series}  # the last of a name is the mean
    return f"At the end: {formats.listing(f'{name} {formats.significant(value)}' for name, value in ends.items())}"
