"""The trained model as a plain one, without PEFT."""

import copy
import inspect
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangora._checks import InputError, check_path
from tangora.adapters.folder import check_replaceable, first_rank_writes, replace_folder, scratch_beside
from tangora.adapters.peft_models import bare_model, check_gathered, check_unmerged, unwrapped

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
            f"save_merged needs a transformers model as base; got {type(base).__name__}: save the "
            "state_dict of merged_model(model) instead"
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
            "a quantized base cannot be merged without a second quantization: call save_adapter, load "
            "the base in floating point, call load_adapter, and merge that model"
        )
    check_unmerged(bare)
    if not hasattr(bare.base_model, "merge_and_unload"):
        config: Any = bare.active_peft_config
        raise InputError(
            f"an adapter of kind {config.peft_type.value} changes no weights, so it cannot be merged: "
            "use save_adapter instead"
        )
    for name, module in bare.named_modules():
        layer: Any = getattr(module, "base_layer", None)
        mode, dilation = getattr(layer, "padding_mode", "zeros"), getattr(layer, "dilation", 1)
        if mode != "zeros" or set(dilation if isinstance(dilation, tuple) else (dilation,)) != {1}:
            raise InputError(
                f"{name} has padding mode {mode!r} and dilation {dilation}, which its adapter does not "
                "use, so one kernel cannot represent both: use save_adapter instead"
            )
    check_gathered(bare, "merging")
    return bare


def _merged(model: PeftModel) -> nn.Module:
    views = list(_tied_views(model))
    # Every parameter of the copy is a new one in the same memory. PEFT's MultiheadAttention makes new parameters at
    # every walk: these must live until the copy is made, or their ids would come to mean others.
    parameters = list(model.parameters())
    shared: dict[int, Any] = {id(parameter): _again(parameter) for parameter in parameters}
    twin: Any = copy.deepcopy(model, shared | {id(view): view.detach() for view in views})
    _separate_bases(twin)
    flags = _tie_flags(twin)
    for config, _ in flags:
        config.tie_word_embeddings = False  # for PEFT, which warns and clears one of them otherwise
    merged = unwrapped(twin.merge_and_unload(safe_merge=True))
    for config, flag in flags:
        config.tie_word_embeddings = flag
    _settle_ties(merged)
    return merged


def _tied_views(model: nn.Module) -> Iterator[Tensor]:
    # PEFT keeps what it tied an adapter to, views with a history, which cannot be copied
    for module in model.modules():
        kwargs: Any = getattr(module, "kwargs", None) or {}
        yield from (kwargs.get("tied_adapter") or {}).values()


def _write(merged: Any, folder: Path) -> None:
    try:
        merged.save_pretrained(folder)
    except RuntimeError as error:  # modules share weights, and their class does not say so
        raise InputError(
            f"transformers cannot save this {type(merged).__name__}: take merged_model(model) and save its "
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
        f"{type(merged).__name__} would load another {name} than the merged model has: use save_adapter "
        "instead, or save the state_dict of merged_model(model)"
    )


def _separate_bases(model: nn.Module) -> None:
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
            base = layer.base_layer = copy.copy(base)
            base._modules, base._buffers = dict(base._modules), dict(base._buffers)
        base._parameters = {name: _again(parameter) for name, parameter in base._parameters.items()}


def _again(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach(), parameter.requires_grad)


def _settle_ties(model: nn.Module) -> None:
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


def _tie_flags(model: nn.Module) -> list[tuple[Any, bool]]:
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
    flags = _tie_flags(model)
    for config, _ in flags:
        config.tie_word_embeddings = False
    for config, flag in flags:
        if type(config).from_dict(config.to_dict()).tie_word_embeddings:  # T5's insists on its flag
            config.tie_word_embeddings = flag
