"""The file that a repeated experiment leaves behind."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tangora.report.files import write_atomic
from tangora.report.recorded import Recorded, read_record
from tangora.report.reproduction.records import Result

_INNERMOST = re.compile(r"\[[^\[\]{}\"]*\]")
"""A list without lists, dictionaries or texts in it."""


class ReproductionRecord(Recorded):
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


def load_reproduction(path: str | Path) -> ReproductionRecord:
    """Read what ``tangora reproduce`` wrote.

    Args:
        path: ``reproduction.json``.

    Returns:
        The record.

    Raises:
        InputError: If the file is missing, corrupt, or something else; the message names it.
    """
    return read_record(ReproductionRecord, path, "reproduction")


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
