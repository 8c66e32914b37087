"""A measurement of curvature as one HTML page that needs no network and nothing beside it."""

from pathlib import Path

from tangora.report import formats
from tangora.report.curvature.curvature_figures import figures
from tangora.report.curvature.curvature_findings import FACTORS, findings
from tangora.report.curvature.curvature_tables import (
    batch_table,
    eigenvalue_table,
    layer_table,
    sharpness_table,
    space_table,
)
from tangora.report.curvature.record import CurvatureRecord
from tangora.report.drawing.charts import figure_section
from tangora.report.drawing.pictures import save_pictures
from tangora.report.files import write_atomic
from tangora.report.layout import Section, render, repeat, subject_facts

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


def write_curvature(record: CurvatureRecord, path: str | Path) -> Path:
    """Write the page of a measurement."""
    return write_atomic(path, render_curvature(record))


def save_curvature_pictures(record: CurvatureRecord, folder: str | Path) -> list[Path]:
    """Draw the figures of a measurement, and write each as PNG and as SVG."""
    return save_pictures(figures(record), folder, kinds=("png", "svg"))


def render_curvature(record: CurvatureRecord) -> str:
    """Make the page of a measurement; the same record gives the same text."""
    tables = {
        "All eigenvalues": eigenvalue_table(record),
        "Sharpness in a ball": sharpness_table(record),
        "All layers": layer_table(record),
        "All mini-batches": batch_table(record),
    }
    note = f"Hessian products: {record.differentiation}, in {record.dtype}."
    examples = formats.plural(record.num_examples, f"{record.split} example")
    return render(
        record.title,
        [
            "tangora curvature",
            _adapter(record.ranks),
            f"loss {formats.metric(record.loss)} on {examples}",
            f"{record.products} products in {formats.seconds(record.seconds)}",
        ],
        record.created,
        findings(record),
        [
            Section("spaces", "Spaces", table=space_table(record), notes=_notes(record)),
            *map(figure_section, figures(record)),
            *(Section(table.name, title, table=table) for title, table in tables.items() if table.rows),
        ],
        repeat(record, record.command, record.settings, note),
        look="measured wide-panels",
        setup=subject_facts(record.settings, record.model_description),
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
