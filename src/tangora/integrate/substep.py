r"""The three flows that projector splitting and BUG are made of, each of one factor with the others frozen.

$\dot K = F(K V^\top)\, V$, $\dot L = F(U L^\top)^\top U$ and $\dot S = \pm U^\top F(U S V^\top)\, V$: no inverse of $S$
anywhere, which is why small singular values do no harm.
"""

import torch

from tangora.integrate.force import LowRankField
from tangora.integrate.low_rank import LowRank, LowRankState, NotFiniteError
from tangora.integrate.runge_kutta import rk_step
from tangora.integrate.state import Field, State
from tangora.integrate.tableau import Tableau


def k_field(field: LowRankField, state: LowRankState) -> Field:
    r"""Return $K \mapsto F(K V^\top)\, V$.

    Args:
        field: $F$.
        state: Gives $V$.

    Returns:
        The field on tuples of $m \times r$ matrices.
    """

    def velocity(K: State) -> State:
        bases = [torch.linalg.qr(part) for part in K]
        points = tuple(LowRank(U, R, Y.V) for (U, R), Y in zip(bases, state, strict=True))
        return tuple(force.right(Z.V) for force, Z in zip(field(points), points, strict=True))

    return velocity


def l_field(field: LowRankField, state: LowRankState) -> Field:
    r"""Return $L \mapsto F(U L^\top)^\top U$.

    Args:
        field: $F$.
        state: Gives $U$.

    Returns:
        The field on tuples of $n \times r$ matrices.
    """

    def velocity(L: State) -> State:
        bases = [torch.linalg.qr(part) for part in L]
        points = tuple(LowRank(Y.U, R.mT, V) for (V, R), Y in zip(bases, state, strict=True))
        return tuple(force.left(Z.U) for force, Z in zip(field(points), points, strict=True))

    return velocity


def s_field(field: LowRankField, state: LowRankState, sign: float) -> Field:
    r"""Return $S \mapsto \pm U^\top F(U S V^\top)\, V$.

    Args:
        field: $F$.
        state: Gives $U$ and $V$.
        sign: 1, or -1 for the backward substep of projector splitting.

    Returns:
        The field on tuples of small matrices.
    """

    def velocity(S: State) -> State:
        points = tuple(LowRank(Y.U, part, Y.V) for part, Y in zip(S, state, strict=True))
        forces = field(points)
        return tuple(sign * (Z.U.mT @ force.right(Z.V)) for force, Z in zip(forces, points, strict=True))

    return velocity


def solve(
    velocity: Field, start: State, step_size: float, tableau: Tableau, first: State | None = None
) -> State:
    """Take one explicit step of a substep's flow.

    Args:
        velocity: The flow.
        start: Where from.
        step_size: The step.
        tableau: The method.
        first: Velocity at ``start``, if known.

    Returns:
        The new matrices.

    Raises:
        NotFiniteError: If an entry is not finite.
    """
    stepped = rk_step(velocity, start, step_size, tableau, first=first, estimate=False)
    if stepped.failure is not None:
        raise NotFiniteError("a substep ended in entries that are not finite")
    return stepped.state
