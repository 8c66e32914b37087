"""A method with other options of its optimizer or start, for ablations: ``lora-pro@gauge=zero``."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tangora._checks import InputError, check_choice
from tangora.init import start_options
from tangora.recipes.later import Later
from tangora.recipes.recipe import Recipe

_COMMON = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "foreach", "on_nonfinite"}


def optimizer_options(entry: Recipe) -> dict[str, Any]:
    """List what makes a method's optimizer its own."""
    make = entry.make_optimizer
    maker: Any = make.func if isinstance(make, partial) else make
    maker = maker.maker if isinstance(maker, Later) else maker
    if not inspect.isclass(maker):
        return {}
    hints = get_type_hints(maker.__init__)
    return {name: hints[name] for name in inspect.signature(maker).parameters if name not in _COMMON}


def varied(entry: Recipe, changes: Sequence[str]) -> Recipe:
    """Change options of a method's optimizer and start."""
    of_optimizer = optimizer_options(entry)
    of_start = start_options(entry.start) if entry.start is not None else {}
    known = of_optimizer | dict(of_start)
    if not known:
        raise InputError(f"recipe {entry.name} has no options of its own; got @{'@'.join(changes)}")
    options = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"options of a recipe are @name=value; got @{change}")
        check_choice(f"option of {entry.name}", name, tuple(known))
        options[name] = _value(name, text, known[name])
    written = [f"{name}={options[name]}" for name in sorted(options)]
    return replace(
        entry,
        name="@".join([entry.name, *written]),
        summary=f"{entry.summary}; {', '.join(written)}",
        make_optimizer=partial(
            entry.make_optimizer, **{key: value for key, value in options.items() if key in of_optimizer}
        ),
        start_options=MappingProxyType(
            dict(entry.start_options) | {key: value for key, value in options.items() if key in of_start}
        ),
    )


def _value(name: str, text: str, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "cannot be read"
        raise InputError(f"{name}: {reason[0].lower()}{reason[1:]}; got {text!r}") from None
