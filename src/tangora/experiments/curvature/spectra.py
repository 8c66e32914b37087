"""From operators of curvature to records: spectra, layers, mini-batches, sharpness and landscapes."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tangora.curvature import CurvatureOperator
from tangora.curvature.batch_noise import batch_statistics
from tangora.curvature.blocks import block_statistics
from tangora.curvature.density import SpectralDensity
from tangora.curvature.eigenpairs import Eigenpairs
from tangora.curvature.landscape import landscape
from tangora.curvature.sharpness import sharpness
from tangora.curvature.trace import Estimate, square_root
from tangora.report.curvature import (
    BatchCurvature,
    BatchNoise,
    Density,
    Eigenvalue,
    Estimated,
    Landscape,
    LayerCurvature,
    Line,
    Plane,
    Scatter,
    Sharpness,
    Spectrum,
)
from tangora.report.curvature.record import Operator, Space

_PEFT = "base_model.model."
_ITERATIONS = 12
"""Products that one largest eigenvalue is expected to take."""
_KRYLOV = 4
_ASCENT = 3
"""Gradients from each start of an ascent."""


@dataclass(frozen=True)
class Budget:
    """How much a spectrum may cost.

    Attributes:
        top: Eigenpairs.
        tol: Relative residual at which an eigenpair has converged.
        max_products: Products that the eigenpairs may take.
        probes: Random vectors of the density.
        steps: Lanczos steps for each.
        trace_products: Products for the trace.
        seed: Of all random vectors.
    """

    top: int
    tol: float
    max_products: int
    probes: int
    steps: int
    trace_products: int
    seed: int

    @property
    def products(self) -> int:
        """The most that one spectrum takes."""
        return self.max_products + self.probes * self.steps + self.trace_products

    def layer_products(self, num_iterated: int) -> int:
        """Return about how many `layers_of` takes."""
        return _ITERATIONS * (1 + num_iterated) + max(2, self.trace_products)

    @property
    def batch_products(self) -> int:
        """About how many `batch_noise_of` takes, those of all batches together counted as one."""
        return 2 * _ITERATIONS + max(2, self.trace_products) + 1

    @property
    def sharpness_products(self) -> int:
        """How many `sharpness_of` takes, beside gradients."""
        return _KRYLOV


class Meter:
    """Counts products with the Hessian as they are made."""

    def __init__(self, total: int, progress: Callable[[int, int], None]):
        self.done, self.total, self._progress = 0, total, progress

    @contextlib.contextmanager
    def stage(self, operator: CurvatureOperator, planned: int) -> Iterator[Callable[..., None]]:
        """Follow an operator through a part of the work; what it did not need of its plan is expected no more."""
        before = operator.products

        def tick(*_: Any) -> None:
            self._progress(self.done + operator.products - before, self.total)

        yield tick
        used = operator.products - before
        self.done, self.total = self.done + used, max(self.total + used - planned, self.done + used)
        self._progress(self.done, self.total)


def spectrum_of(
    operator: CurvatureOperator, space: Space, kind: Operator, budget: Budget, tick: Callable[..., None]
) -> tuple[Spectrum, Eigenpairs]:
    """Measure the curvature over one space."""
    began, before = time.perf_counter(), operator.products
    top, seed = min(budget.top, operator.size), budget.seed
    gradient_norm = float(operator.gradient().double().norm())
    pairs = operator.top_eigenpairs(
        top, tol=budget.tol, max_products=budget.max_products, seed=seed, progress=tick
    )
    density = operator.spectral_density(
        probes=budget.probes, steps=min(budget.steps, operator.size), seed=seed, progress=tick
    )
    trace = operator.trace(products=budget.trace_products, seed=seed, progress=tick)
    return (
        Spectrum(
            space=space,
            operator=kind,
            size=operator.size,
            num_layers=len(operator.space.layout),
            gradient_norm=gradient_norm,
            eigenvalues=_eigenvalues(pairs),
            converged=pairs.converged,
            trace=_estimated(trace),
            frobenius_norm=_norm(density),
            density=_density(density),
            products=operator.products - before,
            seconds=time.perf_counter() - began,
        ),
        pairs,
    )


def _eigenvalues(pairs: Eigenpairs) -> list[Eigenvalue]:
    return [
        Eigenvalue(value=value, residual=residual)
        for value, residual in zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
    ]


def _estimated(estimate: Estimate) -> Estimated:
    known = math.isfinite(estimate.standard_error)
    return Estimated(
        value=estimate.value,
        standard_error=estimate.standard_error if known else None,
        products=estimate.products,
    )


def _norm(density: SpectralDensity) -> Estimated:
    # the probes of the density have seen |H|^2 = n E[λ^2]
    mean, size = density.moment(2), density.size
    square = replace(mean, value=size * mean.value, standard_error=size * mean.standard_error)
    return _estimated(square_root(square))


def _density(density: SpectralDensity) -> Density:
    x = density.grid()
    return Density(
        nodes=[list(nodes) for nodes in density.nodes],
        weights=[list(weights) for weights in density.weights],
        x=x.tolist(),
        smoothed=density.smoothed(x).tolist(),
    )


def layers_of(
    operator: CurvatureOperator, space: Space, budget: Budget, eigenvalues: bool, tick: Callable[..., None]
) -> list[LayerCurvature]:
    """Measure the curvature of every layer."""
    found = block_statistics(
        operator,
        probes=max(2, budget.trace_products),
        eigenvalues=eigenvalues,
        tol=budget.tol,
        seed=budget.seed,
        progress=tick,
    )
    return [
        LayerCurvature(
            name=name.removeprefix(_PEFT),
            space=space,
            size=one.size,
            largest=None
            if one.top_eigenvalue is None or one.residual is None
            else Eigenvalue(value=one.top_eigenvalue, residual=one.residual),
            trace=Estimated(value=one.trace, standard_error=one.trace_error, products=found.products),
            eigenvector_share=one.eigenvector_shares[0],
        )
        for name, one in found.layers.items()
    ]


def batch_noise_of(
    operator: CurvatureOperator, space: Space, budget: Budget, tick: Callable[..., None]
) -> BatchNoise:
    """Measure how much the curvature of mini-batches scatters."""
    probes = max(2, budget.trace_products)
    found = batch_statistics(operator, probes=probes, tol=budget.tol, seed=budget.seed, progress=tick)
    return BatchNoise(
        space=space,
        batches=[
            BatchCurvature(
                weight=one.weight,
                largest=Eigenvalue(value=one.top_eigenvalue, residual=one.residual),
                trace=Estimated(value=one.trace, standard_error=one.trace_error, products=probes),
                directional=one.directional_curvature,
            )
            for one in found.batches
        ],
        largest=Scatter(mean=found.top_eigenvalues.mean, deviation=found.top_eigenvalues.deviation),
        trace=Scatter(mean=found.traces.mean, deviation=found.traces.deviation),
        whole=Eigenvalue(value=found.top_eigenvalue, residual=found.residual),
        variance=Estimated(value=found.variance, standard_error=found.variance_error, products=probes),
        batch_sharpness=found.batch_sharpness,
        overlap=found.overlap,
        chance_overlap=found.chance_overlap,
    )


def sharpness_of(
    operator: CurvatureOperator,
    space: Space,
    pairs: Eigenpairs,
    radius: float,
    budget: Budget,
    tick: Callable[..., None],
) -> Sharpness:
    """Look for the largest loss in a ball."""
    found = sharpness(
        operator,
        radius,
        steps=_ASCENT,
        random_starts=0,
        krylov=_KRYLOV,
        pairs=pairs,
        seed=budget.seed,
        progress=tick,
    )
    return Sharpness(
        space=space,
        radius=radius,
        loss=found.loss,
        rise=found.value,
        second_order=found.second_order,
    )


def landscape_of(
    operator: CurvatureOperator,
    space: Space,
    pairs: Eigenpairs,
    points: int,
    progress: Callable[[int, int], None],
) -> Landscape:
    """Evaluate the loss along the leading eigenvectors and the gradient, and over the plane of the former.

    All go as far as the parabola of the largest eigenvalue needs to double the loss.
    """
    loss, top = operator.loss(), float(pairs.values[0])
    span = math.sqrt(2 * loss / top) if loss > 0 and top > 0 else 1.0
    vectors = {f"eigenvector {index + 1}": vector for index, vector in enumerate(pairs.vectors.mT[:2])}
    gradient = operator.gradient()
    directions = vectors | ({"gradient": gradient / gradient.norm()} if gradient.any() else {})
    lines = []
    for name, vector in directions.items():
        found = landscape(operator, {name: vector}, span=span, points=points, progress=progress)
        lines.append(Line(direction=name, steps=found.coordinates[0].tolist(), losses=found.losses.tolist()))
    plane = None
    if len(vectors) == 2:
        found = landscape(operator, vectors, span=span, points=points, progress=progress)
        across, along = found.names
        x, y = (values.tolist() for values in found.coordinates)
        plane = Plane(directions=(across, along), x=x, y=y, losses=found.losses.mT.tolist())
    return Landscape(space=space, lines=lines, plane=plane)
