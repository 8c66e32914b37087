"""Runs in processes of their own, a few at a time.

Each process is forked from a server that has imported everything and done nothing, so a run starts in a fraction of a
second, owns its memory, and takes nothing with it when it dies.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from tangora.experiments.comparison.sweep import Cell
from tangora.experiments.comparison.worker import DiskFullError, Limits, died, record_path, work
from tangora.experiments.run.execute import Watcher
from tangora.report import Record, load_record, save_json
from tangora.training.data import Task


@dataclass
class _Running:
    cell: Cell
    task: Task
    folder: Path
    process: BaseProcess
    told: Connection
    watcher: Watcher


class Pool:
    """Makes runs side by side."""

    def __init__(self, jobs: int = 1, limits: Limits | None = None):
        limits = limits or Limits()
        self._jobs = jobs
        threads = limits.threads or (max(1, _num_cores() // jobs) if jobs > 1 else None)
        self._limits = Limits(threads, limits.gigabytes)
        self._running: dict[str, _Running] = {}
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([work.__module__])

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> set[str]:
        """Names of the runs that are going on."""
        return set(self._running)

    @property
    def has_room(self) -> bool:
        """Whether another run can be started."""
        return len(self._running) < self._jobs

    def start(self, cell: Cell, task: Task, folder: Path, watcher: Watcher) -> None:
        """Start a run."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work, args=(cell, task, folder, self._limits, theirs), name=cell.id, daemon=True
        )
        with _without_main():
            process.start()
        theirs.close()
        self._running[cell.id] = _Running(cell, task, folder, process, ours, watcher)

    def wait(self) -> list[tuple[Cell, Record]]:
        """Wait until a run ends, and pass on what all of them tell until then."""
        ended: list[tuple[Cell, Record]] = []
        while not ended:
            wait([run.told for run in self._running.values()])
            for name, run in list(self._running.items()):
                if self._hear(run):
                    del self._running[name]
                    ended.append((run.cell, self._record(run)))
        return ended

    def stop(self) -> None:
        """End all runs at once; they leave no record."""
        for run in self._running.values():
            run.process.kill()
        for run in self._running.values():
            run.process.join()
            run.told.close()
        self._running.clear()

    def _hear(self, run: _Running) -> bool:
        # passes on all that a run has told, and tells whether it has ended
        while run.told.poll():
            try:
                kind, *what = run.told.recv()
            except EOFError:  # it has ended without a word
                return True
            if kind == "phase":
                run.watcher.phase(what[0])
            elif kind == "note":
                run.watcher.note(what[0])
            elif kind == "length":
                run.watcher.length(what[0])
            elif kind == "step":
                run.watcher.step(*what)
            elif kind == "full":
                raise DiskFullError(what[0])
            else:
                return True
        return False

    def _record(self, run: _Running) -> Record:
        run.process.join()
        run.told.close()
        path = record_path(run.folder, run.cell)
        if not path.exists():
            save_json(died(run.cell, run.task, run.folder, run.process.exitcode, self._limits), path)
        return load_record(path)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the user's script from a process that is started: it needs nothing of it, and would run it again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
