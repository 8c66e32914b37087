"""Look at the base model under its adapters, without touching anything else."""

import contextlib
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from tangora._checks import InputError


@contextlib.contextmanager
def adapters_off(model: nn.Module, *, keep_heads: bool = False) -> Iterator[None]:
    """Let a model compute what it would without adapters and modules to save.

    PEFT's own ``disable_adapter`` leaves the active adapter trainable, whether it was or not; here only the switch
    itself is moved, and put back.

    Args:
        model: Any model with PEFT layers.
        keep_heads: Whether modules to save stay as they are, and only adapters are switched off.

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

    Raises:
        InputError: Naming the adapter and a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged_adapters:
            raise InputError(
                f"adapter {module.merged_adapters[0]!r} is merged into {name}: call unmerge_adapter first"
            )
