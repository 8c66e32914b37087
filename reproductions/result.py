"""Results of an experiment: checks, tables, figures and numbers, and their file.

All of it survives strict JSON: tensors and arrays become tuples of plain numbers when an object is made, and whatever
is not finite becomes ``None``.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import Field

from tangora._checks import InputError
from tangora.report.drawing.panels import Figure, make_plain, plain_values
from tangora.report.record_files import Measurement, read_record, write_atomic

Cell: TypeAlias = str | float | int | None
Progress: TypeAlias = Callable[[int, int], None]
"""``progress(done, total)``: how many parts of the work are done, and how many there are."""

_Found = TypeVar("_Found")
_INNERMOST = re.compile(r"\[[^\[\]{}\"]*\]")
"""A list without lists, dictionaries or texts in it."""


class Interval(NamedTuple):
    """Numbers that agree with a source, both ends included; ``None`` for no bound."""

    low: float | int | None
    high: float | int | None


def at_most(high: float | int) -> Interval:
    """Return the numbers up to one."""
    return Interval(None, high)


def at_least(low: float | int) -> Interval:
    """Return the numbers from one on."""
    return Interval(low, None)


def near(expected: float, tolerance: float) -> Interval:
    """Return the numbers within a tolerance of one."""
    return Interval(expected - tolerance, expected + tolerance)


@dataclass(frozen=True)
class Check(Generic[_Found]):
    """A statement of a source, as it is declared before anything is measured.

    Attributes:
        claim: The statement, as a sentence that names the number.
        expected: Numbers that agree with it.
        measured: Reads the number off what an experiment found; what is not finite disagrees.
        source: Theorem or page that states it.
    """

    claim: str
    expected: Interval
    measured: Callable[[_Found], float | int | None]
    source: str


@dataclass(frozen=True)
class Outcome:
    """A check and its number, as they are recorded."""

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


def outcomes(checks: Iterable[Check[_Found]], found: _Found) -> tuple[Outcome, ...]:
    """Hold declared checks against what was found."""
    return tuple(
        Outcome(check.claim, check.measured(found), *check.expected, check.source) for check in checks
    )


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers, one for each column; numbers are written with three figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))
        make_plain(self, "rows")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(f"rows of table {self.title!r} must have {len(self.columns)} cells each")

    @classmethod
    def of(cls, title: str, columns: dict[str, Any], caption: str) -> "Table":
        """Make a table from its columns by heading, each a sequence or a tensor."""
        return cls(
            title, tuple(columns), tuple(zip(*map(plain_values, columns.values()), strict=True)), caption
        )


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
    checks: Sequence[Outcome]
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for key in ("findings", "tables", "figures", "checks"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        # as JSON reads it back
        object.__setattr__(self, "data", json.loads(json.dumps(plain_values(self.data))))

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


class Record(Measurement):
    """Results of an experiment with their provenance: ``reproduction.json``."""

    name: str = Field(description="As on the command line.")
    source: str = Field(description="Paper and place in it.")
    stand_ins: tuple[str, ...] = Field(description="What the source leaves open, and what was taken.")
    quick: bool = Field(description="Whether the small settings were asked for.")
    result: Result
    seconds: float = Field(ge=0, description="How long it took.")


def load_record(path: str | Path) -> Record:
    """Read ``reproduction.json``; raise an `InputError` that names the file if it is missing or something else."""
    return read_record(Record, path, "reproduction")


def save_record(record: Record, path: str | Path) -> Path:
    """Write a record as strict JSON, lists of numbers on one line each."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, _INNERMOST.sub(lambda found: " ".join(found[0].split()), text) + "\n")
