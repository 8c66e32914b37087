r"""The parallel basis-update and Galerkin step: one force, everything at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from tangora.integrate.force import Force, LowRankField, attempt
from tangora.integrate.low_rank import LowRank, LowRankState, Truncation, rules, truncate
from tangora.integrate.state import Stepped


def parallel_bug_step(
    field: LowRankField,
    state: LowRankState,
    step_size: float,
    *,
    truncation: Truncation | None = None,
) -> Stepped[LowRankState]:
    r"""Take one parallel BUG step, first order, one evaluation, rank-adaptive.

    With $[U, \tilde U] = \mathrm{orth}[U, F V]$ and $[V, \tilde V] = \mathrm{orth}[V, F^\top U]$ the new core is
    $\begin{bmatrix} S + h U^\top F V & h U^\top F \tilde V \\ h \tilde U^\top F V & 0 \end{bmatrix}$, then cut. Before
    the cut this is $Y + h P_T F$, so that at fixed rank it is Riemannian gradient descent with the SVD retraction.

    Args:
        field: $F$.
        state: The matrices.
        step_size: $h$.
        truncation: How the result of rank $2r$ is cut; None keeps the ranks.

    Returns:
        The step.

    Source:
        Ceruti, Kusch, Lubich (2024), A parallel rank-adaptive integrator for dynamical low-rank approximation; for
        training, GeoLoRA (ICLR 2025).
    """

    def method(counted: LowRankField) -> LowRankState:
        forces = counted(state)
        moved = (_step(Y, force, step_size) for Y, force in zip(state, forces, strict=True))
        return tuple(truncate(Y, rule) for Y, rule in zip(moved, rules(state, truncation), strict=True))

    return attempt(method, field, state)


def _step(Y: LowRank, force: Force, step_size: float) -> LowRank:
    K, L = step_size * force.right(Y.V), step_size * force.left(Y.U)
    U_new, V_new = _complement(Y.U, K), _complement(Y.V, L)
    corner = Y.S.new_zeros(U_new.shape[-1], V_new.shape[-1])
    top = torch.cat([Y.S + Y.U.mT @ K, L.mT @ V_new], dim=-1)
    bottom = torch.cat([U_new.mT @ K, corner], dim=-1)
    return LowRank(
        torch.cat([Y.U, U_new], dim=-1), torch.cat([top, bottom], dim=-2), torch.cat([Y.V, V_new], dim=-1)
    )


def _complement(basis: Float[Tensor, "p k"], added: Float[Tensor, "p l"]) -> Float[Tensor, "p j"]:
    # orthonormal columns that span what is added outside of the basis; QR keeps the basis first, up to signs
    Q, _ = torch.linalg.qr(torch.cat([basis, added], dim=-1))
    return Q[:, basis.shape[-1] :]
