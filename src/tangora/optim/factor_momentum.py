"""Options and gradient averages shared by the optimizers with momentum on both factors."""

from typing import Any, Unpack

from torch import Tensor

from tangora._checks import check_number
from tangora.adapters import LoraPair
from tangora.geometry.tangent import Cotangent
from tangora.optim.base import CommonOptions
from tangora.optim.groups import Params
from tangora.optim.layerwise import LayerwiseOptimizer
from tangora.optim.stack import PairStack, StateShapes, shaped_like_factors


class FactorMomentumOptimizer(LayerwiseOptimizer):
    """A layerwise optimizer with an average of the gradients of each factor.

    Args:
        lr: Bound on the spectral norm of a step of the weight; it must decay towards the end of training.
        momentum: Decay rate of the averages.
        adamw_lr: Learning rate of AdamW for all parameters outside pairs.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        adamw_lr: float | Tensor = 1e-3,
        **common: Unpack[CommonOptions],
    ):
        own = {"momentum": momentum}
        super().__init__(params, lr, own, adamw_lr, **common)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("momentum", group["momentum"], low=0, high=1, open_high=True)

    def _state_shapes(self, pair: LoraPair, group: dict[str, Any]) -> StateShapes:  # noqa: ARG002
        return shaped_like_factors(pair, "momentum_buffer")

    def _averaged(self, stack: PairStack, gradient: Cotangent, beta: float) -> Cotangent:
        """Add the gradients of this step to the averages."""
        average = stack.both("momentum_buffer")
        return Cotangent(*(m.lerp_(g, 1 - beta) for m, g in zip(average, gradient, strict=True)))
