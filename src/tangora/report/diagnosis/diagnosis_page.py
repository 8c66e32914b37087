"""A diagnosis: the file that it leaves behind, and its page."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from tangora.diagnostics import Diagnosis, LayerDiagnosis
from tangora.report import formats
from tangora.report.diagnosis.diagnosis_findings import (
    ALL,
    diagnosis_sentences,
    gradient_starts,
    group_by_kind,
    known_rank,
    reachable_shares,
    start_name,
)
from tangora.report.diagnosis.diagnosis_tables import kind_table, layer_table
from tangora.report.drawing.charts import empty_figure, figure_json, label_text, panel_chart
from tangora.report.drawing.panels import Panel, Series
from tangora.report.drawing.styles import GREY, Style, recipe_styles
from tangora.report.layer_places import LayerPlace, natural, places
from tangora.report.layout import Chart, Section, render, repeat, subject_facts
from tangora.report.record_files import Measurement, read_record, write_atomic

_COLORS = "Cividis"  # readable for the colour-blind, and light to dark when printed
_MAX_CURVES = 12
_OTHERS = "/others"
_ROW, _MARGIN = 24, 150
_CAPTURED = (
    "Captured energy: the squared norm of the gradient's projection on the directions in which the adapter can move "
    "the weight, over that of the gradient. Averages weight each layer with its gradient's energy, its part in the "
    "first-order decrease of the loss: the adapter's at its own weights, all others at the base model's."
)
_BEST = (
    "Best: what any adapter of this rank could capture, the energy of the first 2 × rank singular values of the "
    "gradient. LoRA-GA is built to reach it."
)
_SAMPLE = (
    "The gradient is the mean over the examples that were read. The initializations computed from it (LoRA-GA, "
    "LoRA-One), the best and the rank plan fit these examples and capture less of the gradient on others, the less the "
    "fewer were read. Columns “on other examples” show how much."
)


class DiagnosisRecord(Measurement):
    """A diagnosis, and where it comes from."""

    diagnosis: Diagnosis


def load_diagnosis(path: str | Path) -> DiagnosisRecord:
    """Read what ``tangora diagnose`` wrote."""
    return read_record(DiagnosisRecord, path, "diagnosis")


def write_diagnosis(record: DiagnosisRecord, path: str | Path) -> Path:
    """Write the page of a diagnosis."""
    return write_atomic(path, render_diagnosis(record))


def render_diagnosis(record: DiagnosisRecord) -> str:
    """Make the page of a diagnosis; the same record gives the same text."""
    diagnosis = record.diagnosis
    captured = Chart(
        "captured",
        "What each layer's adapter captures",
        "Share of the energy of each layer's gradient that an adapter captures, in percent. The table of all "
        "layers below has the same numbers.",
        figure_json(captured_figure(diagnosis)),
    )
    reach = panel_chart(
        "reach",
        reach_panel(diagnosis),
        "Share of the gradient's energy that the best adapters of one rank could capture: the first 2 × rank "
        "singular values of each gradient, squared.",
    )
    plan = Chart("plan", "Rank plan", _plan_caption(diagnosis), figure_json(plan_figure(diagnosis)))
    config = json.dumps(diagnosis.plan.config(), indent=1)
    return render(
        record.title,
        ["tangora diagnosis", formats.plural(len(diagnosis.layers), "layer")],
        record.created,
        diagnosis_sentences(diagnosis),
        [
            Section("kinds", "By kind of layer", table=kind_table(diagnosis), notes=_notes(diagnosis)),
            Section("captured-title", captured.title, charts=[captured], views=view_names(diagnosis)),
            Section("reach-title", reach.title, charts=[reach]),
            Section("plan-title", plan.title, charts=[plan], details=("the plan for PEFT", config)),
            Section("layers", "All layers", table=layer_table(diagnosis)),
        ],
        repeat(record),
        look="measured",
        setup=subject_facts(record),
    )


def _plan_caption(diagnosis: Diagnosis) -> str:
    plan = diagnosis.plan
    return (
        f"Ranks that cost {formats.count(plan.parameters)} adapter parameters, within the {formats.count(plan.budget)} "
        f"of rank {plan.r} everywhere, and could capture {formats.tenths(plan.captured_energy)} of the gradient "
        f"instead of {formats.tenths(plan.uniform_captured_energy)}."
    )


def _notes(diagnosis: Diagnosis) -> list[str]:
    notes = [_CAPTURED, _BEST, _SAMPLE]
    if not diagnosis.exact_norms:
        notes.append(
            "Norms are estimates from random probes; relative standard error of the whole gradient's energy: "
            f"{formats.small_share(diagnosis.totals.energy_error)}."
        )
    if diagnosis.totals.cosine is not None:
        notes.append(
            "Cosine: between the gradient and the step that plain LoRA gradients make of it; over all layers "
            f"{formats.significant(diagnosis.totals.cosine)}. The square root of the captured energy is the best "
            "possible."
        )
    if diagnosis.skipped:
        names = ", ".join(f"{name} ({reason})" for name, reason in list(diagnosis.skipped.items())[:5])
        notes.append(f"Not examined: {formats.plural(len(diagnosis.skipped), 'layer')}: {names}.")
    return notes


def view_names(diagnosis: Diagnosis) -> dict[str, str]:
    """List what the heat map of captured energy can show."""
    names = {"adapter": "the adapter as it stands"} if diagnosis.totals.adapter is not None else {}
    names |= {start: f"{start_name(start).full} start" for start in diagnosis.starts}
    names |= {
        f"{start}{_OTHERS}": f"{names[start]}, on other examples"
        for start in gradient_starts(diagnosis.layers)
    }
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
    return _grid_figure(diagnosis).add_trace(
        _heat(
            diagnosis,
            lambda layer: diagnosis.plan.ranks[layer.name],
            str,
            colorbar={"title": {"text": "rank"}},
            zmin=0,
            hovertemplate="%{customdata}<br>rank %{z}<extra></extra>",
        )
    )


def reach_panel(diagnosis: Diagnosis) -> Panel:
    """Draw how much of the gradient the best adapters of one rank could capture."""
    groups = group_by_kind(diagnosis)
    largest = sorted(groups, key=lambda kind: -sum(layer.gradient.energy for layer in groups[kind]))
    kept = [kind for kind in groups if kind in largest[:_MAX_CURVES]]
    looks = recipe_styles(kept) | {ALL: Style(GREY, "solid", "circle", 4)}
    shown = {kind: groups[kind] for kind in kept} | {ALL: diagnosis.layers}
    limit = known_rank([layer.gradient for layer in diagnosis.layers])
    return Panel(
        "What a higher rank would capture",
        "rank",
        "share of the gradient within reach",
        [_reach(name, layers, looks[name]) for name, layers in shown.items()],
        xrange=(0, 1.03 * limit),
        layout={"height": 440, "showlegend": True, "yaxis": {"range": [0, 1.02], "tickformat": ".0%"}},
    )


def _reach(name: str, layers: Sequence[LayerDiagnosis], look: Style) -> Series:
    shares = [0.0, *reachable_shares([layer.gradient for layer in layers])]
    hover = "rank %{x}: %{y:.1%}"
    return Series(name, range(len(shares)), shares, style="smooth", look=look, hover=hover)


def _grid_figure(diagnosis: Diagnosis) -> go.Figure:
    blocks, _, common = _axes(places(layer.name for layer in diagnosis.layers))
    figure = empty_figure("", common)
    figure.update_layout(height=_MARGIN + _ROW * len(blocks))
    figure.update_xaxes(type="category", side="top", showgrid=False)
    # Plotly draws the first row at the bottom
    return figure.update_yaxes(type="category", showgrid=False, autorange="reversed")


def _heat(
    diagnosis: Diagnosis,
    value: Callable[[LayerDiagnosis], float],
    text: Callable[[Any], str],
    **options: Any,
) -> go.Heatmap:
    where = places(layer.name for layer in diagnosis.layers)
    blocks, kinds, common = _axes(where)
    at = {where[layer.name]: layer for layer in diagnosis.layers}
    cells = [[at.get(LayerPlace(block, kind)) for kind in kinds] for block in blocks]
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


def _axes(where: Mapping[str, LayerPlace]) -> tuple[list[str], list[str], str]:
    # rows, columns, and what all rows' names begin with
    blocks = sorted({place.block for place in where.values()}, key=natural)
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    stems = {block.rpartition(".")[0] for block in blocks if block}
    return blocks, kinds, stems.pop() if len(stems) == 1 else ""
