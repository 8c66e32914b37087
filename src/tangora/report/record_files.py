"""Files of results: written whole or not at all, checked when they are read, with where they come from."""

import json
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tangora._checks import InputError, on_one_line


def _check_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


IsoTime = Annotated[str, AfterValidator(_check_time)]


class FrozenModel(BaseModel):
    """Base of all records: no changes after creation, no unknown fields, NaN as a JSON string."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Recorded(FrozenModel):
    """A result with the code and the machine that gave it."""

    versions: dict[str, str] = Field(description="Package name to version.")
    machine: str = Field(description="Processor, accelerator, threads.")
    commit: str | None = Field(default=None, description="Commit of the code that ran.")
    processes: int = Field(default=1, ge=1, description="Processes that trained together.")
    launcher: str | None = Field(default=None, description="Launcher of several processes.")
    model_description: str | None = Field(
        default=None,
        description=("Description of the packaged model; None for another model, or in older records."),
    )
    created: IsoTime = Field(description="When it ended, ISO 8601.")


class Measurement(Recorded):
    """Result of one command, with a page of its own."""

    schema_version: Literal[1] = 1
    title: str
    command: str = Field(description="The command line that repeats it.")
    settings: dict[str, Any]


def save_json(model: BaseModel, path: str | Path) -> Path:
    """Write a model as JSON, whole or not at all."""
    try:
        text = model.model_dump_json(indent=1)
    except ValueError as error:
        raise InputError(f"{path} cannot be written as JSON: {on_one_line(error)}") from error
    return write_atomic(path, text + "\n")


_ModelT = TypeVar("_ModelT", bound=BaseModel)


def read_record(kind: type[_ModelT], path: str | Path, what: str) -> _ModelT:
    """Read one record from a file."""
    return checked_content(kind, read_json(path), path, what)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {on_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must contain a JSON object; got {type(content).__name__}")
    return content


def checked_content(kind: type[_ModelT], content: dict[str, Any], path: str | Path, what: str) -> _ModelT:
    """Check what a file holds."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        where = f" at {place}" if place else ""
        raise InputError(f"{path} is not a valid {what}{where}: {first['msg']}") from error


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    path = Path(path)
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _replace(path: Path, data: bytes) -> None:
    # The same folder, because a rename is atomic only within one file system.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_default_mode(path))  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _default_mode(path: Path) -> int:
    if path.exists():
        return path.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
