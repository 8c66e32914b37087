"""Figures of a measurement of curvature: numbers and axes, drawn as charts on the page and as pictures beside it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tangora._names import SpaceName
from tangora.curvature import BatchNoise, LayerCurvature
from tangora.report.curvature.record import (
    OPERATORS,
    CurvatureRecord,
    Density,
    LandscapeRecord,
    Spectrum,
    in_order,
)
from tangora.report.drawing.panels import Figure, Heatmap, Panel, Scale, Series
from tangora.report.layer_places import natural, places

_DECADES = 7
_LOG_RANGE = 30.0
SPACE_NAMES: dict[SpaceName, str] = {
    "tangent": "tangent space",
    "weights": "full weights",
    "factors": "factors A, B",
}
FACTORS = (
    "Figures over the factors A and B belong to this pair of factors, not to the model: they change "
    "under (B, A) → (BR, R⁻¹A), which changes neither a weight nor an output nor the figures over the "
    "tangent space. Do not compare them across methods, ranks, scalings or initializations."
)


def spectrum_name(spectrum: Spectrum) -> str:
    """Name a spectrum in a table or a legend."""
    return SPACE_NAMES[spectrum.space] + _operator_suffix(spectrum)


def _operator_suffix(spectrum: Spectrum) -> str:
    return "" if spectrum.operator == "hessian" else f", {OPERATORS[spectrum.operator].title}"


def figures(record: CurvatureRecord) -> list[Figure]:
    """List the figures of a measurement."""
    found = [
        _over_spaces(
            record,
            "eigenvalues",
            "Largest eigenvalues",
            "In descending order; the band is the residual: an exact eigenvalue is certainly within it.",
            ("number", "eigenvalue"),
            _eigenvalues,
            xwhole=True,
        ),
        _over_spaces(
            record,
            "counts",
            "Number of directions by curvature",
            "Number of directions with at least the given positive or negative curvature, from "
            "stochastic Lanczos "
            "quadrature without smoothing; the band shows the smallest and the largest probe. Small "
            "numbers of directions are less certain.",
            ("curvature at least", "directions"),
            _counts,
            xscale="log",
            yscale="log",
        ),
        _over_spaces(
            record,
            "density",
            "Spectral density",
            "The same, smoothed: share of directions for each unit of curvature. The width of the peaks is that of the "
            "smoothing.",
            ("eigenvalue", "density"),
            _density,
            yscale="log",
        ),
    ]
    if any(layer.space != "factors" for layer in record.layers):
        found.append(_layers([layer for layer in record.layers if layer.space != "factors"]))
    if record.batch_noise is not None:
        found.append(_batches(record.batch_noise))
    return found + (_landscape(record.landscape) if record.landscape is not None else [])


def _over_spaces(
    record: CurvatureRecord,
    name: str,
    title: str,
    caption: str,
    labels: tuple[str, str],
    draw: Callable[[Spectrum], Sequence[Series]],
    *,
    xscale: Scale = "linear",
    yscale: Scale | None = None,
    xwhole: bool = False,
) -> Figure:
    # the factors get axes of their own: nobody shall compare them with the rest
    by_space: dict[str, list[Series]] = {}
    for spectrum in in_order(record.spectra):
        by_space.setdefault(SPACE_NAMES[spectrum.space], []).extend(draw(spectrum))
    panels = [
        Panel(space, *labels, series, xscale=xscale, yscale=yscale or _scale(series), xwhole=xwhole)
        for space, series in by_space.items()
    ]
    about_factors = f" {FACTORS}" if record.of("factors") is not None else ""
    return Figure(name, title, caption + about_factors, panels)


def _scale(series: Sequence[Series]) -> Scale:
    values = [value for one in series for value in one.y]
    return "log" if min(values) > 0 and max(values) > _LOG_RANGE * min(values) else "linear"


def _eigenvalues(spectrum: Spectrum) -> list[Series]:
    found = spectrum.eigenvalues
    low, high = ([one.value + sign * one.residual for one in found] for sign in (-1, 1))
    numbers, values = range(1, len(found) + 1), [one.value for one in found]
    return [Series(OPERATORS[spectrum.operator].title, numbers, values, low=low, high=high)]


def _counts(spectrum: Spectrum) -> list[Series]:
    suffix = _operator_suffix(spectrum)
    upwards, downwards = (
        _counted(f"{name}{suffix}", spectrum, sign) for name, sign in (("upwards", 1.0), ("downwards", -1.0))
    )
    return [series for series in (upwards, downwards) if series is not None]


def _counted(name: str, spectrum: Spectrum, sign: float) -> Series | None:
    density = spectrum.density
    ends = [sign * node for nodes in density.nodes for node in nodes if sign * node > 0]
    if not ends:
        return None
    top = max(abs(node) for nodes in density.nodes for node in nodes)
    low = max(min(ends), top * 10.0**-_DECADES)
    x = np.geomspace(low, max(*ends, low), 160)
    counts = spectrum.size * _tails(density, sign, x)
    mean = counts.mean(axis=0)
    shown = mean > 0
    return Series(
        name,
        x[shown].tolist(),
        mean[shown].tolist(),
        low=counts.min(axis=0)[shown].tolist(),
        high=counts.max(axis=0)[shown].tolist(),
    )


def _tails(density: Density, sign: float, x: NDArray[np.float64]) -> NDArray[np.float64]:
    # probes x points: the share of directions beyond each point
    rows = []
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        values, shares = sign * np.array(nodes), np.array(weights)
        # a point that is a node, but for rounding, counts as reached
        rows.append((shares * (values >= x[:, None] * (1 - 1e-12))).sum(axis=1))
    return np.array(rows)


def _density(spectrum: Spectrum) -> list[Series]:
    density = spectrum.density
    floor = max(density.smoothed, default=0.0) * 10.0**-_DECADES
    # gaps, where a line would tell of directions that nothing was seen of
    shown = [value if value > floor else None for value in density.smoothed]
    return [Series(OPERATORS[spectrum.operator].title, density.x, shown)]


def _layers(shown: Sequence[LayerCurvature]) -> Figure:
    where = places(layer.name for layer in shown)
    blocks = sorted({place.block for place in where.values() if place.block}, key=natural)
    # layers outside of any block stand before the first one
    number = {block: index for index, block in enumerate(blocks)} | {"": -1}

    def series(value: Callable[[LayerCurvature], float]) -> list[Series]:
        points: dict[str, list[tuple[int, float]]] = {}
        for layer in shown:
            place = where[layer.name]
            points.setdefault(place.kind, []).append((number[place.block], value(layer)))
        return [
            Series(kind, [x for x, _ in sorted(found)], [y for _, y in sorted(found)])
            for kind, found in points.items()
        ]

    shares = series(lambda layer: layer.eigenvector_share)
    panels = [
        Panel("top eigenvector", "block", "share of the eigenvector", shares, xwhole=True),
        Panel("trace", "block", "trace", series(lambda layer: layer.trace.value), xwhole=True),
    ]
    if all(layer.largest is not None for layer in shown):
        largest = series(lambda layer: layer.largest.value if layer.largest else math.nan)
        panels.append(Panel("largest eigenvalue", "block", "λ max", largest, xwhole=True))
    return Figure(
        "layers",
        "Layer by layer",
        f"{SPACE_NAMES[shown[0].space].capitalize()}: the layers' shares of the top eigenvector, and "
        "each layer's own block of the Hessian. Layers outside the blocks are at −1.",
        [replace(panel, yscale=_scale(panel.series)) for panel in panels],
    )


def _batches(noise: BatchNoise) -> Figure:
    numbers = range(1, len(noise.batches) + 1)

    def panel(title: str, values: list[float], mean: float) -> Panel:
        ends = (1, len(values))
        return Panel(
            title,
            "mini-batch",
            title,
            [
                Series("each mini-batch", numbers, values, style="points"),
                Series("their mean", ends, (mean, mean), style="dashed"),
            ],
            xwhole=True,
        )

    return Figure(
        "batches",
        "Mini-batches",
        f"Curvature of each mini-batch, {SPACE_NAMES[noise.space]}.",
        [
            panel("λ max", [one.largest.value for one in noise.batches], noise.largest.mean),
            panel("trace", [one.trace.value for one in noise.batches], noise.trace.mean),
        ],
    )


def _landscape(landscape: LandscapeRecord) -> list[Figure]:
    space, found = SPACE_NAMES[landscape.space], []
    if landscape.lines:
        series = [Series(line.direction, line.steps, line.losses) for line in landscape.lines]
        found.append(
            Figure(
                "lines",
                "The loss along single directions",
                f"Displacements from the current weights, {space}; their length in Frobenius norm.",
                [Panel("loss", "distance", "loss", series)],
            )
        )
    if (plane := landscape.plane) is not None:
        heat = Heatmap(plane.x, plane.y, plane.losses, "loss")
        found.append(
            Figure(
                "plane",
                "The loss over two directions",
                f"Displacements from the current weights (in the middle), {space}; their length in "
                "Frobenius norm.",
                [Panel("loss", *plane.directions, heatmap=heat)],
            )
        )
    return found
