"""What the optimizers share that average the gradients of both factors: their options and the averages."""

from typing import Any

from torch import Tensor

from tangora._checks import check_number
from tangora.adapters import LoraPair
from tangora.geometry.tangent import Cotangent
from tangora.optim.base import LayerwiseOptimizer, OnNonfinite
from tangora.optim.groups import Params
from tangora.optim.stack import PairStack, StateShapes


class FactorMomentumOptimizer(LayerwiseOptimizer):
    r"""A layerwise optimizer with an average of the gradients of each factor."""

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

    def _averaged(self, stack: PairStack, gradient: Cotangent, beta: float) -> Cotangent:
        # adds the gradients of this step to the averages
        return Cotangent(
            stack.state("A", "momentum_buffer").lerp_(gradient.A, 1 - beta),
            stack.state("B", "momentum_buffer").lerp_(gradient.B, 1 - beta),
        )
