"""Where a layer stands: its block, and its kind within the block, read off its name."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class LayerPlace(NamedTuple):
    """Row and column of a layer in a heat map."""

    block: str
    """``model.layers.3``; empty for layers outside of any block."""
    kind: str
    """``q_proj``: as short as tells it from the other kinds."""


def places(names: Iterable[str]) -> dict[str, LayerPlace]:
    """Arrange layers by block and kind.

    A block ends with the first number of a name (with the last one, where the first leaves two layers in one place);
    the rest of the name, without numbers, is the kind.
    """
    names = list(names)
    rest = {name: _after_first_number(name) for name in names}
    kinds = _shortest(set(rest.values()))
    for number in (0, -1):
        found = {name: LayerPlace(_block(name, number), kinds[rest[name]]) for name in names}
        if len(set(found.values())) == len(names):
            return found
    return {name: LayerPlace("", name) for name in names}


def _numbers(parts: Sequence[str]) -> list[int]:
    # a number at the end is no block but the layer itself, as in a Sequential
    return [index for index, part in enumerate(parts[:-1]) if part.isdigit()]


def _block(name: str, number: int) -> str:
    parts = name.split(".")
    numbers = _numbers(parts)
    return ".".join(parts[: numbers[number] + 1]) if numbers else ""


def _after_first_number(name: str) -> str:
    parts = name.split(".")
    numbers = _numbers(parts)
    rest = [part for part in parts[numbers[0] + 1 :] if not part.isdigit()] if numbers else parts
    return ".".join(rest) or name


def _shortest(kinds: set[str]) -> dict[str, str]:
    # each kind's shortest ending that no other kind has
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in kinds - {kind}]
        found[kind] = next(
            (end for end in endings if not any(other.endswith(f".{end}") for other in others)), kind
        )
    return found


def natural(block: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``layers.10`` after ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", block)]
