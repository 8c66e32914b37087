"""Optimizers made like PEFT's own: ``create_tangent_adam(model, lr=...)`` beside ``create_loraplus_optimizer``.

Each takes a PEFT model, possibly wrapped by DistributedDataParallel or ``torch.compile``, and the options of its class;
an `InputError` says when there is no trainable LoRA pair or an option is out of range.
"""

from typing import Any, TypeVar

from torch import Tensor, nn

from tangora._checks import InputError
from tangora.optim.base import PairOptimizer
from tangora.optim.lora_pro import LoRAPro
from tangora.optim.ode_lora import ODELoRA
from tangora.optim.preconditioned_adamw import PreconditionedAdamW
from tangora.optim.tangent_adam import TangentAdam
from tangora.optim.tangent_muon import TangentMuon

Made = TypeVar("Made", bound=PairOptimizer)


def create_tangent_adam(model: nn.Module, *, lr: float | Tensor, **options: Any) -> TangentAdam:
    """Create `TangentAdam` for all trainable parameters of a PEFT model; ``lr`` is full fine-tuning's."""
    return _create(TangentAdam, model, lr, options)


def create_tangent_muon(model: nn.Module, *, lr: float | Tensor = 0.02, **options: Any) -> TangentMuon:
    """Create `TangentMuon` for all trainable parameters of a PEFT model."""
    return _create(TangentMuon, model, lr, options)


def create_lora_pro(model: nn.Module, *, lr: float | Tensor, **options: Any) -> LoRAPro:
    """Create `LoRAPro` for all trainable parameters of a PEFT model; ``lr`` is full fine-tuning's."""
    return _create(LoRAPro, model, lr, options)


def create_preconditioned_adamw(
    model: nn.Module, *, lr: float | Tensor, **options: Any
) -> PreconditionedAdamW:
    """Create `PreconditionedAdamW` for all trainable parameters of a PEFT model; ``lr`` is LoRA's."""
    return _create(PreconditionedAdamW, model, lr, options)


def create_ode_lora(model: nn.Module, *, lr: float | Tensor, **options: Any) -> ODELoRA:
    """Create `ODELoRA` for all trainable parameters of a PEFT model; ``lr`` is plain gradient descent's."""
    return _create(ODELoRA, model, lr, options)


def _create(optimizer: type[Made], model: nn.Module, lr: float | Tensor, options: dict[str, Any]) -> Made:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a PEFT model; got {type(model).__name__}")
    return optimizer(model, lr, **options)
