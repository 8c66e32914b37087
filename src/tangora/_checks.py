"""Checks at the public boundary: every error names the argument, its value and what is allowed."""

import difflib
import importlib.util
import math
from collections.abc import Collection


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line and says what would be allowed."""


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise `InputError` unless ``value`` is one of ``allowed``.

    Args:
        name: The argument as the user knows it.
        value: What was given.
        allowed: What may be given.

    Raises:
        InputError: With the nearest allowed value when there is one.
    """
    if value in allowed:
        return
    options = ", ".join(repr(option) if option is None else str(option) for option in allowed)
    near = difflib.get_close_matches(str(value), [str(option) for option in allowed], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise InputError(f"{name} must be one of {options}; got {value!r}{hint}")


def check_number(
    name: str,
    value: float | int,  # spelled out for run-time checks, where an int is no float
    *,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise `InputError` unless ``value`` is a finite number in the interval.

    Args:
        name: The argument as the user knows it.
        value: What was given.
        low: Smallest allowed value.
        high: Largest allowed value.
        open_low: Whether ``low`` itself is forbidden.
        open_high: Whether ``high`` itself is forbidden.

    Raises:
        InputError: If ``value`` is no number, not finite, or outside the interval.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    above = is_number and (value > low if open_low else value >= low)
    below = is_number and (value < high if open_high else value <= high)
    if above and below:
        return
    left = "(" if open_low or math.isinf(low) else "["
    right = ")" if open_high or math.isinf(high) else "]"
    raise InputError(f"{name} must be a number in {left}{low:g}, {high:g}{right}; got {value!r}")


def check_whole(name: str, value: int, *, low: int) -> None:
    """Raise `InputError` unless a value is a whole number that is large enough.

    Args:
        name: The argument as the user knows it.
        value: What was given.
        low: Smallest allowed value.

    Raises:
        InputError: If ``value`` is no whole number or below ``low``.
    """
    check_number(name, value, low=low)
    if not isinstance(value, int):
        raise InputError(f"{name} must be a whole number; got {value!r}")


def check_installed(package: str, name: str) -> None:
    """Raise `InputError` unless an optional package is installed.

    Args:
        package: Its name, for Python and for pip.
        name: The argument that needs it.

    Raises:
        InputError: With the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{name} needs {package}, which is not installed; run: pip install {package}")
