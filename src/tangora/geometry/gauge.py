r"""From a tangent vector to velocities of the factors: the gauge freedom of LoRA.

Every $(H_A, H_B) = (K_B + X A,\; J_A - B X)$ with $K_B = G_B^+ B^\top g$, $J_A = (I - P_B)\, g A^\top G_A^+$ and any
$r \times r$ matrix $X$ moves $B A$ by the same $P_T(g)$ to first order. The gauge $X$ decides what happens to the
factors. For $W = W_0 + s B A$ the velocities are these divided by $s$.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from tangora._types import Core, FactorA, FactorB
from tangora.geometry.gram import (
    cholesky_inverse,
    eigendecompose,
    gram,
    plus,
    plus_times,
    relative_cutoff,
    times,
)
from tangora.geometry.guess import is_guessing
from tangora.geometry.tangent import Frame, Tangent

Gauge = Literal["zero", "symmetric", "sylvester", "lyapunov"]
GAUGES: tuple[Gauge, ...] = get_args(Gauge)

# Rounding is reached with eight for joint condition numbers of 1e24; scaling must end before the last, quadratic ones.
_SIGN_STEPS = 10
_SIGN_SCALED = 6


def factor_velocity(
    A: FactorA, B: FactorB, at: Frame, tangent: Tangent, gauge: Gauge
) -> tuple[FactorA, FactorB]:
    r"""Return $(H_A, H_B)$ with $B H_A + H_B A = \xi$ in the chosen gauge.

    Args:
        tangent: $\xi$, usually $P_T(g)$.
        gauge: ``zero`` ($X = 0$), ``symmetric`` ($H_A = K_B (I - P_A/2)$, and likewise for $B$), ``sylvester`` (the
            velocity of least norm, which keeps $B^\top B - A A^\top$; LoRA-Pro's default) or ``lyapunov`` (keeps
            $B^\top B - A A^\top$ too, with symmetric $X$).

    Returns:
        $(H_A, H_B)$, shaped like $(A, B)$, for $s = 1$.

    Source:
        LoRA-Pro, arXiv:2407.18242, Theorems 2.1 and 2.3; Lyapunov: derivation in ``docs/theory/lora_pro.md``.
    """
    H_A = at.whiten_B @ tangent.K
    H_B = times(tangent.J, at.whiten_A.mT)
    if gauge == "zero":
        return H_A, H_B
    X = _gauge_matrix(A, B, at, H_A @ A.mT, gauge)
    return plus(H_A, X, A, fresh=True), plus_times(H_B, B, X, scale=-1.0, fresh=True)


def _gauge_matrix(A: FactorA, B: FactorB, at: Frame, drift: Core, gauge: Gauge) -> Core:
    # drift = G_B^+ (B^T g A^T): the overlap that both factors could carry, and that the gauge shares out
    if gauge == "symmetric":
        return -0.5 * drift @ (at.whiten_A @ at.whiten_A.mT)
    gram_A, gram_B, drift64 = gram(A), gram(B.mT), drift.double()
    cutoff = relative_cutoff(A.shape[-2], A.dtype)
    if gauge == "sylvester":
        return _solve_sylvester(gram_B, gram_A, -drift64, cutoff).to(drift.dtype)
    total = gram_A + gram_B
    return _solve_sylvester(total, total, -(drift64 + drift64.mT), cutoff).to(drift.dtype)


def _solve_sylvester(left: Core, right: Core, constant: Core, cutoff: float) -> Core:
    r"""Solve $L X + X R = C$ for symmetric positive semi-definite $L$ and $R$.

    Exact, by the two eigendecompositions; directions in which both vanish get the least-norm solution, zero. Guessing,
    when both are definite, by `_sylvester_by_sign`: a GPU decomposes large matrices one by one.

    Args:
        cutoff: Sums of eigenvalues up to this share of the largest count as zero.
    """
    if is_guessing():
        return _sylvester_by_sign(left, right, constant)
    of_left = eigendecompose(left)
    of_right = of_left if right is left else eigendecompose(right)  # Lyapunov's equation has one matrix
    (l_values, l_vectors), (r_values, r_vectors) = of_left, of_right
    sums = l_values[..., :, None] + r_values[..., None, :]
    rotated = l_vectors.mT @ constant @ r_vectors
    solved = (rotated / sums).where(sums > cutoff * sums.amax((-2, -1), keepdim=True), 0.0)
    return l_vectors @ solved @ r_vectors.mT


def _sylvester_by_sign(left: Core, right: Core, constant: Core) -> Core:
    r"""Solve $L X + X R = C$ for positive definite $L$ and $R$ by Newton's iteration for the sign of a block matrix.

    $\mathrm{sign}\begin{pmatrix} L & -C \\ 0 & -R \end{pmatrix}$ has $-2X$ in its corner. Scaled by norms, the
    number of steps that reaches rounding is the same for all condition numbers that `whiten` lets pass.

    Source:
        Roberts (1980), Linear model reduction and solution of the algebraic Riccati equation by use of the sign
        function; scaling: Higham (2008), Functions of Matrices, section 5.5.
    """
    X = constant
    for index in range(_SIGN_STEPS):
        L_inverse, R_inverse = cholesky_inverse(left), cholesky_inverse(right)
        scale = 1.0
        if index < _SIGN_SCALED:
            largest = torch.maximum(_norm(left), _norm(right))
            scale = (torch.maximum(_norm(L_inverse), _norm(R_inverse)) / largest).sqrt()
        X = (scale * X + L_inverse @ X @ R_inverse / scale) / 2
        left, right = (scale * left + L_inverse / scale) / 2, (scale * right + R_inverse / scale) / 2
    return X / 2


def _norm(matrix: Core) -> Tensor:
    return torch.linalg.matrix_norm(matrix, keepdim=True)


def imbalance(A: FactorA, B: FactorB) -> Core:
    r"""Return $B^\top B - A A^\top$, the invariant of gradient flow on the factors, in float64."""
    return gram(B.mT) - gram(A)
