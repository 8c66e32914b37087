"""What all of plotly's figures here begin with."""

import html

import plotly.graph_objects as go

_TRANSPARENT = "rgba(0,0,0,0)"


def empty_figure(x_title: str, y_title: str) -> go.Figure:
    """Make a figure that takes its colours from the page."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "height": 440,
            "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
            "paper_bgcolor": _TRANSPARENT,
            "plot_bgcolor": _TRANSPARENT,
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "xaxis": axis | {"title": {"text": x_title}},
            "yaxis": axis | {"title": {"text": label_text(y_title), "standoff": 8}},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "itemwidth": 40,
            },
            "hovermode": "closest",
        }
    )


def label_text(name: str) -> str:
    """Make any text safe inside of a figure."""
    # Plotly reads a little HTML in its labels, and ``%{...}`` in hover templates.
    return html.escape(name, quote=False).replace("%{", "%\N{ZERO WIDTH SPACE}{")
