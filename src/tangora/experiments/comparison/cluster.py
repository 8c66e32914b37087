"""Base of the cluster engines: a run as another machine gets it, and how it is followed from here.

The machines share the output folder: a run's data comes from there and its record goes there, as everywhere. So a run
whose machine is lost has lost nothing else, and progress is read from the files that it writes.
"""

import contextlib
import json
import os
import pickle
import platform
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.experiments.comparison.engine import Engine
from tangora.experiments.comparison.pool import Pool
from tangora.experiments.comparison.sweep import Trial
from tangora.experiments.comparison.worker import DiskFullError, Limits, lost, run_trial
from tangora.report import Record
from tangora.report.record_files import write_atomic
from tangora.training.data import Task
from tangora.training.devices import visible_gpus

_ASK_EVERY = 1.0
"""Seconds between two looks at the runs."""


class LostError(Exception):
    """A run has ended elsewhere without a record, for a reason that its message gives."""


class Refusal(NamedTuple):
    """Why a machine cannot make any run of the comparison."""

    reason: str


@dataclass(frozen=True)
class RemoteRun:
    """One run, as a machine gets it that shares the output folder."""

    trial: Trial
    folder: ComparisonFolder
    data: Path
    place: str
    limits: Limits

    def __call__(self) -> Record | Refusal:
        """Make the run in this process, which is given to it."""
        return self._made(self._here)

    def apart(self) -> Record | Refusal:
        """Make the run in a process of its own, which may die alone."""
        return self._made(self._in_process)

    def _made(self, make: Callable[[Task], Record]) -> Record | Refusal:
        try:
            task = pickle.loads(self.data.read_bytes())
        except FileNotFoundError:
            return Refusal(
                f"{platform.node()} cannot access the output folder {self.folder.path}: choose an "
                "--output on a file "
                "system that all nodes share"
            )
        with contextlib.suppress(OSError):  # where there is none such, nothing needs it
            os.chdir(self.place)  # models may be named from there
        os.environ.pop("LOCAL_RANK", None)  # of a launcher with one process
        try:
            return make(task)
        except (DiskFullError, InputError) as problem:
            return Refusal(str(problem))

    def _here(self, task: Task) -> Record:
        if self.limits.threads is not None:
            torch.set_num_threads(self.limits.threads)
        return run_trial(self.trial, task, self.folder)

    def _in_process(self, task: Task) -> Record:
        with Pool(limits=self.limits, gpus=visible_gpus()) as pool:
            pool.start(self.trial, task, self.folder)
            (record,) = pool.wait()
        return record


@dataclass
class _Running:
    trial: Trial
    task: Task
    folder: ComparisonFolder
    job: Any
    seen: int  # bytes of its history


class ClusterEngine(Engine[_Running]):
    """Makes runs on a cluster, which decides when and where each one starts."""

    def __init__(self, jobs: int | None, limits: Limits, progress: Progress | None):
        super().__init__(jobs, limits, progress)
        self._data: dict[Path, Path] = {}

    def stop(self) -> None:
        """End all runs; they leave no record."""
        for run in self._running.values():
            self._cancel(run.job)
        self._running.clear()

    @abstractmethod
    def _submit(self, remote: RemoteRun) -> Any:
        """Hand a run over; return what stands for it."""

    @abstractmethod
    def _outcome(self, job: Any) -> Record | Refusal | None:
        """Return what a run has ended with, ``None`` while it goes on; raise `LostError` if it ended without."""

    @abstractmethod
    def _cancel(self, job: Any) -> None:
        """End a run."""

    def _begun(self, trial: Trial, task: Task, folder: ComparisonFolder) -> _Running:
        folder = ComparisonFolder(folder.path.absolute())
        if folder.path not in self._data:
            self._data[folder.path] = _written(task, folder)
        remote = RemoteRun(trial, folder, self._data[folder.path], str(Path.cwd()), self._limits)
        seen = _size(folder.run(trial.id).metrics)
        return _Running(trial, task, folder, self._submit(remote), seen)

    def _record(self, run: _Running) -> Record | None:
        try:
            outcome = self._outcome(run.job)
        except LostError as problem:
            return lost(run.trial, run.task, run.folder, str(problem))
        if isinstance(outcome, Refusal):
            raise InputError(f"{outcome.reason}; finished runs are kept")
        if outcome is None:
            self._report(run)
        return outcome

    def _pause(self) -> None:
        time.sleep(_ASK_EVERY)

    def _report(self, run: _Running) -> None:
        path = run.folder.run(run.trial.id).metrics
        size = _size(path)
        if self._progress is None or size in (0, run.seen):
            return
        run.seen = size
        with contextlib.suppress(ValueError, OSError, IndexError):  # being written
            last = _last_step(path)
            total = run.trial.settings.num_steps(len(run.task.train))
            self._progress(f"{run.trial.id}: loss {last['loss']:.3f}", last["step"], total)


def _written(task: Task, folder: ComparisonFolder) -> Path:
    # under a name of its own, so that no run that was left behind takes it for that of its own comparison
    path = next(folder.cluster.glob("*.pickle"), folder.cluster / f"{uuid.uuid4().hex}.pickle")
    return write_atomic(path, pickle.dumps(task))


def _last_step(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))  # a line has about a hundred
        return json.loads(file.read().split(b"\n")[-2])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
