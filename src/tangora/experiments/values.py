"""Base of all settings: names, numbers, and validation errors of one line."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tangora._checks import MOST_LISTED, InputError, near_hint, no_such_path, shown

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""Range of seeds that every random generator accepts, NumPy's too."""

_MOST, _LEAST = 10**15, 1e-30


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, numbers are finite, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers take the fields for the arguments

        def __init__(self, /, **values: Any):
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InputError(_first_problem(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: Any) -> Any:
        # YAML's true would be taken for 1
        wanted = str(cls.model_fields[info.field_name or ""].annotation)
        for part in _parts(value):
            if isinstance(part, bool) and not ("bool" in wanted or "Any" in wanted):
                raise ValueError(f"{info.field_name} cannot be a boolean; got {str(part).lower()}")
        return value

    @field_validator("*")
    @classmethod
    def _sizes_of_tensors(cls, value: Any, info: Any) -> Any:
        # what no tensor holds would be refused by whatever meets it first, or be nothing
        for part in _parts(value):
            if isinstance(part, int) and abs(part) > _MOST:
                raise ValueError(f"{info.field_name} must be at most {_MOST:.0e}; got {part}")
            if isinstance(part, float) and part and not _LEAST <= abs(part) <= 1 / _LEAST:
                raise ValueError(
                    f"{info.field_name} must be 0 or in [{_LEAST:g}, {1 / _LEAST:g}]; got {part:g}"
                )
        return value

    groups: ClassVar[Mapping[str, str]] = {}
    """Headings of the help, each by the first setting that stands under it."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of settings, those of Hugging Face above all."""

    @classmethod
    def spelled(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Put values under the settings' own names."""
        found: dict[str, str] = {}
        for key in values:
            if not isinstance(key, str):
                raise InputError(f"settings are given by their names; got {shown(key)} as a name")
            name = cls.aliases.get(key, key)
            if name in found:
                raise InputError(f"{found[name]} and {key} are the same setting; pass only one of them")
            found[name] = key
        return {name: values[key] for name, key in found.items()}

    @classmethod
    def overridden(cls, values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Put values over others."""
        values, own = cls.spelled(values), cls.spelled(own)
        for key, other in (("steps", "epochs"), ("epochs", "steps")):
            if other in cls.model_fields and own.get(key) is not None:
                values.pop(other, None)
        return values | own

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Put values under the settings' own names, with what follows from them before they are validated."""
        return cls.spelled(values)

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        return cls.completed(values) if isinstance(values, dict) else values

    def grown_from(self, found: Mapping[str, Any]) -> set[str]:
        """Tell in which keys these settings ask for more of the same than others did."""
        del found
        return set()


def _parts(value: Any) -> list[Any]:
    # what lists and mappings hold, however deep
    if isinstance(value, Mapping):
        value = list(value.values())
    return [part for each in value for part in _parts(each)] if isinstance(value, (list, tuple)) else [value]


def separated(value: Any) -> Any:
    """Split a text at its commas: lists come so from the command line."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Separated = BeforeValidator(separated)
"""Validator of a list that may be given as a text with commas."""


def _target_names(targets: str | list[str]) -> str | list[str]:
    # PEFT reads a single string as a pattern, and a name alone is none
    if not isinstance(targets, str) or targets == "all-linear":
        return targets
    names = separated(targets)
    return names if len(names) > 1 or re.fullmatch(r"[\w.-]+", targets) else targets


def _device_name(name: str | None) -> str | None:
    # whether it is there is found out where it is used
    if name is not None and not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise InputError(f"device must be cpu, cuda, cuda:N or mps; got {name!r}")
    return name


Device = Annotated[
    str | None,
    AfterValidator(_device_name),
    Field(description="Device: cpu, cuda, cuda:N or mps. Default: a GPU if there is one."),
]
Targets = Annotated[
    str | list[str],
    AfterValidator(_target_names),
    Field(
        description="Layers to adapt: names separated by commas, a pattern, or all-linear (target_modules)."
    ),
]

_SettingsT = TypeVar("_SettingsT", bound=Settings)


def validated(kind: type[_SettingsT], values: Mapping[str, Any], source: str = "") -> _SettingsT:
    """Make settings of values from a place, which errors name."""
    try:
        return kind(**kind.spelled(values))
    except InputError as problem:
        raise InputError(f"{source}: {problem}" if source else str(problem)) from None


def _first_problem(kind: type[Settings], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        hint, names = near_hint(key, [*kind.model_fields, *kind.aliases]), [*kind.model_fields]
        rest = "" if hint and len(names) > MOST_LISTED else f"; allowed: {', '.join(names)}"
        return f"unknown key {key!r}{hint}{rest}"
    message, got = first["msg"].removeprefix("Value error, "), shown(first["input"])
    if first["type"] == "missing":
        return f"{key} must be given: {kind.model_fields[key].description}".rstrip(".")
    if first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", message)
        return (
            f"{key} must be one of {', '.join(allowed)}; got {got}{near_hint(str(first['input']), allowed)}"
        )
    if first["type"] == "value_error":
        return message
    return f"{key}: {message[0].lower()}{message[1:]}; got {got}"


def read_rank_plan(path: str) -> dict[str, Any]:
    """Read the ranks of single layers from a file."""
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"rank_plan {path!r}: {no_such_path(path)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"rank_plan cannot be read: {error}") from None
    return checked_rank_plan(plan)


def checked_rank_plan(plan: Any) -> dict[str, Any]:
    """Return what a plan of ranks says, checked."""
    keys = ("rank_pattern", "alpha_pattern")
    if not isinstance(plan, dict) or any(not isinstance(plan.get(key), dict) for key in keys):
        raise ValueError(f"rank_plan must hold {' and '.join(keys)}")
    for key, number, what in (
        ("rank_pattern", int, "whole numbers"),
        ("alpha_pattern", (int, float), "numbers"),
    ):
        for name, value in plan[key].items():
            if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"rank_plan: {key} must hold {what} above 0; got {value!r} for {name}")
    return {key: plan[key] for key in (*keys, "r", "lora_alpha", "use_rslora") if key in plan}
