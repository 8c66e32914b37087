r"""Projected Runge-Kutta: explicit Runge-Kutta in the tangent spaces, every stage brought back to rank r by an SVD."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tangora.integrate.force import LowRankField, attempt, project_force
from tangora.integrate.low_rank import LowRank, LowRankState, Truncation, rules, truncate
from tangora.integrate.state import Stepped
from tangora.integrate.tableau import Tableau


class _Thin(NamedTuple):
    """A velocity as a product of thin matrices, left @ right^T."""

    left: Float[Tensor, "m k"]
    right: Float[Tensor, "n k"]


def projected_rk_step(
    field: LowRankField,
    state: LowRankState,
    step_size: float,
    tableau: Tableau,
    *,
    truncation: Truncation | None = None,
) -> Stepped[LowRankState]:
    r"""Take one projected Runge-Kutta step.

    $Z_i = \mathrm{SVD}_r(Y + h \sum_j a_{ij} P_{T(Z_j)} F(Z_j))$ and
    $Y_+ = \mathrm{SVD}_r(Y + h \sum_i b_i P_{T(Z_i)} F(Z_i))$. Its order is the tableau's up to the part of the force
    that is normal to the manifold, and its error does not grow as $\sigma_r(Y) \to 0$. With Euler's tableau it is
    Riemannian gradient descent with the SVD retraction.

    Args:
        field: $F$.
        state: The matrices.
        step_size: $h$.
        tableau: The underlying method.
        truncation: How the new matrices are cut; None keeps their ranks. Stages always keep them.

    Returns:
        The step. Nothing of size $m \times n$ is formed.

    Source:
        Kieri & Vandereycken (2019), Projection methods for dynamical low-rank approximation of high-dimensional
        problems, section 4.
    """

    def method(counted: LowRankField) -> LowRankState:
        velocities: list[tuple[_Thin, ...]] = []
        stage = state
        for row in tableau.a[: tableau.evaluations]:
            if row:
                stage = _move(state, step_size, row, velocities, rules(state, None))
            forces = counted(stage)
            tangents = (project_force(Z, force) for Z, force in zip(stage, forces, strict=True))
            velocities.append(tuple(_thin(Z, *tangent) for Z, tangent in zip(stage, tangents, strict=True)))
        weights = tableau.b[: tableau.evaluations]
        return _move(state, step_size, weights, velocities, rules(state, truncation))

    return attempt(method, field, state)


def _thin(Z: LowRank, K: Float[Tensor, "r n"], J: Float[Tensor, "m r"]) -> _Thin:
    return _Thin(torch.cat([Z.U, J], dim=-1), torch.cat([K.mT, Z.V], dim=-1))


def _move(
    state: LowRankState,
    step_size: float,
    weights: Sequence[float],
    velocities: Sequence[tuple[_Thin, ...]],
    how: Sequence[Truncation],
) -> LowRankState:
    used = [(step_size * weight, v) for weight, v in zip(weights, velocities, strict=True) if weight != 0]
    moved: list[LowRank] = []
    for i, (Y, rule) in enumerate(zip(state, how, strict=True)):
        left = torch.cat([Y.U @ Y.S, *(v[i].left for _, v in used)], dim=-1)
        right = torch.cat([Y.V, *(scale * v[i].right for scale, v in used)], dim=-1)
        moved.append(truncate(LowRank.from_thin(left, right), rule))
    return tuple(moved)
