"""The data of a run, and the base model that it begins with."""

import torch

from tangora._checks import InputError
from tangora.experiments.settings import RunSettings
from tangora.training.data import Task, load_task
from tangora.training.devices import device_named
from tangora.training.models import LoadedModel, load_model


def load_run_task(settings: RunSettings) -> Task:
    """Load the data of a run.

    Args:
        settings: The run's; the split does not depend on its seed.

    Returns:
        The task.
    """
    return load_task(settings.data, **settings.as_task())


def load_base(settings: RunSettings, task: Task) -> LoadedModel:
    """Load the untouched base model of a run; a new head is drawn from the run's seed.

    Args:
        settings: The run's.
        task: Its data, for the labels.

    Returns:
        Model and tokenizer; the model on the run's device.
    """
    device = device_named(settings.device)
    loaded = load_model(
        settings.model,
        kind=task.kind,
        labels=task.labels or None,
        dtype=getattr(torch, settings.dtype),
        seed=settings.seed,
        quantize_to=device if settings.load_in_4bit else None,
    )
    if settings.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
        raise InputError(
            f"gradient_checkpointing cannot be used with model {settings.model!r}: "
            f"{type(loaded.model).__name__} does not support it; leave it out"
        )
    if not settings.load_in_4bit:  # what is quantized has been loaded to the device
        loaded.model.to(device)  # pyright: ignore[reportArgumentType]
    return loaded
