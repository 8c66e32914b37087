"""Output folders: whose they are, one process in each at a time, and nothing left by a command that did nothing."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tangora._checks import InputError
from tangora._folders import OutputFolder
from tangora.experiments.settings_files import read_settings, run_file
from tangora.experiments.values import Settings
from tangora.report.record_files import write_atomic

_ORIGIN = {"data_fingerprint": "data", "model_fingerprint": "model"}
"""Keys of what a result was made from, and the settings that name it."""

_MAKERS = {
    "recipes": "tangora compare",
    "recipe": "tangora train",
    "source": "tangora curvature",
    "starts": "tangora diagnose",
}
"""A setting that only one command has, and the command."""

_NO_PART = {"report_to", "save_every", "device", "fsdp", "title", "judge"}
"""Settings that change nothing of what is found; another judge judges the same answers."""

NO_SPACE = "no space left on device"
"""The system's message for a full disk."""


def check_output(folder: Path) -> None:
    """Check that a folder can be made or belongs to a command, before anything slow; writes nothing."""
    with one_line_errors(folder):
        if folder.is_dir():
            output = OutputFolder(folder)
            held = {*folder.iterdir()} - {output.lock}
            if held and output.settings not in held:
                raise InputError(
                    f"{folder} exists but is not a tangora output folder; choose another --output"
                )
            if held:
                read_settings(output.settings)
        elif os.path.lexists(folder):
            raise InputError(f"{folder} exists but is not a folder; choose another --output")
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise InputError(
                f"{folder} cannot be created: {nearest} is not a folder; choose another --output"
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{folder} cannot be written: {nearest} is read-only; choose another --output")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Hold the place of a folder that is written whole."""
    with one_line_errors(folder):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder} exists already; choose another --output")
        check_output(folder)
        with _made(folder.absolute().parent), locked(folder, folder.with_name(f".{folder.name}.lock")):
            yield


@contextlib.contextmanager
def claimed(folder: Path, settings: Settings, origin: Mapping[str, str] | None = None) -> Iterator[None]:
    """Hold an output folder for a command, alone; if nothing was done, leave it as it was found."""
    check_output(folder)
    _check_outside(folder, settings)
    path = OutputFolder(folder).settings
    with one_line_errors(folder), _made(folder), locked(folder):
        if path.exists():
            _check_same(folder, settings, origin or {})
        wanted = json.loads(settings.model_dump_json()) | dict(origin or {})
        with _undone_without_work(folder):
            write_atomic(path, json.dumps(wanted, indent=1) + "\n")
            yield


@contextlib.contextmanager
def locked(folder: Path, lock: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, or wait for them; the system frees it, however this process ends."""
    held = FileLock(path := lock or OutputFolder(folder).lock)
    with one_line_errors(folder):
        path.touch()  # says why where nothing can be written
        try:
            held.acquire(blocking=wait, poll_interval=0.2)
        except Timeout:
            raise InputError(
                f"{folder} is in use by another tangora process; wait until it has ended, or choose another --output"
            ) from None
        except NotImplementedError:  # a file system without locks
            yield
            return
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is free: whoever waits for it makes a new one
            held.release()


@contextlib.contextmanager
def one_line_errors(folder: Path) -> Iterator[None]:
    """Turn what the system refuses into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise InputError(
                f"{folder}: {NO_SPACE}; free some space and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{error.filename or folder}: {os.strerror(error.errno).lower()}") from error
        if isinstance(error, ValueError) and "null byte" in str(error):
            raise InputError(f"{str(folder)!r} is not a valid folder name: {error}") from error
        raise


def is_disk_full(problem: BaseException) -> bool:
    """Tell whether an error means that nothing more can be written."""
    numbers = {getattr(each, "errno", None) for each in (problem, problem.__cause__)}
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT}) or NO_SPACE in str(problem).lower()


def check_origin(
    folder: Path, found: Mapping[str, Any], origin: Mapping[str, str], mend: str = "choose another --output"
) -> None:
    """Check that data and model are still those that results were made from."""
    for key, name in _ORIGIN.items():
        before, now = found.get(key), origin.get(key)
        if before and now and before != now:
            raise InputError(
                f"the {name} changed since {folder} was created: {name} {str(found.get(name))!r} has "
                f"the fingerprint {now[:12]} now, but had {str(before)[:12]} then; {mend}"
            )


def kept_origin(folder: Path) -> dict[str, Any]:
    """Return what is kept of the origin of a run, which `check_origin` takes."""
    found = run_file(folder)
    return {key: found[key] for key in (*_ORIGIN, *_ORIGIN.values()) if key in found}


def _check_outside(folder: Path, settings: Settings) -> None:
    # in a folder of texts every subfolder is a class
    for key in ("data", "test_data"):
        name = getattr(settings, key, None)
        if name is not None and Path(name).is_dir() and folder.resolve().is_relative_to(Path(name).resolve()):
            raise InputError(
                f"{folder} is inside {key} {name!r}, which would change; choose another --output"
            )


def _check_same(folder: Path, settings: Settings, origin: Mapping[str, str]) -> None:
    # what was refused before its first step left nothing to protect
    path = OutputFolder(folder).settings
    found = read_settings(path)
    fields = type(settings).model_fields
    for key, command in _MAKERS.items():
        if key in found and key not in fields:
            raise InputError(f"{folder} belongs to {command}; choose another --output")
    if not _holds_work(folder):
        return
    wanted = json.loads(settings.model_dump_json())
    # what an older version did not know was as it is by default
    usual = {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if not field.is_required()
    }
    wanted, found = usual | wanted, usual | found
    try:
        grown = settings.grown_from(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged (recipes, seeds or learning_rates); choose another --output"
        ) from error
    for key in sorted((wanted.keys() | found.keys()) - _NO_PART - _ORIGIN.keys() - grown):
        if wanted.get(key) != found.get(key):
            raise InputError(
                f"{folder} belongs to another configuration: {key} is {_set(found.get(key))} there and "
                f"{_set(wanted.get(key))} here; choose another --output"
            )
    check_origin(folder, found, origin)


def _holds_work(folder: Path) -> bool:
    output = OutputFolder(folder)
    # left before the first result
    idle = {output.settings, output.log, output.checkpoints, output.lock, output.cluster}
    held = (entry for entry in folder.iterdir() if entry not in idle)
    files = (path for entry in held for path in ([entry] if entry.is_file() else entry.rglob("*")))
    return any(path.is_file() and path.stat().st_size for path in files)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:  # whatever holds something stays
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _undone_without_work(folder: Path) -> Iterator[None]:
    output = OutputFolder(folder)
    before = {path: path.read_bytes() for path in (output.settings, output.log) if path.exists()}
    entries = {*folder.iterdir()}
    try:
        yield
    except BaseException:
        if not _holds_work(folder):
            for entry in folder.iterdir():
                if entry not in entries:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for path, content in before.items():
                path.write_bytes(content)
        raise


def _set(value: Any) -> str:
    # None stands for the default
    return "not set" if value is None else repr(value)
