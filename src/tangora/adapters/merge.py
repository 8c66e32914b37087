"""The trained model as a plain one, without PEFT."""

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tangora._checks import InputError, check_path
from tangora.adapters.bare import bare_model, check_gathered
from tangora.adapters.folder import check_replaceable, replace_folder, scratch_beside
from tangora.adapters.ranks import first_rank_writes
from tangora.adapters.untie import separate_bases, settle_ties, tie_flags
from tangora.adapters.wrapped import unwrapped

# what transformers writes for a model
_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


def merged_model(model: nn.Module) -> nn.Module:
    """Make a plain model with the active adapters in its weights.

    The given model is left as it is; weights without an adapter are shared with it, so train neither while the other
    is in use. Weights that several modules share (input and output embeddings, the tables of encoder and decoder) are
    untied when merging makes them differ: only the adapted module changes.

    Args:
        model: PEFT model with a base in floating point, possibly wrapped (DDP, torch.compile).

    Raises:
        InputError: If ``model`` is no PEFT model, its base is quantized (merging would quantize the sum again), sharded
            or holds other adapters, its adapter has no weights to merge or convolves otherwise than its layer, or an
            adapter is merged already.
    """
    return _merged(_mergeable(model))


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the trained model as a plain one that needs neither PEFT nor tangora.

    Save the tokenizer beside it yourself. With ``torch.distributed`` running, rank 0 writes, and other ranks that call
    this wait for it.

    Args:
        model: PEFT model over a transformers model in floating point; it is left as it is.
        path: Folder to write, whole or not at all; a model that is there already is replaced.

    Raises:
        InputError: If ``model`` cannot be merged (see `merged_model`), its base is no transformers model, its class
            would load the file as another model, or ``path`` holds anything but a model.
    """
    target = check_path("path", path)
    return first_rank_writes(target, lambda: _save_merged(model, target))


def _save_merged(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    bare = _mergeable(model)
    if not isinstance(base := unwrapped(bare.get_base_model()), PreTrainedModel):
        raise InputError(
            f"save_merged needs a transformers model as base; got {type(base).__name__}: "
            "take merged_model(model) and save its state_dict"
        )
    target = Path(path).resolve()
    check_replaceable(
        target, what="model", marker="config.json", known=lambda name: _FILES.fullmatch(name) is not None
    )
    merged: Any = _merged(bare)
    with scratch_beside(target) as scratch:
        _write(merged, scratch)
        _check_class(merged, scratch)
        replace_folder(scratch, target)
    return Path(path)


def _mergeable(model: nn.Module) -> PeftModel:
    bare = bare_model(model)
    base: Any = unwrapped(bare.get_base_model())
    integers = any(not parameter.is_floating_point() for parameter in bare.parameters())
    if integers or getattr(base, "quantization_method", None) or getattr(base, "hf_quantizer", None):
        raise InputError(
            "a quantized base cannot be merged without quantizing the sum again: save_adapter, load the base in "
            "floating point, load_adapter, and merge that"
        )
    if any(getattr(module, "merged_adapters", None) for module in bare.modules()):
        raise InputError("the adapter is merged already: unmerge_adapter first")
    if not hasattr(bare.base_model, "merge_and_unload"):
        config: Any = bare.active_peft_config
        raise InputError(
            f"an adapter of kind {config.peft_type.value} changes no weights: save_adapter it instead"
        )
    for name, module in bare.named_modules():
        layer: Any = getattr(module, "base_layer", None)
        mode, dilation = getattr(layer, "padding_mode", "zeros"), getattr(layer, "dilation", 1)
        if mode != "zeros" or set(dilation if isinstance(dilation, tuple) else (dilation,)) != {1}:
            raise InputError(
                f"{name} has padding mode {mode!r} and dilation {dilation}, which its adapter does not follow, so "
                "that no kernel can do both: save_adapter instead"
            )
    check_gathered(bare, "merging")
    return bare


def _merged(model: PeftModel) -> nn.Module:
    views = list(_tied_views(model))
    # Every parameter of the copy is a new one in the same memory. PEFT's MultiheadAttention makes new parameters at
    # every walk: these must live until the copy is made, or their ids would come to mean others.
    parameters = list(model.parameters())
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in parameters
    }
    twin: Any = copy.deepcopy(model, shared | {id(view): view.detach() for view in views})
    separate_bases(twin)
    flags = tie_flags(twin)
    for config, _ in flags:
        config.tie_word_embeddings = False  # for PEFT, which warns and clears one of them otherwise
    merged = unwrapped(twin.merge_and_unload(safe_merge=True))
    for config, flag in flags:
        config.tie_word_embeddings = flag
    settle_ties(merged)
    return merged


def _tied_views(model: nn.Module) -> Iterator[torch.Tensor]:
    # PEFT keeps what it tied an adapter to, views with a history, which cannot be copied
    for module in model.modules():
        kwargs: Any = getattr(module, "kwargs", None) or {}
        yield from (kwargs.get("tied_adapter") or {}).values()


def _write(merged: Any, folder: Path) -> None:
    try:
        merged.save_pretrained(folder)
    except RuntimeError as error:  # modules share weights, and their class does not say so
        raise InputError(
            f"transformers cannot write this {type(merged).__name__}: take merged_model(model) and save its "
            f"state_dict ({str(error).splitlines()[0]})"
        ) from error


def _check_class(merged: PreTrainedModel, folder: Path) -> None:
    """Refuse a model that its own class would build with other weights or with fewer modules."""
    try:
        with init_empty_weights():
            fresh = type(merged)(type(merged.config).from_pretrained(folder))
    except TypeError:  # a class that takes more than a config
        return
    built, held = ({k: v.shape for k, v in each.state_dict().items()} for each in (fresh, merged))
    if different := sorted(built.items() ^ held.items()):
        _refuse_class(merged, different[0][0])
    names: dict[int, str] = {}
    for name, module in fresh.named_modules(remove_duplicate=False):
        if (first := names.setdefault(id(module), name)) != name:
            one, other = (merged.get_submodule(each).state_dict() for each in (first, name))
            if any(not torch.equal(one[key], other[key]) for key in one):
                _refuse_class(merged, name)


def _refuse_class(merged: nn.Module, name: str) -> None:
    raise InputError(
        f"{type(merged).__name__} would load another {name} than the merged model has: save_adapter instead, or take "
        "merged_model(model) and save its state_dict"
    )
