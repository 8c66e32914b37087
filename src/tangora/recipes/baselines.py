"""Optimizers of the baselines: torch's AdamW and Muon, and LoRA+ by PEFT."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from tangora.adapters import find_pairs
from tangora.optim.groups import decay_groups
from tangora.optim.muon import MuonAndAdamW
from tangora.recipes.head import head_names
from tangora.recipes.regroup import regroup


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    """Make torch's AdamW; biases and norms do not decay."""
    return torch.optim.AdamW(_groups(model), **options)


def lora_plus(model: nn.Module, **options: Any) -> Optimizer:
    """Make the optimizer of LoRA+, AdamW with a larger learning rate for B; biases and norms do not decay."""
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


def full_muon(model: nn.Module, **options: Any) -> Optimizer:
    """Make Muon for the weights that PEFT's ``all-linear`` adapts, and AdamW for everything else."""
    head = head_names(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    factors: dict[Any, float] = {  # by weight: what layers share is stepped once
        module.weight: _size(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and name.split(".")[0] not in head
    }
    return _muon(model, factors, options)


def _size(layer: nn.Module) -> float:
    """Return what Muon's step must be multiplied by."""
    if not isinstance(layer, Conv1D):
        return 1.0
    inputs, outputs = layer.weight.shape  # which Muon takes for outputs x inputs
    return math.sqrt(outputs / inputs)


def factor_muon(model: nn.Module, **options: Any) -> Optimizer:
    """Make Muon for the factors of LoRA, each by itself, and AdamW for everything else."""
    return _muon(model, {factor: 1.0 for pair in find_pairs(model) for factor in (pair.A, pair.B)}, options)


def _muon(model: nn.Module, factors: Mapping[nn.Parameter, float], options: dict[str, Any]) -> Optimizer:
    # each matrix comes with a factor on its learning rate
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for weight, factor in factors.items():
        if weight.requires_grad:
            groups[factor].append(weight)
    matrices = [{"params": each, "lr": options["lr"] * factor} for factor, each in groups.items()]
    return MuonAndAdamW(matrices, _groups(model, [*factors]), **options)


def _groups(model: nn.Module, taken: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters that are not taken, as torch's optimizers want them."""
    return [{key: group[key] for key in group if key != "names"} for group in decay_groups(model, taken)]
