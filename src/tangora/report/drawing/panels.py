"""What is to be drawn, as data. Nothing here draws.

All of it survives strict JSON: tensors and arrays become tuples of plain numbers when an object is made, and whatever
is not finite becomes ``None``, which figures leave out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tangora._checks import InputError
from tangora.report.values import make_plain

Numbers: TypeAlias = Any
"""Given: a tensor, an array or any numbers. Kept: a ``tuple[float | None, ...]``, of such for a surface."""

Scale: TypeAlias = Literal["linear", "log"]


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
            make_plain(self, key)
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
            make_plain(self, key)
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


def _check_numbers(what: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if value is not None and not isinstance(value, (int, float)):
            raise InputError(f"{what} must hold numbers; got {value!r}")
