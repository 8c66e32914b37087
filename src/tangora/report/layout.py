"""The page that all reports are: sentences first, then sections of figures and tables, then how to repeat them."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tangora.report.drawing.panels import DASHES, MARKERS, Style
from tangora.report.record_files import Measurement
from tangora.report.report_table import Table

_Facts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """One figure of a page, as plotly's JSON; its name is the id of its element."""

    name: str
    title: str
    caption: str
    figure: dict[str, Any]
    says: str = ""
    """Text for readers who cannot see the figure."""


@dataclass(frozen=True)
class Section:
    """One part of a page; its name is the id of its heading."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    """Conclusions, before the numbers."""
    table: Table | None = None
    notes: Sequence[str] = ()
    """Notes on how to read the section."""
    charts: Sequence[Chart] = ()
    """Several stand side by side."""
    keyed: bool = False
    """Whether the figures share a key of the recipes' marks."""
    caption: str = ""
    """Caption of all figures together."""
    views: Mapping[str, str] | None = None
    """Names of the traces of the only figure, of which one is shown at a time."""
    details: tuple[str, str] | None = None
    """A longer text that is shown on demand, after its name."""
    links: Sequence[Mapping[str, str | None]] = ()
    """A list of `name`, which is a link where there is an `address`, with `title`, `state` and what is `beneath`."""
    downloads: Mapping[str, str] | None = None
    """CSV by the name of the file."""


@dataclass(frozen=True)
class Repeat:
    """All that is needed to repeat what a page shows."""

    command: str
    settings: Mapping[str, Any]
    versions: _Facts = ()
    machines: Sequence[str] = ()
    commits: Sequence[str] = ()
    note: str = ""
    by_recipe: _Facts = ()
    """Settings of one run of each recipe."""


def repeat(record: Measurement, note: str = "") -> Repeat:
    """Say how to repeat a measurement."""
    commits, versions = [record.commit] if record.commit else [], sorted(record.versions.items())
    return Repeat(record.command, record.settings, versions, [record.machine], commits, note)


def render(
    title: str,
    about: Sequence[str],
    created: str,
    sentences: Sequence[str],
    sections: Sequence[Section | None],
    repeating: Repeat | None,
    *,
    heading: str = "Findings",
    look: str = "",
    brief: _Facts = (),
    setup: _Facts = (),
    notice: str | None = None,
    styles: Mapping[str, Style] | None = None,
) -> str:
    """Make a page that needs no network and nothing beside it; the same input gives the same text.

    ``about`` is what is written beneath the title, ``brief`` and ``sentences`` the most important results, ``look``
    the CSS class of the page, and ``styles`` those of the recipes, in the order of their key.
    """
    environment = Environment(
        loader=PackageLoader("tangora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csv"] = _data_address
    environment.globals.update(dashes=DASHES, markers=MARKERS, styles=styles or {})
    shown = [section for section in sections if section is not None]
    return environment.get_template("page.html.j2").render(
        title=title,
        about=about,
        created=created,
        heading=heading,
        sentences=sentences,
        sections=shown,
        repeat=repeating,
        settings=[] if repeating is None else flat(repeating.settings),
        look=look,
        brief=brief,
        setup=setup,
        notice=notice,
        plotly=Markup(packed_plotly()) if any(section.charts for section in shown) else "",
    )


@cache
def packed_plotly() -> str:
    """Return the library that draws the figures, packed to two fifths of its size."""
    # no time stamp: equal inputs give equal bytes
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _data_address(text: str) -> str:
    # an address that holds a CSV file itself
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Spread nested settings over dotted keys, without those that are not set."""
    pairs = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
    return pairs
