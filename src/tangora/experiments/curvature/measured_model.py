"""A trained run, or a model by name, ready to be measured: weights, data and tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from tangora._checks import InputError
from tangora._folders import RunFolder
from tangora.adapters import find_pairs, load_adapter
from tangora.experiments.data_settings import DataSettings
from tangora.experiments.folders import check_origin, kept_origin
from tangora.experiments.provenance import origin_of
from tangora.experiments.run.preparing import encoded_batches, load_base, load_run_task
from tangora.experiments.settings import RunSettings, TaskSettings
from tangora.experiments.settings_files import run_settings
from tangora.training.data import Task
from tangora.training.data.chat_templates import use_chat_template
from tangora.training.devices import device_named
from tangora.training.models import LoadedModel, load_model

_NOT_KEPT = (
    "{folder} contains neither an adapter nor a model: the run has not finished, or tangora compare "
    "trained all weights, which it does not save. tangora train saves them; tangora compare "
    "--curvature measures before they are deleted"
)


@dataclass(frozen=True)
class MeasuredModel:
    """A model with its adapter, if there is one, in evaluation mode and on its device, and the data."""

    model: nn.Module
    loaded: LoadedModel
    task: Task
    settings: TaskSettings
    title: str
    ranks: tuple[int, ...]
    """Distinct ranks of the adapter's layers, ascending; empty without an adapter."""

    def batches(self, split: str, num_examples: int, batch_size: int) -> list[dict[str, Tensor]]:
        """Make padded batches of the first examples of a split."""
        examples = getattr(self.task, split)[:num_examples]
        if not examples:
            raise InputError(f"split {split!r} of {self.task.name} has no examples")
        return encoded_batches(self.settings, self.loaded, examples, batch_size)


def _is_run(source: str) -> bool:
    """Tell whether something is a run's folder rather than a model."""
    run = RunFolder(Path(source))
    return run.path.is_dir() and (run.settings.is_file() or run.trial_record.is_file())


def load_measured(source: str, adapter: str | None, changes: dict[str, Any], seed: int) -> MeasuredModel:
    """Load what is to be measured."""
    changes = {
        key: value for key, value in changes.items() if key in DataSettings.model_fields and value is not None
    }
    if "data" in changes:
        changes.setdefault("test_data", None)  # the run's belongs to the run's data
    if not _is_run(source):
        return _from_model(source, adapter, TaskSettings(model=source, **changes), seed)
    if adapter is not None:
        raise InputError(f"adapter is only for models; {source} is a run with its own adapter: got {adapter}")
    return _from_run(Path(source), run_settings(Path(source)), changes)


def _from_model(source: str, adapter: str | None, settings: TaskSettings, seed: int) -> MeasuredModel:
    task = load_run_task(settings)
    labels = task.labels or None
    loaded = load_model(
        source, kind=task.kind, labels=labels, class_prompts=settings.class_prompts, seed=seed
    )
    model = load_adapter(loaded.model, adapter, is_trainable=True) if adapter is not None else loaded.model
    return _measured(model, loaded, task, settings, Path(source).name)


def _from_run(folder: Path, trained: RunSettings, changes: dict[str, Any]) -> MeasuredModel:
    settings = trained.model_copy(update=changes)
    task = load_run_task(settings)
    if not changes.keys() - {"max_length"}:
        check_origin(folder, kept_origin(folder), origin_of(settings, task), "bring the original back")
    run = RunFolder(folder)
    if run.adapter.is_dir():
        loaded = load_base(settings, task)
        model: nn.Module = load_adapter(loaded.model, run.adapter, is_trainable=True)
    elif run.model.is_dir():
        loaded = load_model(str(run.model), kind=task.kind, labels=task.labels or None)
        model = loaded.model
    else:
        raise InputError(_NOT_KEPT.format(folder=folder))
    return _measured(model, loaded, task, settings, f"{Path(settings.model).name} after {settings.recipe}")


def _measured(
    model: nn.Module, loaded: LoadedModel, task: Task, settings: TaskSettings, name: str
) -> MeasuredModel:
    use_chat_template(loaded.tokenizer, settings.chat_template)
    model.to(device_named(settings.device))
    pairs = find_pairs(model) if isinstance(model, PeftModel) else []
    ranks = tuple(sorted({pair.shape[2] for pair in pairs}))
    title = f"{name} on {Path(settings.data).name}"
    return MeasuredModel(model, loaded, task, settings, title, ranks)
