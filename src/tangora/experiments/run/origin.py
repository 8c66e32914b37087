"""What a run is made from, in short: the same for the same data and model, whatever their names and dates."""

import hashlib

from tangora.experiments.settings import TaskSettings
from tangora.training.data import Task
from tangora.training.models.base_model import PACKAGED_MODELS
from tangora.training.paths import local_path

_SUFFIXES = {".json", ".safetensors", ".bin", ".gguf", ".model", ".txt"}
_CHUNK, _NUM_CHUNKS = 2**16, 64
"""Training changes nearly every weight: of large files, bytes at regular places are enough."""


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
