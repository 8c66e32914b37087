"""`tangora train`: one run in an output folder that can be interrupted and continued."""

import contextlib
import os
import shutil
from pathlib import Path

import torch

from tangora._checks import check_kind, check_path
from tangora._folders import RunFolder
from tangora._types import Progress
from tangora.experiments.folders import check_origin, claimed
from tangora.experiments.process import joined, log_to, tell_user
from tangora.experiments.provenance import origin_of, versions
from tangora.experiments.run.answering import judged
from tangora.experiments.run.execute import execute
from tangora.experiments.run.measurements import check_reference
from tangora.experiments.run.preparing import check_against_data, sized
from tangora.experiments.settings import RunSettings
from tangora.report import Record, load_record, save_json
from tangora.training.callbacks import check_trackers, last_checkpoint, step_of
from tangora.training.ranks import check_alike, failing_as_one, from_first, is_first, num_ranks


def train(settings: RunSettings, output: str | Path, *, progress: Progress | None = None) -> Record:
    """Train one model.

    The output folder holds ``settings.json``, ``metrics.jsonl`` (a line per step), ``adapter/`` (full
    fine-tuning: ``model/``) and ``record.json``; with ``measure_every`` also ``trajectory.jsonl`` and, for full
    fine-tuning, ``snapshots/``; with ``curvature_every`` also ``curvature.jsonl``; with ``prompts`` also
    ``answers.jsonl``. A judge that fails is an error after all that is written; the next call asks it again.
    Called again after an interruption it continues from the last checkpoint, and after the end it returns the record.

    Under torchrun or accelerate launch all processes train one model together, as one process would: each batch is
    divided among them (``batch_size`` counts all of it), and the first one writes. Every process calls this and gets
    the record.

    Args:
        progress: Called as ``progress(what, done, total)`` with optimizer steps: ``what`` is ``start``, ``training``,
            ``loss 0.123`` after every step, ``evaluation``, ``answers`` or ``curvature``. Sentences about the data
            are logged by ``tangora.notes``.

    Returns:
        The record of the run.

    Raises:
        InputError: If something in the settings cannot be used, the folder belongs to another configuration or is in
            use, the data or the model changed since the run was begun, the disk is full (the message says where the
            weights are), or several processes cannot share a batch or have other data. A folder in which nothing was
            done stays as it was.
    """
    check_kind("settings", settings, RunSettings, "a RunSettings")
    folder = RunFolder(check_path("output", output))
    with joined(settings), contextlib.ExitStack() as held:
        with failing_as_one():
            check_trackers(settings.report_to or ())
            settings, task = sized(settings, folder.path)
            check_reference(settings, task)
            check_against_data(settings, task)
            origin = origin_of(settings, task)
        check_alike({"version": versions(), **settings.model_dump(mode="json"), **origin})

        def begun() -> Record | None:
            held.enter_context(claimed(folder.path, settings, origin))
            if not folder.record.exists():
                return None
            record = load_record(folder.record)
            check_origin(folder.path, record.settings, origin)
            return record

        def ended() -> Record:
            save_json(record, folder.record)
            shutil.rmtree(folder.checkpoints, ignore_errors=True)
            return with_judgement(record)

        def with_judgement(record: Record) -> Record:
            scored = judged(record, settings.judge, folder)
            if scored is not record:
                save_json(scored, folder.record)
            return scored

        if (finished := from_first(begun)) is not None:
            return from_first(lambda: with_judgement(finished))
        tell_user(*_unused_gpus(settings))
        # not before the folder is claimed: looking removes checkpoints that are not whole
        if step := from_first(lambda: last_step(folder.path)):
            tell_user(f"continues from step {step}")
        with log_to(folder.log if is_first() else Path(os.devnull)):
            record = execute(
                settings.model_copy(update={"kind": task.kind}),  # which the default learning rate depends on
                task,
                folder.path,
                run_id="run",
                before="always",
                keep_model=True,
                progress=progress if is_first() else None,
            )
        return from_first(ended)


def _unused_gpus(settings: RunSettings) -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_ranks() > 1 or count < 2 or settings.device == "cpu":
        return []
    used = f"1 of {count} GPUs is used, {settings.device or 'the first'}"
    return [f"{used}; to use all: torchrun --nproc-per-node {count} -m tangora.cli train ..."]


def last_step(output: str | Path) -> int:
    """Return the step from which a run that was cut off goes on; 0 where there is no checkpoint."""
    checkpoint = last_checkpoint(RunFolder(Path(output)).checkpoints)
    return step_of(checkpoint) if checkpoint else 0
