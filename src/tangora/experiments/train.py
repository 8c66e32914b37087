"""`tangora train`: one run in an output folder that can be interrupted and continued."""

import shutil
from pathlib import Path

from tangora._checks import check_kind, check_path
from tangora.experiments.folders import CHECKPOINTS, LOG, check_origin, check_output, claimed
from tangora.experiments.launcher import check_one_process
from tangora.experiments.logs import log_to
from tangora.experiments.run.checks import check_options
from tangora.experiments.run.execute import Watcher, execute
from tangora.experiments.run.loading import load_run_task, with_recorded_sizes, with_sizes
from tangora.experiments.run.origin import origin_of
from tangora.experiments.run.trajectory import check_reference
from tangora.experiments.settings import RunSettings
from tangora.report import Record, load_record, save_json
from tangora.training.callbacks import check_trackers, last_checkpoint
from tangora.training.devices import check_device

RECORD = "record.json"


def train(settings: RunSettings, output: str | Path, *, watcher: Watcher | None = None) -> Record:
    """Train one model.

    The output folder holds ``settings.json``, ``metrics.jsonl`` (a line per step), ``adapter/`` (full
    fine-tuning: ``model/``) and ``record.json``; with ``measure_every`` also ``trajectory.jsonl`` and, for full
    fine-tuning, ``snapshots/``; with ``curvature_every`` also ``curvature.jsonl``.
    Called again after an interruption it continues from the last checkpoint, and after the end it returns the record.

    Args:
        watcher: Called with the progress.

    Returns:
        The record of the run.

    Raises:
        InputError: If something in the settings cannot be used, the folder belongs to another configuration or is in
            use, the data or the model changed since the run was begun, the disk is full (the message says where the
            weights are), or a launcher has started several processes. A folder in which nothing was done stays as it
            was.
    """
    check_one_process("train")
    check_kind("settings", settings, RunSettings, "a RunSettings")
    folder = check_path("output", output)
    check_output(folder)
    check_trackers(settings.report_to or ())
    check_device(settings.device)
    settings = with_recorded_sizes(settings, folder)
    task = load_run_task(settings)
    settings = with_sizes(settings, task)
    check_reference(settings, task)
    check_options(settings, task)
    origin = origin_of(settings, task)
    with claimed(folder, settings, origin):
        if (folder / RECORD).exists():
            record = load_record(folder / RECORD)
            check_origin(folder, record.settings, origin)
            return record
        with log_to(folder / LOG):
            record = execute(
                settings,
                task,
                folder,
                run_id="run",
                before=True,
                keep_model=True,
                watcher=watcher or Watcher(),
            )
        save_json(record, folder / RECORD)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return record


def last_step(output: str | Path) -> int:
    """Return the step from which a run that was cut off goes on; 0 where there is no checkpoint."""
    checkpoint = last_checkpoint(Path(output) / CHECKPOINTS)
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0
