"""Weights that several modules share, when merging changes one of them."""

import inspect
from collections import Counter
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


def separate_bases(model: nn.Module) -> None:
    """Give the base of every adapted module parameters of its own, in the same memory.

    PEFT's safe merge puts new tensors into them, so that nothing else that shares them changes.
    """
    modules = list(model.modules())
    holders = Counter(id(child) for module in modules for child in module._modules.values())
    for layer in modules:
        base: Any = getattr(layer, "base_layer", None)
        if not isinstance(layer, BaseTunerLayer) or isinstance(base, BaseTunerLayer):
            continue
        if holders[id(base)] > 1:  # the module itself is used elsewhere, where PEFT left it as it is
            base = layer.base_layer = copy(base)
            base._modules, base._buffers = dict(base._modules), dict(base._buffers)
        base._parameters = {name: _again(parameter) for name, parameter in base._parameters.items()}


def _again(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach(), parameter.requires_grad)


def settle_ties(model: nn.Module) -> None:
    """Tie what transformers ties and is still equal; where something is not, let it tie nothing from now on.

    Every parameter that transformers knows as tied is then one of its own, in memory and in files: a file with all of
    them loads as it was written, whatever its config says.
    """
    held: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    pairs = {target: source for target, source in _tied_names(model) if {target, source} <= held.keys()}
    for target, source in pairs.items():
        if _equal(held[target], held[source]):
            held[target] = _put(model, target, held[source])
    if all(held[target] is held[source] for target, source in pairs.items()):
        return
    seen: set[int] = set()
    for name in sorted({*pairs, *pairs.values()}):
        parameter = held[name]
        if id(parameter) in seen:
            _put(model, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        seen.add(id(parameter))
    _forget_ties(model)


def tie_flags(model: nn.Module) -> list[tuple[Any, bool]]:
    """Read which configs of a model say that its embeddings are tied."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            parts = (getattr(module.config, name, None) for name in module.config.sub_configs)
            found |= {id(config): config for config in (module.config, *parts)}
    return [
        (config, config.tie_word_embeddings)
        for config in found.values()
        if hasattr(config, "tie_word_embeddings")
    ]


def _tied_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            start = f"{prefix}." if prefix else ""
            for target, source in module.get_expanded_tied_weights_keys().items():
                yield start + target, start + source


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, parameter)
    return parameter


def _forget_ties(model: nn.Module) -> None:
    parts: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in parts:
        module._tied_weights_keys, module.all_tied_weights_keys = {}, {}
    if any("tie_word_embeddings" in inspect.getsource(type(module).forward) for module in parts):
        return  # UMT5 and its like scale the output of their decoder where the flag is set
    flags = tie_flags(model)
    for config, _ in flags:
        config.tie_word_embeddings = False
    for config, flag in flags:
        if type(config).from_dict(config.to_dict()).tie_word_embeddings:  # T5's insists on its flag
            config.tie_word_embeddings = flag
