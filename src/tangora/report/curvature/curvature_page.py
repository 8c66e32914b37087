"""A measurement of curvature as one page, as tables for a terminal, and as pictures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.table import Table as RichTable

from tangora.curvature import Eigenvalue, LayerCurvature
from tangora.report import formats
from tangora.report.curvature.curvature_figures import figures
from tangora.report.curvature.curvature_findings import (
    FACTORS,
    SPACE_NAMES,
    curvature_sentences,
    estimated_text,
    spectrum_name,
    with_error,
)
from tangora.report.curvature.record import CurvatureRecord, in_order
from tangora.report.drawing.charts import figure_section
from tangora.report.drawing.pictures import save_pictures
from tangora.report.layout import Section, render, repeat, subject_facts
from tangora.report.record_files import write_atomic
from tangora.report.report_table import Table

_MAX_LAYERS = 8
_NARROW = ("over", "directions", "λ max", "residual", "trace", "‖H‖", "products")
"""Columns of the table of spaces that 80 characters have room for."""
_SHARPNESS = (
    "The largest rise of the loss that an ascent found within a ball of displacements: a lower bound of the largest "
    "there is. To second order: what gradient and Hessian alone say."
)
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
        "Sharpness in a ball": _sharpness_table(record),
        "All layers": layer_curvature_table(record),
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
        curvature_sentences(record),
        [
            Section("spaces", "Spaces", table=space_table(record), notes=_notes(record)),
            *map(figure_section, figures(record)),
            *(Section(table.name, title, table=table) for title, table in tables.items() if table.rows),
        ],
        repeat(record, note),
        look="measured wide-panels",
        setup=subject_facts(record),
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


def space_table(record: CurvatureRecord) -> Table:
    """Make the table of spaces: the gauge-free ones first, the factors last."""
    return Table.of(
        "spaces",
        "Curvature over each space of directions.",
        in_order(record.spectra),
        {
            "over": spectrum_name,
            "directions": lambda one: formats.count(one.size),
            "λ max": lambda one: formats.significant(one.largest),
            "residual": lambda one: _residual(one.eigenvalues[0]),
            "lowest node": lambda one: formats.significant(one.lowest_node),
            "trace": lambda one: estimated_text(one.trace),
            "‖H‖": lambda one: estimated_text(one.frobenius_norm),
            "‖g‖": lambda one: formats.significant(one.gradient_norm),
            "products": lambda one: str(one.products),
        },
        sortable=False,
    )


def _residual(found: Eigenvalue) -> str:
    return f"{found.residual:.1g}"


def eigenvalue_table(record: CurvatureRecord) -> Table:
    """Make the table of the largest eigenvalues."""
    spectra = in_order(record.spectra)
    headers = ["number", *(text for one in spectra for text in (spectrum_name(one), "residual"))]
    rows = []
    for index in range(max(len(spectrum.eigenvalues) for spectrum in spectra)):
        row = [str(index + 1)]
        for one in spectra:
            if index < len(one.eigenvalues):
                found = one.eigenvalues[index]
                row += [formats.significant(found.value), _residual(found)]
            else:
                row += [formats.MISSING, formats.MISSING]
        rows.append(row)
    return Table.texts("eigenvalue-numbers", "In descending order.", headers, rows, sortable=False)


def layer_curvature_table(record: CurvatureRecord) -> Table:
    """Make the table of layers."""
    total = sum(layer.trace.value for layer in record.layers)
    columns: dict[str, Callable[[LayerCurvature], str]] = {
        "layer": lambda layer: layer.name,
        "directions": lambda layer: formats.count(layer.size),
        "of the top eigenvector": lambda layer: formats.small_share(layer.eigenvector_share),
        "trace": lambda layer: estimated_text(layer.trace),
        "of the trace": lambda layer: formats.share(layer.trace.value / total if total > 0 else None),
    }
    if any(layer.largest is not None for layer in record.layers):
        columns["λ max"] = lambda layer: formats.significant(layer.largest and layer.largest.value)
        columns["residual"] = lambda layer: "" if layer.largest is None else _residual(layer.largest)
    caption = (
        "Each layer's part in the eigenvector of the largest eigenvalue, and its own block of the Hessian."
    )
    return Table.of("layer-numbers", caption, record.layers, columns, sortable=False)


def batch_table(record: CurvatureRecord) -> Table:
    """Make the table of mini-batches, and of what they scatter."""
    noise, rows = record.batch_noise, []
    if noise is not None:
        rows = [
            [
                str(number),
                formats.small_share(one.weight),
                formats.significant(one.largest.value),
                _residual(one.largest),
                estimated_text(one.trace),
                formats.significant(one.directional),
            ]
            for number, one in enumerate(noise.batches, start=1)
        ]
        largest, trace = (with_error(one.mean, one.deviation) for one in (noise.largest, noise.trace))
        rows.append(["mean", "", largest, "", trace, formats.significant(noise.batch_sharpness)])
    return Table.texts(
        "batch-numbers",
        "Curvature of each alone; beside the means the standard deviation over the batches.",
        ["batch", "weight", "λ max", "residual", "trace", "along its gradient"],
        rows,
        sortable=False,
    )


def _sharpness_table(record: CurvatureRecord) -> Table:
    return Table.of(
        "sharpness",
        _SHARPNESS,
        record.sharpness,
        {
            "over": lambda one: SPACE_NAMES[one.space],
            "radius": lambda one: formats.significant(one.radius),
            "loss": lambda one: formats.metric(one.loss),
            "largest rise found": lambda one: formats.significant(one.rise),
            "to second order": lambda one: formats.significant(one.second_order),
        },
        sortable=False,
    )


def curvature_tables(record: CurvatureRecord) -> list[RichTable]:
    """Make the tables for a terminal."""
    layers, table = record.layers, layer_curvature_table(record)
    top = sorted(range(len(layers)), key=lambda index: -layers[index].eigenvector_share)[:_MAX_LAYERS]
    found = {
        "Curvature of the loss": space_table(record).only(dict(zip(_NARROW, _NARROW, strict=True))),
        "Largest eigenvalues": eigenvalue_table(record),
        f"Where the top eigenvector lies, of {len(layers)} layers": replace(
            table, rows=[table.rows[index] for index in top]
        ),
        "Mini-batches": batch_table(record),
        "Sharpness in a ball": _sharpness_table(record),
    }
    return [table.rich(title) for title, table in found.items() if table.rows]
