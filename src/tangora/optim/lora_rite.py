r"""LoRA-RITE: second moments of the size of the rank, in bases that do not depend on how $B A$ is factored.

Source: Yen et al. (ICLR 2025), arXiv:2410.20625, with the choices of the authors' release (no escaped mass, decay rates
corrected as in arXiv:1804.04235, section 7.1). Differs in: moments are carried to new bases when the factors move, so
that no old bases are kept (the same sequence, $r(m+n) + 2 r^2$ numbers instead of $2r(m+n) + 2r^2$); the release's own
clipping of gradients is left out, since training clips them.
"""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from tangora._types import Core, FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.gram import eigendecompose, times
from tangora.geometry.retraction import Factors, rounded
from tangora.geometry.tangent import Cotangent, coordinates, frame
from tangora.optim.base import CommonOptions
from tangora.optim.groups import Params
from tangora.optim.layerwise import LayerwiseOptimizer
from tangora.optim.stack import Loaded, PairStack, StateShapes

_EPS = 1e-6


class RiteMoments(NamedTuple):
    """State of a pair, in coordinates of the factors."""

    momentum: Cotangent
    second_A: Core
    second_B: Core


def lora_rite_step(
    A: FactorA,
    B: FactorB,
    gradient: Cotangent,
    moments: RiteMoments,
    *,
    lr: float,
    keep: float,
    betas: tuple[float, float],
    stored: torch.dtype,
) -> tuple[Factors, RiteMoments]:
    r"""Take one LoRA-RITE step.

    For $A^\top = V^\top R$ with orthonormal rows of $V$: $\bar G = g_B R^{-1}$,
    $S = \bar G (\overline{\bar G^\top \bar G / m})^{-1/2}$, and $B$ moves along the average of $S$, times $R^{-\top}$.
    """
    beta1, beta2 = betas
    at = frame(A, B)
    (left, right), (m_left, m_right) = coordinates(at, gradient), coordinates(at, moments.momentum)
    Z_A, Z_B = at.whiten_A, at.whiten_B
    second_A = beta2 * (Z_B.mT @ moments.second_A @ Z_B) + (1 - beta2) * (left @ left.mT) / left.shape[-1]
    second_B = beta2 * (Z_A.mT @ moments.second_B @ Z_A) + (1 - beta2) * (right.mT @ right) / right.shape[-2]
    m_left = beta1 * m_left + (1 - beta1) * (_inverse_root(second_A) @ left)
    m_right = beta1 * m_right + (1 - beta1) * times(right, _inverse_root(second_B))
    new = Factors(keep * A - lr * (Z_B @ m_left), keep * B - lr * times(m_right, Z_A.mT))
    new = rounded(new, stored)
    to_A, to_B = new.A @ at.V.mT, new.B.mT @ at.U
    carried = Cotangent(to_B @ m_left, times(m_right, to_A.mT))
    return new, RiteMoments(carried, to_B @ second_A @ to_B.mT, to_A @ second_B @ to_A.mT)


def _inverse_root(matrix: Core) -> Core:
    values, vectors = eigendecompose(matrix.double())
    return ((vectors / (values.sqrt() + _EPS)[..., None, :]) @ vectors.mT).to(matrix.dtype)


class LoRARITE(LayerwiseOptimizer):
    r"""LoRA-RITE, an alternative to `TangentMuon`.

    Args:
        lr: Learning rate of the factors; the weight changes by alpha / r times as much.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`; the decay is that of the factors.

    """

    def __init__(self, params: Params, lr: float | Tensor, **common: Unpack[CommonOptions]):
        super().__init__(params, lr, **common)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Nothing beyond the common options."""

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        m, n, r = pair.shape
        return {
            "A": {"exp_avg": (r, n), "exp_avg_sq": (r, r)},
            "B": {"exp_avg": (m, r), "exp_avg_sq": (r, r)},
        }

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        t = here.step
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"])
        factors, moments = lora_rite_step(
            here.A,
            here.B,
            Cotangent(*(g * here.scaling for g in here.gradient)),
            RiteMoments(
                stack.both("exp_avg"),
                stack.state("A", "exp_avg_sq"),
                stack.state("B", "exp_avg_sq"),
            ),
            lr=group["lr"],
            keep=1 - group["lr"] * group["weight_decay"],
            betas=(beta1, beta2),
            stored=stack.dtype,
        )
        stack.keep("A", exp_avg=moments.momentum.A, exp_avg_sq=moments.second_A)
        stack.keep("B", exp_avg=moments.momentum.B, exp_avg_sq=moments.second_B)
        return factors
