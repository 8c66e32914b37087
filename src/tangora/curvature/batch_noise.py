r"""Variation of the Hessian between mini-batches.

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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora import _names
from tangora._checks import InputError, check_whole
from tangora._types import Progress
from tangora.curvature.eigenpairs import Eigenpairs, Eigenvalue
from tangora.curvature.operators import CurvatureOperator
from tangora.curvature.products import random_signs, seeded_generator
from tangora.curvature.trace import TraceEstimate, mean_of, means_of
from tangora.probes.batches import num_batches


@dataclass(frozen=True)
class Spread:
    """A number over mini-batches: mean weighted as they are, and standard deviation of one of mean weight."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class BatchCurvature:
    r"""The curvature of one mini-batch alone."""

    weight: float
    """Its share $w_b$ in the mean over all batches."""
    largest: Eigenvalue
    r"""$\lambda_{\max}(H_b)$."""
    trace: TraceEstimate
    directional: float | None
    r"""$g_b^\top H_b g_b / \|g_b\|^2$ along the batch's own gradient; ``None`` for one that is zero."""


@dataclass(frozen=True)
class BatchNoise:
    r"""All mini-batches and their mean.

    Standard errors are those of the random vectors: that only some batches were looked at is not in them.

    Attributes:
        space: Coordinates.
        batches: In the order given.
        largest: The $\lambda_{\max}(H_b)$ over batches, whose mean is at least $\lambda_{\max}(H)$.
        trace: The traces over batches; the errors of the estimates are in the deviation.
        whole: $\lambda_{\max}(H)$ of the mean.
        variance: Estimate of $\mathbb{E}\|H_b - \bar H\|_F^2$ for a batch of mean weight about the Hessian $\bar H$ of
            all data, $\frac{B}{B-1} \sum_b w_b \|H_b - H\|_F^2$: unbiased for independent examples, since a batch of
            weight $w$ then has variance $\sigma^2 / w$. The mean $H$ itself has $1/B$ of it.
        batch_sharpness: Mean over batches of $g_b^\top H_b g_b / \|g_b\|^2$, each counted once, as a step of SGD does.
            Training with SGD at the learning rate $\eta$ is said to end near $2/\eta$.
        overlap: Mean over pairs of batches of $\|V_a^\top V_b\|_F^2 / k$, in [0, 1].
        chance_overlap: The same for random subspaces, $k/n$.
    """

    space: _names.SpaceName
    batches: list[BatchCurvature]
    largest: Spread
    trace: Spread
    whole: Eigenvalue
    variance: TraceEstimate
    batch_sharpness: float | None
    overlap: float
    chance_overlap: float


class _BatchReading(NamedTuple):
    """The results of one batch."""

    weight: float
    largest: Eigenvalue
    vectors: Tensor
    products: Tensor
    directional: float | None


def batch_statistics(
    operator: CurvatureOperator,
    *,
    probes: int = 8,
    top: int = 1,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> BatchNoise:
    r"""Measure how much the Hessian differs between the operator's batches.

    Holds ``probes + top`` vectors of every batch, on the CPU.

    Args:
        operator: A Hessian over at least two batches with labels.
        probes: Random vectors for traces and distances, at least 2.
        top: Dimension $k$ of the leading subspaces that are compared, in [1, n].
        tol: Relative residual at which an eigenpair has converged.
        seed: Seed of the random vectors.
        progress: Called after each batch.

    Raises:
        InputError: If a number is out of range, or there are fewer than two batches.
    """
    check_whole("probes", probes, low=2)
    check_whole("top", top, low=1)
    size, total = operator.shape[0], num_batches(operator.batches) or 0
    signs = random_signs((probes, size), seeded_generator(seed), operator.dtype, operator.device)
    readings: list[_BatchReading] = []
    for weight, batch in operator.per_batch():
        if weight:
            readings.append(_read(weight, batch, signs, top, tol, seed))
            if progress is not None:
                progress("mini-batches", len(readings), total)
    if len(readings) < 2:
        raise InputError(f"batches must contain at least two batches with labels; got {len(readings)}")
    whole = operator.top_eigenpairs(top, tol=tol, seed=seed)
    return _combined(operator.space.kind, readings, whole, signs.cpu())


def distances(products: Sequence[Float[Tensor, "p n"]], weights: Float[Tensor, " b"]) -> Float[Tensor, "b p"]:
    r"""Return $\|(H_b - H)\, z\|^2$ for every batch and random vector; its mean over vectors is $\|H_b - H\|_F^2$."""
    mean = torch.zeros_like(products[0])
    for weight, product in zip(weights.tolist(), products, strict=True):
        mean.add_(product, alpha=weight)
    return torch.stack([(product - mean).double().square().sum(1) for product in products])


def subspace_overlap(one: Float[Tensor, "n k"], other: Float[Tensor, "n k"]) -> float:
    r"""Return $\|V_a^\top V_b\|_F^2 / k$: 1 for the same subspace, 0 for orthogonal ones, $k/n$ by chance."""
    return float((one.mT @ other).double().square().sum()) / one.shape[1]


def _read(
    weight: float, batch: CurvatureOperator, signs: Tensor, top: int, tol: float, seed: int
) -> _BatchReading:
    pairs = batch.top_eigenpairs(top, tol=tol, seed=seed)
    products = torch.stack([(batch @ sign).cpu() for sign in signs])
    gradient = batch.gradient()
    norm = float(gradient.double().norm())
    directional = None
    if norm > 0:
        direction = gradient / norm
        directional = float(direction.double() @ (batch @ direction).double())
    return _BatchReading(float(weight), pairs.eigenvalues[0], pairs.vectors.cpu(), products, directional)


def _combined(
    space: _names.SpaceName, readings: list[_BatchReading], whole: Eigenpairs, signs: Tensor
) -> BatchNoise:
    probes = len(signs)
    weights = torch.tensor([reading.weight for reading in readings], dtype=torch.float64)
    weights /= weights.sum()
    away = distances([reading.products for reading in readings], weights)
    traces = torch.stack([(reading.products.double() * signs.double()).sum(1) for reading in readings])
    batches = [
        BatchCurvature(weight, reading.largest, trace, reading.directional)
        for weight, reading, trace in zip(weights.tolist(), readings, means_of(traces, probes), strict=True)
    ]
    directional = [reading.directional for reading in readings if reading.directional is not None]
    pairs = combinations([reading.vectors for reading in readings], 2)
    return BatchNoise(
        space=space,
        batches=batches,
        largest=_spread(batches, [batch.largest.value for batch in batches]),
        trace=_spread(batches, [batch.trace.value for batch in batches]),
        whole=whole.eigenvalues[0],
        variance=mean_of((_sampling(len(readings)) * (weights @ away)).tolist(), probes),
        batch_sharpness=fmean(directional) if directional else None,
        overlap=fmean(subspace_overlap(one, other) for one, other in pairs),
        chance_overlap=whole.vectors.shape[1] / whole.vectors.shape[0],
    )


def _spread(batches: list[BatchCurvature], values: list[float]) -> Spread:
    shares = [batch.weight for batch in batches]
    mean = math.fsum(share * value for share, value in zip(shares, values, strict=True))
    square = math.fsum(share * (value - mean) ** 2 for share, value in zip(shares, values, strict=True))
    return Spread(mean, math.sqrt(_sampling(len(values)) * square))


def _sampling(count: int) -> float:
    # Bessel's correction; also right for batches of different sizes, see the variance of `BatchNoise`
    return count / (count - 1)
