"""From settings to a run that can begin: its data, its base model, and checks of what cannot work."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainingArguments

from tangora._checks import InputError, reason
from tangora._folders import OutputFolder, RunFolder
from tangora._types import Progress
from tangora.adapters import discover
from tangora.adapters.card import MODEL_CONFIG
from tangora.curvature.adapted import chosen
from tangora.experiments.data_settings import DataSettings
from tangora.experiments.folders import check_output
from tangora.experiments.settings import RunSettings
from tangora.experiments.settings_files import read_settings
from tangora.recipes import Recipe
from tangora.training.answers import conversation
from tangora.training.benchmarks import load_benchmarks
from tangora.training.data import Encoding, Task, collator, encode, load_task
from tangora.training.data.chat_templates import use_chat_template
from tangora.training.data.encoding import check_chat_template, encode_prompts
from tangora.training.data.fit import check_fit
from tangora.training.data.packing import check_packing
from tangora.training.data.prompts import read_prompts
from tangora.training.devices import check_device, device_named
from tangora.training.metrics import observed
from tangora.training.models import Kind, LoadedModel, load_model
from tangora.training.ranks import dealt, num_ranks

_SettingsT = TypeVar("_SettingsT", bound=DataSettings)

_NEWER = hasattr(TrainingArguments, "activation_checkpointing")  # which warns of the older name

CHECKPOINTING = "activation_checkpointing" if _NEWER else "gradient_checkpointing"
"""Transformers' name of the option; with ``_enable`` that of a model's method."""

# the other kind finds no gradient where a frozen base has embedded the tokens
CHECKPOINTING_KWARGS: dict[str, Any] = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}

_SIZES = ("num_train", "num_validation", "num_test")
_COLUMNS = ("text_column", "label_column", "prompt_column", "completion_column")


@dataclass(frozen=True)
class Run:
    """One training: its settings, data, base model and folder, and the callback for its progress."""

    settings: RunSettings
    task: Task
    loaded: LoadedModel
    folder: RunFolder
    progress: Progress | None = None

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return self.settings.num_steps(len(self.task.train))

    @property
    def evaluation_batch_size(self) -> int:
        """Number of examples in a batch without gradients."""
        return 2 * self.settings.batch_size

    def tell(self, what: str, done: int) -> None:
        """Report what goes on after so many optimizer steps."""
        if self.progress is not None:
            self.progress(what, done, self.num_steps)

    def encoded(self, examples: Sequence[Any]) -> tuple[Sequence[Encoding], Any]:
        """Encode examples as model inputs; the second value makes a batch of some."""
        return encoded(self.settings, self.loaded, examples)

    def batches(self, examples: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Make padded batches of examples."""
        return encoded_batches(self.settings, self.loaded, examples, self.settings.batch_size)

    def dealt(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return what this process reads of batches whose mean is that of all processes."""
        return batches if self.settings.fsdp else dealt(batches)  # passes of a sharded model are made by all

    def sampled(self, count: int) -> list[dict[str, Tensor]]:
        """Make batches of so many training examples, drawn by the run's seed."""
        train = self.task.train
        chosen = random.Random(self.settings.seed).sample(range(len(train)), min(count, len(train)))
        return self.batches([train[index] for index in chosen])


def encoded(
    settings: DataSettings, loaded: LoadedModel, examples: Sequence[Any]
) -> tuple[Sequence[Encoding], Any]:
    """Encode examples as model inputs; the second value makes a batch of some."""
    data = encode(
        examples,
        loaded.tokenizer,
        kind=loaded.kind,
        max_length=settings.max_length,
        chat_template=bool(settings.chat_template),
    )
    return data, collator(loaded.tokenizer, loaded.kind)


def encoded_batches(
    settings: DataSettings, loaded: LoadedModel, examples: Sequence[Any], size: int
) -> list[dict[str, Tensor]]:
    """Make padded batches of examples."""
    if not examples:
        return []
    data, collate = encoded(settings, loaded, examples)
    return [dict(collate(data[first : first + size])) for first in range(0, len(data), size)]


# --- data


def load_run_task(settings: DataSettings) -> Task:
    """Load the data of a run or a diagnosis."""
    how = {key: getattr(settings, key) for key in ("kind", *_SIZES, *_COLUMNS)}
    task = load_task(settings.data, test_spec=getattr(settings, "test_data", None), **how)
    check_chat(task, settings.chat_template)
    return task


def check_chat(task: Task, chat_template: bool | str | None) -> None:
    """Raise unless it is clear how the texts of a task are to be written."""
    if chat_template is None and any("messages" in example for example in task.train):
        raise InputError(
            f"data {task.name!r} contains conversations: pass --chat-template to format them with the "
            "tokenizer's chat template, or --no-chat-template to join the turns with newlines"
        )
    if chat_template and (task.kind != "causal" or not all(example["prompt"] for example in task.train)):
        raise InputError(
            f"chat_template is for prompts with completions and for conversations; data {task.name!r} has "
            f"{'labels' if task.kind == 'classification' else 'plain text'}: omit it"
        )


def sized(settings: _SettingsT, folder: Path) -> tuple[_SettingsT, Task]:
    """Load the data for an output folder, and write the sizes of its splits into the settings.

    Sizes that are not given are those in the folder, so that the same command continues the run.
    """
    check_output(folder)
    check_device(settings.device)
    found = _json(OutputFolder(folder).settings)
    if found.get("data") == settings.data:
        kept = {
            key: found[key]
            for key in ("num_validation", "num_test")
            if getattr(settings, key) is None and isinstance(found.get(key), int)
        }
        settings = settings.model_copy(update=kept)
    task = load_run_task(settings)
    sizes = {"num_validation": len(task.validation), "num_test": len(task.test)}
    return settings.model_copy(update=sizes), task


def with_notes_on_cuts(settings: DataSettings, task: Task, loaded: LoadedModel) -> Task:
    """Check that the model can read the data, and note what of it is cut off."""
    if settings.chat_template:
        check_chat_template(loaded.tokenizer)
    notes = check_fit(
        task,
        loaded.tokenizer,
        max_length=settings.max_length,
        vocabulary=loaded.vocabulary,
        chat_template=bool(settings.chat_template),
    )
    return task.noted(notes)


# --- models


def load_base(settings: RunSettings, task: Task) -> LoadedModel:
    """Load the original base model of a run; a new head is drawn from the run's seed."""
    return _load(settings, task.kind, task.labels)


def load_run_base(settings: RunSettings, adapter: Path) -> LoadedModel:
    """Load the original base model of a finished run, with the files next to its adapter instead of the data."""
    kind, labels = _saved_kind(adapter, settings), _saved_labels(adapter)
    if kind == "classification" and not labels:
        try:
            labels = load_run_task(settings).labels
        except InputError as error:
            raise InputError(
                f"{adapter} was saved without the names of its classes, by an older version, and the "
                f"data with these names cannot be read: {error}"
            ) from error
    loaded = _load(settings, kind, labels)
    if (adapter / "tokenizer_config.json").is_file():
        return replace(loaded, tokenizer=_saved_tokenizer(adapter))
    return loaded


def _saved_tokenizer(adapter: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    except Exception as error:  # a damaged file ends in any of them
        raise InputError(f"{adapter} has no readable tokenizer: {reason(error)}") from error


def _load(settings: RunSettings, kind: Kind, labels: tuple[str, ...]) -> LoadedModel:
    device = device_named(settings.device)
    loaded = load_model(
        settings.model,
        kind=kind,
        labels=labels or None,
        class_prompts=settings.class_prompts,
        dtype=getattr(torch, settings.dtype),
        seed=settings.seed,
        quantize_to=device if settings.load_in_4bit else None,
        shards=num_ranks() if settings.fsdp else 1,
    )
    use_chat_template(loaded.tokenizer, settings.chat_template)
    if settings.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
        raise InputError(
            f"gradient_checkpointing cannot be used with model {settings.model!r}: "
            f"{type(loaded.model).__name__} does not support it; omit it"
        )
    if settings.fsdp:  # before its first pass, in which FSDP2 notes what has a gradient
        loaded.model.requires_grad_(False)
    if not (settings.load_in_4bit or settings.fsdp):  # these have been loaded to the device
        loaded.model.to(device)  # pyright: ignore[reportArgumentType]
    return loaded


def prepare_run(settings: RunSettings, task: Task, model: Any) -> nn.Module:
    """Make a base model ready for training as the settings want it."""
    num_steps = settings.num_steps(len(task.train))
    return prepare_as(settings.chosen_recipe, settings, task.kind, num_steps, model)


def prepare_as(recipe: Recipe, settings: RunSettings, kind: Kind, num_steps: int, model: Any) -> nn.Module:
    """Make a base model ready for a recipe, with an adapter as the settings want it."""
    return recipe.prepare(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        task_type="SEQ_CLS" if kind == "classification" else "CAUSAL_LM",
        total_steps=num_steps,
        seed=settings.seed,
        target_modules=settings.target_modules,
        lora_dropout=settings.lora_dropout,
        rank_plan=settings.rank_plan,
    )


def _prepared_twin(settings: RunSettings, task: Task, loaded: LoadedModel) -> nn.Module:
    # the same with a twin of the model that holds no weights
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(loaded.model)(loaded.model.config)  # pyright: ignore[reportCallIssue]
        return prepare_run(settings, task, twin)


def target_layers(settings: RunSettings, task: Task, loaded: LoadedModel) -> list[str]:
    """List the layers that an adapter of these settings would have, for a model that is trained whole."""
    # PEFT itself chooses
    plain = settings.model_copy(update={"recipe": "lora", "rank": 1, "rank_plan": None})
    adapted = _prepared_twin(plain, task, loaded)
    return [pair.name.removeprefix("base_model.model.") for pair in discover(adapted).pairs]


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
        return read_settings(path) if path.is_file() else {}
    except InputError:
        return {}


# --- what cannot work, said before the work


_CAUSAL = {
    "exact_match": "generated answers",
    "prompts": "generated answers",
    "packing": "the sequences",
    "forgetting": "the loss on unrelated text",
    "benchmarks": "answers to lm-eval's tasks",
}
"""Settings that are for causal models alone, and what they are about."""


def check_against_data(settings: RunSettings, task: Task) -> None:
    """Check the settings against the data, before a model is loaded."""
    if task.kind == "classification":
        for key, what in _CAUSAL.items():
            if getattr(settings, key):
                raise InputError(f"{key} is about {what} of causal models; {task.name} is for classification")
    elif settings.head_learning_rate is not None:
        raise InputError(
            f"head_learning_rate is for classifiers, which get a new head; {task.name} is for a causal model; "
            f"got {settings.head_learning_rate:g}"
        )
    if settings.prompts is not None:
        read_prompts(settings.prompts)
    for key in ("start_examples", "curvature_examples", "measure_gradient"):
        wanted, usual = getattr(settings, key), RunSettings.model_fields[key].default
        if wanted is not None and wanted != usual and wanted > len(task.train):
            raise InputError(
                f"{key} must be at most {len(task.train)}, the number of training examples; got {wanted}"
            )


def check_recipes(runs: Sequence[RunSettings], task: Task, loaded: LoadedModel) -> Task:
    """Check that the recipes of some runs can be prepared on a model, and that it can read their data."""
    shared = runs[0]
    if shared.benchmarks:
        load_benchmarks(shared.benchmarks, shared.benchmark_path, execute_code=shared.execute_code)
    for settings in {run.recipe: run for run in runs}.values():
        adapted = _prepared_twin(settings, task, loaded)
        if settings.rank_plan and len(runs) == 1 and not isinstance(adapted, PeftModel):
            raise InputError(f"rank_plan needs an adapter, but recipe {settings.recipe} has none")
    if shared.curvature_layers is not None:
        try:
            chosen(target_layers(shared, task, loaded), shared.curvature_layers)
        except InputError as problem:
            raise InputError(f"curvature_{problem}") from None
    task = with_notes_on_cuts(shared, task, loaded)
    _check_with_weights(shared, task, loaded)
    return task


def _check_with_weights(settings: RunSettings, task: Task, loaded: LoadedModel) -> None:
    if settings.packing:
        data, _ = encoded(settings, loaded, [task.train[0], task.train[-1]])
        with observed(loaded.model):
            check_packing(loaded.model, data, settings.model)
    if settings.prompts is not None:  # a template may refuse them, with any answers in between
        prompts = read_prompts(settings.prompts)
        opened = [conversation(prompt.turns, ["."] * (len(prompt.turns) - 1)) for prompt in prompts]
        encode_prompts(opened, loaded.tokenizer, chat_template=bool(settings.chat_template))
