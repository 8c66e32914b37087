"""The file that a repeated experiment leaves behind."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tangora._checks import InputError
from tangora.report.files import write_atomic
from tangora.report.records import FrozenModel, IsoTime
from tangora.report.reproduction.records import Result

_INNERMOST = re.compile(r"\[[^\[\]{}\"]*\]")
"""A list without lists, dictionaries or texts in it."""


class ReproductionRecord(FrozenModel):
    """What an experiment found, and where it comes from."""

    schema_version: Literal[1] = 1
    name: str = Field(description="As on the command line.")
    title: str
    source: str = Field(description="Paper and place in it.")
    stand_ins: tuple[str, ...] = Field(description="What the source leaves open, and what was taken.")
    quick: bool = Field(description="Whether the small settings were asked for.")
    command: str = Field(description="The command line that repeats it.")
    settings: dict[str, Any]
    result: Result
    seconds: float = Field(ge=0, description="How long it took.")
    versions: dict[str, str] = Field(description="Package name to version.")
    machine: str = Field(description="Processor, accelerator, threads.")
    commit: str | None = Field(default=None, description="Commit of the code that ran.")
    created: IsoTime = Field(description="When it ended, ISO 8601.")


def load_reproduction(path: str | Path) -> ReproductionRecord:
    """Read what ``tangora reproduce`` wrote.

    Args:
        path: ``reproduction.json``.

    Returns:
        The record.

    Raises:
        InputError: If the file is missing, corrupt, or something else; the message names it.
    """
    try:
        return ReproductionRecord.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is no valid reproduction at {place}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def save_reproduction(record: ReproductionRecord, path: str | Path) -> Path:
    """Write a record as strict JSON, lists of numbers on one line each.

    Args:
        record: What was found.
        path: The file.

    Returns:
        The path written.
    """
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, _INNERMOST.sub(lambda found: " ".join(found[0].split()), text) + "\n")
