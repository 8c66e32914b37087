"""Settings as they are read: from YAML files, presets, and the folders of runs that were made."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tangora._checks import InputError, check_choice, no_such_path
from tangora._folders import RunFolder
from tangora.experiments.settings import RunSettings
from tangora.experiments.values import validated

_PRESETS = {
    path.name.removesuffix(".yaml"): path
    for path in files("tangora.experiments").joinpath("presets").iterdir()
    if path.name.endswith(".yaml")
}
PRESETS = tuple(sorted(_PRESETS))
"""Names of the comparisons that come with tangora."""


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a comparison that comes with tangora, those of its stand-in and its paper among them."""
    check_choice("preset", name, PRESETS)
    return yaml.safe_load(_PRESETS[name].read_text(encoding="utf-8"))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: {no_such_path(path)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{path}{place} is not valid YAML: {problem}") from error
    except (ValueError, RecursionError) as error:  # a date that does not exist, brackets without end
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values; got {type(values).__name__}")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in an output folder, or another file of keys and values."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or use another folder") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged (no keys and values); restore it, or use another folder")
    return values


def run_file(folder: Path) -> dict[str, Any]:
    """Read what the folder of a run, or the record beside it, says of its settings and origin."""
    run = RunFolder(folder)
    if run.settings.is_file():
        return read_settings(run.settings)
    if not run.path.exists():
        raise InputError(f"run {str(folder)!r}: {no_such_path(folder)}")
    if not run.trial_record.is_file():
        raise InputError(
            f"{folder} is not a run folder: it has no settings.json, and its folder has no record"
        )
    values = read_settings(run.trial_record).get("settings")
    return values if isinstance(values, dict) else {}


def run_settings(folder: Path) -> RunSettings:
    """Read the settings of a run."""
    values = run_file(folder)
    # where a run was computed says nothing of where its adapter is read
    known = {
        key: value for key, value in values.items() if key in RunSettings.model_fields and key != "device"
    }
    if "recipe" not in known:
        raise InputError(
            f"{folder} contains a comparison; choose one of its runs, {folder}/runs/NAME"
            if "recipes" in values
            else f"{folder} contains no run: pass an output folder of tangora train or a run of tangora compare"
        )
    return validated(RunSettings, known, str(folder))


def adapter_settings(folder: Path) -> RunSettings:
    """Read the settings of a finished run with an adapter."""
    settings = run_settings(folder)
    if not RunFolder(folder).adapter.is_dir():
        raise InputError(f"{folder} contains no adapter: the run has not finished, or trained all weights")
    return settings
