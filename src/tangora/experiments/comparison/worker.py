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
from tangora.experiments.comparison.sweep import Cell
from tangora.experiments.folders import CHECKPOINTS, LOG, NO_SPACE, is_disk_full
from tangora.experiments.logs import log_to
from tangora.experiments.provenance import provenance
from tangora.experiments.run.execute import Watcher, execute, read_evaluations, read_steps
from tangora.experiments.run.origin import origin_of
from tangora.report import MemoryUse, Record, TimeSplit, save_json
from tangora.report.run_records import RECORDS_FOLDER, Status
from tangora.training.data import Task

RUNS_FOLDER = "runs"

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
    """What a run's process may use.

    Attributes:
        threads: Threads of torch; ``None`` leaves the default.
        gigabytes: What a run may allocate, on a CPU under Linux; ``None`` for no limit.
    """

    threads: int | None = None
    gigabytes: float | None = None


def record_path(folder: Path, cell: Cell) -> Path:
    """Return where the record of a run is."""
    return folder / RECORDS_FOLDER / f"{cell.id}.json"


def run_cell(cell: Cell, task: Task, folder: Path, watcher: Watcher) -> Record:
    """Make a run, and write its record."""
    run_folder = folder / RUNS_FOLDER / cell.id
    try:
        if not cell.settings.save_every:  # a run without a record was cut off
            shutil.rmtree(run_folder, ignore_errors=True)
        with log_to(folder / LOG):
            try:
                record = execute(
                    cell.settings,
                    task,
                    run_folder,
                    run_id=cell.id,
                    stage=cell.stage,
                    is_checked=True,
                    watcher=watcher,
                )
            except Exception as problem:
                _raise_if_disk_is_full(problem, folder)
                logger.exception("%s failed", cell.id)
                record = unfinished(cell, task, folder, *_cause(problem))
        save_json(record, record_path(folder, cell))
        shutil.rmtree(run_folder / CHECKPOINTS, ignore_errors=True)
    except (OSError, InputError) as problem:
        _raise_if_disk_is_full(problem, folder)
        raise
    return record


def unfinished(cell: Cell, task: Task, folder: Path, status: Status, error: str) -> Record:
    """Make the record of a run that did not get to its end."""
    run_folder = folder / RUNS_FOLDER / cell.id
    return Record(
        id=cell.id,
        recipe=cell.settings.recipe,
        learning_rate=cell.settings.peak,
        seed=cell.settings.seed,
        stage=cell.stage,
        status=status,
        error=error,
        settings=cell.settings.model_dump(mode="json") | origin_of(cell.settings, task),
        metrics={},
        history=read_steps(run_folder),
        evaluations=read_evaluations(run_folder),
        time=TimeSplit(start=0.0, forward_backward=0.0, optimizer=0.0, evaluation=0.0),
        memory=MemoryUse(optimizer_state_bytes=0, adapter_bytes=0),
        trainable_parameters=0,
        **provenance(cell.settings.model),
    )


def printed_path(folder: Path, cell: Cell) -> Path:
    """Return where what a run's process printed is."""
    return folder / RUNS_FOLDER / f"{cell.id}.txt"


def died(cell: Cell, task: Task, folder: Path, code: int | None, limits: Limits) -> Record:
    """Make the record of a run whose process ended without one."""
    path = printed_path(folder, cell)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    last = next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
    # allocators abort, and libraries without memory crash
    no_memory = any(words in text for words in _NO_MEMORY) or (
        limits.gigabytes is not None and code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
    )
    if no_memory and limits.gigabytes is not None:
        return unfinished(
            cell, task, folder, "out_of_memory", f"out of memory: max_memory allows {limits.gigabytes:g} GB"
        )
    status: Status = "out_of_memory" if no_memory else "failed"
    if code == -signal.SIGKILL:
        how = "was killed (signal 9), most likely by the system because memory ran out"
    elif code is not None and code < 0:
        how = f"died of signal {-code}"
    else:
        how = f"ended with exit code {code}"
    return unfinished(cell, task, folder, status, f"its process {how}{f': {last}' if last else ''}")


def work(cell: Cell, task: Task, folder: Path, limits: Limits, told: Connection) -> None:
    """Make a run in the process that this is called in, which is given to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison hears it, too, and ends its runs
    _end_with_parent()
    os.environ.pop("LOCAL_RANK", None)  # a launcher with one process: runs side by side cannot share its port
    with _printing_to(folder / RUNS_FOLDER / f"{cell.id}.txt"):
        if limits.threads is not None:
            torch.set_num_threads(limits.threads)
        if limits.gigabytes is not None:
            _limit_memory(limits.gigabytes)
        watcher = Watcher(
            phase=lambda name: told.send(("phase", name)),
            note=lambda sentence: told.send(("note", sentence)),
            length=lambda steps: told.send(("length", steps)),
            step=lambda number, loss: told.send(("step", number, loss)),
        )
        try:
            run_cell(cell, task, folder, watcher)
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
