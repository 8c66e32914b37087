r"""The augmented basis-update and Galerkin step: both bases move, the core moves in old and new bases together."""

import torch

from tangora.integrate.force import LowRankField, attempt
from tangora.integrate.low_rank import LowRank, LowRankState, Truncation, rules, truncate
from tangora.integrate.state import Stepped
from tangora.integrate.substep import k_field, l_field, s_field, solve
from tangora.integrate.tableau import EULER, Tableau


def bug_step(
    field: LowRankField,
    state: LowRankState,
    step_size: float,
    *,
    tableau: Tableau = EULER,
    truncation: Truncation | None = None,
) -> Stepped[LowRankState]:
    r"""Take one augmented BUG step, first order, rank-adaptive.

    $K$ and $L$ move from $U S$ and $V S^\top$ as in projector splitting, side by side; the bases become
    $\hat U = \mathrm{orth}[U, K_1]$ and $\hat V = \mathrm{orth}[V, L_1]$; the core moves forwards by
    $\dot S = \hat U^\top F \hat V$ from $\hat U^\top Y \hat V$, and the $2r \times 2r$ result is cut.

    Args:
        field: $F$.
        state: The matrices.
        step_size: $h$.
        tableau: How the flows are solved. With Euler's two evaluations: one for $K$ and $L$, one for $S$.
        truncation: How the result is cut; None keeps the ranks. A tolerance lets them grow up to twice per step, and
            shrink.

    Returns:
        The step.

    Source:
        Ceruti, Kusch, Lubich (2022), arXiv:2104.05247, section 3.1.
    """

    def method(counted: LowRankField) -> LowRankState:
        forces = counted(state)
        velocity_K = tuple(force.right(Y.V) for Y, force in zip(state, forces, strict=True))
        velocity_L = tuple(force.left(Y.U) for Y, force in zip(state, forces, strict=True))
        K0, L0 = tuple(Y.U @ Y.S for Y in state), tuple(Y.V @ Y.S.mT for Y in state)
        K = solve(k_field(counted, state), K0, step_size, tableau, velocity_K)
        L = solve(l_field(counted, state), L0, step_size, tableau, velocity_L)
        wide = tuple(_augment(*parts) for parts in zip(state, K, L, strict=True))
        S = solve(s_field(counted, wide, 1.0), tuple(Y.S for Y in wide), step_size, tableau)
        moved = (LowRank(Y.U, part, Y.V) for Y, part in zip(wide, S, strict=True))
        return tuple(truncate(Y, rule) for Y, rule in zip(moved, rules(state, truncation), strict=True))

    return attempt(method, field, state)


def _augment(Y: LowRank, K: torch.Tensor, L: torch.Tensor) -> LowRank:
    U, _ = torch.linalg.qr(torch.cat([Y.U, K], dim=-1))
    V, _ = torch.linalg.qr(torch.cat([Y.V, L], dim=-1))
    return LowRank(U, (U.mT @ Y.U) @ Y.S @ (Y.V.mT @ V), V)
