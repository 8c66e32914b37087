"""Names of classes: their order, and whether they are classes at all."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from tangora._checks import InputError
from tangora.training.data.rows import listed

_MOST_NUMBERS = 20
"""Different numbers with fractions that may still be classes, such as half stars."""


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return labels in order: by value if all are whole numbers, else by the alphabet."""
    unsorted = list(names)
    try:
        return tuple(sorted(unsorted, key=int))
    except ValueError:
        return tuple(sorted(unsorted))


def check_classes(found: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise unless labels are those of a classification."""
    known = set(found)
    if len(names) < 2:
        raise InputError(
            f"{where} must hold at least 2 different labels; got only {listed(list(map(repr, names)))}"
        )
    numbers = {name: number for name in known if (number := _number(name)) is not None}
    fractions = [name for name, number in numbers.items() if not number.is_integer()]
    if len(numbers) == len(known) > _MOST_NUMBERS and fractions:
        raise InputError(
            f"{where} must hold classes; it holds {len(known)} different numbers, such as {sorted(fractions)[0]}, and "
            "regression is not supported"
        )
    if len(known) > max(2, len(found) / 2):
        raise InputError(
            f"{where} must hold classes with several examples each; it holds {len(known)} different labels in "
            f"{len(found)} examples, such as {', '.join(map(repr, sorted(known)[:3]))}"
        )
    same: dict[float, str] = {}
    for name in sorted(numbers):
        if (other := same.setdefault(numbers[name], name)) != name:
            raise InputError(
                f"{where} must write a class in one way; {other!r} and {name!r} are the same number"
            )


def class_notes(found: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return what a user should know of the classes."""
    counts = Counter(found)
    notes = [f"{len(names)} classes: {listed([f'{name} ({counts[name]})' for name in names])}"]
    if alone := [name for name in names if counts[name] == 1]:
        notes.append(f"classes with a single example, which no method can learn and prove: {listed(alone)}")
    if absent := [name for name in names if not counts[name]]:
        notes.append(f"classes without an example: {listed(absent)}")
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        notes.append(f"classes that differ in capital letters only: {listed(alike)}")
    return notes


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
