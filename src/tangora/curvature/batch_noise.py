r"""How much the Hessian differs between mini-batches.

$H = \sum_b w_b H_b$ is the mean over $B$ batches, with weights $w_b$ proportional to their labels. What is measured of
every batch: its largest eigenvalue and trace, its distance $\|H_b - H\|_F^2$ from the mean, the subspace of its leading
eigenvectors, and its curvature along its own gradient.

One set of random vectors serves all batches. For a vector $z$ with $\mathbb{E}\, z z^\top = I$ and any matrix $M$,
$\mathbb{E}\|M z\|^2 = \operatorname{tr}(M\, \mathbb{E}[z z^\top]\, M^\top) = \|M\|_F^2$. With $M = H_b - H$ the
products $H_b z$ of all batches with the same $z$ are enough, since $H z = \sum_b w_b H_b z$: the estimate costs no
product beyond those of the traces, is zero where all batches agree, and is unbiased. With other vectors for each batch
it would be the difference of two large numbers.

Source: the estimator as derived here; that batches are sharper than their mean: Granziol et al., JMLR 2022,
arXiv:2006.09092; batch sharpness: Andreyev and Beneventano, arXiv:2412.20553.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._checks import InputError, check_whole
from tangora.curvature.products import random_signs, seeded_generator
from tangora.curvature.surface import LossSurface, mean_and_error

_ACCURACY = 1e-3


class Spread(NamedTuple):
    """A number over batches."""

    mean: float
    """Weighted as the batches are."""
    deviation: float
    """Standard deviation of a batch of mean weight."""
    smallest: float
    largest: float


@dataclass(frozen=True)
class BatchCurvature:
    r"""One mini-batch.

    Attributes:
        weight: $w_b$; all of them sum to 1.
        top_eigenvalue: $\lambda_{\max}(H_b)$.
        residual: $\|H_b v - \lambda v\|$ of its eigenvector; some eigenvalue is at most that far away.
        trace: Estimate of $\operatorname{tr} H_b$.
        trace_error: Its standard error.
        distance: Estimate of $\|H_b - H\|_F^2$.
        distance_error: Its standard error.
        gradient_norm: $\|g_b\|$.
        directional_curvature: $g_b^\top H_b g_b / \|g_b\|^2$; ``None`` for a gradient that is zero.
        overlap: $\|V_b^\top V\|_F^2 / k$ with the leading eigenvectors of the mean, in [0, 1].
    """

    weight: float
    top_eigenvalue: float
    residual: float
    trace: float
    trace_error: float
    distance: float
    distance_error: float
    gradient_norm: float
    directional_curvature: float | None
    overlap: float


@dataclass(frozen=True)
class BatchNoise:
    r"""All mini-batches and their mean.

    Standard errors are those of the random vectors: that only some batches were looked at is not in them.

    Attributes:
        batches: In the order given.
        top_eigenvalue: $\lambda_{\max}(H)$ of the mean.
        residual: Of its eigenvector.
        trace: Estimate of $\operatorname{tr} H$.
        trace_error: Its standard error.
        variance: Estimate of $\mathbb{E}\|H_b - \bar H\|_F^2$ for a batch of mean weight about the Hessian $\bar H$ of
            all data, $\frac{B}{B-1} \sum_b w_b \|H_b - H\|_F^2$: unbiased for independent examples, since a batch of
            weight $w$ then has variance $\sigma^2 / w$. The mean $H$ itself has $1/B$ of it.
        variance_error: Its standard error.
        overlap: Mean over pairs of batches of $\|V_a^\top V_b\|_F^2 / k$, in [0, 1].
        chance_overlap: The same for random subspaces, $k/n$.
        batch_sharpness: Mean over batches of $g_b^\top H_b g_b / \|g_b\|^2$, each counted once, as a step of SGD does.
            Training with SGD at the learning rate $\eta$ is said to end near $2/\eta$.
        products: Products with the Hessian of all batches.
        batch_products: Products with the Hessian of one batch.
    """

    batches: tuple[BatchCurvature, ...]
    top_eigenvalue: float
    residual: float
    trace: float
    trace_error: float
    variance: float
    variance_error: float
    overlap: float
    chance_overlap: float
    batch_sharpness: float | None
    products: int
    batch_products: int

    @property
    def top_eigenvalues(self) -> Spread:
        r"""The $\lambda_{\max}(H_b)$ over batches, whose mean is at least $\lambda_{\max}(H)$."""
        return self._spread([batch.top_eigenvalue for batch in self.batches])

    @property
    def traces(self) -> Spread:
        """The traces over batches; the errors of the estimates are in the deviation."""
        return self._spread([batch.trace for batch in self.batches])

    def to_dict(self) -> dict[str, Any]:
        """Return everything, spreads included, as JSON can hold it."""
        spreads = {"top_eigenvalues": self.top_eigenvalues, "traces": self.traces}
        return asdict(self) | {name: spread._asdict() for name, spread in spreads.items()}

    def _spread(self, values: list[float]) -> Spread:
        shares = [batch.weight for batch in self.batches]
        mean = math.fsum(share * value for share, value in zip(shares, values, strict=True))
        square = math.fsum(share * (value - mean) ** 2 for share, value in zip(shares, values, strict=True))
        return Spread(mean, math.sqrt(_sampling(len(values)) * square), min(values), max(values))


class _Reading(NamedTuple):
    """What one batch gives."""

    weight: float
    value: float
    residual: float
    vectors: Tensor
    products: Tensor
    gradient_norm: float
    directional: float | None
    used: int


def batch_statistics(
    operator: LossSurface,
    *,
    probes: int = 8,
    top: int = 1,
    tol: float = _ACCURACY,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> BatchNoise:
    r"""Measure how much the Hessian differs between the operator's batches.

    Holds ``probes + top`` vectors of every batch, on the CPU.

    Args:
        operator: A Hessian over at least two batches with labels.
        probes: Random vectors for traces and distances, at least 2.
        top: Dimension $k$ of the leading subspaces that are compared, in [1, n].
        seed: Of the random vectors.
        progress: Called after each batch with the number of batches read so far.

    Raises:
        InputError: If a number is out of range, or there are fewer than two batches.
    """
    check_whole("probes", probes, low=2)
    check_whole("top", top, low=1)
    generator = seeded_generator(seed)
    signs = random_signs((probes, operator.size), generator, operator.dtype, operator.device)
    readings: list[_Reading] = []
    for weight, batch in operator.per_batch():
        if weight:
            readings.append(_read(weight, batch, signs, top, tol, seed))
            if progress is not None:
                progress(len(readings))
    if len(readings) < 2:
        raise InputError(f"batches must be at least two with labels to be compared; got {len(readings)}")
    before = operator.products
    whole = operator.top_eigenpairs(top, tol=tol, seed=seed)
    return _combined(readings, whole, signs.cpu(), operator.products - before)


def distances(products: Sequence[Float[Tensor, "p n"]], weights: Float[Tensor, " b"]) -> Float[Tensor, "b p"]:
    r"""Return $\|(H_b - H)\, z\|^2$ for every batch and random vector; its mean over vectors is $\|H_b - H\|_F^2$.

    Args:
        products: $H_b z$ of each batch, with the same vectors in the rows.
        weights: $w_b$, which sum to 1.

    Returns:
        In float64.
    """
    mean = torch.zeros_like(products[0])
    for weight, product in zip(weights.tolist(), products, strict=True):
        mean.add_(product, alpha=weight)
    return torch.stack([(product - mean).double().square().sum(1) for product in products])


def subspace_overlap(one: Float[Tensor, "n k"], other: Float[Tensor, "n k"]) -> float:
    r"""Return $\|V_a^\top V_b\|_F^2 / k$, the mean squared cosine of the principal angles between two subspaces.

    Returns:
        1 for the same subspace, 0 for orthogonal ones; $k/n$ is what chance gives.
    """
    return float((one.mT @ other).double().square().sum()) / one.shape[1]


def _read(weight: float, batch: Any, signs: Tensor, top: int, tol: float, seed: int) -> _Reading:
    before = batch.products
    pairs = batch.top_eigenpairs(top, tol=tol, seed=seed)
    products = torch.stack([batch.matvec(sign).cpu() for sign in signs])
    gradient = batch.gradient()
    norm = float(gradient.double().norm())
    directional = None
    if norm > 0:
        direction = gradient / norm
        directional = float(direction.double() @ batch.matvec(direction).double())
    return _Reading(
        weight=float(weight),
        value=float(pairs.values[0]),
        residual=float(pairs.residuals[0]),
        vectors=pairs.vectors.cpu(),
        products=products,
        gradient_norm=norm,
        directional=directional,
        used=batch.products - before,
    )


def _combined(readings: list[_Reading], whole: Any, signs: Tensor, products: int) -> BatchNoise:
    weights = torch.tensor([reading.weight for reading in readings], dtype=torch.float64)
    weights /= weights.sum()
    away = distances([reading.products for reading in readings], weights)
    traces = torch.stack([(reading.products.double() * signs.double()).sum(1) for reading in readings])
    found = [mean_and_error(values) for values in (away, traces)]
    (distance, distance_error), (trace, trace_error) = [
        (mean.tolist(), error.tolist()) for mean, error in found
    ]
    vectors = whole.vectors.cpu()
    batches = tuple(
        BatchCurvature(
            weight=float(weights[index]),
            top_eigenvalue=reading.value,
            residual=reading.residual,
            trace=trace[index],
            trace_error=trace_error[index],
            distance=distance[index],
            distance_error=distance_error[index],
            gradient_norm=reading.gradient_norm,
            directional_curvature=reading.directional,
            overlap=subspace_overlap(reading.vectors, vectors),
        )
        for index, reading in enumerate(readings)
    )
    variance, variance_error = mean_and_error(_sampling(len(readings)) * (weights @ away))
    mean_trace, mean_trace_error = mean_and_error(weights @ traces)
    directional = [reading.directional for reading in readings if reading.directional is not None]
    pairs = combinations([reading.vectors for reading in readings], 2)
    return BatchNoise(
        batches=batches,
        top_eigenvalue=float(whole.values[0]),
        residual=float(whole.residuals[0]),
        trace=float(mean_trace),
        trace_error=float(mean_trace_error),
        variance=float(variance),
        variance_error=float(variance_error),
        overlap=fmean(subspace_overlap(one, other) for one, other in pairs),
        chance_overlap=vectors.shape[1] / vectors.shape[0],
        batch_sharpness=fmean(directional) if directional else None,
        products=products,
        batch_products=sum(reading.used for reading in readings),
    )


def _sampling(count: int) -> float:
    # Bessel's correction; also right for batches of different sizes, see the variance of `BatchNoise`
    return count / (count - 1)
