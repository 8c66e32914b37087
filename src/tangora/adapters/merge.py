"""The trained model as a plain one, without PEFT."""

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tangora._checks import InputError
from tangora.adapters.folder import check_replaceable, replace_folder, scratch_beside

# what transformers writes for a model
_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


def merged_model(model: PeftModel) -> nn.Module:
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
    _check_mergeable(model)
    # Every parameter of the copy is a new one in the same memory. PEFT's safe merge puts new tensors into the weights
    # and never writes into the old ones.
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    for tensor in _tied_views(model):
        shared[id(tensor)] = tensor.detach()
    twin = copy.deepcopy(model, shared)
    _untie(twin)
    return twin.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]


def save_merged(model: PeftModel, path: str | os.PathLike[str]) -> Path:
    """Write the trained model as a plain one that needs neither PEFT nor tangora.

    Save the tokenizer beside it yourself.

    Args:
        model: PEFT model over a transformers model in floating point; it is left as it is.
        path: Folder to write, whole or not at all; a model that is there already is replaced.

    Returns:
        The folder.

    Raises:
        InputError: If ``model`` cannot be merged (see `merged_model`), its base is no transformers model, or ``path``
            holds anything but a model.
    """
    _check_mergeable(model)
    if not isinstance(model.get_base_model(), PreTrainedModel):
        raise InputError(
            f"save_merged needs a transformers model as base; got {type(model.get_base_model()).__name__}: "
            "take merged_model(model) and save its state_dict"
        )
    target = Path(path).resolve()
    check_replaceable(
        target, what="model", marker="config.json", known=lambda name: _FILES.fullmatch(name) is not None
    )
    merged: Any = merged_model(model)
    with scratch_beside(target) as scratch:
        merged.save_pretrained(scratch)
        replace_folder(scratch, target)
    return Path(path)


def _check_mergeable(model: PeftModel) -> None:
    if not isinstance(model, PeftModel):
        raise InputError(f"model must be a PeftModel; got {type(model).__name__}")
    base: Any = model.get_base_model()
    integers = any(not parameter.is_floating_point() for parameter in model.parameters())
    if integers or getattr(base, "quantization_method", None) or getattr(base, "hf_quantizer", None):
        raise InputError(
            "a quantized base cannot be merged without quantizing the sum again: save_adapter, load the base in "
            "floating point, load_adapter, and merge that"
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise InputError("the adapter is merged already: unmerge_adapter first")


def _tied_views(model: nn.Module) -> Iterator[torch.Tensor]:
    # PEFT keeps what it tied an adapter to, views with a history, which cannot be copied
    for module in model.modules():
        kwargs: Any = getattr(module, "kwargs", None) or {}
        yield from (kwargs.get("tied_adapter") or {}).values()


def _untie(model: Any) -> None:
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return
    rows, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not (hasattr(rows, "lora_A") or hasattr(head, "lora_A")):
        return
    first, second = (_base_layer(layer) for layer in (rows, head))
    if first.weight is second.weight:
        second.weight = nn.Parameter(torch.clone(first.weight.detach()), first.weight.requires_grad)
        base.config.tie_word_embeddings = False


def _base_layer(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)
