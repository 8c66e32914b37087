"""What an experiment hands over: numbers, what they say, and how they are to be drawn. Nothing here draws.

All of it survives strict JSON: tensors and arrays become tuples of plain numbers when an object is made, and whatever
is not finite becomes ``None``, which figures leave out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tangora._checks import InputError

Numbers: TypeAlias = Any
"""Given: a tensor, an array or any numbers. Kept: a ``tuple[float | None, ...]``, of such for a surface."""

Scale: TypeAlias = Literal["linear", "log"]
Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True)
class Series:
    """One curve, or the points of one kind.

    Attributes:
        name: As in the legend; series of one name in several panels of a figure look alike, and only the first of them
            is in the legend.
        x: Abscissae.
        y: As many ordinates.
        low: Lower edge of a band around the curve, for example the smallest of all seeds.
        high: Upper edge of the band.
        style: Whether the points are joined.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    style: Literal["line", "points", "dashed"] = "line"

    def __post_init__(self):
        for key in ("x", "y", "low", "high"):
            _make_plain(self, key)
            values = getattr(self, key)
            _check_numbers(f"{key} of series {self.name!r}", () if values is None else values)
            if values is not None and len(values) != len(self.x):
                raise InputError(
                    f"{key} of series {self.name!r} must have {len(self.x)} values; got {len(values)}"
                )
        if (self.low is None) != (self.high is None):
            raise InputError(f"series {self.name!r} must have both low and high, or neither")


@dataclass(frozen=True)
class Heatmap:
    """A surface seen from above.

    Attributes:
        x: Columns.
        y: Rows.
        z: One row of values for each of ``y``.
        label: What the values are.
    """

    x: Numbers
    y: Numbers
    z: Numbers
    label: str

    def __post_init__(self):
        for key in ("x", "y", "z"):
            _make_plain(self, key)
        if len(self.z) != len(self.y) or any(len(row) != len(self.x) for row in self.z):
            raise InputError(
                f"z of heat map {self.label!r} must be {len(self.y)} rows of {len(self.x)} values"
            )


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above it.
        xlabel: Below it.
        ylabel: Beside it.
        series: Curves and points, drawn in this order.
        heatmap: Drawn below the series.
        xscale: Of the abscissae; values that a logarithm has no place for are left out.
        yscale: Of the ordinates.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series] = ()
    heatmap: Heatmap | None = None
    xscale: Scale = "linear"
    yscale: Scale = "linear"

    def __post_init__(self):
        object.__setattr__(self, "series", tuple(self.series))


@dataclass(frozen=True)
class Figure:
    """Panels side by side.

    Attributes:
        name: Stem of the PNG file and id on the page: small letters, digits and hyphens.
        title: Above it.
        caption: What is to be seen, in a sentence or two.
        panels: At least one.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]

    def __post_init__(self):
        object.__setattr__(self, "panels", tuple(self.panels))
        if not self.panels:
            raise InputError(f"panels of figure {self.name!r} must not be empty")


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
        _make_plain(self, "rows")
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
            _make_plain(self, key)

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


def plain_values(value: Any) -> Any:
    """Turn numbers of any kind into plain finite ones.

    Args:
        value: A tensor, an array, a number, a text, or mappings and iterables of them.

    Returns:
        The same with tuples, dictionaries, ``int``, ``float``, ``bool`` and ``str``; ``None`` for what is not finite.

    Raises:
        InputError: If it holds something else.
    """
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


def _check_numbers(what: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if value is not None and not isinstance(value, (int, float)):
            raise InputError(f"{what} must hold numbers; got {value!r}")


def _make_plain(target: Any, key: str) -> None:
    object.__setattr__(target, key, plain_values(getattr(target, key)))


def _listed(value: Any) -> Any:
    # as JSON reads it back
    if isinstance(value, tuple):
        return [_listed(item) for item in value]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value
