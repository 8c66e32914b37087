"""Charts as data, with one colour, dash and marker per recipe. Nothing here draws.

All that a record keeps of it survives strict JSON: tensors and arrays become tuples of plain numbers when an object is
made, and whatever is not finite becomes ``None``, which figures leave out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from tangora._checks import InputError
from tangora.report.statistics.judgement import BASELINE, CEILING

Numbers: TypeAlias = Any
"""Given: a tensor, an array or any numbers. Kept: a ``tuple[float | None, ...]``, of such for a surface."""

Scale: TypeAlias = Literal["linear", "log"]

_Unrecorded = Field(exclude=True)

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow and black: each of the others is
# readable on a white and on a dark page.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#808080"
BAND_OPACITY = 0.15

DASHES = {
    "solid": ("none", "-"),
    "dash": ("6 3", (0, (5, 2))),
    "dot": ("2 2", (0, (1.2, 1.6))),
    "dashdot": ("6 2 2 2", (0, (5, 2, 1.2, 2))),
    "longdash": ("10 3", (0, (9, 2))),
}
"""By plotly's name, in SVG and in matplotlib."""
MARKERS = {
    "circle": ("●", "o"),
    "square": ("■", "s"),
    "diamond": ("◆", "D"),
    "triangle-up": ("▲", "^"),
    "triangle-down": ("▼", "v"),
    "triangle-left": ("◀", "<"),
    "triangle-right": ("▶", ">"),
    "cross": ("✚", "P"),
    "star": ("★", "*"),
}
"""By plotly's name, as text and in matplotlib."""
# As many as dashes. 5 and 6 have no common factor: all 30 pairs of colour and dash come before one repeats, and then
# with another marker.
_DASHES, _MARKERS = list(DASHES), list(MARKERS)[: len(DASHES)]


@dataclass(frozen=True)
class Style:
    """Style of a recipe or a curve: the colour as ``#rrggbb``, dash and marker by plotly's names."""

    color: str
    dash: str
    marker: str
    width: float = 2
    filled: bool = True

    def faded(self, alpha: float) -> str:
        """Make the colour transparent."""
        red, green, blue = (int(self.color[start : start + 2], 16) for start in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha})"

    def thin(self, width: float) -> "Style":
        """Draw a thinner line."""
        return replace(self, width=width)

    def hollow(self) -> "Style":
        """Leave the marks empty."""
        return replace(self, filled=False)


# In the order of their styles, which must stay: a recipe looks the same on every page. The first six, which are most
# often compared, differ in colour.
_KNOWN = (
    *("tangent-muon", "lora-pro", "lora-ga", "tangent", "dora", "pissa"),
    *("rslora", "lora+", "polora", "lora-rite", "lora-muon", "factor-muon"),
    *("lora-one", "orthogonal", "odelora-euler", "adalora", "full-muon", "p-lora"),
    *("lora-one-plain", "one-step", "lora-pro-factor", "lora-pro-sgd", "odelora-heun", "odelora-rk4"),
    *("odelora-bug", "lora-ga+pro", "orthogonal+tangent", "orthogonal+tangent-muon", "lora-ga+tangent-muon"),
    *("lora-ga+tangent", "lora-one+tangent", "adalora+tangent-muon", "adalora+tangent", "adalora+lora-pro"),
)
_REFERENCES = {BASELINE: Style(GREY, "dash", "cross"), CEILING: Style(GREY, "solid", "star")}


def recipe_styles(recipes: Iterable[str]) -> dict[str, Style]:
    """Give every recipe its style; LoRA and full fine-tuning, the references, are grey.

    The style of a recipe that comes with the library depends on its name alone. Others get styles that are left.
    """
    names = set(recipes)
    styles = {name: style for name, style in _REFERENCES.items() if name in names}
    styles |= {name: _style(index, dash=index) for index, name in enumerate(_KNOWN) if name in names}
    taken = set(styles.values())
    left = (style for style in (_style(index, dash=index) for index in count()) if style not in taken)
    return styles | dict(zip(sorted(names - set(styles)), left, strict=False))


def series_styles(names: Iterable[str]) -> dict[str, Style]:
    """Give every curve of a figure its style; the first six are solid lines."""
    ordered = enumerate(dict.fromkeys(names))
    return {name: _style(index, dash=index // len(_COLORS)) for index, name in ordered}


def _style(index: int, dash: int) -> Style:
    turn = len(_DASHES)
    marker = index + index // (turn * len(_COLORS))
    return Style(_COLORS[index % len(_COLORS)], _DASHES[dash % turn], _MARKERS[marker % turn])


@dataclass(frozen=True)
class Series:
    """One curve, or the points of one kind.

    Series of one name in several panels of a figure look alike, and only the first of them is in the legend.
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    """Lower edge of a band around the curve, for example the smallest of all seeds."""
    high: Numbers | None = None
    style: Literal["line", "points", "dashed", "smooth", "steps", "rings", "crosses"] = "line"
    """A line shows its points where they are few, a smooth one never."""
    bars: Annotated[Literal["x", "y"] | None, _Unrecorded] = None
    """The axis along which `low` and `high` are the ends of error bars, if they are no band."""
    look: Annotated[Style | None, _Unrecorded] = None
    """A style of its own; the page then has a key in place of a legend."""
    hover: Annotated[str, _Unrecorded] = ""
    """Plotly's template of what is shown at a point, beneath the name; ``%{customdata}`` is one of `data`."""
    data: Annotated[Sequence[Any] | None, _Unrecorded] = None

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
    """A surface seen from above: one row of ``z`` for each of ``y``."""

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
    """One pair of axes; series are drawn in their order, above the heat map."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series] = ()
    heatmap: Heatmap | None = None
    xscale: Scale = "linear"
    """Values that a logarithm has no place for are left out."""
    yscale: Scale = "linear"
    rows: Annotated[Sequence[str], _Unrecorded] = ()
    """Names of y = 0, 1, …, from the bottom up, around a line at x = 0."""
    xrange: Annotated[tuple[float, float] | None, _Unrecorded] = None
    xticks: Annotated[Mapping[float, str] | None, _Unrecorded] = None
    xwhole: Annotated[bool, _Unrecorded] = False
    """Whether the x axis counts things and has ticks at whole numbers only."""
    layout: Annotated[Mapping[str, Any], _Unrecorded] = field(default_factory=dict)
    """Further options of plotly's layout."""

    def __post_init__(self):
        object.__setattr__(self, "series", tuple(self.series))


@dataclass(frozen=True)
class Figure:
    """Panels side by side, or in rows; the name is the stem of the picture's file and the id on the page."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    columns: Annotated[int | None, _Unrecorded] = None
    """Panels in a row of the picture; default all."""

    def __post_init__(self):
        object.__setattr__(self, "panels", tuple(self.panels))
        if not self.panels:
            raise InputError(f"panels of figure {self.name!r} must not be empty")


def whole_step(panel: Panel) -> int:
    """Choose the distance of ticks at whole numbers: 1, 2, 5, 10, 20, … for six of them or a few less."""
    ends = panel.xrange or [x for series in panel.series for x in series.x if x is not None] or (0, 1)
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if 6 * step >= max(ends) - min(ends):
                return step
        power *= 10


def decades(low: float, high: float) -> list[float]:
    """List the powers of ten around two numbers and between them."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _check_numbers(what: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if value is not None and not isinstance(value, (int, float)):
            raise InputError(f"{what} must hold numbers; got {value!r}")


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
