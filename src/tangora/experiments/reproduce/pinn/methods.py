"""The methods that adapt a network, each an optimizer, a start and the learning rates it is first tried with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from tangora.optim import LoRAPro, PreconditionedAdamW, TangentAdam
from tangora.optim.ode_flow import Scheme
from tangora.optim.ode_lora import ODELoRA


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        name: In tables and figures.
        family: ``full`` (all weights), ``baseline`` (LoRA as it was before), ``ode`` or ``other``.
        make: ``(model, lr)`` -> optimizer.
        center: Middle of the first rates, as a power of ten.
        start: Start of the adapter, ``None`` for PEFT's own.
        gradients_per_step: Of the optimizer.
        moments: Whether it keeps any: plain descent and flows do not.
    """

    name: str
    family: str
    make: Callable[[nn.Module, float], Optimizer]
    center: float
    start: str | None = None
    gradients_per_step: int = 1
    moments: bool = True


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adam(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.AdamW(_trainable(model), lr=lr, weight_decay=0.0)


def _descent(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.SGD(_trainable(model), lr=lr)


def _preconditioned(model: nn.Module, lr: float) -> Optimizer:
    return PreconditionedAdamW(model, lr)


def _pro(model: nn.Module, lr: float) -> Optimizer:
    return LoRAPro(model, lr)


def _tangent(model: nn.Module, lr: float) -> Optimizer:
    return TangentAdam(model, lr)


def _ode(scheme: Scheme) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: ODELoRA(model, lr, scheme=scheme)


# Factor schemes and LoRA-Pro divide by the Gram matrices of the factors, which B = 0 leaves without inverse; orthogonal
# factors are balanced, well-conditioned and need no data. LoRA runs from both, so that start and optimizer can be told
# apart; plain descent shows what Adam's moments alone are worth.
_METHODS = (
    Method("full (Adam)", "full", _adam, -2.5),
    Method("full (descent)", "full", _descent, -2.0, moments=False),
    Method("LoRA", "baseline", _adam, -2.0),
    Method("LoRA (orthogonal start)", "baseline", _adam, -2.0, "orthogonal"),
    Method("LoRA (descent)", "baseline", _descent, -1.0, "orthogonal", moments=False),
    Method("P-LoRA", "baseline", _preconditioned, -2.0),
    Method("LoRA-Pro", "baseline", _pro, -2.5, "orthogonal"),
    Method("TangentAdam", "other", _tangent, -2.5),
    Method("ODELoRA Euler", "ode", _ode("euler"), -1.5, "orthogonal", moments=False),
    Method("ODELoRA Heun", "ode", _ode("heun"), -1.5, "orthogonal", 2, moments=False),
    Method("ODELoRA RK4", "ode", _ode("rk4"), -1.0, "orthogonal", 4, moments=False),
    Method("ODELoRA BUG", "ode", _ode("bug"), -1.5, "orthogonal", moments=False),
)

METHODS = {method.name: method for method in _METHODS}


def rate(power: float | int) -> float:
    """Return a learning rate of the grid of half decades, without rounding noise.

    Args:
        power: Multiple of one half.

    Returns:
        Ten to this power, with three figures.
    """
    return float(f"{10**power:.2e}")


def first_powers(method: Method, num: int) -> list[float]:
    """Return the powers of ten of the first rates.

    Args:
        method: Whose.
        num: How many.

    Returns:
        Half decades around the method's center, in rising order.
    """
    return [method.center + (index - num // 2) / 2 for index in range(num)]
