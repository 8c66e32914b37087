"""`tangora diagnose`: how much of the full gradient LoRA sees, for a model and data by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tangora._checks import check_choice
from tangora.adapters import load_adapter
from tangora.diagnostics import DEFAULT_RANK, STARTS, diagnose
from tangora.experiments.logs import log_to
from tangora.experiments.provenance import provenance
from tangora.experiments.settings import Settings, claim_folder
from tangora.recipes import recipe
from tangora.report import DiagnosisRecord, save_json, write_diagnosis
from tangora.report.files import write_atomic
from tangora.training.data import Task, collator, encode, load_task
from tangora.training.models import Kind, LoadedModel, load_model

RECORD, PLAN, PAGE = "diagnosis.json", "rank_plan.json", "diagnosis.html"


class DiagnoseSettings(Settings):
    """Model, data, and what to look at."""

    model: str = Field(default="minilm-l6", description="Packaged name, local folder, GGUF file or hub name.")
    data: str = Field(
        default="bbc-news", description="Packaged name, reasoning-gym:<name>, local file or hub name."
    )
    kind: Kind | None = Field(
        default=None, description="classification or causal; default: what the data is."
    )
    text_column: str | None = Field(default=None, description="Column of the text.")
    label_column: str | None = Field(default=None, description="Column of the label.")
    prompt_column: str | None = Field(default=None, description="Column of the prompt.")
    completion_column: str | None = Field(default=None, description="Column of the completion.")
    num_train: int | None = Field(
        default=None, ge=1, description="Training examples, as in train; default: all that remain."
    )
    num_validation: int = Field(default=200, ge=1, description="Examples kept apart, as in train.")
    num_test: int = Field(default=500, ge=1, description="Examples kept apart, as in train.")
    num_examples: int = Field(default=32, ge=1, description="Training examples whose gradient is read.")
    num_held_out: int = Field(
        default=32, ge=0, description="Further training examples, on which the starts are looked at too."
    )
    batch_size: int = Field(default=4, ge=1, description="Examples at once.")
    max_length: int = Field(default=128, ge=2, description="Tokens per example; longer ones are cut.")
    adapter: str | None = Field(
        default=None, description="Folder of a saved adapter; default: a plain LoRA start."
    )
    rank: int | None = Field(
        default=None, ge=1, description="Rank of the starts; default: the adapter's, or 8."
    )
    budget_rank: int | None = Field(
        default=None,
        ge=1,
        description="Uniform rank whose parameters the rank plan may spend; default: rank.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="LoRA's alpha at budget_rank, for the plan; default: scaling unchanged.",
    )
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="Layers to adapt, as PEFT takes them; a saved adapter knows its own.",
    )
    starts: list[str] = Field(default=list(STARTS), description="Starts to compare.")
    exact_norms: bool | None = Field(
        default=None, description="Form the gradients for exact norms; default: where they fit into memory."
    )
    power_iterations: int = Field(
        default=1, ge=0, description="Rounds that sharpen the singular values, two passes each."
    )
    seed: int = Field(default=0, ge=0, description="Seed of random vectors, starts and a new head.")

    @field_validator("target_modules")
    @classmethod
    def _separated(cls, targets: str | list[str]) -> str | list[str]:
        # PEFT reads a single string as a pattern; names come separated by commas from the command line
        return _names(targets) if isinstance(targets, str) and "," in targets else targets

    @field_validator("starts", mode="before")
    @classmethod
    def _known(cls, starts: object) -> object:
        if isinstance(starts, str):
            starts = _names(starts)
        for start in starts if isinstance(starts, list) else ():
            check_choice("starts", start, STARTS)
        return starts


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class DiagnosisFiles:
    """What a diagnosis leaves in its output folder."""

    record: DiagnosisRecord
    record_path: Path
    plan: Path
    page: Path


def diagnose_task(
    settings: DiagnoseSettings,
    output: str | Path,
    *,
    command: str = "",
    phase: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int | None], None] = lambda _done, _total: None,
) -> DiagnosisFiles:
    """Diagnose a model on data, both by name.

    The output folder holds ``settings.json``, ``diagnosis.json`` (everything), ``rank_plan.json`` (for ``tangora train
    --rank-plan``, or as arguments of PEFT's ``LoraConfig``) and ``diagnosis.html``. Called again it writes them anew.

    Args:
        settings: What to look at.
        output: Output folder.
        command: The command line, for the record.
        phase: Called with the name of what begins.
        progress: Hears of batches read, and their total.

    Returns:
        The record, and where the files are.

    Raises:
        InputError: If something in the settings cannot be used, or the folder belongs to another configuration.
    """
    folder = Path(output)
    phase("loading")
    task = _load_task(settings)
    claim_folder(folder, settings)
    with log_to(folder / "log.txt"):
        loaded, model = _load_model(settings, task)
        phase("gradients")
        batches, held_out = _batches(settings, task, loaded)
        found = diagnose(
            model,
            batches,
            held_out=held_out or None,
            rank=settings.rank,
            budget_rank=settings.budget_rank,
            alpha=settings.alpha,
            starts=settings.starts,
            exact_norms=settings.exact_norms,
            power_iterations=settings.power_iterations,
            seed=settings.seed,
            progress=progress,
        )
    record = DiagnosisRecord(
        title=f"{Path(settings.model).name} on {Path(settings.data).name}",
        command=command,
        settings=settings.model_dump(mode="json") | {"data_fingerprint": task.fingerprint},
        diagnosis=found,
        **provenance(),
    )
    plan = json.dumps(found.plan.config(), indent=1, allow_nan=False)
    return DiagnosisFiles(
        record,
        save_json(record, folder / RECORD),
        write_atomic(folder / PLAN, plan + "\n"),
        write_diagnosis(record, folder / PAGE),
    )


def _load_task(settings: DiagnoseSettings) -> Task:
    keys = ("kind", "num_train", "num_validation", "num_test")
    columns = ("text_column", "label_column", "prompt_column", "completion_column")
    return load_task(settings.data, **{key: getattr(settings, key) for key in (*keys, *columns)})


def _load_model(settings: DiagnoseSettings, task: Task) -> tuple[LoadedModel, nn.Module]:
    loaded = load_model(settings.model, kind=task.kind, labels=task.labels or None, seed=settings.seed)
    if torch.cuda.is_available():
        loaded.model.to("cuda")  # pyright: ignore[reportArgumentType]
    if settings.adapter is not None:
        return loaded, load_adapter(loaded.model, settings.adapter)
    rank = settings.rank or DEFAULT_RANK
    return loaded, recipe("lora").prepare(
        loaded.model,
        r=rank,
        lora_alpha=2 * rank,
        task_type="SEQ_CLS" if task.kind == "classification" else "CAUSAL_LM",
        total_steps=1,
        seed=settings.seed,
        target_modules=settings.target_modules,
    )


def _batches(
    settings: DiagnoseSettings, task: Task, loaded: LoadedModel
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    # of the first training examples, and of the next ones
    collate, size, end = collator(loaded.tokenizer, task.kind), settings.batch_size, settings.num_examples
    batches = []
    for examples in (task.train[:end], task.train[end : end + settings.num_held_out]):
        data = (
            encode(examples, loaded.tokenizer, kind=task.kind, max_length=settings.max_length).encodings
            if examples
            else []
        )
        batches.append([dict(collate(data[first : first + size])) for first in range(0, len(data), size)])
    return batches[0], batches[1]
