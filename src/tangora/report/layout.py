"""What all pages share: the template engine, figures as JSON, settings as lines."""

import json
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs


@dataclass(frozen=True)
class Chart:
    """One figure of a page; `name` is the id of its element, fixed so that equal inputs give equal bytes."""

    name: str
    title: str
    caption: str
    figure: dict[str, Any]


def render(template: str, title: str, **values: Any) -> str:
    """Fill a template of this package.

    Args:
        template: Its file name.
        title: Of the page.
        **values: What it shows; text is escaped.

    Returns:
        A whole HTML page that loads nothing.
    """
    environment = Environment(
        loader=PackageLoader("tangora.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(title=title, plotly=Markup(get_plotlyjs()), **values)


def plain(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as JSON can hold it.

    Args:
        figure: The figure.

    Returns:
        Data and layout.
    """
    return json.loads(figure.to_json() or "{}")


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Spread nested settings over dotted keys.

    Args:
        settings: Nested dictionaries.
        prefix: What all keys begin with.

    Returns:
        Keys and values as text.
    """
    pairs = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
    return pairs
