"""Saved adapter of a run, and the proof that plain PEFT computes the model's outputs with it.

Where the disk is full, the weights go to another place rather than nowhere.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from tangora._checks import InputError, on_one_line
from tangora._folders import RunFolder
from tangora.adapters import load_adapter, save_adapter
from tangora.adapters.folder import replace_folder, scratch_beside
from tangora.experiments.folders import NO_SPACE, is_disk_full
from tangora.experiments.provenance import versions
from tangora.experiments.run.machine import num_bytes
from tangora.experiments.run.preparing import Run, load_base
from tangora.experiments.settings import RunSettings
from tangora.training.callbacks import last_checkpoint, step_of
from tangora.training.data import Task
from tangora.training.data.images import holds_image
from tangora.training.ranks import is_first

_NUM_EXAMPLES = 8
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference that rounding explains, as a share of the largest logit: the frozen weights' dtype decides."""

_MOMENTS = 2
_CHECKPOINTS_AT_ONCE = 3


@dataclass(frozen=True)
class Proof:
    """Difference between the logits of plain PEFT with a saved adapter and those of the trained model.

    Attributes:
        difference: Largest absolute difference.
        allowed: The most that rounding explains.
    """

    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether plain PEFT computes what the trained model did."""
        return self.difference <= self.allowed  # not so for NaN


def save_with_logits(run: Run, model: PeftModel) -> None:
    """Save the adapter of a run, and what it computes on a few test examples, which `verify_adapter` compares with."""
    facts = model_card_facts(run.settings, run.task.fingerprint, data_format(run))
    save_adapter(model, run.folder.adapter, card=facts, tokenizer=run.loaded.tokenizer)
    logits = _logits(run, model)
    if is_first():
        torch.save(logits, run.folder.logits)


def verify_adapter(settings: RunSettings, task: Task, folder: Path) -> Proof:
    """Load the saved adapter with plain PEFT on a fresh base, and compare its logits with the trained model's."""
    run = Run(settings, task, load_base(settings, task), RunFolder(folder))
    model = load_adapter(run.loaded.model, run.folder.adapter)
    try:
        expected = torch.load(run.folder.logits, weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{run.folder.logits} cannot be read, so the export cannot be verified") from error
    difference = float((_logits(run, model) - expected).abs().max())
    return Proof(difference, _ROUNDING[settings.dtype] * max(1.0, float(expected.abs().max())))


def data_format(run: Run) -> str:
    """Name the form in which the examples of a run are written for a model; model cards have code for each."""
    if run.settings.chat_template:
        return "chat template"
    first = run.task.train[0]
    if run.task.kind == "causal":
        return "prompt + newline + completion + eos" if first["prompt"] else "plain text"
    if holds_image(first):
        return "images"
    return "pair of texts" if "text_pair" in first else "text"


def model_card_facts(settings: RunSettings, fingerprint: str, form: str) -> dict[str, Any]:
    """Return what a model card should tell of a run."""
    length = {"steps": settings.steps} if settings.epochs is None else {"epochs": settings.epochs}
    return {
        "base model": settings.model,
        "recipe": settings.recipe,
        "learning rate": settings.peak_learning_rate,
        "seed": settings.seed,
        **length,
        "batch size": settings.batch_size * settings.accumulate,
        "data": settings.data,
        "data fingerprint": fingerprint,
        "format": form,
        "max length": settings.max_length,
    } | versions()


@torch.no_grad()
def _logits(run: Run, model: nn.Module) -> Float[Tensor, "..."]:
    data, collate = run.encoded(run.task.test[:_NUM_EXAMPLES])
    batch = collate([data[index] for index in range(len(data))])
    batch.pop("labels", None)
    model.eval()
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu()


def check_space(folder: Path, model: nn.Module, *, keeps_model: bool, checkpoints: bool) -> None:
    """Check, before training, that what it leaves will fit on the disk."""
    trained = num_bytes(p for p in model.parameters() if p.requires_grad)
    # an adapter may be saved at twice its rank
    last = (
        2 * trained if isinstance(model, PeftModel) else num_bytes(model.parameters()) if keeps_model else 0
    )
    needed = last + (_CHECKPOINTS_AT_ONCE * (1 + _MOMENTS) * trained if checkpoints else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {NO_SPACE}: this run will write about {needed / 2**20:,.1f} MiB and "
            f"{free / 2**20:,.1f} MiB are free; free some space, or choose another --output"
        )


@contextmanager
def rescued(run: Run, model: Callable[[], nn.Module]) -> Iterator[None]:
    """If nothing can be written while a run trains or is saved, keep its weights in the system's temporary folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as problem:
        if not is_disk_full(problem) or not is_first():
            raise
        sealed = last_checkpoint(run.folder.checkpoints)  # the one that was cut off goes, and frees its space
        step = f"continues from step {step_of(sealed)}" if sealed else "begins again"
        place = Path(tempfile.mkdtemp(prefix="tangora-"))
        try:
            kept = f"the current weights are in {save_weights(run, model(), RunFolder(place))}"
        except (OSError, SafetensorError, RuntimeError):
            shutil.rmtree(place, ignore_errors=True)
            kept = f"{place.parent} is full, too"
        raise InputError(
            f"{run.folder.path}: {NO_SPACE}; {kept}; free some space, and the same command {step}"
        ) from problem


@contextmanager
def read_whole(checkpoint: Path | None, step: Callable[[], int]) -> Iterator[None]:
    """Say of a checkpoint that cannot be read what to do."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        RuntimeError,
        UnpicklingError,
        SafetensorError,
    ) as problem:
        if checkpoint is None or is_disk_full(problem) or step() > step_of(checkpoint):
            raise
        said = on_one_line(problem, 100)
        raise InputError(
            f"{checkpoint} cannot be read ({said}); delete it, and the same command continues from the "
            "previous checkpoint"
        ) from problem


def save_weights(run: Run, model: nn.Module, folder: RunFolder) -> Path:
    """Write the adapter of a run, or its whole model with the tokenizer, whole or not at all."""
    if isinstance(model, PeftModel):
        return save_adapter(model, folder.adapter).path
    with scratch_beside(folder.model) as scratch:
        run.loaded.model.save_pretrained(scratch)
        run.loaded.tokenizer.save_pretrained(scratch)
        replace_folder(scratch, folder.model)
    return folder.model
