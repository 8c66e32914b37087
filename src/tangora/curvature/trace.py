r"""Trace and Frobenius norm of a symmetric operator from products with random vectors.

Hutchinson: $\operatorname{tr} H = \mathbb{E}\, z^\top H z$ for random signs $z$; the error falls as $N^{-1/2}$.
Hutch++: some of the products find an orthonormal $Q$ that captures the leading eigenvectors and give
$\operatorname{tr} Q^\top H Q$ exactly, the others estimate the rest, $(I - QQ^\top) H (I - QQ^\top)$: where the
spectrum has outliers the error is far smaller.

Source: Hutchinson (1990), Commun. Stat. Simul. Comput. 19; Meyer, Musco, Musco, Woodruff (2021), arXiv:2010.09649, with
the Krylov space of Chen and Hallman (2023), arXiv:2205.01736, in place of a sketch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from tangora._checks import check_number, check_whole
from tangora._types import Progress
from tangora.curvature.lanczos import Krylov
from tangora.curvature.products import Matrix, Products, dot, norm, orthogonalize, seeded_generator


@dataclass(frozen=True)
class TraceEstimate:
    """A trace, or another mean over random vectors."""

    value: float
    standard_error: float | None
    """Standard deviation of the estimate, itself estimated; ``None`` for a single sample."""
    products: int
    """Products with the operator that were made."""
    samples: int = 1
    """Independent samples that the standard error comes from; 1 where a record does not tell."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval, by Student's distribution: with few samples the error is uncertain too.

        Args:
            level: Probability, in (0, 1), that the interval holds the true number.

        Returns:
            Its two ends; infinite for a single sample.

        Raises:
            InputError: If ``level`` is out of range.
        """
        check_number("level", level, low=0, high=1, open_low=True, open_high=True)
        if self.samples < 2 or self.standard_error is None:
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + level) / 2, self.samples - 1)) * self.standard_error
        return self.value - half, self.value + half

    def scaled(self, factor: float) -> "TraceEstimate":
        """Return the estimate of a multiple."""
        error = self.standard_error
        return TraceEstimate(
            factor * self.value, None if error is None else factor * error, self.products, self.samples
        )

    def root(self) -> "TraceEstimate":
        r"""Return the estimate of the root, with its error to first order, $\sigma / (2 \sqrt{x})$."""
        root, error = math.sqrt(self.value), self.standard_error
        if error is not None and root > 0:
            error /= 2 * root
        return TraceEstimate(root, error, self.products, self.samples)


def mean_of(samples: Sequence[float], products: int) -> TraceEstimate:
    """Average independent samples that took so many products."""
    values = torch.tensor(samples, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(samples)) if len(samples) > 1 else None
    return TraceEstimate(float(values.mean()), error, products, len(samples))


def means_of(samples: Float[Tensor, "b p"], products: int) -> list[TraceEstimate]:
    """Average the independent samples in each row, which all took so many products."""
    samples = samples.double()
    errors = (samples.std(-1) / samples.shape[-1] ** 0.5).tolist()
    pairs = zip(samples.mean(-1).tolist(), errors, strict=True)
    return [TraceEstimate(mean, error, products, samples.shape[-1]) for mean, error in pairs]


def hutchinson(
    operator: Matrix, *, products: int = 60, seed: int = 0, progress: Progress | None = None
) -> TraceEstimate:
    """Estimate a trace by Hutchinson's method.

    Args:
        operator: See `tangora.curvature.lanczos_eigenpairs`.
        products: Number of random vectors, at least 2.
        seed: Seed of the random vectors.
        progress: Called after each product.

    Returns:
        An unbiased estimate; exact for a diagonal operator.

    Raises:
        InputError: If a number is out of range or a product is not finite.
    """
    check_whole("products", products, low=2)
    product, generator = Products(operator, products, "trace", progress), seeded_generator(seed)
    samples = []
    for _ in range(products):
        signs = product.signs(generator)
        samples.append(dot(signs, product(signs)))
    return mean_of(samples, product.count)


def hutch_plus_plus(
    operator: Matrix, *, products: int = 60, seed: int = 0, progress: Progress | None = None
) -> TraceEstimate:
    r"""Estimate a trace by Hutch++ with a Krylov space.

    Half of the products build $Q$ by the Lanczos iteration, which gives $Q^\top H Q$ with it: a sketch of as many
    columns would need as many products again, and captures less. The other half are samples of the rest. Holds half as
    many vectors as there are products.

    Args:
        operator: See `tangora.curvature.lanczos_eigenpairs`.
        products: Budget, at least 4; from twice the operator's dimension $n$ on the trace is exact, with $n$ products.
        seed: Seed of the random vectors.
        progress: Called after each product.

    Returns:
        An unbiased estimate. Its standard error is that of the samples, given what the Krylov space captured.

    Raises:
        InputError: If a number is out of range or a product is not finite.
    """
    captured = _Captured(operator, products, seed, "trace", progress)
    return captured.estimate(float(captured.krylov.diagonal.sum()), dot)


def frobenius_norm(
    operator: Matrix, *, products: int = 60, seed: int = 0, progress: Progress | None = None
) -> TraceEstimate:
    r"""Estimate $\|H\|_F$ in the same way.

    $\|H\|_F^2 = \|H Q\|_F^2 + \mathbb{E}\,\|H (I - QQ^\top) z\|^2$, where the Lanczos iteration gives
    $\|H Q\|_F^2 = \|T\|_F^2 + \beta_m^2$.

    Args:
        operator: See `tangora.curvature.lanczos_eigenpairs`.
        products: Budget, at least 4; from $2n$ on the norm is exact, with $n$ products.
        seed: Seed of the random vectors.
        progress: Called after each product.

    Returns:
        The root of an unbiased estimate of the square, with its error to first order. From few samples it is skewed:
        95 % intervals from 20 products held the truth in 87 % of 1000 trials, those from 60 in 95 %
        (``benchmarks/spectra.json``).

    Raises:
        InputError: If a number is out of range or a product is not finite.
    """
    captured = _Captured(operator, products, seed, "norm", progress)
    small = captured.krylov
    inside = float(small.diagonal.square().sum() + 2 * small.off_diagonal.square().sum()) + small.remainder**2
    return captured.estimate(inside, lambda _, image: norm(image) ** 2).root()


class _Captured:
    """A Krylov space made with half of the products; the others are samples of what it leaves out."""

    def __init__(self, operator: Matrix, products: int, seed: int, what: str, progress: Progress | None):
        check_whole("products", products, low=4)
        self._product = Products(operator, products, what, progress)
        self._generator = seeded_generator(seed)
        dimension = min(products // 2, self._product.size)
        start = self._product.signs(self._generator)
        self.krylov = Krylov(self._product, dimension, start).tridiagonalize(dimension)

    def estimate(self, inside: float, sample: Callable[[Tensor, Tensor], float]) -> TraceEstimate:
        product = self._product
        if product.count == product.size:
            return TraceEstimate(inside, 0.0, product.count, product.count)
        samples = []
        for _ in range(product.total - product.count):
            outside = product.signs(self._generator)
            orthogonalize(outside, self.krylov.basis)
            samples.append(sample(outside, product(outside)))
        rest = mean_of(samples, product.count)
        return TraceEstimate(inside + rest.value, rest.standard_error, product.count, rest.samples)
