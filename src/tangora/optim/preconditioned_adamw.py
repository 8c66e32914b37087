r"""Preconditioned LoRA: AdamW on gradients scaled by the other factor's Gram matrix.

Source: Zhang & Pilanci (ICML 2024), Riemannian Preconditioned LoRA, arXiv:2402.02347; the damping of LoRA-One
(arXiv:2502.01235). Differs in: both preconditioners use the old factors, as in PEFT; the paper's code updates A first.
"""

from typing import Any, Unpack

from torch import Tensor

from tangora._checks import check_number
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.gram import damped_inverse, gram, times
from tangora.geometry.tangent import Cotangent
from tangora.optim.adamw import adamw_factors, adamw_moments
from tangora.optim.base import CommonOptions
from tangora.optim.groups import Params
from tangora.optim.layerwise import LayerwiseOptimizer
from tangora.optim.stack import Loaded, PairStack, StateShapes


def precondition(A: FactorA, B: FactorB, g_A: FactorA, g_B: FactorB, damping: float) -> Cotangent:
    r"""Return $H_A = (B^\top B + \lambda I)^{-1} g_A$ and $H_B = g_B (A A^\top + \lambda I)^{-1}$."""
    left, right = damped_inverse(gram(B.mT), damping), damped_inverse(gram(A), damping)
    return Cotangent(left.to(A.dtype) @ g_A, times(g_B, right.to(A.dtype)))


class PreconditionedAdamW(LayerwiseOptimizer):
    r"""P-LoRA (Scaled AdamW), and the second half of LoRA-One.

    Args:
        lr: Learning rate, as for LoRA.
        damping: $\lambda$ added to the Gram matrices. Default 1e-6, LoRA-One's; PEFT's ``create_riemannian_optimizer``
            uses 1e-2.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`; the decay is that of the factors.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        damping: float = 1e-6,
        **common: Unpack[CommonOptions],
    ):
        own = {"damping": damping}
        super().__init__(params, lr, own, **common)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("damping", group["damping"], low=0, open_low=True)

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        return adamw_moments(pair)

    def _step_stack(self, stack: PairStack, here: Loaded, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        g_A, g_B = (g * here.scaling for g in here.gradient)
        velocities = precondition(here.A, here.B, g_A, g_B, group["damping"])
        return adamw_factors(stack, here, velocities, group)
