"""Models that are made once, by one process or another, and kept in the user's cache folder."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tangora._checks import InputError


def cache_folder() -> Path:
    """Return ``$TANGORA_CACHE``, ``$XDG_CACHE_HOME/tangora`` or ``~/.cache/tangora``."""
    if own := os.environ.get("TANGORA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tangora"


def cached_model(key: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of the cache that holds a model, made at the first call."""
    folder = cache_folder() / "models" / key
    # the folder appears under this name only when it is complete
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
            complete = Path(temporary) / "model"
            make(complete)
            # a process beside this one may have been first: its copy is as good
            with contextlib.suppress(FileExistsError):
                _rename(complete, folder)
    except PermissionError as error:
        raise InputError(f"cannot write the model cache {folder}; set TANGORA_CACHE to a folder") from error
    return folder


def _rename(source: Path, target: Path) -> None:
    """Rename a folder; a full target is a `FileExistsError` on every system."""
    try:
        source.rename(target)
    except OSError:
        if target.is_dir():
            raise FileExistsError(target) from None
        raise
