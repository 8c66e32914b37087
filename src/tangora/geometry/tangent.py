r"""The tangent space of the rank-r matrices at $Y = B A$, computed only with thin matrices.

Convention: the adapted weight is $W = W_0 + s B A$ and $g = \partial L/\partial W$. Autograd gives
$g_A = s B^\top g$ and $g_B = s\, g A^\top$; divided by $s$ they are the **cotangent** $(B^\top g,\; g A^\top)$, all
that LoRA training ever sees of $g$. Nothing here depends on $s$, and nothing of size $m \times m$, $n \times n$ or
$m \times n$ is formed (but for functions whose argument already is $m \times n$).

Tangent vectors are held in orthonormal bases, $\xi = U K + J V$ with $U^\top J = 0$, where $U$ spans the columns of
$B$ and $V$ the rows of $A$. They stay of the size of $\xi$ when $B$ or $A$ shrinks to zero, and they are the same in
every gauge $(B, A) \to (B R, R^{-1} A)$ up to a rotation.

Source: Vandereycken (2013), arXiv:1209.3834, section 2, for the fixed-rank manifold.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora._types import Core, FactorA, FactorB, Weight
from tangora.geometry.gram import gram, plus, plus_times, relative_cutoff, times, whiten


class Frame(NamedTuple):
    r"""Orthonormal bases at $(B, A)$: $U = B\,Z_B$ and $V = Z_A^\top A$.

    Directions in which a factor vanishes have zero columns in $U$ and $Z_B$ (zero rows in $V$, zero columns in $Z_A$).
    """

    U: FactorB
    V: FactorA
    whiten_A: Core
    whiten_B: Core


class Cotangent(NamedTuple):
    r"""A matrix $M$ in the form of LoRA's gradients, $(B^\top M,\; M A^\top)$; determines $P_T(M)$ uniquely."""

    A: FactorA
    B: FactorB


class Coordinates(NamedTuple):
    r"""The same in the frame's orthonormal bases, $(U^\top M,\; M V^\top)$."""

    left: FactorA
    right: FactorB


class Tangent(NamedTuple):
    r"""A tangent vector $\xi = U K + J V$ with $U^\top J = 0$."""

    K: FactorA
    J: FactorB


class Metric(NamedTuple):
    r"""A diagonal metric $\langle Z, D_r Z D_c \rangle$ on the weights; both diagonals positive."""

    rows: Float[Tensor, "*b m"]
    columns: Float[Tensor, "*b n"]


def frame(A: FactorA, B: FactorB) -> Frame:
    r"""Build the orthonormal bases of the row space of $A$ and the column space of $B$.

    Args:
        A: $r \times n$ factor, floating point.
        B: $m \times r$ factor.

    Returns:
        The frame, in the factors' dtype. Zero and rank-deficient factors are allowed.
    """
    cutoff = relative_cutoff(A.shape[-2], A.dtype)
    whiten_A = whiten(gram(A), cutoff).to(A.dtype)
    whiten_B = whiten(gram(B.mT), cutoff).to(B.dtype)
    return Frame(times(B, whiten_B), whiten_A.mT @ A, whiten_A, whiten_B)


def coordinates(at: Frame, cotangent: Cotangent) -> Coordinates:
    r"""Express LoRA's gradients in the orthonormal bases.

    Args:
        cotangent: $(B^\top M,\; M A^\top)$; for a gradient that is $(g_A, g_B)/s$.

    Returns:
        $(U^\top M,\; M V^\top)$.
    """
    return Coordinates(at.whiten_B.mT @ cotangent.A, times(cotangent.B, at.whiten_A))


def project(at: Frame, seen: Coordinates) -> Tangent:
    r"""Project a gradient onto the tangent space.

    $P_T(g) = P_B g + g P_A - P_B g P_A$, the equivalent gradient nearest to $g$: $K = U^\top g$ and
    $J = (I - U U^\top)\, g V^\top$.

    Source:
        LoRA-Pro, arXiv:2407.18242, Theorem 2.1 (any gauge gives this matrix).
    """
    return Tangent(seen.left, plus_times(seen.right, at.U, seen.left @ at.V.mT, scale=-1.0))


def project_metric(at: Frame, seen: Coordinates, metric: Metric) -> Tangent:
    r"""Precondition a gradient with a diagonal metric and project it in that metric.

    The result minimises $\|\xi - H^{-1} g\|_H$ over the tangent space for $H(Z) = D_r Z D_c$: the ordinary projection
    in the coordinates $D_r^{1/2} Z D_c^{1/2}$. With $D_r = D_c = 1$ it is `project`.

    Source:
        Closed form as in AdaPreLoRA, arXiv:2605.08734; derivation in ``docs/theory/tangent_adam.md``.
    """
    # normal equations  U' H(xi) = U' g  and  H(xi) V' = g V'  for xi = U K + J V
    gram_left = _inverse(at.U.mT @ (at.U * metric.rows[..., :, None]))
    gram_right = _inverse((at.V * metric.columns[..., None, :]) @ at.V.mT)
    left, right = seen.left / metric.columns[..., None, :], seen.right / metric.rows[..., :, None]
    along = at.U.mT @ right
    shared = (along - gram_left @ (seen.left @ at.V.mT)) @ gram_right
    K = plus(gram_left @ left, shared, at.V, fresh=True)
    return Tangent(K, times(plus_times(right, at.U, along, scale=-1.0, fresh=True), gram_right))


