"""Where a number comes from: data and model, versions, machine and commit."""

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tangora._launched import launcher
from tangora._names import MODELS
from tangora.experiments.settings import TaskSettings
from tangora.report.formats import plural
from tangora.training.data import Task
from tangora.training.models.base_model import PACKAGED_MODELS
from tangora.training.paths import local_path
from tangora.training.ranks import num_ranks

_PACKAGES = ("tangora", "torch", "peft", "transformers", "accelerate", "datasets")

_SUFFIXES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".txt"}
_CHUNK, _NUM_CHUNKS = 2**16, 64
"""Training changes nearly every weight: of large files, bytes at regular places are enough."""


def provenance(model: str = "") -> dict[str, Any]:
    """Return what every record says of its origin: what the model is, versions, machine, commit and present time."""
    return {
        "model_description": MODELS.get(model),
        "versions": versions(),
        "machine": _machine(),
        "commit": _commit(),
        "processes": num_ranks(),
        "launcher": launcher(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES}


def _machine() -> str:
    """Return processor architecture, number of threads and accelerator; nothing that names a host."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{platform.machine()}, {plural(torch.get_num_threads(), 'thread')}, {accelerator}"


@cache
def _commit() -> str | None:
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


def origin_of(settings: TaskSettings, task: Task | None = None) -> dict[str, str]:
    """Return the fingerprints of data, where it is known, and of a model whose files are the user's and may change."""
    found = {
        "data_fingerprint": task.fingerprint if task else None,
        "model_fingerprint": model_fingerprint(settings.model),
    }
    return {key: value for key, value in found.items() if value is not None}


def model_fingerprint(name: str) -> str | None:
    """Hash the sizes and a part of the bytes of a model's files, in a fraction of a second for any size."""
    path = local_path(name)
    if name in PACKAGED_MODELS or path is None:
        return None
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES and each.is_file())
    seen = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        seen.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        step = max(_CHUNK, size // _NUM_CHUNKS)
        with file.open("rb") as content:
            for start in range(0, size, step):
                content.seek(start)
                seen.update(content.read(_CHUNK))
    return seen.hexdigest()
