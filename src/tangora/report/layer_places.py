"""Where a layer stands: its block, and its kind within the block, read off its name."""

import re
from collections.abc import Iterable
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
    for split in (_first_block, _last_block):
        found = {name: LayerPlace(split(name), kinds[rest[name]]) for name in names}
        if len(set(found.values())) == len(names):
            return found
    return {name: LayerPlace("", name) for name in names}


def _parts(name: str) -> list[str]:
    return name.split(".")


def _numbers(name: str) -> list[int]:
    # a number at the end is no block but the layer itself, as in a Sequential
    return [index for index, part in enumerate(_parts(name)[:-1]) if part.isdigit()]


def _after_first_number(name: str) -> str:
    parts, numbers = _parts(name), _numbers(name)
    rest = [part for part in parts[numbers[0] + 1 :] if not part.isdigit()] if numbers else parts
    return ".".join(rest) or name


def _first_block(name: str) -> str:
    numbers = _numbers(name)
    return ".".join(_parts(name)[: numbers[0] + 1]) if numbers else ""


def _last_block(name: str) -> str:
    numbers = _numbers(name)
    return ".".join(_parts(name)[: numbers[-1] + 1]) if numbers else ""


def _shortest(kinds: set[str]) -> dict[str, str]:
    # each kind's shortest ending that no other kind has
    found = {}
    for kind in kinds:
        parts = _parts(kind)
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        found[kind] = next(
            (end for end in endings if not any(_ends_with(other, end) for other in kinds - {kind})), kind
        )
    return found


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def natural(block: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``layers.10`` after ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", block)]
