r"""The density of all eigenvalues by stochastic Lanczos quadrature.

For a random $z$ with $\|z\|^2 = n$ the measure $\mu_z = \sum_i (v_i^\top z)^2 / n \; \delta_{\lambda_i}$ has the
density of states as its mean. After $m$ Lanczos steps from $z$ the eigenvalues $\theta_j$ of the tridiagonal matrix and
the squared first components of its eigenvectors, $w_j$, are nodes and weights of the Gauss quadrature of $\mu_z$:
moments up to $2m - 1$ are exact, and at a node the distribution function of $\mu_z$ lies between the sums of the
weights before and up to that node. Nodes and weights are the result; the distribution function needs nothing else.

A density needs a width. One width for all nodes is a larger error than the quadrature on spectra of neural networks,
where the bulk is a thousandth of the range. Here each node is smoothed over half its distance to the next one, but over
its residual where that is less: a node that has converged is an eigenvalue.

Source: Golub and Meurant, Matrices, Moments and Quadrature (2010), chapters 6 and 7; Ubaru, Chen, Saad (2017), SIAM J.
Matrix Anal. Appl. 38; bounds of Chebyshev, Markov and Stieltjes: Szegő, Orthogonal Polynomials, section 3.41; the
width: this library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_number, check_whole, shown
from tangora._types import Progress
from tangora.curvature.lanczos import Krylov
from tangora.curvature.products import Matrix, Products, seeded_generator, size_of
from tangora.curvature.trace import TraceEstimate, mean_of

# of the range of the spectrum: a single eigenvalue is drawn this wide
_NARROWEST = 1e-4


Points: TypeAlias = Float[Tensor, "*s"] | np.ndarray | Sequence[float] | float
"""Where a function is evaluated."""


class Distribution(NamedTuple):
    r"""The distribution function $F(x)$, the share of eigenvalues up to $x$, float64 on the CPU.

    ``value`` is the mean of the probes' step functions and ``standard_error`` that over probes (not a number for one
    probe). ``lower`` and ``upper`` bound what more Lanczos steps with the same probes could give.
    """

    value: Float[Tensor, "*s"]
    standard_error: Float[Tensor, "*s"]
    lower: Float[Tensor, "*s"]
    upper: Float[Tensor, "*s"]


@dataclass(frozen=True)
class SpectralDensity:
    r"""An estimate of the distribution of all eigenvalues.

    Attributes:
        nodes: $\theta_j$ of each probe, ascending.
        weights: $w_j$ of each probe, with sum 1.
        residuals: How far each node may be from an eigenvalue.
        size: Dimension of the operator.
        products: Products with the operator that were made.
    """

    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    residuals: tuple[tuple[float, ...], ...]
    size: int
    products: int

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest node; the spectrum reaches at least as far."""
        return min(nodes[0] for nodes in self.nodes), max(nodes[-1] for nodes in self.nodes)

    def cdf(self, x: Points) -> Distribution:
        """Return the share of eigenvalues up to some points.

        Args:
            x: The points: a tensor, an array, a list or one number.

        Returns:
            See `Distribution`.
        """
        points = _array("x", x)
        values, lower, upper = [], [], []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            before = np.concatenate([[0.0], np.cumsum(weights)])
            before[-1] = 1.0
            count = np.searchsorted(nodes, points, side="right")
            values.append(before[count])
            lower.append(before[np.maximum(count - 1, 0)])
            upper.append(before[np.minimum(count + 1, len(nodes))])
        return Distribution(
            torch.as_tensor(np.mean(values, 0)),
            torch.as_tensor(_standard_error(np.stack(values))),
            torch.as_tensor(np.mean(lower, 0)),
            torch.as_tensor(np.mean(upper, 0)),
        )

    def moment(self, power: int) -> TraceEstimate:
        r"""Return the mean of a power of the eigenvalues, $\operatorname{tr} H^p / n$.

        Exact for the probes while $p \le 2m - 1$: ``size * moment(1)`` is Hutchinson's estimate of the trace, and
        ``size * moment(2)`` that of $\|H\|_F^2$.

        Args:
            power: $p \ge 1$.

        Returns:
            The mean over probes with its standard error.
        """
        check_whole("power", power, low=1)
        samples = [
            math.fsum(weight * node**power for node, weight in zip(nodes, weights, strict=True))
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        return mean_of(samples, self.products)

    def smoothed(self, x: Points, width: float | None = None) -> Float[Tensor, "*s"]:
        """Return the density, smoothed by normal distributions at the nodes.

        Args:
            x: The points, as for `cdf`; see `grid` for points that miss no peak.
            width: One standard deviation for all nodes, in units of the eigenvalues; default each node's own, see the
                head of this file.

        Returns:
            Shares of eigenvalues per unit, float64 on the CPU.
        """
        if width is not None:
            check_number("width", width, low=0, open_low=True)
        points = _array("x", x)
        density = np.zeros_like(points)  # a scalar where there is one point
        for nodes, weights, widths in zip(self.nodes, self.weights, self.widths(), strict=True):
            for node, weight, own in zip(nodes, weights, widths, strict=True):
                deviation = own if width is None else width
                away = (points - node) / deviation
                density += weight / (deviation * math.sqrt(2 * math.pi)) * np.exp(-0.5 * away**2)
        return torch.as_tensor(density / len(self.nodes))

    def widths(self) -> tuple[tuple[float, ...], ...]:
        """Return the standard deviation with which each probe's nodes are smoothed by default."""
        low, high = self.range
        scale = high - low if high > low else max(abs(high), 1.0)
        found = []
        for nodes, residuals in zip(self.nodes, self.residuals, strict=True):
            gaps = np.diff(nodes)
            nearest = np.minimum(np.append(gaps, np.inf), np.insert(gaps, 0, np.inf))
            narrow = np.minimum(nearest / 2, residuals)
            found.append(tuple(np.maximum(narrow, _NARROWEST * scale).tolist()))
        return tuple(found)

    def grid(self, points: int = 400, width: float | None = None) -> Float[Tensor, " p"]:
        """Return points to draw the density at, ascending: evenly spread ones, and some across every node."""
        check_whole("points", points, low=2)
        nodes, widths = (np.concatenate([*map(np.asarray, parts)]) for parts in (self.nodes, self.widths()))
        if width is not None:
            check_number("width", width, low=0, open_low=True)
        spread = widths if width is None else np.full_like(widths, width)
        around = nodes[:, None] + spread[:, None] * np.linspace(-3, 3, 7)
        even = np.linspace(around.min(), around.max(), points)
        return torch.from_numpy(np.unique(np.concatenate([even, around.ravel()])))


def spectral_density(
    operator: Matrix, *, probes: int = 4, steps: int = 40, seed: int = 0, progress: Progress | None = None
) -> SpectralDensity:
    """Measure the density of eigenvalues by stochastic Lanczos quadrature.

    Memory: ``steps + 1`` vectors.

    Args:
        operator: See `tangora.curvature.lanczos_eigenpairs`.
        probes: Random vectors; at least 2 for error bars.
        steps: Lanczos steps, and products, for each; no more than the operator's dimension are made.
        seed: Seed of the random vectors.
        progress: Called after each product.

    Raises:
        InputError: If a number is out of range or a product is not finite.
    """
    for name, value in (("probes", probes), ("steps", steps)):
        check_whole(name, value, low=1)
    size = size_of(operator)
    steps = min(steps, size)
    product = Products(operator, probes * steps, "density", progress)
    generator = seeded_generator(seed)
    nodes, weights, residuals = [], [], []
    for _ in range(probes):
        small = Krylov(product, steps, product.signs(generator)).tridiagonalize(steps)
        values, vectors = scipy.linalg.eigh_tridiagonal(small.diagonal.numpy(), small.off_diagonal.numpy())
        squares = vectors[0] ** 2
        nodes.append(tuple(values.tolist()))
        weights.append(tuple((squares / squares.sum()).tolist()))
        residuals.append(tuple((small.remainder * np.abs(vectors[-1])).tolist()))
    return SpectralDensity(tuple(nodes), tuple(weights), tuple(residuals), size, product.count)


def _array(name: str, points: Any) -> np.ndarray:
    try:
        points = points.detach().cpu().double() if isinstance(points, Tensor) else points
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} must be a number, a list of numbers or a tensor; got {shown(points)}"
        ) from None
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite; got {shown(points)}")
    return array


def _standard_error(values: np.ndarray) -> np.ndarray:
    if len(values) == 1:
        return np.full(values.shape[1:], np.nan)
    return values.std(0, ddof=1) / math.sqrt(len(values))
