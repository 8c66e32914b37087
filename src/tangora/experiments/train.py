"""`tangora train`: one run in an output folder that can be interrupted and continued."""

from pathlib import Path

from tangora._checks import check_kind, check_path
from tangora.experiments.launcher import check_one_process
from tangora.experiments.logs import log_to
from tangora.experiments.run.execute import Watcher, execute
from tangora.experiments.run.loading import load_run_task
from tangora.experiments.run.trajectory import check_reference
from tangora.experiments.settings import RunSettings, claim_folder
from tangora.report import Record, load_record, save_json
from tangora.training.tracking import check_trackers

RECORD = "record.json"


def train(settings: RunSettings, output: str | Path, *, watcher: Watcher | None = None) -> Record:
    """Train one model.

    The output folder holds ``settings.json``, ``metrics.jsonl`` (a line per step), ``adapter/`` (full
    fine-tuning: ``model/``) and ``record.json``; with ``measure_every`` also ``trajectory.jsonl`` and, for full
    fine-tuning, ``snapshots/``; with ``curvature_every`` also ``curvature.jsonl``.
    Called again after an interruption it continues from the last checkpoint, and after the end it returns the record.

    Args:
        settings: What to train.
        output: Output folder.
        watcher: Hears of the progress.

    Returns:
        The record of the run.

    Raises:
        InputError: If something in the settings cannot be used, the folder belongs to another configuration, or a
            launcher has started several processes.
    """
    check_one_process("train")
    check_kind("settings", settings, RunSettings, "a RunSettings")
    folder = check_path("output", output)
    check_trackers(settings.report_to or ())
    task = load_run_task(settings)
    check_reference(settings, task)
    claim_folder(folder, settings)
    if (folder / RECORD).exists():
        return load_record(folder / RECORD)
    with log_to(folder / "log.txt"):
        record = execute(
            settings, task, folder, run_id="run", before=True, keep_model=True, watcher=watcher or Watcher()
        )
    save_json(record, folder / RECORD)
    return record
