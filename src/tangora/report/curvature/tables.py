"""A measurement of curvature as tables: short ones for a terminal, full ones for the page."""

from collections.abc import Callable

from rich.table import Table

from tangora.report import formats
from tangora.report.curvature.record import CurvatureRecord, Estimated, LayerCurvature, Spectrum, in_order
from tangora.report.curvature.summary import SPACE_NAMES, estimate, name
from tangora.report.terminal import rich_table

_MAX_LAYERS = 8
_WIDE = ("lowest node", "‖g‖")
"""Columns that 80 characters have no room for."""

Cells = list[list[str]]


def space_table(record: CurvatureRecord) -> tuple[list[str], Cells]:
    """Make the table of spaces: the gauge-free ones first, the factors last."""
    headers = ["over", "directions", "λ max", "residual", "lowest node", "trace", "‖H‖", "‖g‖", "products"]
    return headers, [_space_cells(spectrum) for spectrum in in_order(record.spectra)]


def _space_cells(spectrum: Spectrum) -> list[str]:
    top = spectrum.eigenvalues[0]
    return [
        name(spectrum),
        formats.count(spectrum.size),
        formats.significant(top.value),
        f"{top.residual:.1g}",
        formats.significant(spectrum.lowest_node),
        _estimate(spectrum.trace),
        _estimate(spectrum.frobenius_norm),
        formats.significant(spectrum.gradient_norm),
        str(spectrum.products),
    ]


def eigenvalue_table(record: CurvatureRecord) -> tuple[list[str], Cells]:
    """Make the table of the largest eigenvalues."""
    spectra = in_order(record.spectra)
    rows = max(len(spectrum.eigenvalues) for spectrum in spectra)
    headers = ["number", *(text for one in spectra for text in (name(one), "residual"))]

    def cells(index: int) -> list[str]:
        found = [one.eigenvalues[index] if index < len(one.eigenvalues) else None for one in spectra]
        return [
            text
            for one in found
            for text in (
                (formats.MISSING, formats.MISSING)
                if one is None
                else (formats.significant(one.value), f"{one.residual:.1g}")
            )
        ]

    return headers, [[str(index + 1), *cells(index)] for index in range(rows)]


def layer_table(record: CurvatureRecord) -> tuple[list[str], Cells]:
    """Make the table of layers."""
    total = sum(layer.trace.value for layer in record.layers)
    columns: dict[str, Callable[[LayerCurvature], str]] = {
        "layer": lambda layer: layer.name,
        "directions": lambda layer: formats.count(layer.size),
        "of the top eigenvector": lambda layer: formats.small_share(layer.eigenvector_share),
        "trace": lambda layer: _estimate(layer.trace),
        "of the trace": lambda layer: (
            formats.share(layer.trace.value / total) if total > 0 else formats.MISSING
        ),
    }
    if any(layer.largest is not None for layer in record.layers):
        columns["λ max"] = lambda layer: formats.significant(layer.largest and layer.largest.value)
        columns["residual"] = lambda layer: "" if layer.largest is None else f"{layer.largest.residual:.1g}"
    return list(columns), [[cell(layer) for cell in columns.values()] for layer in record.layers]


def batch_table(record: CurvatureRecord) -> tuple[list[str], Cells]:
    """Make the table of mini-batches, and of what they scatter."""
    headers = ["batch", "weight", "λ max", "residual", "trace", "along its gradient"]
    noise = record.batch_noise
    if noise is None:
        return headers, []
    rows = [
        [
            str(number),
            formats.small_share(one.weight),
            formats.significant(one.largest.value),
            f"{one.largest.residual:.1g}",
            _estimate(one.trace),
            formats.significant(one.directional),
        ]
        for number, one in enumerate(noise.batches, start=1)
    ]
    means = [
        "mean",
        "",
        estimate(noise.largest.mean, noise.largest.deviation),
        "",
        estimate(noise.trace.mean, noise.trace.deviation),
        formats.significant(noise.batch_sharpness),
    ]
    return headers, [*rows, means]


def sharpness_table(record: CurvatureRecord) -> tuple[list[str], Cells]:
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
    return ["over", "radius", "loss", "largest rise found", "to second order"], rows


def curvature_tables(record: CurvatureRecord) -> list[Table]:
    """Make the tables for a terminal."""
    headers, rows = space_table(record)
    narrow = [index for index, header in enumerate(headers) if header not in _WIDE]
    tables = [
        rich_table(
            "Curvature of the loss", [headers[i] for i in narrow], [[row[i] for i in narrow] for row in rows]
        ),
        rich_table("Largest eigenvalues", *eigenvalue_table(record)),
    ]
    headers, rows = layer_table(record)
    if rows:
        top = sorted(range(len(rows)), key=lambda index: -record.layers[index].eigenvector_share)[
            :_MAX_LAYERS
        ]
        tables.append(
            rich_table(
                f"Where the top eigenvector lies, of {len(rows)} layers", headers, [rows[i] for i in top]
            )
        )
    for title, (heads, cells) in (
        ("Mini-batches", batch_table(record)),
        ("Sharpness in a ball", sharpness_table(record)),
    ):
        if cells:
            tables.append(rich_table(title, heads, cells))
    return tables


def _estimate(value: Estimated) -> str:
    return estimate(value.value, value.standard_error)
