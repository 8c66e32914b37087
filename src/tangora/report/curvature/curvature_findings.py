"""What a measurement of curvature says, in words."""

import math

from tangora.curvature import TraceEstimate
from tangora.report import formats
from tangora.report.curvature.record import OPERATORS, CurvatureRecord, SharpnessRecord, Space, Spectrum

SPACE_NAMES: dict[Space, str] = {
    "tangent": "tangent space",
    "weights": "full weights",
    "factors": "factors A, B",
}
_WHERE: dict[Space, str] = {
    "tangent": "in the tangent space",
    "weights": "over the full weights of the chosen layers",
    "factors": "over the factors A and B",
}
FACTORS = (
    "Figures over the factors A and B belong to this pair of factors, not to the model: they change under "
    "(B, A) → (BR, R⁻¹A), which leaves every weight, every output and the figures over the tangent space as they are. "
    "They must not be compared across methods, ranks, scalings or initializations."
)


def curvature_sentences(record: CurvatureRecord) -> list[str]:
    """Say in words what was found, the most important first."""
    return [
        *_of_top(record.main),
        *_of_low_end(record.main),
        *_of_other_operators(record),
        *_of_sharpness(record),
        *_of_batches(record),
        *_of_layers(record),
        *_of_factors(record),
        f"All numbers are for the {formats.plural(record.num_examples, f'{record.split} example')} that were read.",
    ]


def spectrum_name(spectrum: Spectrum) -> str:
    """Name a spectrum in a table or a legend."""
    return SPACE_NAMES[spectrum.space] + operator_suffix(spectrum)


def operator_suffix(spectrum: Spectrum) -> str:
    """Name an operator behind something else, unless it is the Hessian."""
    return "" if spectrum.operator == "hessian" else f", {OPERATORS[spectrum.operator].title}"


def _of_top(spectrum: Spectrum) -> list[str]:
    values = [eigenvalue.value for eigenvalue in spectrum.eigenvalues]
    trace = spectrum.trace
    text = (
        f"{_WHERE[spectrum.space].capitalize()} ({formats.count(spectrum.size)} directions) the largest curvature is "
        f"{formats.significant(values[0])} and the trace {estimated_text(trace)}"
    )
    share = sum(values) / trace.value if trace.value > 0 else math.inf
    if len(values) > 1 and 0 < share <= 1:
        text += f"; the {len(values)} largest eigenvalues make up {formats.small_share(share)} of it"
    sentences = [f"{text}."]
    if not spectrum.converged:
        sentences.append(
            "Not all of these eigenvalues converged within the budget; the residuals bound their errors."
        )
    return sentences


def _of_low_end(spectrum: Spectrum) -> list[str]:
    low = spectrum.lowest_node
    if low >= 0 or spectrum.operator != "hessian":
        return []
    ratio = -low / spectrum.largest if spectrum.largest > 0 else math.inf
    if ratio < 1e-3:
        return []
    return [
        f"The point is no minimum: some direction curves down by {formats.significant(-low)} or more"
        + (f", {formats.small_share(ratio)} of the largest curvature." if math.isfinite(ratio) else ".")
    ]


def _of_other_operators(record: CurvatureRecord) -> list[str]:
    return [
        f"{_WHERE[one.space].capitalize()} {OPERATORS[one.operator].subject} has largest eigenvalue "
        f"{formats.significant(one.largest)} and trace {estimated_text(one.trace)}."
        for one in record.spectra
        if one.operator != "hessian" and one.space != "factors" and record.of(one.space) is not None
    ]


def _of_sharpness(record: CurvatureRecord) -> list[str]:
    return [_rise(one) for one in record.sharpness if one.space != "factors"]


def _rise(sharpness: SharpnessRecord) -> str:
    return (
        f"Within a distance of {formats.significant(sharpness.radius)} {_WHERE[sharpness.space]} the loss can rise "
        f"from {formats.metric(sharpness.loss)} to {formats.metric(sharpness.loss + sharpness.rise)} at least; "
        f"gradient and Hessian alone predict {formats.metric(sharpness.loss + sharpness.second_order)}."
    )


def _of_batches(record: CurvatureRecord) -> list[str]:
    noise = record.batch_noise
    if noise is None or noise.space == "factors":
        return []
    largest, spread = formats.significant(noise.largest.mean), formats.significant(noise.largest.deviation)
    text = (
        f"Over {len(noise.batches)} mini-batches the largest curvature is {largest} on average, with a standard "
        f"deviation of {spread}; that of the mean loss is {formats.significant(noise.whole.value)}."
    )
    return [text]


def _of_layers(record: CurvatureRecord) -> list[str]:
    layers = [layer for layer in record.layers if layer.space != "factors"]
    if len(layers) < 2:
        return []
    top = sorted(layers, key=lambda layer: -layer.eigenvector_share)[:3]
    parts = [f"{layer.name} ({formats.small_share(layer.eigenvector_share)})" for layer in top]
    return [f"The direction of the largest curvature lies mainly in {formats.listing(parts)}."]


def _of_factors(record: CurvatureRecord) -> list[str]:
    factors = record.of("factors")
    if factors is None:
        return []
    return [
        (
            f"Over the factors A and B the largest eigenvalue is {formats.significant(factors.largest)} and the trace "
            f"{estimated_text(factors.trace)}. {FACTORS}"
        )
    ]


def estimated_text(estimated: TraceEstimate) -> str:
    """Write an estimate with its standard error."""
    return with_error(estimated.value, estimated.standard_error)


def with_error(value: float, error: float | None) -> str:
    """Write a number with its error."""
    text = formats.significant(value)
    # one figure, without an exponent where it is large
    return text if not error else f"{text} ± {float(f'{error:.1g}'):g}"
