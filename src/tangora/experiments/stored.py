"""Settings of runs that were made, read from their folders."""

from pathlib import Path
from typing import Any

from tangora._checks import InputError
from tangora.experiments.settings import RunSettings
from tangora.experiments.values import read_settings, validated


def run_file(folder: Path) -> dict[str, Any]:
    """Read what the folder of a run, or the record beside it, says of its settings and origin."""
    own, record = folder / "settings.json", folder.parent.parent / "records" / f"{folder.name}.json"
    source = own if own.is_file() else record
    if not source.is_file():
        raise InputError(f"{folder} is no run folder: it has no settings.json, and no record beside it")
    values = read_settings(source)
    if source is record:
        values = values["settings"] if isinstance(values.get("settings"), dict) else {}
    return values


def run_settings(folder: Path) -> RunSettings:
    """Read the settings of a run."""
    values = run_file(folder)
    # where a run was computed says nothing of where its adapter is read
    known = {
        key: value for key, value in values.items() if key in RunSettings.model_fields and key != "device"
    }
    if "recipe" not in known:
        raise InputError(
            f"{folder} holds a comparison; choose one of its runs, {folder}/runs/NAME"
            if "recipes" in values
            else f"{folder} holds no run: give an output folder of tangora train, or one of the runs of tangora compare"
        )
    return validated(RunSettings, known, str(folder))


def adapter_settings(folder: Path) -> RunSettings:
    """Read the settings of a finished run with an adapter."""
    settings = run_settings(folder)
    if not (folder / "adapter").is_dir():
        raise InputError(f"{folder} holds no adapter: the run has not finished, or trained all weights")
    return settings
