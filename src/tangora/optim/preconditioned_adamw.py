r"""Preconditioned LoRA: AdamW on gradients scaled by the other factor's Gram matrix.

Source: Zhang & Pilanci (ICML 2024), Riemannian Preconditioned LoRA, arXiv:2402.02347; the damping of LoRA-One
(arXiv:2502.01235). Differs in: both preconditioners use the old factors, as in PEFT; the paper's code updates A first.
"""

from typing import Any

from torch import Tensor

from tangora._checks import check_number
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.gram import damped_inverse, gram, times
from tangora.geometry.tangent import Cotangent
from tangora.optim.adamw import adamw_factors, factor_moments
from tangora.optim.base import LayerwiseOptimizer, OnNonfinite
from tangora.optim.groups import Params
from tangora.optim.stack import PairStack, StateShapes


def precondition(A: FactorA, B: FactorB, g_A: FactorA, g_B: FactorB, damping: float) -> Cotangent:
    r"""Return $H_A = (B^\top B + \lambda I)^{-1} g_A$ and $H_B = g_B (A A^\top + \lambda I)^{-1}$."""
    left, right = damped_inverse(gram(B.mT), damping), damped_inverse(gram(A), damping)
    return Cotangent(left.to(A.dtype) @ g_A, times(g_B, right.to(A.dtype)))


class PreconditionedAdamW(LayerwiseOptimizer):
    r"""P-LoRA (Scaled AdamW), and the second half of LoRA-One.

    Args:
        params: PEFT model, pairs, or parameter groups.
        lr: Learning rate, as for LoRA.
        damping: $\lambda$ added to the Gram matrices. Default 1e-6, LoRA-One's; PEFT's ``create_riemannian_optimizer``
            uses 1e-2.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of the factors, per unit of ``lr``.
        maximize: Whether to climb instead of descend.
        foreach: ``None`` or ``True``: layers of equal shape take their step together as one stack, this library's
            counterpart of torch's ``foreach``; ``False``: one layer at a time.
        on_nonfinite: ``"raise"`` or ``"skip"`` the step when a gradient is not finite.

    Raises:
        InputError: For an option outside its range.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from tangora import PreconditionedAdamW
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = PreconditionedAdamW(model, lr=1e-3, damping=1e-2)
        >>> model(torch.randn(5, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        damping: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        defaults = {
            "lr": lr,
            "damping": damping,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, on_nonfinite)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("damping", group["damping"], low=0, open_low=True)

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        return factor_moments(pair)

    def _step_stack(self, stack: PairStack, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        g_A, g_B = (g * stack.scaling for g in stack.gradient)
        velocities = precondition(stack.A, stack.B, g_A, g_B, group["damping"])
        return adamw_factors(stack, velocities, group)
