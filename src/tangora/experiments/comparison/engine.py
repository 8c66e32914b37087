"""Execution of a comparison's runs: processes on this machine, or a cluster."""

from abc import ABC, abstractmethod
from typing import Generic, Self, TypeVar

from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.experiments.comparison.sweep import Trial
from tangora.experiments.comparison.worker import Limits
from tangora.report import Record
from tangora.training.data import Task

_RunT = TypeVar("_RunT")


class Engine(ABC, Generic[_RunT]):
    """Takes runs, and gives back their records as they end; left early, it ends what goes on.

    Subclasses hold of each run what they need to follow it.
    """

    def __init__(self, jobs: int | None, limits: Limits, progress: Progress | None):
        self._jobs, self._limits, self._progress = jobs, limits, progress
        self._running: dict[str, _RunT] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> set[str]:
        """Names of the runs that wait or go on."""
        return set(self._running)

    @property
    def has_room(self) -> bool:
        """Whether another run can be started."""
        return self._jobs is None or len(self._running) < self._jobs

    def start(self, trial: Trial, task: Task, folder: ComparisonFolder) -> None:
        """Start a run, or hand it over."""
        self._running[trial.id] = self._begun(trial, task, folder)

    def wait(self) -> list[Record]:
        """Wait until runs end, and report the progress of all of them until then."""
        while True:
            found = {name: self._record(run) for name, run in self._running.items()}
            ended = {name: record for name, record in found.items() if record is not None}
            if ended:
                for name in ended:
                    del self._running[name]
                return [*ended.values()]
            self._pause()

    @abstractmethod
    def stop(self) -> None:
        """End all runs at once; they leave no record."""

    @abstractmethod
    def _begun(self, trial: Trial, task: Task, folder: ComparisonFolder) -> _RunT:
        """Start a run, and return what it is followed by."""

    @abstractmethod
    def _record(self, run: _RunT) -> Record | None:
        """Return the record of a run that has ended; report the progress of one that goes on."""

    @abstractmethod
    def _pause(self) -> None:
        """Wait until it is worth looking at the runs again."""
