"""Looks at a model without leaving a trace: mode, gradients and random state stay as they were."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import nn

from tangora._checks import check_whole

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of examples done and of all examples."""


@contextlib.contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; restore each module's mode and the random state."""
    # each module has its own mode: a frozen backbone may be in evaluation mode while its head trains
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs."""
    return next(model.parameters()).device


def length_batches(lengths: Sequence[int], batch_size: int, progress: Progress | None) -> Iterator[list[int]]:
    """Yield the indices of each batch, longest first: little padding, and what does not fit fails at once."""
    check_whole("batch_size", batch_size, low=1)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
