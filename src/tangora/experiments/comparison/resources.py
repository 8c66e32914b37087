"""Resources of a comparison: this machine, or a cluster's scheduler. They do not change its results."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from tangora._checks import InputError
from tangora.experiments.values import Settings, validated

Cluster = Literal["ray", "slurm"]


class RayOptions(Settings):
    """Address of a Ray cluster, and the resources of one run there."""

    address: str | None = Field(
        default=None, description="Default: RAY_ADDRESS, a cluster running on this machine, or a new one."
    )
    gpus: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="GPUs of one run, or a part of one. Default: 1 if there are any.",
    )
    cpus: float = Field(default=1, gt=0, description="Cores of one run.")
    retries: int = Field(
        default=1, ge=0, description="Maximum restarts of a run whose worker or node failed."
    )


class SlurmOptions(Settings):
    """Resources of one run's Slurm job; further keys are sbatch's own."""

    model_config = ConfigDict(extra="allow")

    time: int = Field(ge=1, description="time limit of one run's job in minutes")
    gpus: int = Field(default=1, ge=0, le=1, description="GPUs per node.")
    cpus: int | None = Field(default=None, ge=1, description="Cores of one run.")
    setup: str | None = Field(
        default=None, description="A shell command before the run, such as module load."
    )
    executor: Literal["slurm", "local"] = Field(
        default="slurm", description="local: processes on this machine, to try it without Slurm."
    )


class Resources(Settings):
    """Resources of a comparison. They do not change its results."""

    groups: ClassVar[Mapping[str, str]] = {"jobs": "Output and resources"}

    jobs: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Parallel runs: each has its own GPU, or they share GPUs and cores. Default: the number of "
            "GPUs, or 1; no limit on a cluster."
        ),
    )
    cluster: Cluster | None = Field(
        default=None, description="Run on a cluster instead of this machine; needs tangora[cluster]."
    )
    cluster_options: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Resources of one run on the cluster, KEY=VALUE separated by commas: gpus, cpus, retries, "
            "address (Ray); "
            "time in minutes, gpus, cpus, setup and any option of sbatch (Slurm)."
        ),
    )
    max_hours: float | None = Field(
        default=None,
        ge=0,
        description="Time limit in hours: do not start a run that is expected to exceed it.",
    )
    max_memory: float | None = Field(
        default=None, gt=0, description="Memory limit of each run in gigabytes, on a CPU under Linux."
    )
    retry: bool = Field(default=False, description="Repeat failed runs.")

    @field_validator("cluster_options", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        # KEY=VALUE,KEY=VALUE from the command line; a value may have commas in brackets, as lists of nodes do
        if not isinstance(given, str):
            return given
        pairs = [part.partition("=") for part in re.split(r",(?![^\[]*\])", given)]
        for key, equals, value in pairs:
            if not (key.strip() and equals and value.strip()):
                raise ValueError(f"cluster_options must be KEY=VALUE, separated by commas; got {given!r}")
        return {key.strip(): value.strip() for key, _, value in pairs}

    @model_validator(mode="after")
    def _possible(self) -> "Resources":
        if self.cluster is None:
            if self.cluster_options:
                raise ValueError("cluster_options need cluster; pass ray or slurm, or omit cluster_options")
            return self
        _ = self.ray if self.cluster == "ray" else self.slurm
        if self.max_hours is not None and self.jobs is None:
            raise ValueError(
                "max_hours needs jobs with a cluster, because all runs are queued at once: set both"
            )
        if self.max_memory is not None and self.cluster == "slurm":
            raise ValueError(
                "max_memory does not apply to Slurm, which has its own limit: set cluster_options mem=..."
            )
        return self

    @property
    def ray(self) -> RayOptions:
        """The options of Ray."""
        return validated(RayOptions, self.cluster_options, "cluster_options")

    @property
    def slurm(self) -> SlurmOptions:
        """The options of Slurm."""
        if "time" not in self.cluster_options:
            raise InputError(
                "cluster slurm needs a time limit for the job of one run: cluster_options time=MINUTES"
            )
        return validated(SlurmOptions, self.cluster_options, "cluster_options")
