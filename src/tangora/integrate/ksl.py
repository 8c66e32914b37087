r"""Projector splitting (KSL, Lie): the flow of $Y = U S V^\top$ as three flows of one factor each, in turn."""

import torch

from tangora.integrate.force import LowRankField, attempt
from tangora.integrate.low_rank import LowRank, LowRankState
from tangora.integrate.state import Stepped
from tangora.integrate.substep import k_field, l_field, s_field, solve
from tangora.integrate.tableau import EULER, Tableau


def ksl_step(
    field: LowRankField, state: LowRankState, step_size: float, *, tableau: Tableau = EULER
) -> Stepped[LowRankState]:
    r"""Take one step of projector splitting, first order.

    $K$: from $U S$ along $\dot K = F V$ to $K_1 = U_1 \hat S$. $S$: from $\hat S$ backwards along
    $\dot S = -U_1^\top F V$ to $\tilde S$. $L$: from $V \tilde S^\top$ along $\dot L = F^\top U_1$ to
    $L_1 = V_1 S_1^\top$. Each sees the force at where the one before has come. With one frozen $F$ and Euler steps the
    result is $P_{U_1}(Y + h F)$ with $U_1 = \mathrm{orth}((Y + h F) V)$: a sweep of subspace iteration.

    Args:
        field: $F$.
        state: The matrices; their ranks are kept.
        step_size: $h$.
        tableau: How the three flows are solved, one explicit step each. With Euler's three evaluations.

    Returns:
        The step.

    Source:
        Lubich & Oseledets (2014), arXiv:1301.1058, section 3.2.
    """

    def method(counted: LowRankField) -> LowRankState:
        K = solve(k_field(counted, state), tuple(Y.U @ Y.S for Y in state), step_size, tableau)
        bases = [torch.linalg.qr(part) for part in K]
        turned = tuple(LowRank(U, R, Y.V) for (U, R), Y in zip(bases, state, strict=True))
        S = solve(s_field(counted, turned, -1.0), tuple(Y.S for Y in turned), step_size, tableau)
        start = tuple(Y.V @ part.mT for Y, part in zip(turned, S, strict=True))
        L = solve(l_field(counted, turned), start, step_size, tableau)
        bases = [torch.linalg.qr(part) for part in L]
        return tuple(LowRank(Y.U, R.mT, V) for Y, (V, R) in zip(turned, bases, strict=True))

    return attempt(method, field, state)
