"""The file that a diagnosis leaves behind."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tangora._checks import InputError
from tangora.diagnostics import Diagnosis
from tangora.report.records import FrozenModel, IsoTime


class DiagnosisRecord(FrozenModel):
    """A diagnosis, and where it comes from."""

    schema_version: Literal[1] = 1
    title: str
    command: str = Field(description="The command line that repeats it.")
    settings: dict[str, Any]
    diagnosis: Diagnosis
    versions: dict[str, str] = Field(description="Package name to version.")
    machine: str = Field(description="Processor, accelerator, threads.")
    commit: str | None = Field(default=None, description="Commit of the code that ran.")
    created: IsoTime = Field(description="When it ended, ISO 8601.")


def load_diagnosis(path: str | Path) -> DiagnosisRecord:
    """Read what ``tangora diagnose`` wrote.

    Args:
        path: ``diagnosis.json``.

    Returns:
        The record.

    Raises:
        InputError: If the file is missing, corrupt, or something else; the message names it.
    """
    try:
        return DiagnosisRecord.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} is no valid diagnosis at {place}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
