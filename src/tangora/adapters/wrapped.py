"""Look through what training wraps around a model."""

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers for data-parallel training and compilation.

    Args:
        model: Any model.

    Returns:
        What is inside.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
