"""Runs on a Ray cluster, each a task; without a cluster Ray starts one on this machine."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from tangora._checks import InputError
from tangora._types import Progress
from tangora.experiments.comparison.cluster import ClusterEngine, LostError, Refusal, RemoteRun
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.worker import Limits
from tangora.experiments.process import tell_user
from tangora.report import Record

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise InputError("cluster 'ray' needs Ray: pip install 'tangora[cluster]'") from None


class RayEngine(ClusterEngine):
    """Makes every run in a Ray task, in a process below Ray's worker: both may die without the comparison.

    A task whose worker or node died is made again by Ray, up to ``retries`` times.
    """

    def __init__(self, resources: Resources, progress: Progress | None):
        self._options = options = resources.ray
        threads = max(1, int(options.cpus))
        super().__init__(resources.jobs, Limits(threads, resources.max_memory), progress)
        self._is_ours = not ray.is_initialized()
        self._make: Any = ray.remote(_made_apart)
        self._gpus = 0.0

    def __enter__(self) -> Self:
        if self._is_ours:
            self._connect()
        there = ray.cluster_resources().get("GPU", 0)
        self._gpus = (1.0 if there else 0.0) if self._options.gpus is None else self._options.gpus
        if self._gpus and not there:
            tell_user("the Ray cluster has no GPU now: the runs wait for a node with a GPU")
        return self

    def _connect(self) -> None:
        address = self._options.address
        try:
            with _kept_signals():
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as problem:  # of many kinds, network's and Ray's
            said = " ".join(str(problem).split())
            where = address or os.environ.get("RAY_ADDRESS") or "on this machine"
            raise InputError(f"Ray {where} cannot be reached: {said}") from problem

    def stop(self) -> None:
        """End all tasks, and Ray if it was started for them."""
        super().stop()
        if self._is_ours and ray.is_initialized():
            with _kept_signals():
                ray.shutdown()

    def _submit(self, remote: RemoteRun) -> Any:
        options: dict[str, Any] = {
            "name": remote.trial.id,
            "num_cpus": self._options.cpus,
            "num_gpus": self._gpus if remote.trial.settings.any_gpu else 0,
            "max_retries": self._options.retries,
        }
        return self._make.options(**options).remote(remote)

    def _outcome(self, job: Any) -> Record | Refusal | None:
        if not ray.wait([job], timeout=0)[0]:
            return None
        try:
            return ray.get(job)
        except RayTaskError as problem:  # what a run does wrong is in its record
            return Refusal(f"a Ray worker cannot execute runs: {_last_line(problem)}")
        except RayError as problem:
            raise LostError(f"its Ray task ended without a record: {_first_line(problem)}") from problem

    def _cancel(self, job: Any) -> None:
        ray.cancel(job, force=True)


def _made_apart(remote: RemoteRun) -> Record | Refusal:
    return remote.apart()


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__


def _last_line(problem: Exception) -> str:
    return str(problem).strip().rpartition("\n")[2] or type(problem).__name__


@contextmanager
def _kept_signals() -> Iterator[None]:
    # Ray takes SIGTERM for itself, which is how a scheduler interrupts a comparison
    alone = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)
