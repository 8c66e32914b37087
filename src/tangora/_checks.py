"""Checks at the public boundary: every error names the argument, its value and what is allowed."""

import difflib
import importlib.util
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

MOST_LISTED = 12
"""Allowed names that an error lists beside the one that was probably meant."""


class InputError(ValueError):
    """An argument is invalid. The message is one line: the argument, its value, and what is allowed."""


class OtherRankError(InputError):
    """An error of another process, which prints its own message."""


def near_hint(name: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean ...?)`` if ``name`` is nearly one of ``allowed``, else nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def near_path(path: str | os.PathLike[str]) -> str:
    """Return `` (did you mean ...?)`` if a path is nearly that of a file or folder beside it, else nothing."""
    folder, name = os.path.split(os.fspath(path).rstrip("/"))
    try:
        near = difflib.get_close_matches(name, os.listdir(os.path.expanduser(folder) or "."), n=1)
    except (OSError, ValueError):  # no folder, or no name that one could have
        return ""
    return f" (did you mean {os.path.join(folder, near[0])}?)" if near else ""


def no_such_path(path: str | os.PathLike[str]) -> str:
    """Return what an error says of a path that does not exist."""
    return f"there is no such file or folder{near_path(path)}"


def check_choice(name: str, value: object, allowed: Collection[object], *, listed_by: str = "") -> None:
    """Raise `InputError` unless ``value`` is one of ``allowed``, which a command may list."""
    if any(_equal(value, option) for option in allowed):
        return
    hint = near_hint(str(value)[:80], [str(option) for option in allowed])
    if hint and len(allowed) > MOST_LISTED:
        rest = f"; {listed_by} shows all" if listed_by else ""
        raise InputError(f"{name} must be one of {len(allowed)} names; got {shown(value)}{hint}{rest}")
    options = ", ".join(repr(option) if option is None else str(option) for option in allowed)
    raise InputError(f"{name} must be one of {options}; got {shown(value)}{hint}")


def check_number(
    name: str,
    value: float | int,  # spelled out for run-time checks, where an int is no float
    *,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise `InputError` unless ``value`` is a finite number in the interval."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    above = is_number and (value > low if open_low else value >= low)
    below = is_number and (value < high if open_high else value <= high)
    if above and below:
        return
    left = "(" if open_low or math.isinf(low) else "["
    right = ")" if open_high or math.isinf(high) else "]"
    raise InputError(f"{name} must be a number in {left}{low:g}, {high:g}{right}; got {shown(value)}")


def check_whole(name: str, value: int, *, low: int) -> None:
    """Raise `InputError` unless a value is a whole number that is large enough."""
    check_number(name, value, low=low)
    if not isinstance(value, int):
        raise InputError(f"{name} must be a whole number; got {shown(value)}")


def check_installed(package: str, name: str, source: str | None = None) -> None:
    """Raise `InputError` unless an optional package is installed; pip finds it under its name or in a source."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{name} needs {package}, which is not installed; run: pip install {source or package}"
        )


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise `InputError` unless a value is a valid seed, here and in the libraries used."""
    check_whole(name, seed, low=0)
    check_number(name, seed, high=2**32 - 1)


def check_kind(name: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
    """Raise `InputError` unless a value has the given type."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {allowed}; got {shown(value)}")


def check_callable(name: str, value: object, allowed: str) -> None:
    """Raise `InputError` unless a value can be called; ``allowed`` says with what."""
    if not callable(value):
        raise InputError(f"{name} must be {allowed}; got {shown(value)}")


def check_path(name: str, value: Any) -> Path:
    """Return a path, or raise `InputError` if a value is none."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str):
        raise InputError(f"{name} must be a path; got {shown(value)}")
    if not path:
        raise InputError(f"{name} must be a path; got an empty text")
    return Path(path)


def shown(value: object) -> str:
    """Return a value for an error message: its repr if that is short, otherwise its type."""
    written = repr(value) if isinstance(value, _WRITTEN) else ""
    if written and len(written) <= 80 and "\n" not in written:
        return written
    return value.__name__ if isinstance(value, type) else f"an object of type {type(value).__name__}"


def reason(error: BaseException) -> str:
    """Return the first line of another library's error, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def on_one_line(error: BaseException, most: int | None = None) -> str:
    """Return another library's error on one line of at most so many letters; its type if it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


# of other objects, such as models and tensors, the type says more
_WRITTEN = (str, bytes, int, float, complex, type(None), list, tuple, set, dict, os.PathLike)


def _equal(value: Any, option: object) -> bool:
    try:
        return bool(value == option)
    except (TypeError, ValueError, RuntimeError):  # of arrays and tensors
        return False
