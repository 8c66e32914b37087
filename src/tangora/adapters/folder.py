"""Folders that appear whole or not at all."""

import errno
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tangora._checks import InputError


def check_replaceable(target: Path, *, what: str, marker: str, known: Callable[[str], bool]) -> None:
    """Refuse to replace a folder that holds anything but what is to be written."""
    if not target.exists():
        return
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if not target.is_dir() or (held and marker not in held):
        raise InputError(f"{target} exists and is no {what} folder; choose another path")
    if strangers := sorted(name for name in held if not known(name)):
        raise InputError(
            f"{target} holds {strangers[0]} beside the {what}, which would be lost; choose another path"
        )


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Make a temporary folder on the same file system, and remove it in any case."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch / "new"  # mkdtemp's own folder is readable by its owner only
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder to its place; what was there comes back if that fails."""
    for attempt in itertools.count():
        old = source.with_name(f"old-{attempt}")
        try:
            with suppress(FileNotFoundError):
                target.rename(old)
            source.rename(target)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another process was quicker: its folder is replaced in turn
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        else:
            return
