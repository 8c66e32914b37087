"""One run of a comparison, whatever becomes of it: it ends with a record on the disk, unless the disk is full."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.experiments.comparison.sweep import Trial
from tangora.experiments.folders import NO_SPACE, is_disk_full, locked
from tangora.experiments.process import log_to
from tangora.experiments.run.execute import execute, identity, read_evaluations, read_steps
from tangora.report import MemoryUse, Record, TimeSplit, load_record, save_json
from tangora.report.run_records import Status
from tangora.training.data import Task

_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "Cannot allocate memory",
    "MemoryError",
    "bad_alloc",
    "can't start new thread",
)
_LITTLE_SPACE = 2**20

logger = logging.getLogger(__name__)


class DiskFullError(OSError):
    """Nothing more can be written; no fault of the run."""


@dataclass(frozen=True)
class Limits:
    """Limits of a run's process: threads of torch, and memory (on a CPU under Linux); ``None`` for no limit."""

    threads: int | None = None
    gigabytes: float | None = None


def run_trial(trial: Trial, task: Task, folder: ComparisonFolder, progress: Progress | None = None) -> Record:
    """Make a run, and write its record; where another process is making it already, wait for that one instead."""
    path, lock = folder.record_of(trial.id), folder.lock_of(trial.id)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock.parent, lock, wait=True):
            return load_record(path) if path.exists() else _run_alone(trial, task, folder, progress)
    except (OSError, InputError) as problem:
        _raise_if_disk_is_full(problem, folder.path)
        raise


def _run_alone(trial: Trial, task: Task, folder: ComparisonFolder, progress: Progress | None) -> Record:
    run = folder.run(trial.id)
    if not trial.settings.save_every:  # a run without a record was cut off
        shutil.rmtree(run.path, ignore_errors=True)
    with log_to(folder.log):
        try:
            record = execute(
                trial.settings,
                task,
                run.path,
                run_id=trial.id,
                stage=trial.stage,
                before="if it has no new head" if trial.before else "never",
                is_checked=True,
                progress=progress,
            )
        except Exception as problem:
            _raise_if_disk_is_full(problem, folder.path)
            logger.exception("%s failed", trial.id)
            record = _unfinished(trial, task, folder, *_cause(problem))
    save_json(record, folder.record_of(trial.id))
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return record


def _unfinished(trial: Trial, task: Task, folder: ComparisonFolder, status: Status, error: str) -> Record:
    run = folder.run(trial.id)
    return Record(
        **identity(trial.settings, task, trial.id, trial.stage),
        status=status,
        error=error,
        metrics={},
        history=read_steps(run),
        evaluations=read_evaluations(run),
        time=TimeSplit(start=0.0, forward_backward=0.0, optimizer=0.0, evaluation=0.0),
        memory=MemoryUse(optimizer_state_bytes=0, adapter_bytes=0),
        trainable_parameters=0,
    )


def died(trial: Trial, task: Task, folder: ComparisonFolder, code: int | None, limits: Limits) -> Record:
    """Make the record of a run whose process ended without one."""
    path = folder.printed_by(trial.id)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
    # allocators abort, and libraries without memory crash
    no_memory = any(words in text for words in _NO_MEMORY) or (
        limits.gigabytes is not None and code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
    )
    if no_memory and limits.gigabytes is not None:
        error = f"out of memory: max_memory allows {limits.gigabytes:g} GB"
        return _unfinished(trial, task, folder, "out_of_memory", error)
    status: Status = "out_of_memory" if no_memory else "failed"
    if code == -signal.SIGKILL:
        how = "was killed (signal 9), most likely by the system because memory ran out"
    elif code is not None and code < 0:
        how = f"was killed by signal {-code}"
    else:
        how = f"ended with exit code {code}"
    return _unfinished(trial, task, folder, status, f"its process {how}{f': {last}' if last else ''}")


def lost(trial: Trial, task: Task, folder: ComparisonFolder, error: str) -> Record:
    """Make the record of a run that another machine has lost, unless it was written before."""
    path = folder.record_of(trial.id)
    with contextlib.suppress(OSError):
        path.parent.chmod(path.parent.stat().st_mode)  # a network file system looks again for what is in it
    if not path.exists():
        save_json(_unfinished(trial, task, folder, "failed", error), path)
    return load_record(path)


def work(trial: Trial, task: Task, folder: ComparisonFolder, limits: Limits, told: Connection) -> None:
    """Make a run in the process that this is called in, which is given to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison gets it, too, and ends its runs
    _end_with_parent()
    os.environ.pop("LOCAL_RANK", None)  # a launcher with one process: runs side by side cannot share its port
    with _printing_to(folder.printed_by(trial.id)):
        if limits.threads is not None:
            torch.set_num_threads(limits.threads)
        if limits.gigabytes is not None:
            _limit_memory(limits.gigabytes)
        try:
            run_trial(trial, task, folder, lambda *progress: told.send(("progress", *progress)))
            told.send(("done", None))
        except DiskFullError as problem:
            told.send(("full", str(problem)))


def _cause(problem: Exception) -> tuple[Status, str]:
    said = " ".join(str(problem).split())
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(
        words in said for words in _NO_MEMORY
    ):
        return "out_of_memory", said or type(problem).__name__
    if isinstance(problem, InputError):
        return "failed", said
    return "failed", f"{type(problem).__name__}: {said}"


def _raise_if_disk_is_full(problem: Exception, folder: Path) -> None:
    space = shutil.disk_usage(folder).free if folder.exists() else _LITTLE_SPACE
    if is_disk_full(problem) or space < _LITTLE_SPACE:
        raise DiskFullError(f"{folder}: {NO_SPACE}") from problem


def _end_with_parent() -> None:
    # a killed comparison must not leave runs behind that write next to those of its successor
    parent = parent_process()
    if parent is None:
        return
    sentinel: Any = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory(gigabytes: float) -> None:
    import resource  # not on Windows

    # what the process has before it begins, libraries and the parent's data among it, is not the run's
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    limit = int(gigabytes * 2**30) + pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send what the process prints, native libraries included, to a file that is removed if it stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    yield
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if not path.stat().st_size:
        path.unlink()
