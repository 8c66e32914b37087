r"""How much of a gradient one adapter can follow, from the products $(U^\top G,\; G V^\top)$ alone.

Pure functions of one layer's factors, in float64 whatever comes in. For a DoRA layer, whose factors move the weight by
$D\,(s B A)$ with a diagonal $D$, pass $D B$ for $B$.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.geometry.gram import eigendecompose, gram, relative_cutoff
from tangora.geometry.tangent import Coordinates, Frame, frame, project, squared_norm


class EquivalentGradient(NamedTuple):
    r"""What plain LoRA's first-order step $\tilde g = s^2 (B B^\top G + G A^\top A)$ has to do with $G$."""

    inner: float
    r"""$\langle \tilde g, G \rangle \ge 0$."""
    squared_norm: float
    r"""$\|\tilde g\|_F^2$."""


def bases(A: FactorA, B: FactorB) -> Frame:
    r"""Build the orthonormal bases $U$ of $B$'s columns and $V$ of $A$'s rows.

    The gradient is read along these rather than along the factors, whose condition number would multiply the rounding
    errors of the products. A zero factor has zero bases.
    """
    return frame(A.double(), B.double())


def captured(at: Frame, seen: Coordinates) -> float:
    r"""Return $\|P_T(G)\|_F^2$, the energy of the gradient that the adapter can follow.

    A factor that is zero has no directions: with $B = 0$ this is $\|G P_A\|_F^2$.

    Source:
        LoRA-Pro, arXiv:2407.18242, theorem 2.1.
    """
    return float(squared_norm(project(at, Coordinates(seen.left.double(), seen.right.double()))))


def captured_share(energy: float, total: float) -> float:
    r"""Return $\kappa = \|P_T(G)\|_F^2 / \|G\|_F^2$."""
    return min(energy / total, 1.0) if total > 0 else 0.0


def equivalent_gradient(
    A: FactorA,
    B: FactorB,
    at: Frame,
    seen: Coordinates,
    *,
    scaling: float,
    row_scale: Float[Tensor, " m"] | None = None,
) -> EquivalentGradient:
    r"""Compare plain LoRA's equivalent gradient with the full one.

    Its cosine with $G$ is $\langle \tilde g, G\rangle / (\|\tilde g\| \|G\|)$; that of the projection $P_T(G)$ is
    $\sqrt\kappa$, and no adapter of the same subspaces has a larger one.
    """
    A, B = A.double(), B.double()
    left, right = _through_factors(A, B, at, seen)
    pushed = right if row_scale is None else right * row_scale.double()[:, None] ** 2
    # g~ / s^2 = B left + pushed A; all products are r x r
    inner = left.square().sum() + (pushed * right).sum()
    norm = (
        (gram(B.mT) * gram(left)).sum()
        + 2 * ((B.mT @ pushed) * (left @ A.mT)).sum()
        + (gram(pushed.mT) * gram(A)).sum()
    )
    return EquivalentGradient(float(inner) * scaling**2, max(float(norm), 0.0) * scaling**4)


def factor_gradient_norms(
    A: FactorA,
    B: FactorB,
    at: Frame,
    seen: Coordinates,
    *,
    scaling: float,
    row_scale: Float[Tensor, " m"] | None = None,
) -> tuple[float, float]:
    r"""Return the Frobenius norms of $\partial L / \partial A = s B^\top G$ and $\partial L / \partial B = s G A^\top$.

    They depend on the gauge: $(B R, R^{-1} A)$ is the same weight with other norms.
    """
    left, right = _through_factors(A.double(), B.double(), at, seen)
    right = right if row_scale is None else right * row_scale.double()[:, None]
    norms = torch.linalg.matrix_norm(left), torch.linalg.matrix_norm(right)
    return abs(scaling) * float(norms[0]), abs(scaling) * float(norms[1])


def _through_factors(A: FactorA, B: FactorB, at: Frame, seen: Coordinates) -> tuple[Tensor, Tensor]:
    # B' G and G A' from U' G and G V'
    return (B.mT @ at.U) @ seen.left.double(), seen.right.double() @ (at.V @ A.mT)


def cosine(equivalent: EquivalentGradient, total: float) -> float | None:
    r"""Return the cosine of $\tilde g$ and $G$."""
    if not (equivalent.squared_norm > 0 and total > 0):
        return None
    return min(equivalent.inner / math.sqrt(equivalent.squared_norm * total), 1.0)


def condition_number(factor: FactorA) -> float | None:
    r"""Return the ratio of the extreme eigenvalues of $F F^\top$, which LoRA-Pro and its like invert."""
    values = eigendecompose(gram(factor)).values
    smallest, largest = float(values[0]), float(values[-1])
    cutoff = relative_cutoff(factor.shape[-2], factor.dtype)
    return largest / smallest if smallest > cutoff * largest else None


def effective_rank(A: FactorA, B: FactorB) -> float:
    r"""Return the effective rank of $B A$, see `entropy_rank`."""
    core = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().mT).R.mT
    return entropy_rank(torch.linalg.svdvals(core))


def entropy_rank(values: Float[Tensor, " k"]) -> float:
    r"""Return the exponential of the entropy of singular values $\sigma_i / \sum_j \sigma_j$; 0 for a zero matrix.

    Source:
        Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality".
    """
    if not values[0] > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def imbalance_norms(A: FactorA, B: FactorB) -> tuple[float, float]:
    r"""Return $\|B^\top B - A A^\top\|_F$ and its ratio to $\|B^\top B\|_F + \|A A^\top\|_F$."""
    gram_A, gram_B = gram(A), gram(B.mT)
    norm = float(torch.linalg.matrix_norm(gram_B - gram_A))
    scale = float(torch.linalg.matrix_norm(gram_B) + torch.linalg.matrix_norm(gram_A))
    return norm, norm / scale if scale > 0 else 0.0
