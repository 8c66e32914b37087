"""The file that a measurement of curvature leaves behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tangora._names import SPACES, Space
from tangora.report.record_files import FrozenModel, Recorded, read_record
from tangora.report.run_records import Count, Seconds

Operator = Literal["hessian", "gauss-newton"]


class Eigenvalue(FrozenModel):
    """One eigenvalue, and how far its vector is from being an eigenvector."""

    value: float
    residual: float = Field(ge=0, description="Norm of H v - value v: an eigenvalue lies within it.")


class Estimated(FrozenModel):
    """A number from random probes."""

    value: float
    standard_error: float | None = Field(
        default=None, ge=0, description="None where there are too few probes."
    )
    products: Count = Field(description="Matrix products that it took.")


class Density(FrozenModel):
    """Stochastic Lanczos quadrature: what is known of all eigenvalues together."""

    nodes: list[list[float]] = Field(description="Of each probe, ascending.")
    weights: list[list[float]] = Field(description="Of each probe, with sum 1: shares of the directions.")
    x: list[float] = Field(description="Where the smoothed density is given.")
    smoothed: list[float] = Field(description="Its values, mean over the probes.")

    @model_validator(mode="after")
    def _check_lengths(self) -> "Density":
        pairs = [*zip(self.nodes, self.weights, strict=False), (self.x, self.smoothed)]
        if len(self.nodes) != len(self.weights) or any(len(ours) != len(theirs) for ours, theirs in pairs):
            raise ValueError("nodes and weights, x and smoothed must be of equal lengths")
        return self


class Spectrum(FrozenModel):
    """The curvature over one space of directions."""

    space: Space
    operator: Operator
    size: Count = Field(description="Dimension.")
    num_layers: Count
    gradient_norm: float = Field(ge=0)
    eigenvalues: list[Eigenvalue] = Field(min_length=1, description="The largest, in descending order.")
    converged: bool = Field(description="Whether all of them reached the tolerance within the budget.")
    trace: Estimated
    frobenius_norm: Estimated
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


class LayerCurvature(FrozenModel):
    """The diagonal block of one layer."""

    name: str
    space: Space
    size: Count
    largest: Eigenvalue | None = Field(default=None, description="None if it was not asked for.")
    trace: Estimated
    eigenvector_share: float = Field(
        ge=0, description="Share of the layer in the leading eigenvector of the whole, squared length."
    )


class BatchCurvature(FrozenModel):
    """The curvature of one mini-batch alone."""

    weight: float = Field(gt=0, description="Its share in the mean over all batches.")
    largest: Eigenvalue
    trace: Estimated
    directional: float | None = Field(default=None, description="g'Hg / g'g with the batch's own gradient.")


class Scatter(FrozenModel):
    """A number over mini-batches."""

    mean: float
    deviation: float = Field(ge=0, description="Standard deviation.")


class BatchNoise(FrozenModel):
    """How much the curvature of mini-batches scatters."""

    space: Space
    batches: list[BatchCurvature] = Field(min_length=2)
    largest: Scatter
    trace: Scatter
    whole: Eigenvalue = Field(description="The largest eigenvalue of the mean over the batches.")
    variance: Estimated = Field(description="Mean of |H_b - H|² in Frobenius norm.")
    batch_sharpness: float | None = Field(default=None, description="Mean of g'Hg / g'g over the batches.")
    overlap: float = Field(description="Of the batches' leading eigenspaces, in [0, 1]: 1 if they agree.")
    chance_overlap: float = Field(description="The same for random directions.")


class Sharpness(FrozenModel):
    """How far the loss can rise within a ball, as far as an ascent found."""

    space: Space
    radius: float = Field(gt=0, description="Frobenius norm of the displacement.")
    loss: float
    rise: float = Field(description="The largest rise that was found: a lower bound.")
    second_order: float = Field(description="What the expansion to the second order says.")


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


class Landscape(FrozenModel):
    """The loss around the point."""

    space: Space
    lines: list[Line] = Field(default_factory=list)
    plane: Plane | None = None


class CurvatureRecord(Recorded):
    """The curvature of the loss at one point, and where it comes from."""

    schema_version: Literal[1] = 1
    measured: Literal["curvature"] = "curvature"
    title: str
    command: str = Field(description="The command line that repeats it.")
    settings: dict[str, Any]
    ranks: list[int] = Field(description="Of the adapter's layers, distinct; empty without an adapter.")
    loss: float
    num_examples: Count
    num_batches: Count
    split: str = Field(description="Where the examples come from.")
    differentiation: str = Field(description="How products with the Hessian were made.")
    dtype: str
    spectra: list[Spectrum] = Field(min_length=1)
    layers: list[LayerCurvature] = Field(default_factory=list)
    batch_noise: BatchNoise | None = None
    sharpness: list[Sharpness] = Field(default_factory=list)
    landscape: Landscape | None = None
    products: Count
    seconds: Seconds

    @model_validator(mode="after")
    def _check_spaces(self) -> "CurvatureRecord":
        keys = [(spectrum.space, spectrum.operator) for spectrum in self.spectra]
        if len(set(keys)) < len(keys):
            raise ValueError("a space is recorded more than once")
        if {space for space, _ in keys} == {"factors"}:
            raise ValueError("factors must stand beside the tangent space or the weights")
        return self

    @property
    def main(self) -> Spectrum:
        """The first spectrum that does not depend on the choice of factors."""
        return min(self.spectra, key=lambda one: (SPACES.index(one.space), one.operator != "hessian"))

    def of(self, space: Space, operator: Operator = "hessian") -> Spectrum | None:
        """Look a spectrum up."""
        return next((one for one in self.spectra if (one.space, one.operator) == (space, operator)), None)


def load_curvature(path: str | Path) -> CurvatureRecord:
    """Read what ``tangora curvature`` wrote."""
    return read_record(CurvatureRecord, path, "record of curvature")


def in_order(spectra: Sequence[Spectrum]) -> list[Spectrum]:
    """Sort spectra: those that do not depend on the choice of factors first."""
    return sorted(spectra, key=lambda one: (SPACES.index(one.space), one.operator != "hessian"))
