"""Heat maps and curves of a diagnosis."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tangora.diagnostics import Diagnosis, LayerDiagnosis
from tangora.report.diagnosis.summary import ALL, START_NAMES, fitted, known_rank, reachable_shares
from tangora.report.drawing.plots import empty_figure, label_text
from tangora.report.drawing.styles import recipe_styles
from tangora.report.layers import Place, natural, places

_COLORS = "Cividis"  # readable for the colour-blind, and light to dark when printed
_MAX_CURVES = 12
_OTHERS = "/others"
_ROW, _MARGIN = 24, 150


def view_names(diagnosis: Diagnosis) -> dict[str, str]:
    """List what the heat map of captured energy can show."""
    names = {"adapter": "the adapter as it stands"} if diagnosis.totals.adapter is not None else {}
    names |= {start: f"{START_NAMES[start]} start" for start in diagnosis.starts}
    names |= {f"{start}{_OTHERS}": f"{names[start]}, on other examples" for start in fitted(diagnosis.layers)}
    return names | {"reachable": "the best possible at this rank"}


def captured_figure(diagnosis: Diagnosis) -> go.Figure:
    """Draw the captured energy of every layer, by block and kind."""
    figure = _grid_figure(diagnosis)
    for index, (key, title) in enumerate(view_names(diagnosis).items()):
        figure.add_trace(
            _heat(
                diagnosis,
                lambda layer, key=key: _captured(layer, key),
                lambda value: f"{100 * value:.2g}" if value < 0.0995 else f"{100 * value:.0f}",
                visible=index == 0,
                colorbar={"title": {"text": "captured"}, "tickformat": ".0%"},
                zmin=0.0,
                zmax=1.0,
                hovertemplate=f"%{{customdata}}<br>{title}: %{{z:.2%}}<extra></extra>",
            )
        )
    return figure


def _captured(layer: LayerDiagnosis, key: str) -> float:
    if key == "adapter":
        assert layer.adapter is not None
        return layer.adapter.captured_energy
    if key.endswith(_OTHERS):
        assert layer.held_out is not None
        return layer.held_out.starts[key.removesuffix(_OTHERS)]
    return layer.reachable if key == "reachable" else layer.starts[key]


def plan_figure(diagnosis: Diagnosis) -> go.Figure:
    """Draw the rank that the plan gives to every layer."""
    figure = _grid_figure(diagnosis)
    figure.add_trace(
        _heat(
            diagnosis,
            lambda layer: diagnosis.plan.ranks[layer.name],
            str,
            colorbar={"title": {"text": "rank"}},
            zmin=0,
            hovertemplate="%{customdata}<br>rank %{z}<extra></extra>",
        )
    )
    return figure


def reach_figure(diagnosis: Diagnosis) -> go.Figure:
    """Draw how much of the gradient the best adapters of one rank could capture."""
    where = places(layer.name for layer in diagnosis.layers)
    groups: dict[str, list[LayerDiagnosis]] = {}
    for layer in diagnosis.layers:
        groups.setdefault(where[layer.name].kind, []).append(layer)
    largest = sorted(groups, key=lambda kind: -sum(layer.gradient.energy for layer in groups[kind]))
    kept = [kind for kind in groups if kind in largest[:_MAX_CURVES]]
    styles = recipe_styles(kept)
    figure = empty_figure("rank", "share of the gradient within reach")
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_xaxes(range=[0, 1.03 * known_rank([layer.gradient for layer in diagnosis.layers])])
    for kind in kept:
        line = {"color": styles[kind].color, "dash": styles[kind].dash, "width": 2}
        figure.add_trace(_curve(kind, groups[kind], line))
    figure.add_trace(_curve(ALL, diagnosis.layers, {"color": "#808080", "width": 4}))
    return figure


def _curve(name: str, layers: Sequence[LayerDiagnosis], line: dict[str, Any]) -> go.Scatter:
    shares = reachable_shares([layer.gradient for layer in layers])
    shown = label_text(name)
    return go.Scatter(
        x=list(range(len(shares) + 1)),
        y=[0.0, *shares],
        name=shown,
        mode="lines",
        line=line,
        hovertemplate=f"{shown}<br>rank %{{x}}: %{{y:.1%}}<extra></extra>",
    )


def _grid_figure(diagnosis: Diagnosis) -> go.Figure:
    blocks, _, common = _axes(places(layer.name for layer in diagnosis.layers))
    figure = empty_figure("", common)
    figure.update_layout(height=_MARGIN + _ROW * len(blocks))
    figure.update_xaxes(type="category", side="top", showgrid=False)
    # Plotly draws the first row at the bottom
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure


def _heat(
    diagnosis: Diagnosis,
    value: Callable[[LayerDiagnosis], float],
    text: Callable[[Any], str],
    **options: Any,
) -> go.Heatmap:
    where = places(layer.name for layer in diagnosis.layers)
    blocks, kinds, common = _axes(where)
    at = {where[layer.name]: layer for layer in diagnosis.layers}
    cells = [[at.get(Place(block, kind)) for kind in kinds] for block in blocks]
    return go.Heatmap(
        x=[label_text(kind) for kind in kinds],
        y=[label_text(block.removeprefix(common).lstrip(".")) or "–" for block in blocks],
        z=[[None if layer is None else value(layer) for layer in row] for row in cells],
        text=[["" if layer is None else text(value(layer)) for layer in row] for row in cells],
        texttemplate="%{text}",
        customdata=[["" if layer is None else label_text(layer.name) for layer in row] for row in cells],
        hoverongaps=False,
        colorscale=_COLORS,
        xgap=1,
        ygap=1,
        **options,
    )


def _axes(where: Mapping[str, Place]) -> tuple[list[str], list[str], str]:
    # rows, columns, and what all rows' names begin with
    blocks = sorted({place.block for place in where.values()}, key=natural)
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    stems = {block.rpartition(".")[0] for block in blocks if block}
    return blocks, kinds, stems.pop() if len(stems) == 1 else ""
