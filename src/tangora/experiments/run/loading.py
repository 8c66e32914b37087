"""The data of a run, and the base model that it begins with, ready for training."""

from typing import Any

import torch
from torch import nn

from tangora._checks import InputError
from tangora.experiments.settings import RunSettings
from tangora.recipes import recipe
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


def prepare(method: str, model: Any, task: Task, settings: RunSettings) -> nn.Module:
    """Make a base model ready for training as the settings want it.

    Args:
        method: Recipe.
        model: Changed in place.
        task: For the kind.
        settings: The run's.

    Returns:
        What `Recipe.prepare` returns.
    """
    return recipe(method).prepare(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        task_type="SEQ_CLS" if task.kind == "classification" else "CAUSAL_LM",
        total_steps=settings.num_steps(len(task.train)),
        seed=settings.seed,
        target_modules=settings.target_modules,
        lora_dropout=settings.lora_dropout,
        rank_plan=settings.rank_plan,
    )


def prepared_twin(method: str, settings: RunSettings, task: Task, loaded: LoadedModel) -> nn.Module:
    """Do the same with a twin of the model that holds no weights.

    Returns:
        What `prepare` returns; it costs next to nothing, and fails for the same reasons.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(loaded.model)(loaded.model.config)  # pyright: ignore[reportCallIssue]
        return prepare(method, twin, task, settings)
