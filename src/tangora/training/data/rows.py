"""Rows as they were read, before columns are chosen and splits are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_SHOWN = 80


class Row(NamedTuple):
    """One record and the place to name in a message about it."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class RawData:
    """What a data set holds before columns are chosen and splits are made.

    Attributes:
        splits: Rows by split; a data set that comes unsplit has only ``train``.
        labels: Names of the classes where the data set says them, in its order.
        name: Name for messages.
    """

    splits: Mapping[str, list[Row]]
    labels: tuple[str, ...] = ()
    name: str = "the data"

    @property
    def columns(self) -> list[str]:
        """All columns that some training row has: one row may lack what the others hold."""
        return list(dict.fromkeys(column for row in self.splits["train"] for column in row.values))


def shown(value: object) -> str:
    """Return a value as a message may show it: on one line, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def listed(names: "tuple[str, ...] | list[str]", most: int = 20) -> str:
    """Return names separated by commas, but not all of very many."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
