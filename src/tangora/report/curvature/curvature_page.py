"""A measurement of curvature in words, as one page, as tables for a terminal, and as pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from tangora.curvature import BatchNoise, Eigenvalue, LayerCurvature, TraceEstimate
from tangora.report import formats
from tangora.report.curvature.curvature_figures import FACTORS, SPACE_NAMES, figures, spectrum_name
from tangora.report.curvature.record import (
    OPERATORS,
    CurvatureRecord,
    SharpnessRecord,
    SpaceName,
    Spectrum,
    in_order,
)
from tangora.report.drawing.charts import figure_section
from tangora.report.drawing.pictures import save_pictures
from tangora.report.layout import Section, render, repeat
from tangora.report.record_files import write_atomic
from tangora.report.report_table import Table
from tangora.report.setup_facts import subject_facts
from tangora.report.terminal_table import TerminalTable

_MAX_LAYERS = 8
_NARROW = ("over", "directions", "λ max", "residual", "trace", "‖H‖", "products")
"""Columns of the table of spaces that 80 characters have room for."""
_SHARPNESS = (
    "The largest increase of the loss that gradient ascent found within a ball of displacements: a "
    "lower bound of the true maximum. To second order: the prediction of gradient and Hessian alone."
)
_SPACES = (
    "Tangent space: the directions in which the adapter can change the weights, in orthonormal "
    "coordinates. Its figures depend only on the weights. Full weights: every entry of the chosen "
    "layers' matrices; these are the directions of full fine-tuning, for every method."
)
_NUMBERS = (
    "λ max: the largest eigenvalue. Residual: the norm of H v − λ v; an exact eigenvalue is within "
    "this distance. Lowest node: of the quadrature; an upper bound of the smallest eigenvalue. ± at a "
    "trace or norm: the standard error of its random "
    "probes, imprecise if there are few probes. ‖H‖: Frobenius norm. ‖g‖: the gradient's norm in the "
    "same coordinates. Products: with the matrix, over all examples."
)
_WHERE: dict[SpaceName, str] = {
    "tangent": "in the tangent space",
    "weights": "over the full weights of the chosen layers",
    "factors": "over the factors A and B",
}
_FLAT = 1e-3  # curvature downwards, relative to the largest, below which the point passes for a minimum
_FINITE = "Products are finite differences of gradients and contain their error."


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
    notes = formats.sentences(
        _SPACES,
        _NUMBERS,
        FACTORS if record.of("factors") is not None else None,
        _FINITE if record.differentiation != "exact" else None,
    )
    examples = formats.plural(record.num_examples, f"{record.split} example")
    return render(
        record.title,
        [
            "tangora curvature",
            f"adapter of {formats.ranks(record.ranks)}" if record.ranks else "no adapter",
            f"loss {formats.metric(record.loss)} on {examples}",
            f"{formats.plural(record.products, 'product')} in {formats.seconds(record.seconds)}",
        ],
        record.created,
        curvature_sentences(record),
        [
            Section("spaces", "Spaces", table=space_table(record), notes=notes),
            *map(figure_section, figures(record)),
            *(Section(table.name, title, table=table) for title, table in tables.items() if table.rows),
        ],
        repeat(record, f"Hessian products: {record.differentiation}, in {record.dtype}."),
        look="measured wide-panels",
        setup=subject_facts(record),
    )


def curvature_sentences(record: CurvatureRecord) -> list[str]:
    """State the results in words, the most important first."""
    main = record.main
    unsure = "Not all of these eigenvalues converged within the budget; the residuals bound their errors."
    return formats.sentences(
        _of_top(main),
        None if main.converged else unsure,
        _of_low_end(main),
        *(_of_operator(one) for one in record.spectra if record.of(one.space) is not None),
        *(_of_ball(one) for one in record.sharpness),
        _of_batches(record.batch_noise),
        _of_layers(record.layers),
        _of_factors(record.of("factors")),
        f"All numbers are for {formats.plural(record.num_examples, f'{record.split} example')}.",
    )


def _of_top(spectrum: Spectrum) -> str:
    values, trace = [eigenvalue.value for eigenvalue in spectrum.eigenvalues], spectrum.trace
    text = (
        f"{_WHERE[spectrum.space].capitalize()} ({formats.count(spectrum.size)} directions) the largest curvature is "
        f"{formats.significant(values[0])} and the trace {_estimated(trace)}"
    )
    share = sum(values) / trace.value if trace.value > 0 else math.inf
    if len(values) == 1 or not 0 < share <= 1:
        return f"{text}."
    return f"{text}; the {len(values)} largest eigenvalues make up {formats.small_share(share)} of it."


def _of_low_end(spectrum: Spectrum) -> str | None:
    down = -spectrum.lowest_node
    ratio = down / spectrum.largest if spectrum.largest > 0 else math.inf
    if spectrum.operator != "hessian" or down <= 0 or ratio < _FLAT:
        return None
    text = (
        "The current weights are not a minimum: in some direction the curvature is negative, with size "
        f"{formats.significant(down)} or more"
    )
    if math.isinf(ratio):
        return f"{text}."
    return f"{text}, {formats.small_share(ratio)} of the largest curvature."


def _of_operator(spectrum: Spectrum) -> str | None:
    if spectrum.operator == "hessian" or spectrum.space == "factors":
        return None
    return (
        f"{_WHERE[spectrum.space].capitalize()} {OPERATORS[spectrum.operator].subject} has largest eigenvalue "
        f"{formats.significant(spectrum.largest)} and trace {_estimated(spectrum.trace)}."
    )


def _of_ball(ball: SharpnessRecord) -> str | None:
    if ball.space == "factors":
        return None
    return (
        f"Within a distance of {formats.significant(ball.radius)} {_WHERE[ball.space]} the loss can "
        f"rise from {formats.metric(ball.loss)} to at least {formats.metric(ball.loss + ball.rise)}; "
        f"gradient and Hessian alone predict {formats.metric(ball.loss + ball.second_order)}."
    )


def _of_batches(noise: BatchNoise | None) -> str | None:
    if noise is None or noise.space == "factors":
        return None
    return (
        f"Over {formats.plural(len(noise.batches), 'mini-batch', 'mini-batches')} the largest curvature is "
        f"{formats.significant(noise.largest.mean)} on average, with a standard deviation of "
        f"{formats.significant(noise.largest.deviation)}; the curvature of the mean loss is "
        f"{formats.significant(noise.whole.value)}."
    )


def _of_layers(layers: Sequence[LayerCurvature]) -> str | None:
    shown = [layer for layer in layers if layer.space != "factors"]
    if len(shown) < 2:
        return None
    top = sorted(shown, key=lambda layer: -layer.eigenvector_share)[:3]
    parts = [f"{layer.name} ({formats.small_share(layer.eigenvector_share)})" for layer in top]
    return f"The direction of the largest curvature is mainly in {formats.listing(parts)}."


def _of_factors(factors: Spectrum | None) -> str | None:
    if factors is None:
        return None
    return (
        f"Over the factors A and B the largest eigenvalue is {formats.significant(factors.largest)} and the trace "
        f"{_estimated(factors.trace)}. {FACTORS}"
    )


def _estimated(estimated: TraceEstimate) -> str:
    return with_error(estimated.value, estimated.standard_error)


def with_error(value: float, error: float | None) -> str:
    """Write a number with its error."""
    text = formats.significant(value)
    # one figure, without an exponent where it is large
    return text if not error else f"{text} ± {float(f'{error:.1g}'):g}"


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
            "trace": lambda one: _estimated(one.trace),
            "‖H‖": lambda one: _estimated(one.frobenius_norm),
            "‖g‖": lambda one: formats.significant(one.gradient_norm),
            "products": lambda one: str(one.products),
        },
        sortable=False,
    )


def _residual(found: Eigenvalue | None) -> str:
    return formats.MISSING if found is None else f"{found.residual:.1g}"


def eigenvalue_table(record: CurvatureRecord) -> Table:
    """Make the table of the largest eigenvalues."""
    spectra = in_order(record.spectra)
    rows = []
    for number, found in enumerate(zip_longest(*(one.eigenvalues for one in spectra)), start=1):
        row = [str(number)]
        for one in found:
            row += [formats.significant(one and one.value), _residual(one)]
        rows.append(row)
    headers = ["number", *(text for one in spectra for text in (spectrum_name(one), "residual"))]
    return Table.texts("eigenvalue-numbers", "In descending order.", headers, rows, sortable=False)


def layer_curvature_table(record: CurvatureRecord) -> Table:
    """Make the table of layers."""
    total = sum(layer.trace.value for layer in record.layers)
    columns: dict[str, Callable[[LayerCurvature], str]] = {
        "layer": lambda layer: layer.name,
        "directions": lambda layer: formats.count(layer.size),
        "of the top eigenvector": lambda layer: formats.small_share(layer.eigenvector_share),
        "trace": lambda layer: _estimated(layer.trace),
        "of the trace": lambda layer: formats.share(layer.trace.value / total if total > 0 else None),
    }
    if any(layer.largest is not None for layer in record.layers):
        columns["λ max"] = lambda layer: formats.significant(layer.largest and layer.largest.value)
        columns["residual"] = lambda layer: "" if layer.largest is None else _residual(layer.largest)
    caption = "Each layer's share of the top eigenvector, and its own block of the Hessian."
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
                _estimated(one.trace),
                formats.significant(one.directional),
            ]
            for number, one in enumerate(noise.batches, start=1)
        ]
        largest, trace = (with_error(one.mean, one.deviation) for one in (noise.largest, noise.trace))
        rows.append(["mean", "", largest, "", trace, formats.significant(noise.batch_sharpness)])
    return Table.texts(
        "batch-numbers",
        "Curvature of each mini-batch; next to the means, the standard deviation over the batches.",
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


def curvature_tables(record: CurvatureRecord) -> list[TerminalTable]:
    """Make the tables for a terminal."""
    layers, table = record.layers, layer_curvature_table(record)
    top = sorted(range(len(layers)), key=lambda index: -layers[index].eigenvector_share)[:_MAX_LAYERS]
    found = {
        "Curvature of the loss": space_table(record).only(dict(zip(_NARROW, _NARROW, strict=True))),
        "Largest eigenvalues": eigenvalue_table(record),
        f"Shares of the top eigenvector in {formats.plural(len(layers), 'layer')}": replace(
            table, rows=[table.rows[index] for index in top]
        ),
        "Mini-batches": batch_table(record),
        "Sharpness in a ball": _sharpness_table(record),
    }
    more = {"Curvature of the loss": "The page also has the lowest node and the gradient's norm."}
    return [table.rich(title, caption=more.get(title)) for title, table in found.items() if table.rows]
