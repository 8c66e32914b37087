"""The file that a measurement of curvature leaves behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tangora._names import SPACES, SpaceName
from tangora.curvature import (
    BatchNoise,
    CurvatureOperator,
    Eigenvalue,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    LayerCurvature,
    TraceEstimate,
)
from tangora.report.record_files import FrozenModel, Measurement, read_record
from tangora.report.run_records import Count, Seconds

Operator = Literal["hessian", "gauss-newton", "empirical-fisher"]


@dataclass(frozen=True)
class OperatorKind:
    """A matrix whose spectrum is measured, and what it is called."""

    make: Callable[..., CurvatureOperator]
    title: str
    flag: str | None
    """The setting that asks for it; the Hessian is always measured."""
    subject: str
    """Subject of sentences about it."""


OPERATORS: dict[Operator, OperatorKind] = {
    "hessian": OperatorKind(Hessian, "Hessian", None, "the Hessian"),
    "gauss-newton": OperatorKind(GaussNewton, "Gauss–Newton", "gauss_newton", "the Gauss–Newton part alone"),
    "empirical-fisher": OperatorKind(
        EmpiricalFisher, "empirical Fisher", "empirical_fisher", "the empirical Fisher matrix"
    ),
}
"""The Hessian, and what can be measured beside it over the first space."""


class Density(FrozenModel):
    """Stochastic Lanczos quadrature: what is known of all eigenvalues together."""

    nodes: list[list[float]] = Field(description="Eigenvalue estimates of each probe, ascending.")
    weights: list[list[float]] = Field(description="Their weights for each probe, with sum 1.")
    x: list[float] = Field(description="Grid of the smoothed density.")
    smoothed: list[float] = Field(description="Density at the grid points, mean over the probes.")

    @model_validator(mode="after")
    def _check_lengths(self) -> "Density":
        pairs = [*zip(self.nodes, self.weights, strict=False), (self.x, self.smoothed)]
        if len(self.nodes) != len(self.weights) or any(len(ours) != len(theirs) for ours, theirs in pairs):
            raise ValueError("nodes and weights, x and smoothed must be of equal lengths")
        return self


class Spectrum(FrozenModel):
    """The curvature over one space of directions."""

    space: SpaceName
    operator: Operator
    size: Count = Field(description="Dimension.")
    num_layers: Count
    gradient_norm: float = Field(ge=0)
    eigenvalues: list[Eigenvalue] = Field(
        min_length=1, description="Largest eigenvalues, in descending order."
    )
    converged: bool = Field(description="Whether all of them reached the tolerance within the budget.")
    trace: TraceEstimate
    frobenius_norm: TraceEstimate
    density: Density
    products: Count = Field(description="Matrix products in all.")
    seconds: Seconds

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[0].value

    @property
    def lowest_node(self) -> float:
        """The lowest node of the quadrature: an upper bound of the smallest eigenvalue."""
        return min(node for nodes in self.density.nodes for node in nodes)


class SharpnessRecord(FrozenModel):
    """Largest rise of the loss within a ball that an ascent found."""

    space: SpaceName
    radius: float = Field(gt=0, description="Frobenius norm of the displacement.")
    loss: float
    rise: float = Field(description="The largest rise that was found: a lower bound.")
    second_order: float = Field(description="Prediction of the second-order expansion.")


class Line(FrozenModel):
    """The loss along one direction."""

    direction: str
    steps: list[float] = Field(description="Lengths of the displacement.")
    losses: list[float]


class Plane(FrozenModel):
    """The loss over two directions."""

    directions: tuple[str, str]
    x: list[float]
    y: list[float]
    losses: list[list[float]] = Field(description="One row for each of y.")


class LandscapeRecord(FrozenModel):
    """The loss around the point."""

    space: SpaceName
    lines: list[Line] = Field(default_factory=list)
    plane: Plane | None = None


class CurvatureRecord(Measurement):
    """The curvature of the loss at one point, and where it comes from."""

    measured: Literal["curvature"] = "curvature"
    ranks: list[int] = Field(description="Distinct ranks of the adapter's layers; empty without an adapter.")
    loss: float
    num_examples: Count
    num_batches: Count
    split: str = Field(description="Source of the examples.")
    differentiation: str = Field(description="Method of the Hessian-vector products.")
    dtype: str
    spectra: list[Spectrum] = Field(min_length=1)
    layers: list[LayerCurvature] = Field(default_factory=list)
    batch_noise: BatchNoise | None = None
    sharpness: list[SharpnessRecord] = Field(default_factory=list)
    landscape: LandscapeRecord | None = None
    products: Count
    seconds: Seconds

    @model_validator(mode="after")
    def _check_spaces(self) -> "CurvatureRecord":
        keys = [(spectrum.space, spectrum.operator) for spectrum in self.spectra]
        if len(set(keys)) < len(keys):
            raise ValueError("a space is recorded more than once")
        if {space for space, _ in keys} == {"factors"}:
            raise ValueError("factors must be measured together with the tangent space or the weights")
        return self

    @property
    def main(self) -> Spectrum:
        """The first spectrum that does not depend on the choice of factors."""
        return min(self.spectra, key=lambda one: (SPACES.index(one.space), one.operator != "hessian"))

    def of(self, space: SpaceName, operator: Operator = "hessian") -> Spectrum | None:
        """Look a spectrum up."""
        return next((one for one in self.spectra if (one.space, one.operator) == (space, operator)), None)


def load_curvature(path: str | Path) -> CurvatureRecord:
    """Read what ``tangora curvature`` wrote."""
    return read_record(CurvatureRecord, path, "record of curvature")


def in_order(spectra: Sequence[Spectrum]) -> list[Spectrum]:
    """Sort spectra: those that do not depend on the choice of factors first."""
    return sorted(spectra, key=lambda one: (SPACES.index(one.space), one.operator != "hessian"))
