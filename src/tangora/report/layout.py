"""What all pages share: the template engine, tables, figures as JSON, settings as lines."""

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tangora.report import formats


@dataclass(frozen=True)
class Chart:
    """One figure of a page.

    Attributes:
        name: The id of its element, fixed so that equal inputs give equal bytes.
        title: Its heading.
        caption: How to read it.
        figure: Plotly's data and layout.
        says: What it shows, for those who cannot see it.
    """

    name: str
    title: str
    caption: str
    figure: dict[str, Any]
    says: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        lines: Its text; all lines but the first are small print.
        value: What it is sorted by; None comes last.
        kind: CSS class of the text.
        more: Longer text that is shown on demand.
    """

    lines: Sequence[str]
    value: float | str | None = None
    kind: str = ""
    more: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of a page.

    Attributes:
        name: Its element has the id ``<name>-table``.
        caption: What it holds.
        headers: Of the columns; the first column names the row.
        rows: Cells.
        words: Indices of columns that hold words, which are set to the left.
    """

    name: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        name: The id of its heading.
        title: Its heading.
        sentences: What it says, before the numbers.
        grid: Its table.
        notes: How to read it.
        charts: Its figures; several stand side by side.
        keyed: Whether the figures share a key of the recipes' marks.
    """

    name: str
    title: str
    sentences: Sequence[str] = ()
    grid: Grid | None = None
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = field(default_factory=tuple)
    keyed: bool = False


def cell(text: str, value: float | str | None = None) -> Cell:
    """Make a cell of one line."""
    return Cell([text], value)


def number_cell(value: float | None, *lines: str) -> Cell:
    """Make a cell of a number."""
    return Cell([lines[0], *(line for line in lines[1:] if line != formats.MISSING)], value)


def render(template: str, title: str, *, drawn: bool = True, **values: Any) -> str:
    """Fill a template of this package."""
    environment = Environment(
        loader=PackageLoader("tangora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly = Markup(packed_plotly()) if drawn else ""
    return environment.get_template(template).render(title=title, plotly=plotly, **values)


@cache
def packed_plotly() -> str:
    """Return the library that draws the figures, packed to two fifths of its size."""
    # no time stamp: equal inputs give equal bytes
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def plain(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as JSON can hold it."""
    return json.loads(figure.to_json() or "{}")


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Spread nested settings over dotted keys, without those that are not set."""
    pairs = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
    return pairs
