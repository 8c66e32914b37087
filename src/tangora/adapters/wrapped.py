"""Look through what data-parallel training and compilation wrap around a model, and refuse sharded weights."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from tangora._checks import InputError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: Any) -> Any:
    """Return the model inside wrappers for data-parallel training and compilation.

    Returns:
        The innermost model; anything else is returned unchanged.
    """
    while isinstance(model, (*_PARALLEL, OptimizedModule)):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def uncompiled_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name the modules of a model, without the wrappers that ``torch.compile`` puts around some of them.

    Returns:
        Modules by their path in the model.
    """
    return {name: module for name, module in model.named_modules() if not isinstance(module, OptimizedModule)}


def check_not_sharded(
    parameters: Iterable[tuple[str, nn.Parameter]],
    what: str,
    instead: str = "call it before the model is sharded",
) -> None:
    """Raise `InputError` if a process holds a part of a parameter only.

    Args:
        what: The function that needs them whole, for the message.
        instead: What to do, for the message.

    Raises:
        InputError: Naming the parameter.
    """
    for name, parameter in parameters:
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):
            raise InputError(
                f"{what} needs whole weights, and {name} is sharded (FSDP, tensor parallelism, ZeRO-3): {instead}"
            )
