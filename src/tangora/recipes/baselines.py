"""Optimizers of the baselines: torch's AdamW, and LoRA+ by PEFT."""

from itertools import chain
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer

from tangora.optim.groups import decay_groups
from tangora.recipes.regroup import regroup


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    """Make torch's AdamW; biases and norms do not decay.

    Args:
        model: The model.
        **options: AdamW's.

    Returns:
        The optimizer of the trainable parameters.
    """
    groups = [{key: group[key] for key in group if key != "names"} for group in decay_groups(model)]
    return torch.optim.AdamW(groups, **options)


def lora_plus(model: nn.Module, **options: Any) -> Optimizer:
    """Make the optimizer of LoRA+, AdamW with a larger learning rate for B; biases and norms do not decay.

    Args:
        model: A PEFT model.
        **options: AdamW's.

    Returns:
        The optimizer of the trainable parameters.
    """
    # ratio 16: the paper's recommendation
    optimizer = create_loraplus_optimizer(
        model,  # pyright: ignore[reportArgumentType]
        torch.optim.AdamW,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=options.pop("weight_decay", 0.0),
        **options,
    )
    # PEFT's own rule lets RMSNorm decay
    undecayed = [group["params"] for group in decay_groups(model) if group.get("weight_decay") == 0]
    regroup(optimizer, chain(*undecayed), weight_decay=0.0)
    return optimizer
