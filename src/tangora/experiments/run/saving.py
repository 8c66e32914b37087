"""What a run leaves behind: where the disk is full, in another place rather than nowhere."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from tangora._checks import InputError, on_one_line
from tangora.adapters import save_adapter
from tangora.adapters.folder import replace_folder, scratch_beside
from tangora.experiments.folders import CHECKPOINTS, NO_SPACE, is_disk_full
from tangora.training.callbacks import last_checkpoint
from tangora.training.models import LoadedModel

_MOMENTS = 2
_CHECKPOINTS_AT_ONCE = 3


def check_space(folder: Path, model: nn.Module, *, keeps_model: bool, checkpoints: bool) -> None:
    """Check, before training, that what it leaves will fit on the disk."""
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    # an adapter may be saved at twice its rank
    last = 2 * trained if isinstance(model, PeftModel) else _bytes(model.parameters()) if keeps_model else 0
    needed = last + (_CHECKPOINTS_AT_ONCE * (1 + _MOMENTS) * trained if checkpoints else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {NO_SPACE}: this run will write about {needed / 2**20:,.1f} MiB and "
            f"{free / 2**20:,.1f} MiB are free; free some, or choose another --output"
        )


@contextmanager
def rescued(folder: Path, loaded: LoadedModel, model: nn.Module) -> Iterator[None]:
    """If nothing can be written while a run trains or is saved, keep its weights in the system's temporary folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as problem:
        if not is_disk_full(problem):
            raise
        sealed = last_checkpoint(folder / CHECKPOINTS)  # the one that was cut off goes, and frees its space
        step = f"goes on from step {sealed.name.split('-')[1]}" if sealed else "begins again"
        place = Path(tempfile.mkdtemp(prefix="tangora-"))
        try:
            kept = f"the weights so far are in {save_weights(place, loaded, model)}"
        except (OSError, SafetensorError, RuntimeError):
            shutil.rmtree(place, ignore_errors=True)
            kept = f"{place.parent} is full, too"
        raise InputError(
            f"{folder}: {NO_SPACE}; {kept}; free some space, and the same command {step}"
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
        if checkpoint is None or is_disk_full(problem) or step() > int(checkpoint.name.split("-")[1]):
            raise
        said = on_one_line(problem, 100)
        raise InputError(
            f"{checkpoint} cannot be read ({said}); delete it, and the same command goes on from the one before"
        ) from problem


def save_weights(folder: Path, loaded: LoadedModel, model: nn.Module) -> Path:
    """Write the adapter of a run, or its whole model with the tokenizer, whole or not at all."""
    if isinstance(model, PeftModel):
        return save_adapter(model, folder / "adapter").path
    target = folder / "model"
    with scratch_beside(target) as scratch:
        loaded.model.save_pretrained(scratch)
        loaded.tokenizer.save_pretrained(scratch)
        replace_folder(scratch, target)
    return target


def _bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(each.numel() * each.element_size() for each in parameters)
