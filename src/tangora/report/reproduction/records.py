"""What an experiment hands over: numbers, what they say, and how they are to be drawn.

All of it survives strict JSON: tensors and arrays become tuples of plain numbers when an object is made, and whatever
is not finite becomes ``None``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tangora._checks import InputError
from tangora.report.drawing.panels import Figure
from tangora.report.values import make_plain, plain_values

Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers.

    Attributes:
        title: Above it.
        columns: Headings.
        rows: One value for each heading; numbers are written with three figures.
        caption: What is to be seen.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))
        make_plain(self, "rows")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(f"rows of table {self.title!r} must have {len(self.columns)} cells each")


@dataclass(frozen=True)
class Check:
    """A statement of a source as one number and the interval it must lie in.

    Attributes:
        claim: The statement, as a sentence.
        value: What was measured; ``None`` if it was not finite, which fails.
        low: Smallest value that agrees; ``None`` for no bound.
        high: Largest value that agrees; ``None`` for no bound.
        source: Theorem or page that states it.
    """

    claim: str
    value: float | int | None
    low: float | int | None
    high: float | int | None
    source: str

    def __post_init__(self):
        if any(bound is not None and math.isnan(bound) for bound in (self.low, self.high)):
            raise InputError(f"bounds of the check {self.claim!r} must be numbers or None; got NaN")
        for key in ("value", "low", "high"):
            make_plain(self, key)

    @property
    def passed(self) -> bool:
        """Whether the value lies in the interval."""
        if self.value is None:
            return False
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)


@dataclass(frozen=True)
class Result:
    """All that an experiment found.

    Attributes:
        findings: Plain sentences, made from the numbers, the most important one first.
        tables: Numbers worth reading.
        figures: Numbers worth seeing.
        checks: What the source states, held against the numbers.
        data: Anything else to keep: names, numbers, lists and dictionaries of them.
    """

    findings: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[Figure]
    checks: Sequence[Check]
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for key in ("findings", "tables", "figures", "checks"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        object.__setattr__(self, "data", _listed(plain_values(self.data)))

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def _listed(value: Any) -> Any:
    # as JSON reads it back
    if isinstance(value, tuple):
        return [_listed(item) for item in value]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value