def _inverse(weighted_gram: Core) -> Core:
    # pseudo-inverse: directions that the frame lacks stay out
    cutoff = relative_cutoff(weighted_gram.shape[-1], weighted_gram.dtype)
    whitening = whiten(weighted_gram.double(), cutoff)
    return (whitening @ whitening.mT).to(weighted_gram.dtype)


def transport(at: Frame, cotangent: Cotangent, A: FactorA, B: FactorB) -> Cotangent:
    r"""Transport a tangent vector to new factors by projection.

    Args:
        at: Frame at the old factors.
        cotangent: $(B^\top M,\; M A^\top)$ of the tangent vector $M$ there.

    Returns:
        $(B_+^\top M,\; M A_+^\top)$, which determine $P_{T_+}(M)$.
    """
    # M = U K + R V - U C V with K = Z_B' (B' M), R = (M A') Z_A, C = K V'
    to_left, to_right = at.whiten_B.mT, at.whiten_A
    core = to_left @ (cotangent.A @ at.V.mT)
    from_V, from_U = at.V @ A.mT, B.mT @ at.U
    along_V = (B.mT @ cotangent.B) @ to_right - from_U @ core
    along_U = to_left @ (cotangent.A @ A.mT) - core @ from_V
    return Cotangent(
        plus((from_U @ to_left) @ cotangent.A, along_V, at.V, fresh=True),
        plus_times(times(cotangent.B, to_right @ from_V), at.U, along_U, fresh=True),
    )


def second_moments(at: Frame, seen: Coordinates) -> tuple[Float[Tensor, "*b m"], Float[Tensor, "*b n"]]:
    r"""Return the row and column means of $P_T(g) \circ P_T(g)$ from the factors, in $O((m + n) r^2)$.

    With $K = U^\top g$, $R = g V^\top$ and $C = U^\top g V^\top$ the row sums are the diagonals of
    $R R^\top + U (K K^\top - C C^\top) U^\top$, the column sums those of $K^\top K + V^\top (R^\top R - C^\top C) V$.

    Returns:
        Means over each row ($m$ numbers) and over each column ($n$ numbers).
    """
    U, V, (left, right) = at.U, at.V, seen
    core = left @ V.mT
    outside_V = left @ left.mT - core @ core.mT
    outside_U = right.mT @ right - core.mT @ core
    rows = times(U, outside_V).mul_(U).addcmul_(right, right).sum(-1)
    columns = (outside_U @ V).mul_(V).addcmul_(left, left).sum(-2)
    # the sums are non-negative; rounding may leave a row without gradient just below zero
    return rows.clamp(min=0) / V.shape[-1], columns.clamp(min=0) / U.shape[-2]


def squared_norm(tangent: Tangent) -> Float[Tensor, "*b"]:
    r"""Return $\|\xi\|_F^2 = \|K\|_F^2 + \|J\|_F^2$.

    A frame's zero rows and columns carry nothing.
    """
    return tangent.K.square().sum((-2, -1)) + tangent.J.square().sum((-2, -1))


def captured_energy(tangent: Tangent, gradient_norm: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    r"""Return $\kappa = \|P_T(g)\|_F^2 / \|g\|_F^2$, the share of the gradient in the adapter's tangent space.

    Returns:
        $\kappa \in [0, 1]$; zero where the gradient vanishes.
    """
    share = squared_norm(tangent) / gradient_norm.square()
    return share.nan_to_num(nan=0.0, posinf=0.0).clamp(max=1)


def alignment_error(tangent: Tangent, gradient_norm: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    r"""Return $\varepsilon = \|g - P_T(g)\|_F$ by Pythagoras.

    Returns:
        $\varepsilon$, in the gradient's units; accurate to $\sqrt{\mathrm{eps}}\,\|g\|$ (see `residual` for better).
    """
    return (gradient_norm.square() - squared_norm(tangent)).clamp(min=0).sqrt()


def residual(at: Frame, gradient: Weight) -> Weight:
    r"""Return $g - P_T(g) = (I - P_B)\, g\, (I - P_A)$ of a dense gradient, without cancellation.

    Returns:
        What no LoRA step can follow; its Frobenius norm is the alignment error.
    """
    left = gradient - at.U @ (at.U.mT @ gradient)
    return left - (left @ at.V.mT) @ at.V


def dense_captured_energy(at: Frame, gradient: Weight) -> Float[Tensor, "*b"]:
    r"""Return $\kappa$ of a dense gradient, see `captured_energy`."""
    K = at.U.mT @ gradient
    across = gradient @ at.V.mT
    seen = Tangent(K, across - at.U @ (at.U.mT @ across))
    return captured_energy(seen, torch.linalg.matrix_norm(gradient))
