"""Numbers of any kind as JSON has them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tangora._checks import InputError


def plain_values(value: Any) -> Any:
    """Turn numbers of any kind into plain finite ones."""
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return tuple(plain_values(item) for item in value)
    raise InputError(f"results must be numbers, texts, lists and dictionaries; got {type(value).__name__}")


def make_plain(target: Any, key: str) -> None:
    """Do so with an attribute of a frozen object that is being made."""
    object.__setattr__(target, key, plain_values(getattr(target, key)))
