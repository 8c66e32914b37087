"""`tangora diagnose`: how much of the full gradient LoRA captures, for a model and data by name."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tangora._checks import InputError
from tangora._folders import OutputFolder
from tangora._types import Progress
from tangora.adapters import load_adapter
from tangora.diagnostics import DEFAULT_RANK, diagnose
from tangora.experiments.folders import claimed
from tangora.experiments.measurement_settings import DiagnoseSettings
from tangora.experiments.process import check_one_process, log_to, tell_user
from tangora.experiments.provenance import provenance
from tangora.experiments.run.preparing import encoded_batches, sized, with_notes_on_cuts
from tangora.recipes import recipe
from tangora.report import DiagnosisRecord, save_json, write_diagnosis
from tangora.report.record_files import write_atomic
from tangora.training.data import Task
from tangora.training.data.chat_templates import use_chat_template
from tangora.training.devices import device_named
from tangora.training.models import LoadedModel, load_model


@dataclass(frozen=True)
class DiagnosisFiles:
    """Files of a diagnosis in its output folder."""

    record: DiagnosisRecord
    record_path: Path
    plan: Path
    page: Path


def diagnose_task(
    settings: DiagnoseSettings,
    output: str | Path,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> DiagnosisFiles:
    """Diagnose a model on data, both by name.

    The output folder holds ``settings.json``, ``diagnosis.json`` (everything), ``rank_plan.json`` (for ``tangora train
    --rank-plan``, or as arguments of PEFT's ``LoraConfig``) and ``diagnosis.html``. Called again it writes them anew.
    """
    check_one_process("diagnose")
    folder = Path(output)
    if progress is not None:
        progress("loading", 0, 0)
    settings, task = sized(settings, folder)
    _check_sizes(settings, task)
    with claimed(folder, settings), log_to(OutputFolder(folder).log):
        loaded, model = _load_model(settings, task)
        task = with_notes_on_cuts(settings, task, loaded)
        tell_user(*task.notes)
        end, size = settings.num_examples, settings.batch_size
        first, next_ones = task.train[:end], task.train[end : end + settings.num_held_out]
        found = diagnose(
            model,
            encoded_batches(settings, loaded, first, size),
            held_out=encoded_batches(settings, loaded, next_ones, size) or None,
            rank=settings.rank,
            budget_rank=settings.budget_rank,
            alpha=settings.alpha,
            starts=settings.starts,
            exact_norms=settings.exact_norms,
            power_iterations=settings.power_iterations,
            seed=settings.seed,
            progress=progress or False,
        )
        record = DiagnosisRecord(
            title=f"{Path(settings.model).name} on {Path(settings.data).name}",
            command=command,
            settings=settings.model_dump(mode="json") | {"data_fingerprint": task.fingerprint},
            diagnosis=found,
            **provenance(settings.model),
        )
        plan = json.dumps(found.plan.config(), indent=1, allow_nan=False)
        return DiagnosisFiles(
            record,
            save_json(record, folder / "diagnosis.json"),
            write_atomic(folder / "rank_plan.json", plan + "\n"),
            write_diagnosis(record, folder / "diagnosis.html"),
        )


def _check_sizes(settings: DiagnoseSettings, task: Task) -> None:
    # defaults shrink to what there is; what was asked for does not
    asked = settings.model_fields_set & {"num_examples", "num_held_out"}
    wanted, there = settings.num_examples + settings.num_held_out, len(task.train)
    if asked and wanted > there:
        raise InputError(
            f"num_examples and num_held_out must be at most {there} together, the number of training examples; got "
            f"{settings.num_examples} and {settings.num_held_out}"
        )


def _load_model(settings: DiagnoseSettings, task: Task) -> tuple[LoadedModel, nn.Module]:
    labels = task.labels or None
    loaded = load_model(
        settings.model,
        kind=task.kind,
        labels=labels,
        class_prompts=settings.class_prompts,
        seed=settings.seed,
    )
    use_chat_template(loaded.tokenizer, settings.chat_template)
    loaded.model.to(device_named(settings.device))  # pyright: ignore[reportArgumentType]
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
