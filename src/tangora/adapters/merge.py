"""The trained model as a plain one, without PEFT."""

import contextlib
import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from tangora._checks import InputError
from tangora.adapters.folder import check_replaceable, replace_folder, scratch_beside
from tangora.adapters.once import on_first_rank
from tangora.adapters.switch import peft_model

# what transformers writes for a model
_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


def merged_model(model: nn.Module) -> nn.Module:
    """Make a plain model with the active adapters in its weights.

    The given model is left as it is; weights without an adapter are shared with it, so train neither while the other
    is in use. Input and output embeddings that share their memory are untied when one of them is adapted, because after
    merging they differ.

    Args:
        model: PEFT model with a base in floating point.

    Returns:
        The merged model.

    Raises:
        InputError: If ``model`` is no PEFT model, its base is quantized (merging would quantize the sum again), or an
            adapter is merged already.
    """
    model = _mergeable(model, "merged_model")
    # in the same memory: PEFT's safe merge puts new tensors into the weights and never writes into the old ones
    twin = with_parameters(model, lambda tensor: tensor)
    _untie(twin)
    with _ties_settled(twin.get_base_model()):
        return twin.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the trained model as a plain one that needs neither PEFT nor tangora.

    Save the tokenizer beside it yourself.

    Args:
        model: PEFT model over a transformers model in floating point, also inside DistributedDataParallel or
            ``torch.compile``; it is left as it is. With ``torch.distributed`` running, rank 0 writes, and other ranks
            that call it wait.
        path: Folder to write, whole or not at all; a model that is there already is replaced.

    Returns:
        The folder.

    Raises:
        InputError: If ``model`` cannot be merged (see `merged_model`), its base is no transformers model, or ``path``
            holds anything but a model.
    """
    model = _mergeable(model, "save_merged")
    if not isinstance(model.get_base_model(), PreTrainedModel):
        raise InputError(
            f"save_merged needs a transformers model as base; got {type(model.get_base_model()).__name__}: "
            "take merged_model(model) and save its state_dict"
        )
    target = Path(path).resolve()
    check_replaceable(
        target, what="model", marker="config.json", known=lambda name: _FILES.fullmatch(name) is not None
    )

    def write() -> Path:
        merged: Any = merged_model(model)
        with scratch_beside(target) as scratch:
            merged.save_pretrained(scratch)
            replace_folder(scratch, target)
        return Path(path)

    return on_first_rank(write, target, "save_merged")


def _mergeable(model: nn.Module, owner: str) -> PeftModel:
    """Return the PEFT model that is to be merged, or raise `InputError`."""
    model = peft_model(model, owner)
    base: Any = model.get_base_model()
    integers = any(not parameter.is_floating_point() for parameter in model.parameters())
    if integers or getattr(base, "quantization_method", None) or getattr(base, "hf_quantizer", None):
        raise InputError(
            "a quantized base cannot be merged without quantizing the sum again: save_adapter, load the base in "
            "floating point, load_adapter, and merge that"
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise InputError("the adapter is merged already: unmerge_adapter first")
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        mode, dilation = getattr(base, "padding_mode", "zeros"), getattr(base, "dilation", 1)
        if mode != "zeros" or (dilation != 1 and {*dilation} != {1}):
            raise InputError(
                f"{name} has padding mode {mode!r} and dilation {dilation}, which its adapter does not follow, so "
                "that no kernel can do both: save_adapter instead"
            )
    return model


def with_parameters(model: PeftModel, new: Callable[[torch.Tensor], torch.Tensor]) -> PeftModel:
    """Copy a model with other tensors in its parameters; parameters that are one in it are one in the copy.

    Args:
        model: PEFT model.
        new: Makes the tensor of a parameter.

    Returns:
        The copy.
    """
    views = [*_tied_views(model)]
    parameters = [*model.parameters()]  # kept alive: some layers make new ones whenever they are listed
    memo: dict[int, Any] = {id(p): nn.Parameter(new(p.detach()), p.requires_grad) for p in parameters}
    memo |= {id(view): new(view.detach()) for view in views}
    return copy.deepcopy(model, memo)


def _tied_views(model: nn.Module) -> Iterator[torch.Tensor]:
    # PEFT keeps what it tied an adapter to, views with a history, which cannot be copied
    for module in model.modules():
        kwargs: Any = getattr(module, "kwargs", None) or {}
        yield from (kwargs.get("tied_adapter") or {}).values()


def _untie(model: nn.Module) -> None:
    """Give layers that merging changes a module and parameters of their own: others may hold the same ones."""
    times = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base: Any = layer.base_layer
        if isinstance(base, BaseTunerLayer):
            continue
        if times[id(base)] > times[id(layer)]:  # UMT5's encoder calls the very module of the shared table
            layer.base_layer = base = _twin_of(base)
        for name, parameter in list(base.named_parameters(recurse=False)):
            base.register_parameter(name, nn.Parameter(parameter.detach(), parameter.requires_grad))


def _twin_of(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    return twin


@contextlib.contextmanager
def _ties_settled(base: nn.Module) -> Iterator[None]:
    """Make config and memory say which of a model's tied weights are still tied after merging.

    A saved file leaves out weights that share the memory of another; loading ties what is missing to the source that
    the model's class names, and leaves alone what the file holds with values of its own.
    """
    config: Any = getattr(base, "config", None)
    if not isinstance(base, PreTrainedModel) or not getattr(config, "tie_word_embeddings", False):
        yield
        return
    config.tie_word_embeddings = False  # PEFT would look at one pair of them, and warn
    yield
    config.tie_word_embeddings = True
    ties = base.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = {name: base.get_parameter_or_buffer(name) for name in {*ties, *ties.values()}}
    broken = [name for name, source in ties.items() if not _same(parameters[name], parameters[source])]
    for name in broken:
        parent, _, key = name.rpartition(".")
        setattr(base.get_submodule(parent), key, nn.Parameter(parameters[name].detach().clone(), False))
    # the forward pass of T5's kin scales by it; elsewhere readers take it at its word and skip the head in the file
    config.tie_word_embeddings = getattr(config, "is_encoder_decoder", False) or len(broken) < len(ties)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()
