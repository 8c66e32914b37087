"""Look at the base model under its adapters, without touching anything else."""

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from tangora._checks import InputError
from tangora.adapters.wrapped import unwrapped


@contextlib.contextmanager
def adapters_off(model: nn.Module, *, keep_heads: bool = False) -> Iterator[None]:
    """Let a model compute what it would without adapters and modules to save.

    PEFT's own ``disable_adapter`` leaves the active adapter trainable, whether it was or not; here only the switch
    itself is moved, and put back.

    Args:
        model: Any model with PEFT layers.
        keep_heads: Whether modules to save stay as they are, and only adapters are switched off.

    Yields:
        Nothing.

    Raises:
        InputError: If an adapter is merged: the base is not there to be looked at.
    """
    check_unmerged(model)
    kinds = (BaseTunerLayer,) if keep_heads else (BaseTunerLayer, AuxiliaryTrainingWrapper)
    switched = [module for module in model.modules() if isinstance(module, kinds)]
    before = [module.disable_adapters for module in switched]
    try:
        for module in switched:
            module._disable_adapters = True
        yield
    finally:
        for module, was in zip(switched, before, strict=True):
            module._disable_adapters = was


def check_unmerged(model: nn.Module) -> None:
    """Raise `InputError` if an adapter of the model is merged.

    Args:
        model: Any model.

    Raises:
        InputError: Naming the adapter and a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged_adapters:
            raise InputError(
                f"adapter {module.merged_adapters[0]!r} is merged into {name}: call unmerge_adapter first"
            )


def peft_model(model: nn.Module, owner: str) -> PeftModel:
    """Return the PEFT model inside wrappers for data-parallel training and compilation.

    Args:
        model: What a user gave.
        owner: Name of the function, for the message.

    Returns:
        The PEFT model.

    Raises:
        InputError: If there is none, or its base model is one, too: each writes only its own adapters.
    """
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, PeftModel):
        raise InputError(f"{owner} needs a PeftModel; got {type(model).__name__}")
    nested = next((name for name, m in inner.named_modules() if name and isinstance(m, PeftModel)), None)
    if nested is not None:
        raise InputError(
            f"{owner} needs a PeftModel over a base model, and its {nested} is a PeftModel, whose adapters would be "
            "lost: use model.add_adapter for a second adapter, or merge_and_unload the first one before"
        )
    return inner
