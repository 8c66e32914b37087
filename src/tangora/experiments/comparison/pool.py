"""Runs in processes of their own on this machine, a few at a time.

Each process is forked from a server that has imported everything and done nothing, so a run starts in a fraction of a
second, owns its memory, and takes nothing with it when it dies. Where there are GPUs it is started anew with one of
them: imports may start CUDA (bitsandbytes' do), after which a process can neither be forked nor change its GPU.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.experiments.comparison.engine import Engine
from tangora.experiments.comparison.sweep import Trial
from tangora.experiments.comparison.worker import DiskFullError, Limits, died, work
from tangora.report import Record, load_record, save_json
from tangora.training.data import Task

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Running:
    trial: Trial
    task: Task
    folder: ComparisonFolder
    process: BaseProcess
    told: Connection
    gpu: str | None


class Pool(Engine[_Running]):
    """Makes runs side by side, ``progress("ID: what", done, total)`` for each.

    A run that does not name another device has one of the GPUs to itself, or shares it with as few as possible.
    """

    def __init__(
        self,
        jobs: int = 1,
        limits: Limits | None = None,
        progress: Progress | None = None,
        gpus: Sequence[str] = (),
    ):
        super().__init__(jobs, limits or Limits(), progress)
        self._gpus = gpus
        forks = not gpus and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([work.__module__])

    def stop(self) -> None:
        """End all runs at once; they leave no record."""
        for run in self._running.values():
            run.process.kill()
        for run in self._running.values():
            run.process.join()
            run.told.close()
        self._running.clear()

    def _begun(self, trial: Trial, task: Task, folder: ComparisonFolder) -> _Running:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work, args=(trial, task, folder, self._limits, theirs), name=trial.id, daemon=True
        )
        gpu = self._gpu_for(trial)
        with _without_main(), _seeing(gpu):
            process.start()
        theirs.close()
        if self._progress is not None:
            self._progress(f"{trial.id}: starting", 0, trial.settings.steps or 0)
        return _Running(trial, task, folder, process, ours, gpu)

    def _pause(self) -> None:
        wait([run.told for run in self._running.values()])

    def _gpu_for(self, trial: Trial) -> str | None:
        if not self._gpus or not trial.settings.any_gpu:
            return None
        taken = [run.gpu for run in self._running.values()]
        return min(self._gpus, key=taken.count)

    def _has_ended(self, run: _Running) -> bool:
        # reads all messages that a run has sent
        while run.told.poll():
            try:
                kind, *what = run.told.recv()
            except EOFError:  # it has ended without a word
                return True
            if kind == "full":
                raise DiskFullError(what[0])
            if kind == "done":
                return True
            if self._progress is not None:
                words, done, total = what
                self._progress(f"{run.trial.id}: {words}", done, total)
        return False

    def _record(self, run: _Running) -> Record | None:
        if not self._has_ended(run):
            return None
        run.process.join()
        run.told.close()
        path = run.folder.record_of(run.trial.id)
        if not path.exists():
            save_json(died(run.trial, run.task, run.folder, run.process.exitcode, self._limits), path)
        return load_record(path)


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _seeing(gpu: str | None) -> Iterator[None]:
    """Show a single GPU to a process that is started."""
    before = os.environ.get(_VISIBLE)
    if gpu is not None:
        os.environ[_VISIBLE] = gpu
    try:
        yield
    finally:
        if before is not None:
            os.environ[_VISIBLE] = before
        elif gpu is not None:
            del os.environ[_VISIBLE]


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the user's script from a process that is started: it needs nothing of it, and would run it again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
