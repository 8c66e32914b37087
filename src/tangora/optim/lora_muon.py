r"""LoRA-Muon: each factor's momentum is orthogonalised where the other factor has been made orthonormal.

Source: arXiv:2606.12921. Differs in: the step is divided by the scaling $s$, so that ``lr`` bounds the change of the
weight and not that of $B A$; singular Gram matrices (at $B = 0$) have pseudo-inverses.
"""

from typing import Any

from torch import Tensor

from tangora._checks import check_number
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.retraction import Factors
from tangora.geometry.spectral import thin_polar
from tangora.geometry.tangent import Cotangent, coordinates, frame
from tangora.optim.base import LayerwiseOptimizer, OnNonfinite
from tangora.optim.groups import Params
from tangora.optim.stack import PairStack, StateShapes


def lora_muon_step(A: FactorA, B: FactorB, momentum: Cotangent, *, step_size: float, decay: float) -> Factors:
    r"""Return the factors after one step on $Y = B A$.

    $\Delta A = -\tfrac{\eta}{2} S_B^{-1/2} \mathrm{msign}(S_B^{-1/2} M_A)$ with $S_B = B^\top B$, and its mirror image.

    Args:
        A: Factor.
        B: Factor.
        momentum: Averages of the factors' gradients.
        step_size: $\eta$, a bound on the spectral norm of the change of $B A$.
        decay: Factor on $B A$; each factor takes its root.

    Returns:
        The new factors.
    """
    at = frame(A, B)
    left, right = coordinates(at, momentum)
    keep = decay**0.5
    half = step_size / (2 * keep)
    return Factors(
        keep * A - half * (at.whiten_B @ thin_polar(left)),
        keep * B - half * (at.whiten_A @ thin_polar(right.mT)).mT,
    )


class LoRAMuon(LayerwiseOptimizer):
    r"""LoRA-Muon, a rival of `TangentMuon`.

    Args:
        params: PEFT model, pairs, or parameter groups.
        lr: Bound on the spectral norm of a step of the weight.
        momentum: Decay rate of the averages of the gradients.
        weight_decay: Decoupled decay of $B A$, per unit of ``lr``.
        adamw_lr: Learning rate of AdamW for all parameters outside pairs.
        betas: AdamW's decay rates.
        eps: AdamW's.
        maximize: Whether to climb instead of descend.
        foreach: As for `TangentMuon`.
        on_nonfinite: ``"raise"`` or ``"skip"`` the step when a gradient is not finite.

    Raises:
        InputError: For an option outside its range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adamw_lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, on_nonfinite, rest={"lr": adamw_lr})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("momentum", group["momentum"], low=0, high=1, open_high=True)

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        m, n, r = pair.shape
        return {"A": {"momentum_buffer": (r, n)}, "B": {"momentum_buffer": (m, r)}}

    def _step_stack(self, stack: PairStack, group: dict[str, Any]) -> tuple[FactorA, FactorB]:
        momentum = Cotangent(
            stack.state("A", "momentum_buffer").lerp_(stack.gradient.A, 1 - group["momentum"]),
            stack.state("B", "momentum_buffer").lerp_(stack.gradient.B, 1 - group["momentum"]),
        )
        step_size = group["lr"] / stack.scaling
        decay = 1 - group["lr"] * group["weight_decay"]
        return lora_muon_step(stack.A, stack.B, momentum, step_size=step_size, decay=decay)
