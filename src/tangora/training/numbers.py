"""A check that several modules of this folder share."""

from tangora._checks import InputError, check_number


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
