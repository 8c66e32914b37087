r"""What ODELoRA's schemes are made of: the descent of $Y = B A$ at given factors, and the ways back to rank r.

Along the flow $\dot W = -P_T(g)$, restricted to rank r, $W = W_0 + s Y$ gives $\dot Y = -\xi$ with
$\xi = P_T(g) / s + \lambda Y$ for decay $\lambda$. Everything here is a pure function of stacks of equal layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from tangora._types import FactorA, FactorB
from tangora.geometry.gram import times
from tangora.geometry.retraction import Factors, balanced_product, rebalance, svd_retract
from tangora.geometry.tangent import (
    Cotangent,
    Frame,
    Tangent,
    coordinates,
    frame,
    project,
    squared_norm,
)


class Descent(NamedTuple):
    r"""Factors, the frame there, and the tangent vector $\xi$ along which $Y$ descends."""

    A: FactorA
    B: FactorB
    at: Frame
    tangent: Tangent


def descent(A: FactorA, B: FactorB, cotangent: Cotangent, scaling: float, decay: float) -> Descent:
    r"""Return $\xi = P_T(g)/s + \lambda Y$."""
    at = frame(A, B)
    K, J = (part / scaling for part in project(at, coordinates(at, cotangent)))
    if decay:
        K = K + decay * (at.U.mT @ B) @ A
    return Descent(A, B, at, Tangent(K, J))


def balanced_descent(here: Descent) -> Descent:
    """Move a descent to balanced factors of the same product."""
    A, B = rebalance(here.A, here.B)
    (U, V), (K, J) = here.at[:2], here.tangent
    seen = Cotangent((B.mT @ U) @ K, times(U, K @ A.mT) + times(J, V @ A.mT))
    return descent(A, B, seen, 1.0, 0.0)


def is_weak(here: Descent, step: float, guard: float) -> Bool[Tensor, "*b"]:
    r"""Tell where a step is large against the smallest singular value of $Y$.

    The factors' velocities grow like $1/\sigma_r(Y)$, so that such a step leaves the domain of every scheme in the
    factors, however smooth the flow of $Y$ is.
    """
    size = step * squared_norm(here.tangent).sqrt()
    core = (here.at.U.mT @ here.B) @ (here.A @ here.at.V.mT)
    return guard * size > torch.linalg.svdvals(core)[..., -1]


def bug_step(here: Descent, step: float, tolerance: float) -> Factors:
    r"""Take one step of the parallel BUG integrator with a single gradient: $\mathrm{SVD}(Y - h \xi)$, cut.

    Source:
        Ceruti, Kusch, Lubich (2024), parallel BUG, arXiv:2304.05660; GeoLoRA, arXiv:2410.18720, for gradients. That
        its product is $\mathrm{SVD}_r(Y - h P_T g)$ is checked in the tests.
    """
    new = svd_retract(here.A, here.B, here.at, here.tangent, step)
    return cut_ranks(new, tolerance) if tolerance else new


def cut_ranks(factors: Factors, tolerance: float) -> Factors:
    """Set the weakest directions of balanced factors to zero."""
    values = factors.B.norm(dim=-2) * factors.A.norm(dim=-1)
    tails = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    kept = (tails > tolerance * tails[..., :1]) | (tails[..., :1] == 0)
    return Factors(factors.A * kept[..., :, None], factors.B * kept[..., None, :])


def combine(start: Descent, stages: Sequence[Descent], weights: Sequence[float]) -> Factors:
    r"""Return balanced factors of the best rank-r approximation of $Y - \sum_i w_i \xi_i$."""
    left, right = [start.at.U], [(start.at.U.mT @ start.B) @ start.A]
    for stage, weight in zip(stages, weights, strict=True):
        if weight:
            left += [stage.at.U, stage.tangent.J]
            right += [-weight * stage.tangent.K, -weight * stage.at.V]
    rank = start.A.shape[-2]
    return balanced_product(torch.cat(left, -1), torch.cat(right, -2), rank, Factors(start.A, start.B))


def k_step(here: Descent, step: float) -> Factors:
    r"""Take the first substep of the projector-splitting integrator: the column space, at fixed row space.

    Source:
        Lubich & Oseledets (2014), arXiv:1301.1058.
    """
    V, (K, J) = here.at.V, here.tangent
    along = times(here.B, here.A @ V.mT) - step * (J + times(here.at.U, K @ V.mT))
    Q, R = torch.linalg.qr(along)
    return Factors(R @ V, Q)


def s_step(here: Descent, step: float, V: FactorA) -> Factors:
    r"""Take the second substep, backwards in time: the core, at fixed column and row space."""
    return Factors(here.A + step * (_seen_from_B(here) @ V.mT) @ V, here.B)


def l_step(here: Descent, step: float) -> Factors:
    r"""Take the last substep: the row space, at fixed column space."""
    return rebalance(here.A - step * _seen_from_B(here), here.B)


def _seen_from_B(here: Descent) -> FactorA:
    return (here.B.mT @ here.at.U) @ here.tangent.K
