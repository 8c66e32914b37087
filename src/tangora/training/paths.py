"""Which names of models and data can only be files or folders: a missing one is found before anything is loaded."""

import os
from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def local_path(name: str) -> Path | None:
    """Return the file or folder that a name means."""
    path = os.path.expanduser(
        name
    )  # Path.expanduser raises for an unknown user, Path.is_file for a long name
    return Path(path) if os.path.isfile(path) or os.path.isdir(path) else None


def is_model_path(name: str) -> bool:
    """Tell whether a model's name can be no hub name and no packaged one."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def is_data_path(name: str) -> bool:
    """Tell whether a data set's name can be no hub name and no packaged one."""
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in DATA_SUFFIXES
