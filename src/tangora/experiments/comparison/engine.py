"""Where the runs of a comparison are made: on this machine, or on a cluster with an engine of its own."""

from collections.abc import Iterable
from typing import Protocol, Self

from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.experiments.comparison.plan import CompareSettings
from tangora.experiments.comparison.pool import Pool, num_cores
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.sweep import Trial
from tangora.experiments.comparison.worker import Limits
from tangora.report import Record
from tangora.training.data import Task
from tangora.training.devices import visible_gpus


class Engine(Protocol):
    """Takes runs, and gives back their records as they end; left early, it ends what goes on."""

    @property
    def running(self) -> set[str]:
        """Names of the runs that it has."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether it takes another run."""
        ...

    def start(self, trial: Trial, task: Task, folder: ComparisonFolder) -> None:
        """Take a run."""
        ...

    def wait(self) -> list[tuple[Trial, Record]]:
        """Wait until runs end."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def engine_for(
    resources: Resources, tasks: Iterable[CompareSettings], progress: Progress | None = None
) -> Engine:
    """Make the engine that resources name, for comparisons; a cluster's package is imported here only."""
    tasks = list(tasks)
    if resources.cluster is None:
        gpus = visible_gpus() if any(task.any_gpu for task in tasks) else []
        jobs = resources.jobs or len(gpus) or 1
        threads = max(1, num_cores() // jobs) if jobs > 1 else None
        return Pool(jobs, Limits(threads, resources.max_memory), progress, gpus)
    for task in tasks:
        if task.device not in (None, "cuda", "cpu"):
            raise InputError(f"device {task.device!r} is one of this machine's: leave it out with a cluster")
    if resources.cluster == "ray":
        from tangora.experiments.comparison.on_ray import RayEngine

        return RayEngine(resources, progress)
    from tangora.experiments.comparison.on_slurm import SlurmEngine

    return SlurmEngine(resources, progress)
