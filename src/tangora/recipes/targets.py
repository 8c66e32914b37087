"""Which layers an adapter is asked for, checked with the names that there are."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from tangora._checks import InputError, check_kind, on_one_line
from tangora.recipes.head import head_names

_USUAL = (nn.Linear, nn.Conv2d, Conv1D)


def check_targets(model: nn.Module, targets: str | Iterable[str]) -> None:
    """Raise unless every target names a layer of the model."""
    check_kind("target_modules", targets, (str, list, tuple, set), "names of layers, or all-linear")
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    try:
        pattern = re.compile(targets) if isinstance(targets, str) else None
    except re.error as error:
        raise InputError(
            f"target_modules must be names or a regular expression ({error}); got {targets!r}"
        ) from None
    for target in [targets] if isinstance(targets, str) else targets:
        check_kind("target_modules", target, str, "names of layers, or all-linear")
        found = [
            name
            for name in names
            if (pattern.fullmatch(name) if pattern else name == target or name.endswith(f".{target}"))
        ]
        if not target or not found:
            raise InputError(_unknown(target, model))


def _unknown(target: str, model: nn.Module) -> str:
    head = head_names(model)
    paths = [path.split(".") for path, module in model.named_modules() if isinstance(module, _USUAL)]
    names = sorted({path[-1] for path in paths if path[0] not in head and not path[-1].isdecimal()})
    near = difflib.get_close_matches(target, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"target_modules must name layers of the model, such as {', '.join(names)}; got {target!r}{hint}"


def wrapped(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a model with an adapter."""
    try:
        made = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except NoMatchingPeftModuleError as error:  # the head, which is trained whole
        raise InputError(
            f"target_modules must name layers outside of the head; got {_written(config)}"
        ) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        said = on_one_line(error, 160)
        raise InputError(f"target_modules {_written(config)} cannot be adapted: {said}") from error
    assert isinstance(made, PeftModel)
    return made


def _written(config: Any) -> str:
    targets = config.target_modules  # PEFT keeps a list of names as a set
    return repr(targets) if isinstance(targets, (str, type(None))) else ", ".join(sorted(targets))
