"""What was measured on the way of the runs: alignment with the gradient and with full fine-tuning, and curvature."""

from collections.abc import Sequence

from tangora.report import formats
from tangora.report.comparison.curves import LossCurve, curves_of, judged
from tangora.report.comparison.figures import curves_figure
from tangora.report.layout import Chart, Section, plain
from tangora.report.records import Comparison
from tangora.report.statistics.summary import Row

_ALIGNMENT = {
    "captured_energy": "share of the gradient’s energy that the adapter can follow",
    "cosine": "cosine with full fine-tuning’s change",
    "relative_distance": "distance to full fine-tuning, relative to its change",
    "mean_left_angle": "mean angle of B to the gradient’s left singular vectors, °",
    "mean_right_angle": "mean angle of A to the gradient’s right singular vectors, °",
    "effective_rank": "effective rank of the change",
    "relative_imbalance": "imbalance of A and B",
}
_CURVATURE = {
    "weights_top_eigenvalue": "largest eigenvalue over the weights",
    "tangent_top_eigenvalue": "largest eigenvalue in the tangent space",
    "weights_trace": "trace over the weights",
    "tangent_trace": "trace in the tangent space",
}
_BAND = "Mean over the seeds at each recipe's best learning rate; the band reaches from the smallest to the largest."


def measured_sections(comparison: Comparison, rows: Sequence[Row]) -> list[Section]:
    """Draw what was measured on the way."""
    runs = {
        recipe: measured
        for recipe, records in judged(comparison, rows).items()
        if (measured := [run for run in records if run.trajectory or run.curvature])
    }
    sections = []
    for name, title, wanted in (
        ("alignment", "Alignment over time", _ALIGNMENT),
        ("curvature", "Curvature over time", _CURVATURE),
    ):
        charts = []
        for key, quantity in wanted.items():
            curves = curves_of(
                runs,
                lambda run, key=key: {
                    int(point["step"]): point[key] for point in run.trajectory + run.curvature if key in point
                },
            )
            if curves:
                figure = curves_figure(curves, rows, "", keyed=True)
                charts.append(
                    Chart(
                        f"{name}-{key}",
                        quantity[0].upper() + quantity[1:],
                        "",
                        plain(figure),
                        last_values(curves),
                    )
                )
        if charts:
            sections.append(Section(name, title, charts=charts, notes=[_BAND], keyed=True))
    return sections


def last_values(curves: Sequence[LossCurve]) -> str:
    """Say where curves end."""
    ends = [f"{curve.recipe} {formats.significant(float(curve.smooth[-1]))}" for curve in curves]
    return f"At the end: {formats.listing(ends)}"
