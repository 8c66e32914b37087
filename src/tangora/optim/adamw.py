"""torch's AdamW as a function of lists of tensors: for everything that is no pair, and for moments on factors."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.adapters.sharded import is_sharded
from tangora.optim.stack import Loaded, PairStack, StateShapes, shaped_like_factors

_FUSED_DEVICES = ("cpu", "cuda")


def adamw_update(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: dict[str, Any],
    unless: Bool[Tensor, ""] | None = None,
) -> None:
    """Take one AdamW step in place, ``steps`` included, unless there is a doubt (where it can be fused only)."""
    beta1, beta2 = group["betas"]
    adamw(
        list(tensors),
        list(gradients),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        fused=all(map(_can_be_fused, tensors, gradients, exp_avgs, exp_avg_sqs)),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group.get("maximize", False),
        found_inf=None if unless is None else unless.float(),
    )


def _can_be_fused(tensor: Tensor, *others: Tensor) -> bool:
    # torch's kernel walks through memory: tensors of different strides would be paired up wrongly, without an error
    return tensor.device.type in _FUSED_DEVICES and all(other.stride() == tensor.stride() for other in others)


def adamw_states(parameters: Sequence[nn.Parameter], state: dict[Tensor, Any]) -> None:
    """Create the states that trainable parameters lack, and bring all to their parameter's device and dtype."""
    for parameter in parameters:
        own = state[parameter] if parameter in state or parameter.requires_grad else None
        if own is None:
            continue
        own.setdefault("step", torch.tensor(0.0))
        own["step"] = own["step"].to(_step_device(parameter), torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in own:
                own[key] = torch.zeros_like(parameter.detach())
            own[key] = own[key].to(parameter.device, parameter.dtype)


def adamw_parameters(
    parameters: Sequence[nn.Parameter], state: dict[Tensor, Any], group: dict[str, Any]
) -> None:
    """Step ordinary parameters with AdamW."""
    active = [parameter for parameter in parameters if parameter.grad is not None]
    adamw_states(active, state)
    for sharded in (False, True):  # torch's kernels take whole tensors or shards, not both at once
        some = [parameter for parameter in active if is_sharded(parameter) == sharded]
        states = [state[parameter] for parameter in some]
        if some:
            adamw_update(
                some,
                [parameter.grad for parameter in some if parameter.grad is not None],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["step"] for s in states],
                group,
            )


def _step_device(parameter: Tensor) -> torch.device:
    # torch's fused kernel reads the step on the device; elsewhere a CPU scalar avoids a synchronisation
    return parameter.device if parameter.device.type == "cuda" else torch.device("cpu")


def step_counters(tensors: Sequence[Tensor], step: int) -> list[Tensor]:
    """Make the counters that `adamw_update` takes."""
    # filled on the device: a number copied there would be waited for
    return [torch.full((), float(step - 1), device=_step_device(tensor)) for tensor in tensors]


def adamw_moments(pair: LoraPair) -> StateShapes:
    """Return the states that `adamw_factors` keeps for a pair."""
    return shaped_like_factors(pair, "exp_avg", "exp_avg_sq")


def adamw_factors(
    stack: PairStack, here: Loaded, velocities: Sequence[Tensor], group: dict[str, Any]
) -> tuple[FactorA, FactorB]:
    """Step a stack's factors in place with AdamW on directions in their own coordinates; keeps the moments."""
    factors = (here.A, here.B)
    exp_avg, exp_avg_sq = stack.both("exp_avg"), stack.both("exp_avg_sq")
    downhill = {**group, "maximize": False}  # the gradient has its sign already
    adamw_update(factors, velocities, exp_avg, exp_avg_sq, step_counters(factors, here.step), downhill)
    return factors
