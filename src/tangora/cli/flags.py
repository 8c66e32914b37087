"""Flags from settings, and settings from flags and a file."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from glob import escape as escape_glob
from glob import glob
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from tangora._checks import InputError
from tangora._names import DATA, MODELS, SPACES, STARTS
from tangora.experiments.presets import PRESETS
from tangora.experiments.values import Settings, read_yaml
from tangora.recipes import recipes
from tangora.training.paths import is_data_path, is_model_path, local_path

PANELS = (
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
    "starts": STARTS,
    "over": SPACES,
    "preset": PRESETS,
    "device": ("cpu", "cuda", "mps"),
}
"""What the TAB key offers for a setting besides files; more is allowed where a setting says so."""

_PATHS: dict[str, Callable[[str], bool]] = {
    "model": is_model_path,
    "source": is_model_path,
    "data": is_data_path,
    "test_data": is_data_path,
    "adapter": bool,
    "reference": bool,
}
"""Settings that may name files or folders, and when they do."""

_SHOWN = {"rank_plan": "<file>", "adapter": "<folder>", "reference": "<folder>"}
"""What the help shows as the value of a setting, where that is more than its type."""

_INSIDE = {"model": "config.json", "adapter": "adapter_config.json", "reference": "record.json"}
"""What a folder that they name must hold."""


def takes(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each setting, described by it, and hidden ones for other names and for ``--no-``.

    Args:
        settings: Where names, types, descriptions and defaults come from.

    Returns:
        A decorator of a function with ``**values``, which receives the settings that were given. A setting that the
        function takes by its own name gets no flag.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = {
            key: p for key, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD
        }
        flags = {key: flag for key, flag in _flags(settings).items() if key not in own}

        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            given = {key: arguments[key] for key in flags if arguments[key] is not None}
            command(**{key: arguments[key] for key in own}, **settings.spelled(_switched(given)))

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


def option(panel: str, metavar: str, text: str, *names: str, **more: Any) -> Any:
    """Return a flag that a command declares itself.

    Args:
        panel: Heading in the help.
        metavar: Its value in the help; empty for a switch.
        text: What it means.
        *names: Its names; default: the parameter's.
        **more: Further options of `typer.Option`.

    Returns:
        The option.
    """
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, **more)


def names_for(key: str) -> Callable[[str], list[str]]:
    """Return what completes the names of a setting, the last one of a list separated by commas.

    Args:
        key: The setting.

    Returns:
        Completions of what has been typed.
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        names = [f"{before}{comma}{name}" for name in _NAMES.get(key, ()) if name.startswith(last)]
        return names + (sorted(glob(f"{escape_glob(incomplete)}*")) if key in _PATHS else [])

    return complete


def _place(annotation: Any) -> int:
    # the heading under which a flag stands; arguments come first
    option = next((part for part in get_args(annotation) if hasattr(part, "rich_help_panel")), None)
    panel = getattr(option, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _flags(settings: type[Settings]) -> dict[str, Any]:
    """Return the annotation of a parameter for each setting, and for each of their other names."""
    parent: Any = settings.__base__
    fields = settings.model_fields
    panels, panel = {}, None
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
            raise InputError(f"--{flag} and --no-{flag} exclude each other; give one of them")
        values[name] = False
    return values


def with_file(settings: type[Settings], flags: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """Add the settings of a file.

    Args:
        settings: Whose names and aliases are meant.
        flags: Settings from the command line, which win.
        config: YAML file.

    Returns:
        All settings.

    Raises:
        InputError: If the file cannot be read.
    """
    return settings.overridden(read_yaml(config) if config is not None else {}, flags)


def check_paths(*settings: Settings) -> None:
    """Check that files and folders exist and hold what they must, before anything slow is imported to read them.

    Args:
        *settings: What names them.

    Raises:
        InputError: Naming the first that does not.
    """
    for each in settings:
        for key, is_path in _PATHS.items():
            name = getattr(each, key, None)
            if name is not None and is_path(name):
                _check_path(key, name)


def _check_path(key: str, name: str) -> None:
    path, inside = local_path(name), _INSIDE.get(key)
    if path is None:
        raise InputError(f"{key} {name!r}: there is no such file or folder")
    if inside is not None and path.is_dir() and not (path / inside).is_file():
        raise InputError(f"{key} {name!r}: this folder has no {inside}")
