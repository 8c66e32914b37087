"""A learning rate of its own for a new head, which every method trains whole.

Without it a head takes the adapter's rate, and methods are compared by how fast their heads may learn: LoRA's best rate
is ten times that of full fine-tuning, whatever its adapter does.
"""

from typing import Any

from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.optim import Optimizer

from tangora._checks import InputError, check_number
from tangora.adapters import unwrapped
from tangora.recipes.regroup import regroup

_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def head_names(model: nn.Module) -> list[str]:
    """Name the modules of a classifier that do not belong to its backbone."""
    if not type(model).__name__.endswith(_CLASSIFIERS):
        return []
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != backbone and any(True for _ in child.parameters())
    ]


def head_options(model: nn.Module) -> dict[str, Any]:
    """Return what PEFT must be told about a head.

    It knows heads called ``score`` and ``classifier`` only. The others, T5's and BART's ``classification_head`` and
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
    """Find the parameters of a new head."""
    model = unwrapped(model)
    kept = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    heads = kept or [model.get_submodule(name) for name in head_names(model)]
    return [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]


def set_head_rate(optimizer: Optimizer, model: nn.Module, lr: float) -> None:
    """Give the head of a model a learning rate of its own."""
    check_number("head_lr", lr, low=0)
    head = head_parameters(model)
    if not head:
        raise InputError(f"head_lr needs a model with a new head; {type(model).__name__} has none")
    regroup(optimizer, head, lr=lr)
