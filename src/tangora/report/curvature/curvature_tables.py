"""A measurement of curvature as tables: short ones for a terminal, full ones for the page."""

from collections.abc import Callable
from dataclasses import replace

from rich.table import Table as RichTable

from tangora.report import formats
from tangora.report.curvature.curvature_findings import (
    SPACE_NAMES,
    estimated_text,
    spectrum_name,
    with_error,
)
from tangora.report.curvature.record import CurvatureRecord, Eigenvalue, LayerCurvature, in_order
from tangora.report.table import Table, text_table

_MAX_LAYERS = 8
_NARROW = ("over", "directions", "λ max", "residual", "trace", "‖H‖", "products")
"""Columns of the table of spaces that 80 characters have room for."""
_SHARPNESS = (
    "The largest rise of the loss that an ascent found within a ball of displacements: a lower bound of the largest "
    "there is. To second order: what gradient and Hessian alone say."
)


def space_table(record: CurvatureRecord) -> Table:
    """Make the table of spaces: the gauge-free ones first, the factors last."""
    headers = ["over", "directions", "λ max", "residual", "lowest node", "trace", "‖H‖", "‖g‖", "products"]
    rows = [
        [
            spectrum_name(spectrum),
            formats.count(spectrum.size),
            *_with_residual(spectrum.eigenvalues[0]),
            formats.significant(spectrum.lowest_node),
            estimated_text(spectrum.trace),
            estimated_text(spectrum.frobenius_norm),
            formats.significant(spectrum.gradient_norm),
            str(spectrum.products),
        ]
        for spectrum in in_order(record.spectra)
    ]
    return text_table("spaces", "Curvature over each space of directions.", headers, rows)


def _with_residual(found: Eigenvalue) -> tuple[str, str]:
    return formats.significant(found.value), f"{found.residual:.1g}"


def eigenvalue_table(record: CurvatureRecord) -> Table:
    """Make the table of the largest eigenvalues."""
    spectra = in_order(record.spectra)
    headers = ["number", *(text for one in spectra for text in (spectrum_name(one), "residual"))]
    rows = [
        [
            str(index + 1),
            *(
                text
                for one in spectra
                for text in (
                    _with_residual(one.eigenvalues[index])
                    if index < len(one.eigenvalues)
                    else (formats.MISSING, formats.MISSING)
                )
            ),
        ]
        for index in range(max(len(spectrum.eigenvalues) for spectrum in spectra))
    ]
    return text_table("eigenvalue-numbers", "In descending order.", headers, rows)


def layer_table(record: CurvatureRecord) -> Table:
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
        columns["residual"] = lambda layer: "" if layer.largest is None else f"{layer.largest.residual:.1g}"
    return text_table(
        "layer-numbers",
        "Each layer's part in the eigenvector of the largest eigenvalue, and its own block of the Hessian.",
        list(columns),
        [[write(layer) for write in columns.values()] for layer in record.layers],
    )


def batch_table(record: CurvatureRecord) -> Table:
    """Make the table of mini-batches, and of what they scatter."""
    noise, rows = record.batch_noise, []
    if noise is not None:
        rows = [
            [
                str(number),
                formats.small_share(one.weight),
                *_with_residual(one.largest),
                estimated_text(one.trace),
                formats.significant(one.directional),
            ]
            for number, one in enumerate(noise.batches, start=1)
        ]
        largest, trace = (with_error(one.mean, one.deviation) for one in (noise.largest, noise.trace))
        rows.append(["mean", "", largest, "", trace, formats.significant(noise.batch_sharpness)])
    return text_table(
        "batch-numbers",
        "Curvature of each alone; beside the means the standard deviation over the batches.",
        ["batch", "weight", "λ max", "residual", "trace", "along its gradient"],
        rows,
    )


def sharpness_table(record: CurvatureRecord) -> Table:
    """Make the table of the rises of the loss within a ball."""
    rows = [
        [
            SPACE_NAMES[one.space],
            formats.significant(one.radius),
            formats.metric(one.loss),
            formats.significant(one.rise),
            formats.significant(one.second_order),
        ]
        for one in record.sharpness
    ]
    headers = ["over", "radius", "loss", "largest rise found", "to second order"]
    return text_table("sharpness", _SHARPNESS, headers, rows)


def curvature_tables(record: CurvatureRecord) -> list[RichTable]:
    """Make the tables for a terminal."""
    layers, table = record.layers, layer_table(record)
    top = sorted(range(len(layers)), key=lambda index: -layers[index].eigenvector_share)[:_MAX_LAYERS]
    found = {
        "Curvature of the loss": space_table(record).only(dict(zip(_NARROW, _NARROW, strict=True))),
        "Largest eigenvalues": eigenvalue_table(record),
        f"Where the top eigenvector lies, of {len(layers)} layers": replace(
            table, rows=[table.rows[index] for index in top]
        ),
        "Mini-batches": batch_table(record),
        "Sharpness in a ball": sharpness_table(record),
    }
    return [table.rich(title) for title, table in found.items() if table.rows]
