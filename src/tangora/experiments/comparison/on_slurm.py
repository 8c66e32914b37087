"""Runs as jobs of Slurm, submitted by submitit; those that become due together are one job array.

Jobs outlive the command that submitted them, unless it is interrupted and cancels them. Their numbers are kept in the
output folder, so that the same command takes up those that are still alive.
"""

import contextlib
import json
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora._types import Progress
from tangora.experiments.comparison.cluster import ClusterEngine, LostError, Refusal, RemoteRun
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.worker import Limits
from tangora.experiments.process import tell_user
from tangora.report import Record
from tangora.report.record_files import write_atomic

try:
    import submitit
    from submitit.helpers import DelayedSubmission
except ImportError:
    raise InputError("cluster 'slurm' needs submitit: pip install 'tangora[cluster]'") from None

_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}
_MANY = 1000
"""Time limits that a run with checkpoints may meet: it has gone on after every one."""

_ASK_EVERY, _PATIENCE = 15.0, 30.0
"""Seconds between two questions to Slurm, and until the files of a job that has ended must be seen here."""


class _SlurmRun(RemoteRun):
    """A run that goes on in a new job when its own is preempted, or out of time and has checkpoints."""

    def checkpoint(self) -> DelayedSubmission:
        """Say to submitit what a job that is queued again has to do."""
        return DelayedSubmission(self)


@dataclass
class _Job:
    remote: RemoteRun
    submitted: Any = None
    ended: float | None = None


class SlurmEngine(ClusterEngine):
    """Makes every run in a job of its own."""

    def __init__(self, resources: Resources, progress: Progress | None):
        self._options = resources.slurm
        super().__init__(resources.jobs, Limits(self._options.cpus), progress)
        self._known: dict[Path, dict[str, Any]] = {}
        self._kept: list[_Job] = []
        self._queue = _Queue()

    def _submit(self, remote: RemoteRun) -> _Job:
        remote = _SlurmRun(**vars(remote))
        if remote.folder.path not in self._known:
            self._known[remote.folder.path] = self._alive(remote.folder)
        job = _Job(remote, self._known[remote.folder.path].get(remote.trial.id))
        if job.submitted is None:
            self._kept.append(job)
        return job

    def wait(self) -> list[Record]:
        """Submit the runs that have been taken, and wait until one ends."""
        self._submit_kept()
        return super().wait()

    def _submit_kept(self) -> None:
        kept, self._kept = self._kept, []
        for folder in {job.remote.folder for job in kept}:
            jobs = [job for job in kept if job.remote.folder == folder]
            with _one_line():
                submitted = self._executor(jobs[0].remote).submit_array([job.remote for job in jobs])
            self._queue.forget()
            known = self._known[folder.path]
            for job, each in zip(jobs, submitted, strict=True):
                job.submitted = known[job.remote.trial.id] = each
            numbers = {name: each.job_id for name, each in known.items()}
            write_atomic(_numbers(folder), json.dumps(numbers, indent=1))
            first = submitted[0].job_id.partition("_")[0]
            tell_user(f"{len(jobs)} runs submitted as job {first}")

    def _executor(self, remote: RemoteRun) -> Any:
        options = self._options
        # a run without checkpoints would begin again, and be out of time again
        restarts = _MANY if remote.trial.settings.save_every else 0
        folder = _files(remote.folder)
        executor = submitit.AutoExecutor(folder, options.executor, slurm_max_num_timeout=restarts)
        executor.update_parameters(
            name="tangora",
            timeout_min=options.time,
            gpus_per_node=options.gpus or None,
            cpus_per_task=options.cpus,
            slurm_setup=None if options.setup is None else [options.setup],
            slurm_array_parallelism=self._jobs,
            slurm_additional_parameters={"requeue": True, **(options.model_extra or {})},
        )
        return executor

    def _alive(self, folder: ComparisonFolder) -> dict[str, Any]:
        # of an earlier command, which was killed
        path = _numbers(folder)
        if self._options.executor == "local" or not path.exists():
            return {}
        numbers = json.loads(path.read_text(encoding="utf-8"))
        queue = self._queue.now() or {}
        return {
            name: submitit.SlurmJob(_files(folder), number)
            for name, number in numbers.items()
            if queue.get(number, "UNKNOWN") not in {*_ENDED, "UNKNOWN"}
        }

    def _outcome(self, job: _Job) -> Record | Refusal | None:
        submitted = job.submitted
        if submitted is None:
            return None
        if submitted.paths.result_pickle.exists():
            if submitted.exception() is None:
                return submitted.result()
            raise LostError(f"its job {submitted.job_id} failed: {_last_line(submitted.stderr())}")
        if self._options.executor == "local":
            state = "ended" if submitted.done() else None
        else:
            state = self._queue.ended(submitted.job_id)
        if state is None:
            job.ended = None  # one that is queued again had only seemed to end
            return None
        job.ended = job.ended or time.monotonic()
        if self._options.executor == "slurm" and time.monotonic() - job.ended < _PATIENCE:
            return None
        raise LostError(
            f"its job {submitted.job_id} left no record (state {state}): {_last_line(submitted.stderr())}"
        )

    def _cancel(self, job: _Job) -> None:
        if job.submitted is not None:
            job.submitted.cancel(check=False)


class _Queue:
    """The user's jobs as squeue lists them, which every Slurm has; sacct needs a database beside it."""

    def __init__(self):
        self._asked, self._states = -math.inf, dict[str, str]()

    def forget(self) -> None:
        """Ask anew: jobs have been submitted."""
        self._asked = -math.inf

    def now(self) -> dict[str, str] | None:
        """Return the states of jobs by their numbers, ``None`` if Slurm did not answer."""
        if time.monotonic() - self._asked > _ASK_EVERY:
            command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
            if asked.returncode:
                return None
            self._states = dict(line.split() for line in asked.stdout.splitlines())
            self._asked = time.monotonic()
        return self._states

    def ended(self, number: str) -> str | None:
        """Return the last state of a job that has ended; it leaves the queue some minutes later."""
        states = self.now()
        if states is None:
            return None
        state = states.get(number, "unknown")
        return state if state in {*_ENDED, "unknown"} else None


def _files(folder: ComparisonFolder) -> Path:
    return folder.cluster / "jobs"


def _numbers(folder: ComparisonFolder) -> Path:
    return folder.cluster / "jobs.json"


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").split("\n") if line.strip()]
    return lines[-1] if lines else "its node left no output; does it see the output folder?"


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # what sbatch says of its options comes as submitit's own
        said = " ".join(str(problem).split())
        raise InputError(f"Slurm does not take the runs: {said}") from problem
