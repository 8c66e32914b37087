"""A measurement of curvature as one HTML page that needs no network and nothing beside it."""

from pathlib import Path

from tangora.report import formats
from tangora.report.curvature.figures import figures
from tangora.report.curvature.record import CurvatureRecord
from tangora.report.curvature.summary import FACTORS, findings
from tangora.report.curvature.tables import (
    batch_table,
    eigenvalue_table,
    layer_table,
    sharpness_table,
    space_table,
)
from tangora.report.drawing.charts import charts
from tangora.report.drawing.pictures import save_pictures
from tangora.report.files import write_atomic
from tangora.report.layout import flat, render
from tangora.report.subject import subject_facts

_TEMPLATE = "curvature.html.j2"
_SPACES = (
    "Tangent space: the directions in which the adapter can move the weights, in orthonormal coordinates. Its figures "
    "depend on the weights alone. Full weights: every entry of the chosen layers' matrices; the directions that full "
    "fine-tuning has, for every method."
)
_NUMBERS = (
    "λ max: the largest eigenvalue. Residual: the norm of H v − λ v; an eigenvalue lies that close. Lowest node: of "
    "the quadrature; the smallest eigenvalue is no larger. ± at a trace or norm: the standard error of its random "
    "probes, at best a rough one where there are few of them. ‖H‖: Frobenius norm. ‖g‖: the gradient's norm in the "
    "same coordinates. Products: with the matrix, over all examples."
)
_FINITE = "Products were made by finite differences of gradients: they carry their error."
_SHARPNESS = (
    "The largest rise of the loss that an ascent found within a ball of displacements: a lower bound of the largest "
    "there is. To second order: what gradient and Hessian alone say."
)


def write_curvature(record: CurvatureRecord, path: str | Path) -> Path:
    """Write the page of a measurement."""
    return write_atomic(path, render_curvature(record))


def save_curvature_pictures(record: CurvatureRecord, folder: str | Path) -> list[Path]:
    """Draw the figures of a measurement, and write each as PNG and as SVG."""
    return save_pictures(figures(record), folder, kinds=("png", "svg"))


def render_curvature(record: CurvatureRecord) -> str:
    """Make the page of a measurement; the same record gives the same text."""
    return render(
        _TEMPLATE,
        record.title,
        record=record,
        findings=findings(record),
        adapter=_adapter(record.ranks),
        loss=formats.metric(record.loss),
        examples=formats.plural(record.num_examples, f"{record.split} example"),
        spaces=space_table(record),
        notes=_notes(record),
        figures=[(figure, charts(figure)) for figure in figures(record)],
        tables=_tables(record),
        duration=formats.seconds(record.seconds),
        setup=subject_facts(record.settings, record.model_description),
        settings=flat(record.settings),
        versions=sorted(record.versions.items()),
    )


def _adapter(ranks: list[int]) -> str:
    if not ranks:
        return "no adapter"
    return f"adapter of rank {ranks[0]}" if len(ranks) == 1 else f"adapter of ranks {ranks[0]} to {ranks[-1]}"


def _notes(record: CurvatureRecord) -> list[str]:
    notes = [_SPACES, _NUMBERS]
    if record.of("factors") is not None:
        notes.append(FACTORS)
    if record.differentiation != "exact":
        notes.append(_FINITE)
    return notes


def _tables(record: CurvatureRecord) -> list[tuple[str, str, str, tuple[list[str], list[list[str]]]]]:
    # name, title, caption, headers and rows; without those that are empty
    found = [
        ("eigenvalue-numbers", "All eigenvalues", "In descending order.", eigenvalue_table(record)),
        ("sharpness", "Sharpness in a ball", _SHARPNESS, sharpness_table(record)),
        (
            "layer-numbers",
            "All layers",
            "Each layer's part in the eigenvector of the largest eigenvalue, and its own block of the Hessian.",
            layer_table(record),
        ),
        (
            "batch-numbers",
            "All mini-batches",
            "Curvature of each alone; beside the means the standard deviation over the batches.",
            batch_table(record),
        ),
    ]
    return [entry for entry in found if entry[3][1]]
