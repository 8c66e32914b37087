"""Optimizers of the baselines (torch's AdamW and Muon, LoRA+ by PEFT), and groups with options of their own."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from tangora._checks import InputError, check_number
from tangora.adapters import find_pairs, head_parameters, linear_layers
from tangora.optim.groups import PairGroup, decay_groups
from tangora.optim.muon import MuonAndAdamW


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
    _regroup(optimizer, chain(*undecayed), weight_decay=0.0)
    return optimizer


def full_muon(model: nn.Module, **options: Any) -> Optimizer:
    """Make Muon for the weights that PEFT's ``all-linear`` adapts, and AdamW for everything else."""
    layers: Iterable[Any] = linear_layers(model).values()
    # by weight: what layers share is stepped once
    factors: dict[Any, float] = {layer.weight: _size(layer) for layer in layers}
    return _muon(model, factors, options)


def set_head_rate(optimizer: Optimizer, model: nn.Module, lr: float) -> None:
    """Give the head of a model a learning rate of its own.

    Without it a head takes the adapter's rate, and methods are compared by how fast their heads may learn: LoRA's best
    rate is ten times that of full fine-tuning, whatever its adapter does.
    """
    check_number("head_lr", lr, low=0)
    head = head_parameters(model)
    if not head:
        raise InputError(f"head_lr needs a model with a new head; {type(model).__name__} has none")
    _regroup(optimizer, head, lr=lr)


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


def _regroup(optimizer: Optimizer, parameters: Iterable[nn.Parameter], **options: Any) -> None:
    """Give parameters other options, in groups of their own where they share one with others."""
    chosen = {id(parameter) for parameter in parameters}
    for index, group in enumerate(list(optimizer.param_groups)):
        inside = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if len(inside) == len(group["params"]):
            group.update(options)
        elif inside:
            own = {key: value for key, value in group.items() if key not in {"params", "param_names"}}
            if isinstance(group, PairGroup):
                optimizer.param_groups[index] = group.without(inside)
            else:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**own, **options, "params": inside})
