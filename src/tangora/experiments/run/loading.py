"""The data of a run, and the base model that it begins with, ready for training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from transformers import AutoTokenizer

from tangora._checks import InputError, reason
from tangora.adapters.card import MODEL_CONFIG
from tangora.experiments.folders import SETTINGS
from tangora.experiments.settings import RunSettings, Settings
from tangora.recipes import recipe
from tangora.training.data import Task, load_task
from tangora.training.data.encoding import check_chat_template
from tangora.training.data.fit import check_fit
from tangora.training.devices import device_named
from tangora.training.models import Kind, LoadedModel, load_model

_SettingsT = TypeVar("_SettingsT", bound=Settings)

_SIZES = ("num_train", "num_validation", "num_test")
_COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")


@runtime_checkable
class _Read(Protocol):
    """Settings that say which data is read, and how."""

    @property
    def data(self) -> str: ...
    @property
    def chat_template(self) -> bool | None: ...


def load_run_task(settings: _Read) -> Task:
    """Load the data of a run or a diagnosis."""
    how = {key: getattr(settings, key) for key in ("kind", *_SIZES, *_COLUMNS)}
    task = load_task(settings.data, test_spec=getattr(settings, "test_data", None), **how)
    check_chat(task, settings.chat_template)
    return task


def check_chat(task: Task, chat_template: bool | None) -> None:
    """Raise unless it is clear how the texts of a task are to be written."""
    if chat_template is None and any("messages" in example for example in task.train):
        raise InputError(
            f"data {task.name!r} holds conversations: give --chat-template to write them with the tokenizer's chat "
            "template, or --no-chat-template to join the turns by newlines"
        )
    if chat_template and (task.kind != "causal" or not all(example["prompt"] for example in task.train)):
        raise InputError(
            f"chat_template is for prompts with completions and for conversations; data {task.name!r} holds "
            f"{'labels' if task.kind == 'classification' else 'plain text'}: leave it out"
        )


def with_sizes(settings: _SettingsT, task: Task) -> _SettingsT:
    """Write the sizes that were chosen into settings, so that folders and records tell them."""
    sizes = {"num_validation": len(task.validation), "num_test": len(task.test)}
    return settings.model_copy(update=sizes)


def with_recorded_sizes(settings: _SettingsT, folder: Path) -> _SettingsT:
    """Take sizes that were not given from an output folder, so that the same command continues what is there."""
    found = _json(folder / SETTINGS)
    if found.get("data") != getattr(settings, "data", None):
        return settings
    sizes = {
        key: found[key]
        for key in ("num_validation", "num_test")
        if getattr(settings, key) is None and isinstance(found.get(key), int)
    }
    return settings.model_copy(update=sizes)


def fitted(task: Task, loaded: LoadedModel, *, max_length: int, chat_template: bool | None) -> Task:
    """Check that the model can read the data, and note what of it is cut off."""
    if chat_template:
        check_chat_template(loaded.tokenizer)
    notes = check_fit(
        task,
        loaded.tokenizer,
        max_length=max_length,
        vocabulary=loaded.vocabulary,
        chat_template=bool(chat_template),
    )
    return task.noted(notes)


def load_base(settings: RunSettings, task: Task) -> LoadedModel:
    """Load the untouched base model of a run; a new head is drawn from the run's seed."""
    return _load(settings, task.kind, task.labels)


def load_run_base(settings: RunSettings, adapter: Path) -> LoadedModel:
    """Load the untouched base model of a finished run, with what stands beside its adapter instead of the data."""
    kind, labels = _saved_kind(adapter, settings), _saved_labels(adapter)
    if kind == "classification" and not labels:
        try:
            labels = load_run_task(settings).labels
        except InputError as error:
            raise InputError(
                f"{adapter} was saved without the names of its classes, by an older version, and the data that holds "
                f"them cannot be read: {error}"
            ) from error
    loaded = _load(settings, kind, labels)
    if (adapter / "tokenizer_config.json").is_file():
        return replace(loaded, tokenizer=_saved_tokenizer(adapter))
    return loaded


def _saved_tokenizer(adapter: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    except Exception as error:  # a damaged file ends in any of them
        raise InputError(f"{adapter} has no tokenizer that can be read: {reason(error)}") from error


def _load(settings: RunSettings, kind: Kind, labels: tuple[str, ...]) -> LoadedModel:
    device = device_named(settings.device)
    loaded = load_model(
        settings.model,
        kind=kind,
        labels=labels or None,
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
    """Make a base model ready for training as the settings want it."""
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
    """Do the same with a twin of the model that holds no weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(loaded.model)(loaded.model.config)  # pyright: ignore[reportCallIssue]
        return prepare(method, twin, task, settings)


def _saved_kind(adapter: Path, settings: RunSettings) -> Kind:
    config = _json(adapter / "adapter_config.json")
    # images have no task type of PEFT's
    known: dict[str, Kind] = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal"}
    return known.get(str(config.get("task_type"))) or settings.kind or "classification"


def _saved_labels(adapter: Path) -> tuple[str, ...]:
    names = _json(adapter / MODEL_CONFIG / "config.json").get("id2label")
    if not isinstance(names, dict) or not all(key.isdecimal() for key in names):
        return ()
    return tuple(names[key] for key in sorted(names, key=int))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
