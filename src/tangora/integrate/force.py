r"""The right-hand side of a low-rank flow, $\dot Y = F(Y)$, seen through products with thin matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tangora.geometry.tangent import Coordinates, Frame, Tangent, project
from tangora.integrate.low_rank import LowRank, LowRankState, NotFiniteError
from tangora.integrate.state import Stepped


@runtime_checkable
class Force(Protocol):
    r"""$F$ at one point $Y = U S V^\top$; for gradient flow $F = -g$.

    The schemes ask for ``right(Y.V)`` and ``left(Y.U)`` of the very $Y$ they gave to the field, and for nothing else.
    One backward pass through a LoRA adapter gives both, so the dense $F$ is never needed. Asked without autograd.
    """

    def right(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Return F X."""
        ...

    def left(self, X: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """Return F^T X."""
        ...


@dataclass(frozen=True, eq=False)
class DenseForce:
    """A force given as the dense matrix.

    Args:
        F: The matrix, for gradient flow minus the gradient.
    """

    F: Float[Tensor, "m n"]

    def right(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Return F X.

        Args:
            X: Thin matrix.

        Returns:
            The product.
        """
        return self.F @ X

    def left(self, X: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """Return F^T X.

        Args:
            X: Thin matrix.

        Returns:
            The product.
        """
        return self.F.mT @ X


LowRankField: TypeAlias = Callable[[LowRankState], tuple[Force, ...]]
"""``field((Y_1, Y_2, ...))`` -> their forces. One call is one evaluation of the gradient, of all layers together."""


def for_one(field: Callable[[LowRank], Force]) -> LowRankField:
    """Make a field for states of one matrix.

    Args:
        field: Matrix to force.

    Returns:
        The field on tuples of one.
    """

    def on_tuple(state: LowRankState) -> tuple[Force, ...]:
        (Y,) = state
        return (field(Y),)

    return on_tuple


def project_force(Y: LowRank, force: Force) -> Tangent:
    r"""Return $P_T F$ at $Y$, the part of the force that keeps the rank.

    Args:
        Y: The point.
        force: $F$ there.

    Returns:
        $U K + J V^\top$ in the bases of ``Y``.
    """
    eye = torch.eye(Y.S.shape[-1], dtype=Y.S.dtype, device=Y.S.device)
    # the tangent space of U S V^T is that of U V^T, whose factors need no whitening
    at = Frame(Y.U, Y.V.mT, eye, eye)
    return project(at, Coordinates(force.left(Y.U).mT, force.right(Y.V)))


def attempt(
    method: Callable[[LowRankField], LowRankState], field: LowRankField, state: LowRankState
) -> Stepped[LowRankState]:
    """Run one low-rank step: count evaluations, keep autograd out of the algebra, turn non-finite into a status.

    Args:
        method: The step, given the field to call.
        field: The user's field; runs in the caller's autograd mode.
        state: What is returned if the step fails.

    Returns:
        The step.
    """
    evaluations = 0
    caller_mode = torch.is_grad_enabled()

    def counted(at: LowRankState) -> tuple[Force, ...]:
        nonlocal evaluations
        evaluations += 1
        with torch.set_grad_enabled(caller_mode):
            return field(at)

    try:
        with torch.no_grad():
            return Stepped(method(counted), evaluations)
    except NotFiniteError:
        return Stepped(state, evaluations, failure="not finite")
