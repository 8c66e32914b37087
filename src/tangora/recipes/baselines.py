"""Optimizers of the baselines: torch's AdamW and Muon, and LoRA+ by PEFT."""

import math
from collections.abc import Iterable, Sequence
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
    """Make torch's AdamW; biases and norms do not decay.

    Args:
        model: The model.
        **options: AdamW's.

    Returns:
        The optimizer of the trainable parameters.
    """
    return torch.optim.AdamW(_groups(model), **options)


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


def full_muon(model: nn.Module, **options: Any) -> Optimizer:
    """Make Muon for the weights that PEFT's ``all-linear`` adapts, and AdamW for everything else.

    Args:
        model: A model that is trained whole.
        **options: Of `MuonAndAdamW`.

    Returns:
        The optimizer of the trainable parameters.
    """
    head = head_names(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    layers: dict[Any, nn.Module] = {  # by weight: what layers share is stepped once
        module.weight: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and name.split(".")[0] not in head
    }
    return _muon(model, layers, options, [weight for weight in layers if isinstance(layers[weight], Conv1D)])


def factor_muon(model: nn.Module, **options: Any) -> Optimizer:
    """Make Muon for the factors of LoRA, each by itself, and AdamW for everything else.

    Args:
        model: A PEFT model.
        **options: Of `MuonAndAdamW`.

    Returns:
        The optimizer of the trainable parameters.
    """
    return _muon(model, [factor for pair in find_pairs(model) for factor in (pair.A, pair.B)], options)


def _muon(
    model: nn.Module,
    matrices: Iterable[nn.Parameter],
    options: dict[str, Any],
    transposed: Sequence[nn.Parameter] = (),
) -> Optimizer:
    matrices = [each for each in matrices if each.requires_grad]
    rest = _groups(model, matrices)
    if not transposed:
        return MuonAndAdamW(matrices, rest, **options)
    kept = {*transposed}
    groups: list[dict[str, Any]] = [{"params": [each for each in matrices if each not in kept]}]
    for weight in transposed:  # Muon takes inputs x outputs for outputs x inputs
        inputs, outputs = weight.shape
        groups.append({"params": [weight], "lr": options["lr"] * math.sqrt(outputs / inputs)})
    return MuonAndAdamW([group for group in groups if group["params"]], rest, **options)


def _groups(model: nn.Module, taken: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Return the groups of the trainable parameters that are not taken, as torch's optimizers want them."""
    return [{key: group[key] for key in group if key != "names"} for group in decay_groups(model, taken)]
