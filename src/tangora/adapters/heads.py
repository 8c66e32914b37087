"""The head of a model, which every method trains whole, and the linear layers besides it, which adapters are put on."""

from typing import Any

from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from tangora.adapters.peft_models import uncompiled_modules, unwrapped

_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def head_names(model: nn.Module) -> list[str]:
    """Name the modules of a classifier that do not belong to its backbone; none for other models."""
    if not type(model).__name__.endswith(_CLASSIFIERS):
        return []
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != backbone and any(True for _ in child.parameters())
    ]


def head_options(model: nn.Module) -> dict[str, Any]:
    """Return the options of PEFT's configuration that keep adapters off the head and train it whole.

    PEFT knows heads called ``score`` and ``classifier`` only. The others, T5's and BART's ``classification_head`` and
    DistilBERT's ``pre_classifier``, it would leave random and frozen, or put adapters on.
    """
    names = head_names(model)
    if set(names) <= set(SEQ_CLS_HEAD_NAMES):
        return {}
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in names
    ]
    return {"modules_to_save": names, "exclude_modules": inside}


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the trainable parameters of a new head."""
    model = unwrapped(model)
    kept = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    heads = kept or [model.get_submodule(name) for name in head_names(model)]
    return [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a base model by path, without its head and output embeddings."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {*head_names(model), *(SEQ_CLS_HEAD_NAMES if output is None else ())}
    return {
        name: module
        for name, module in uncompiled_modules(model).items()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not output
        and name.split(".")[0] not in heads
    }
