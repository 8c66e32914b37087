"""The proof of a saved adapter: plain PEFT computes with it, on the untouched base, what the trained model did."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.adapters import load_adapter, save_adapter
from tangora.experiments.provenance import versions
from tangora.experiments.run.batches import encoded
from tangora.experiments.run.loading import load_base
from tangora.experiments.settings import RunSettings, TaskSettings
from tangora.training.data import Task
from tangora.training.models import LoadedModel

_NUM_EXAMPLES = 8
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference that rounding explains, as a share of the largest logit: the frozen weights' dtype decides."""


@dataclass(frozen=True)
class Proof:
    """What plain PEFT's logits say of a saved adapter.

    Attributes:
        difference: Largest absolute difference from the trained model's logits.
        allowed: The most that rounding explains.
    """

    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether plain PEFT computes what the trained model did."""
        return self.difference <= self.allowed  # not so for NaN


def save_with_logits(
    model: PeftModel, folder: Path, loaded: LoadedModel, task: Task, settings: RunSettings
) -> None:
    """Save the adapter of a run, and what it computes on a few test examples, which `verify_adapter` will ask for."""
    facts = model_card_facts(settings, task.fingerprint, data_format(task, settings))
    save_adapter(model, folder / "adapter", card=facts, tokenizer=loaded.tokenizer)
    torch.save(_logits(model, loaded, task, settings), folder / "logits.pt")


def verify_adapter(settings: RunSettings, task: Task, folder: Path) -> Proof:
    """Load the saved adapter with plain PEFT on a fresh base, and compare its logits with the trained model's."""
    loaded = load_base(settings, task)
    model = load_adapter(loaded.model, folder / "adapter")
    try:
        expected = torch.load(folder / "logits.pt", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{folder / 'logits.pt'} cannot be read, so that nothing can be proven") from error
    difference = float((_logits(model, loaded, task, settings) - expected).abs().max())
    return Proof(difference, _ROUNDING[settings.dtype] * max(1.0, float(expected.abs().max())))


def data_format(task: Task, settings: TaskSettings) -> str:
    """Say how the examples of a task are written for a model, as a card has code for it."""
    if settings.chat_template:
        return "chat template"
    first = task.train[0]
    if task.kind == "causal":
        return "prompt + newline + completion + eos" if first["prompt"] else "plain text"
    if "pixels" in first:
        return "images"
    return "pair of texts" if "text_pair" in first else "text"


def model_card_facts(settings: RunSettings, fingerprint: str, form: str) -> dict[str, Any]:
    """Return what a model card should tell of a run."""
    length = {"steps": settings.steps} if settings.epochs is None else {"epochs": settings.epochs}
    return {
        "base model": settings.model,
        "recipe": settings.recipe,
        "learning rate": settings.peak,
        "seed": settings.seed,
        **length,
        "batch size": settings.batch_size * settings.accumulate,
        "data": settings.data,
        "data fingerprint": fingerprint,
        "format": form,
        "max length": settings.max_length,
    } | versions()


@torch.no_grad()
def _logits(model: nn.Module, loaded: LoadedModel, task: Task, settings: RunSettings) -> Float[Tensor, "..."]:
    data, collate = encoded(task.test[:_NUM_EXAMPLES], loaded, settings)
    batch = collate([data[index] for index in range(len(data))])
    batch.pop("labels", None)
    model.eval()
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu()
