"""One colour, dash and marker per recipe, the same in every figure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tangora.report.statistics.judgement import BASELINE, CEILING

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow and black: each of the others is
# readable on a white and on a dark page.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#808080"
BAND_OPACITY = 0.15
TRANSPARENT = "rgba(0,0,0,0)"

# Five, because 5 and 6 have no common factor: all 30 pairs of colour and dash come before one repeats.
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down")

SVG_DASHES = {"solid": "none", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "10 3"}
MARKS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "triangle-down": "▼",
    "cross": "✚",
    "star": "★",
}
MATPLOTLIB_DASHES = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1.2, 1.6)),
    "dashdot": (0, (5, 2, 1.2, 2)),
    "longdash": (0, (9, 2)),
}
MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "triangle-left": "<",
    "triangle-right": ">",
    "cross": "P",
    "star": "*",
}


@dataclass(frozen=True)
class Style:
    """How a recipe or a curve is drawn: the colour as ``#rrggbb``, dash and marker by plotly's names."""

    color: str
    dash: str
    marker: str
    width: float = 2
    filled: bool = True

    def faded(self, alpha: float) -> str:
        """Make the colour transparent."""
        red, green, blue = (int(self.color[start : start + 2], 16) for start in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha})"

    def hollow(self) -> "Style":
        """Leave the marks empty."""
        return replace(self, filled=False)


_REFERENCES = {BASELINE: Style(GREY, "dash", "cross"), CEILING: Style(GREY, "solid", "star")}


def recipe_styles(recipes: Iterable[str]) -> dict[str, Style]:
    """Give every recipe its style; LoRA and full fine-tuning, the references, are grey."""
    names = set(recipes)
    others = sorted(names - set(_REFERENCES))
    styles = {name: style for name, style in _REFERENCES.items() if name in names}
    for index, name in enumerate(others):
        turn = index % len(_DASHES)
        styles[name] = Style(_COLORS[index % len(_COLORS)], _DASHES[turn], _MARKERS[turn])
    return styles


def series_styles(names: Iterable[str]) -> dict[str, Style]:
    """Give every curve of a figure its style; the first six are solid lines."""
    num_colors = len(_COLORS)
    return {
        name: Style(
            _COLORS[index % num_colors],
            _DASHES[index // num_colors % len(_DASHES)],
            _MARKERS[index % len(_MARKERS)],
        )
        for index, name in enumerate(dict.fromkeys(names))
    }
