"""Flags from settings, and settings from flags and a file."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from glob import escape as escape_glob
from glob import glob
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from tangora._checks import InputError, no_such_path
from tangora._names import DATA, DIAGNOSED_STARTS, MODELS, SPACES
from tangora.experiments.settings_files import PRESETS, read_yaml
from tangora.experiments.values import Settings, validated
from tangora.recipes import recipes
from tangora.training.paths import is_data_path, is_model_path, local_path

_SettingsT = TypeVar("_SettingsT", bound=Settings)

_PANELS = (
    "Method",
    "Sweep and seeds",
    "Model and data",
    "Adapter",
    "Optimization",
    "Evaluation",
    "Measurements",
    "Accuracy and cost",
    "Output and resources",
)
"""Headings of the help, in order."""

_NAMES: Mapping[str, Iterable[str]] = {
    "recipe": tuple(entry.name for entry in recipes()),
    "recipes": tuple(entry.name for entry in recipes()),
    "model": MODELS,
    "data": DATA,
    "starts": DIAGNOSED_STARTS,
    "over": SPACES,
    "preset": PRESETS,
    "device": ("cpu", "cuda", "mps"),
}
"""Completions of a setting's value besides files; some settings allow further values."""

_PATHS: dict[str, Callable[[str], bool]] = {
    "model": is_model_path,
    "source": is_model_path,
    "data": is_data_path,
    "test_data": is_data_path,
    "adapter": bool,
    "reference": bool,
    "benchmark_path": bool,
}
"""Settings that may name files or folders, and when they do."""

_SHOWN = {
    "rank_plan": "<file>",
    "adapter": "<folder>",
    "reference": "<folder>",
    "benchmark_path": "<folder>",
}
"""Placeholder of a setting's value in the help, where its type is not enough."""

_INSIDE = {"model": "config.json", "adapter": "adapter_config.json", "reference": "record.json"}
"""File that a folder given for the setting must contain."""


def takes(*settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each setting, described by it, and hidden ones for other names and for ``--no-``.

    The function's ``**values`` are the settings that were given, as `given_for` divides them among their classes. A
    setting that it takes by its own name gets no flag.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = {
            key: p for key, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD
        }
        flags = {key: flag for each in settings for key, flag in _flags(each).items() if key not in own}

        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            given = {key: arguments[key] for key in flags if arguments[key] is not None}
            command(**{key: arguments[key] for key in own}, **_switched(given))

        made = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
            for key, flag in flags.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()] + made
        parameters.sort(key=lambda p: _place(p.annotation))
        call.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def given_for(settings: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given settings that belong to a class, by their own names."""
    names = settings.model_fields.keys() | settings.aliases.keys()
    return settings.spelled({key: value for key, value in values.items() if key in names})


def from_flags(
    settings: type[_SettingsT], values: Mapping[str, Any], config: Path | None = None, **own: Any
) -> _SettingsT:
    """Make the settings of a command from its flags, which win, and a YAML file; check the files they name."""
    given = settings.overridden(read_yaml(config) if config is not None else {}, given_for(settings, values))
    made = validated(settings, given | own, str(config or ""))
    check_paths(made)
    return made


def option(panel: str, metavar: str, text: str, *names: str, **more: Any) -> Any:
    """Return a flag that a command declares itself; the metavar of a switch is empty."""
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, **more)


def names_for(key: str) -> Callable[[str], list[str]]:
    """Return what completes the names of a setting, the last one of a list separated by commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        names = [f"{before}{comma}{name}" for name in _NAMES.get(key, ()) if name.startswith(last)]
        return names + (sorted(glob(f"{escape_glob(incomplete)}*")) if key in _PATHS else [])

    return complete


def _place(annotation: Any) -> int:
    # the heading under which a flag stands; arguments come first
    option = next((part for part in get_args(annotation) if hasattr(part, "rich_help_panel")), None)
    panel = getattr(option, "rich_help_panel", None)
    return _PANELS.index(panel) if panel in _PANELS else -1


def _flags(settings: type[Settings]) -> dict[str, Any]:
    """Return the annotation of a parameter for each setting, and for each of their other names."""
    parent: Any = settings.__base__
    panels, panel = {}, None
    fields = {
        key: field for key, field in settings.model_fields.items() if not field.exclude
    }  # only in files
    for key in fields:
        panel = settings.groups.get(key, panel)
        panels[key] = panel
    flags: dict[str, Any] = {}
    # what a command does not share with others stands first
    for key in sorted(fields, key=lambda key: key in parent.model_fields):
        kind = _kind(fields[key])
        flags[key] = Annotated[kind | None, _option(key, fields[key], panels[key])]
        if kind is bool:
            flags[f"no_{key}"] = _hidden(f"no_{key}", bool)
    for alias, key in settings.aliases.items():
        flags[alias] = _hidden(alias, _kind(fields[key]))
    return flags


def _hidden(key: str, kind: type) -> Any:
    return Annotated[kind | None, typer.Option(f"--{key.replace('_', '-')}", hidden=True)]


def _option(key: str, field: FieldInfo, panel: str | None) -> Any:
    kind, choices = _kind(field), _choices(field)
    shown = "" if kind is bool else f"<{'list' if _is_list(field) else kind.__name__}>"
    default = _default(field)
    notes = [f"One of {', '.join(choices)}."] if choices else []
    notes += [f"Default: {default}."] if default else []
    return typer.Option(
        f"--{key.replace('_', '-')}",
        help=" ".join([escape(str(field.description)), *notes]),
        show_default=False,
        metavar=_SHOWN.get(key, shown.replace("str", "text")),
        rich_help_panel=panel,
        autocompletion=_completion(key, choices),
    )


def _completion(key: str, choices: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    if choices:
        return lambda incomplete: [name for name in choices if name.startswith(incomplete)]
    return names_for(key) if key in _NAMES else None


def _kind(field: FieldInfo) -> type:
    # lists are text with commas on a command line; the settings split it
    types = _types(field)
    return next((kind for kind in (int, float, bool) if kind in types), str)


def _types(field: FieldInfo) -> tuple[Any, ...]:
    found: Any = field.annotation
    return get_args(found) if get_origin(found) in (Union, UnionType) else (found,)


def _is_list(field: FieldInfo) -> bool:
    types = _types(field)
    return str not in types and any(get_origin(each) in (list, dict) for each in types)


def _choices(field: FieldInfo) -> tuple[str, ...]:
    return next((get_args(each) for each in _types(field) if get_origin(each) is Literal), ())


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(map(str, value))
    # without one, what happens then stands in the description
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""


def _switched(given: Mapping[str, Any]) -> dict[str, Any]:
    # no_KEY is KEY that is false
    values = {key: value for key, value in given.items() if not (key.startswith("no_") and value is True)}
    for key in given.keys() - values.keys():
        name = key.removeprefix("no_")
        if name in values:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} and --no-{flag} exclude each other; pass only one of them")
        values[name] = False
    return values


def check_paths(*settings: Settings) -> None:
    """Check that files and folders exist and hold what they must, before anything slow is imported to read them."""
    for each in settings:
        for key, is_path in _PATHS.items():
            name = getattr(each, key, None)
            if name is not None and is_path(name):
                _check_path(key, name)


def _check_path(key: str, name: str) -> None:
    path, inside = local_path(name), _INSIDE.get(key)
    if path is None:
        raise InputError(f"{key} {name!r}: {no_such_path(name)}")
    if inside is not None and path.is_dir() and not (path / inside).is_file():
        raise InputError(f"{key} {name!r}: this folder has no {inside}")
