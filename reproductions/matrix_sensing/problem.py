r"""Matrix sensing: find $W_\star$ of rank $r_\star$ from $y_i = \langle M_i, W_\star \rangle$ with Gaussian $M_i$.

Problems come as a stack of shape (seeds, condition numbers). Those of one seed share their measurements, so that
$\nabla L(W) = \sum_i \langle M_i, W - W_\star \rangle M_i$, a product with one $mn \times mn$ matrix, is evaluated for
all condition numbers at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import Weight
from tangora.geometry.retraction import Factors


class Problems(NamedTuple):
    """A stack of problems."""

    target: Float[Tensor, "s c m n"]
    r"""$W_\star$, float64, largest singular value one."""
    gram: Float[Tensor, "s mn mn"] | None
    r"""$H = \sum_i \mathrm{vec}(M_i)\, \mathrm{vec}(M_i)^\top$ of each seed, or ``None`` for $H = I$."""

    def gradient(self, W: Weight) -> Weight:
        r"""Return the gradient of $L(W) = \frac12 \sum_i \langle M_i, W - W_\star \rangle^2$, for each problem."""
        return self._apply(W - self.target)

    def error(self, W: Weight) -> Float[Tensor, "s c"]:
        r"""Return $\|W - W_\star\|_F / \|W_\star\|_F$ for each problem."""
        return torch.linalg.matrix_norm(W - self.target) / torch.linalg.matrix_norm(self.target)

    def backprojection(self) -> Weight:
        r"""Return $\sum_i y_i M_i$, whose mean over the measurements is $W_\star$."""
        return self._apply(self.target)

    def single(self, seed: int, condition: int) -> "Problems":
        """Return one problem of the stack, by row and column, as a stack of one."""
        gram = None if self.gram is None else self.gram[seed : seed + 1]
        return Problems(self.target[seed : seed + 1, condition : condition + 1], gram)

    def _apply(self, W: Weight) -> Weight:
        return W if self.gram is None else (self.gram @ W.flatten(-2).mT).mT.reshape(W.shape)


def measurements(num: int, size: int, generator: torch.Generator) -> Float[Tensor, "num size"]:
    r"""Draw $M_i$ with independent normal entries of variance one over their number, one flattened $M_i$ per row."""
    return _normal(num, size, generator) / num**0.5


def draw_problems(
    m: int, n: int, rank: int, conditions: Sequence[float], num_measurements: int | None, seeds: Sequence[int]
) -> Problems:
    r"""Draw problems whose singular values are spaced evenly in the logarithm.

    Args:
        m: Rows.
        n: Columns.
        rank: $r_\star$.
        conditions: $\sigma_1 / \sigma_{r_\star}$ of $W_\star$, by column of the stack; singular vectors are the same.
        num_measurements: $N$; ``None`` for the exact quadratic $\frac12 \|W - W_\star\|_F^2$.
        seeds: Seeds, by row of the stack.
    """
    targets, grams = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.linalg.qr(_normal(size, rank, generator)).Q for size in (m, n))
        share = torch.linspace(0, -1, rank, dtype=torch.float64) if rank > 1 else torch.zeros(1).double()
        values = torch.stack([float(condition) ** share for condition in conditions])
        targets.append((left * values[:, None, :]) @ right.mT)
        if num_measurements is not None:
            rows = measurements(num_measurements, m * n, generator)
            grams.append(rows.mT @ rows)
    return Problems(torch.stack(targets), torch.stack(grams) if grams else None)


def spectral_start(problems: Problems, rank: int) -> Factors:
    r"""Return balanced factors of the best approximation of $\sum_i y_i M_i$ of a rank that may exceed $r_\star$."""
    return _balanced(problems.backprojection(), rank)


def nearby_start(problems: Problems, rank: int, share: float, seed: int) -> Factors:
    r"""Return balanced factors of a matrix near the target, disturbed by a share of $\sigma_{r_\star}(W_\star)$."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(problems.target.shape, generator=generator, dtype=torch.float64)
    smallest = torch.linalg.svdvals(problems.target)[..., rank - 1, None, None]
    return _balanced(
        problems.target + share * smallest * noise / torch.linalg.matrix_norm(noise, keepdim=True), rank
    )


def random_start(problems: Problems, rank: int, size: float, seed: int) -> Factors:
    r"""Return random factors, with entries $N(0, \mathrm{size}^2 / n)$ in A and $N(0, \mathrm{size}^2 / m)$ in B.

    The rows of the stack differ; the condition numbers share their start.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, m, n = problems.target.shape
    A = torch.randn(rows, 1, rank, n, generator=generator, dtype=torch.float64) * size / n**0.5
    B = torch.randn(rows, 1, m, rank, generator=generator, dtype=torch.float64) * size / m**0.5
    return Factors(A.repeat(1, columns, 1, 1), B.repeat(1, columns, 1, 1))


def _balanced(W: Weight, rank: int) -> Factors:
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    root = values[..., :rank].sqrt()
    return Factors(root[..., :, None] * Vh[..., :rank, :], U[..., :, :rank] * root[..., None, :])


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)
