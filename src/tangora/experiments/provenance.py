"""Where a number comes from: versions, machine and commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tangora._names import MODELS
from tangora.report.run_records import MachineLoad

_PACKAGES = ("tangora", "torch", "peft", "transformers", "accelerate", "datasets")


def provenance(model: str = "") -> dict[str, Any]:
    """Return what every record says of its origin: what the model is, versions, machine, commit and present time."""
    return {
        "model_description": MODELS.get(model),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES}


def machine() -> str:
    """Return processor architecture, number of threads and accelerator; nothing that names a host."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {accelerator}"


def load_average() -> float | None:
    """Return how many processes ran or wanted to, mean over the last minute; ``None`` on Windows."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def machine_load(before: float | None) -> MachineLoad | None:
    """Return the load before and after a run, and the number of processors."""
    after = load_average()
    if before is None or after is None:
        return None
    return MachineLoad(before=before, after=after, processors=os.cpu_count() or 1)


@cache
def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, or ``None`` for an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:  # some other project's repository, with tangora installed below it
            return None
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()
