"""From AdaLoRA's three factors to plain LoRA of the ranks that AdaLoRA found."""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.adapters.pair import pattern_key
from tangora.adapters.peft_models import active_adapter, check_unmerged, unwrapped
from tangora.adapters.saved_factors import commonest


@torch.no_grad()
def from_adalora(model: nn.Module) -> PeftModel:
    r"""Turn an AdaLoRA adapter into plain LoRA of the ranks that it has found, which any optimizer can train on.

    $s\, P\, \mathrm{diag}(e)\, Q$ becomes $B A$ with $B = P \sqrt{s |e|}$ and $A = \mathrm{sign}(e) \sqrt{s |e|}\, Q$,
    without the directions whose $e$ AdaLoRA has set to zero; a layer that has lost all keeps one, with $B = 0$. The
    model computes the same, to rounding.

    Args:
        model: PEFT model whose only adapter is AdaLoRA's, after its last allocation of ranks. It is used up: its base
            and its new heads go into the result.

    Returns:
        A PEFT model on the same base with alpha = r everywhere, and ``rank_pattern`` for ranks other than the most
        frequent one.

    Raises:
        InputError: If the model's adapter is not AdaLoRA's, not the only one, or merged. The model is then as it was.
    """
    model, config = _only_adalora(model)
    check_unmerged(model)
    name = active_adapter(model)
    factors = {
        path: _factors(layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_A
    }
    heads = {
        path: module.modules_to_save[name]
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    ranks = {path: len(A) for path, (A, _) in factors.items()}
    usual = commonest(ranks.values())
    others = {pattern_key(path): rank for path, rank in ranks.items() if rank != usual}
    plain = _in_place_of(
        model,
        LoraConfig(
            task_type=config.task_type,
            r=usual,
            lora_alpha=usual,
            rank_pattern=others,
            alpha_pattern=others,
            target_modules=[path.removeprefix("base_model.model.") for path in factors],
            modules_to_save=config.modules_to_save,
            lora_dropout=config.lora_dropout,
            fan_in_fan_out=config.fan_in_fan_out,
            bias=config.bias,
        ),
    )
    for path, (A, B) in factors.items():
        layer: Any = plain.get_submodule(path)
        for held, new in ((layer.lora_A[name].weight, A), (layer.lora_B[name].weight, B)):
            held.copy_(new.reshape(held.shape))
    for path, head in heads.items():
        wrapper: Any = plain.get_submodule(path)
        wrapper.modules_to_save[name].load_state_dict(head.state_dict())
    return plain


def is_adalora(model: Any) -> bool:
    """Say whether a model's active adapter is AdaLoRA's."""
    model = unwrapped(model)
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, AdaLoraConfig)


def with_saved_ranks(model: nn.Module, folder: Path) -> PeftModel:
    """Give an AdaLoRA model's base a new plain LoRA adapter that has the configuration of a saved one."""
    model, _ = _only_adalora(model)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return _in_place_of(model, config)


def _only_adalora(model: Any) -> tuple[PeftModel, AdaLoraConfig]:
    model = unwrapped(model)
    config = model.peft_config[active_adapter(model)] if isinstance(model, PeftModel) else None
    if not isinstance(config, AdaLoraConfig) or len(model.peft_config) != 1:
        raise InputError(
            f"model must be a PEFT model with one adapter, AdaLoRA's; got {type(config).__name__}"
        )
    return model, config


def _in_place_of(model: PeftModel, config: Any) -> Any:
    name = active_adapter(model)
    base: Any = model.unload()
    return get_peft_model(base, config, adapter_name=name)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer, of the rank that is left, at scaling one."""
    P, Q, e = layer.lora_B[name], layer.lora_A[name], layer.lora_E[name][:, 0]
    e = e * layer.scaling[name] / (layer.ranknum[name] + 1e-5)  # as PEFT's forward pass has it
    left = e.nonzero()[:, 0]
    if len(left) == 0:
        return Q[:1].clone(), torch.zeros_like(P[:, :1])
    size = e[left].abs().sqrt()
    return (e[left].sign() * size)[:, None] * Q[left], P[:, left] * size
