"""A diagnosis of a model on data, both by name, and what it leaves in a folder."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from tangora._checks import InputError
from tangora.adapters import load_adapter
from tangora.diagnostics import DEFAULT_RANK, diagnose
from tangora.experiments.diagnose.settings import DiagnoseSettings
from tangora.experiments.folders import LOG, check_output, claimed
from tangora.experiments.launcher import check_one_process
from tangora.experiments.logs import log_to
from tangora.experiments.provenance import provenance
from tangora.experiments.run.loading import fitted, load_run_task, with_recorded_sizes, with_sizes
from tangora.recipes import recipe
from tangora.report import DiagnosisRecord, save_json, write_diagnosis
from tangora.report.record_files import write_atomic
from tangora.training.data import Task, collator, encode
from tangora.training.devices import check_device, device_named
from tangora.training.models import LoadedModel, load_model

logger = logging.getLogger(__name__)

RECORD, PLAN, PAGE = "diagnosis.json", "rank_plan.json", "diagnosis.html"


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
    """
    check_one_process("diagnose")
    folder = Path(output)
    check_output(folder)
    phase("loading")
    check_device(settings.device)
    settings = with_recorded_sizes(settings, folder)
    task = load_run_task(settings)
    _check_sizes(settings, task)
    settings = with_sizes(settings, task)
    with claimed(folder, settings), log_to(folder / LOG):
        loaded, model = _load_model(settings, task)
        task = fitted(task, loaded, max_length=settings.max_length, chat_template=settings.chat_template)
        for note in task.notes:
            logger.info("%s", note)
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
            progress=lambda _, done, total: progress(done, total or None),
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
            save_json(record, folder / RECORD),
            write_atomic(folder / PLAN, plan + "\n"),
            write_diagnosis(record, folder / PAGE),
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
    loaded = load_model(settings.model, kind=task.kind, labels=task.labels or None, seed=settings.seed)
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


def _batches(
    settings: DiagnoseSettings, task: Task, loaded: LoadedModel
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    # of the first training examples, and of the next ones
    collate, size, end = collator(loaded.tokenizer, task.kind), settings.batch_size, settings.num_examples
    batches = []
    for examples in (task.train[:end], task.train[end : end + settings.num_held_out]):
        how = {"kind": task.kind, "max_length": settings.max_length}
        data = (
            encode(examples, loaded.tokenizer, **how, chat_template=bool(settings.chat_template))
            if examples
            else []
        )
        batches.append([dict(collate(data[first : first + size])) for first in range(0, len(data), size)])
    return batches[0], batches[1]
