"""Flags from settings, and settings from flags and a file."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from pydantic.fields import FieldInfo

from tangora._checks import InputError
from tangora.experiments.settings import Settings, read_yaml
from tangora.training.paths import is_data_path, is_model_path

_PATHS: dict[str, Callable[[str], bool]] = {
    "model": is_model_path,
    "source": is_model_path,
    "data": is_data_path,
    "test_data": is_data_path,
    "adapter": bool,
    "reference": bool,
}
"""Settings that may name files or folders, and when they do."""

_INSIDE = {"model": "config.json", "adapter": "adapter_config.json", "reference": "record.json"}
"""What a folder that they name must hold."""


def takes(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each setting, described by it.

    Args:
        settings: Where names, types, descriptions and defaults come from.

    Returns:
        A decorator of a function with ``**values``, which receives the flags that were given. A setting that the
        function takes by its own name gets no flag.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            command(**{key: value for key, value in arguments.items() if key in own or value is not None})

        signature = inspect.signature(command, eval_str=True)
        own = {
            key: p for key, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD
        }
        flags = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(key, field))
            for key, field in settings.model_fields.items()
            if key not in own
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()] + flags
        call.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def _flag(key: str, field: FieldInfo) -> Any:
    kinds = {kind for kind in (int, float, bool) if kind in (field.annotation, *get_args(field.annotation))}
    default = "" if field.default is None else f" [dim]\\[default: {field.default}][/dim]"
    option = typer.Option(
        f"--{key.replace('_', '-')}", help=f"{field.description}{default}", show_default=False
    )
    return Annotated[(kinds.pop() if kinds else str) | None, option]


def about(settings: type[Settings], key: str) -> str:
    """Return what a setting means, for a flag that a command declares itself.

    Args:
        settings: Where it is described.
        key: The setting.

    Returns:
        Its description.
    """
    return str(settings.model_fields[key].description)


def assignments(changes: list[str]) -> dict[str, Any]:
    """Read ``--set`` flags.

    Args:
        changes: ``KEY=VALUE`` each, the value as in YAML.

    Returns:
        Values by key.

    Raises:
        InputError: Naming the flag that is none of this form.
    """
    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"set must be KEY=VALUE; got {change!r}")
        try:
            values[key.strip().replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"set must be KEY=VALUE with a value as in YAML; got {change!r}") from None
    return values


def with_file(flags: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """Add the settings of a file.

    Args:
        flags: Settings from the command line, which win.
        config: YAML file.

    Returns:
        All settings.

    Raises:
        InputError: If the file cannot be read.
    """
    return (read_yaml(config) if config is not None else {}) | flags


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
    path, inside = Path(name).expanduser(), _INSIDE.get(key)
    if not path.exists():
        raise InputError(f"{key} {name!r}: there is no such file or folder")
    if inside is not None and path.is_dir() and not (path / inside).is_file():
        raise InputError(f"{key} {name!r}: this folder has no {inside}")


def with_lists(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Split what a command line separates by commas.

    Args:
        values: Settings; ``recipes``, ``seeds`` and ``learning_rates`` may be text.
        base: Those of the preset, whose recipes a common grid is for.

    Returns:
        Settings as `CompareSettings` takes them.

    Raises:
        InputError: If a number cannot be read.
    """
    values = dict(values)
    if "seed" in values:
        values["seeds"] = [values.pop("seed")]
    if isinstance(values.get("recipes"), str):
        values["recipes"] = [name.strip() for name in values["recipes"].split(",")]
    if isinstance(seeds := values.get("seeds"), str):
        values["seeds"] = [_number("seeds", text, int) for text in seeds.split(",")]
    if isinstance(rates := values.get("learning_rates"), str):
        grid = [_number("learning_rates", text, float) for text in rates.split(",")]
        values["learning_rates"] = dict.fromkeys(values.get("recipes", base.get("recipes", [])), grid)
    return values


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name} must be numbers separated by commas; got {text!r}") from None
