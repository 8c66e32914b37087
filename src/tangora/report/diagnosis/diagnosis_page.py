"""A diagnosis: the file that it leaves behind, its findings in words, and its page."""

import json
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import plotly.graph_objects as go

from tangora.diagnostics import Diagnosis, LayerDiagnosis, RankPlan
from tangora.diagnostics.records import SHARES
from tangora.report import formats
from tangora.report.diagnosis.diagnosis_tables import (
    ALL,
    KindRow,
    gradient_starts,
    group_by_kind,
    kind_rows,
    kind_table,
    known_rank,
    layer_table,
    reachable_shares,
    start_name,
)
from tangora.report.drawing.charts import empty_figure, figure_json, label_text, panel_chart
from tangora.report.drawing.panels import GREY, Panel, Series, Style, recipe_styles
from tangora.report.layer_places import LayerPlace, natural, places
from tangora.report.layout import Chart, Section, render, repeat
from tangora.report.record_files import Measurement, read_record, write_atomic
from tangora.report.setup_facts import subject_facts

_COLORS = "Cividis"  # readable for the colour-blind, and light to dark when printed
_MAX_CURVES = 12
_WORTH_IT = 0.01  # what a rank plan must promise more, as a share of the gradient's energy
_ROW, _MARGIN = 24, 150
_CAPTURED = (
    "Captured energy: the squared norm of the gradient's projection onto the adapter's tangent space, "
    "divided by that of the gradient. Averages weight each layer with its gradient's energy, its share "
    "of the first-order decrease of the loss: the adapter's at its own weights, all others at the base "
    "model's."
)
_BEST = (
    "Best: the most that any adapter of the same rank can capture, the energy of the first 2 × rank "
    "singular values of the gradient. LoRA-GA is designed to reach it."
)
_SAMPLE = (
    "The gradient is the mean over the given examples. The initializations computed from it (LoRA-GA, "
    "LoRA-One), the best and the rank plan fit these examples and capture less of the gradient on "
    "other examples. The difference is larger with fewer examples. Columns “on other examples” show it."
)

_Read: TypeAlias = Callable[[LayerDiagnosis], Any]


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
        "Energy captured in each layer",
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
    ranks = diagnosis.plan
    plan_caption = (
        f"Ranks that cost {formats.count(ranks.parameters)} adapter parameters, within the "
        f"{formats.count(ranks.budget)} of rank {ranks.r} everywhere, and could capture {_plan_shares(ranks)}."
    )
    plan = Chart("plan", "Rank plan", plan_caption, figure_json(plan_figure(diagnosis)))
    shown = {key: name for key, (name, _) in views(diagnosis).items()}
    config = json.dumps(ranks.config(), indent=1)
    return render(
        record.title,
        ["tangora diagnosis", formats.plural(len(diagnosis.layers), "layer")],
        record.created,
        diagnosis_sentences(diagnosis),
        [
            Section("kinds", "By kind of layer", table=kind_table(diagnosis), notes=_notes(diagnosis)),
            Section("captured-title", captured.title, charts=[captured], views=shown),
            Section("reach-title", reach.title, charts=[reach]),
            Section("plan-title", plan.title, charts=[plan], details=("the plan for PEFT", config)),
            Section("layers", "All layers", table=layer_table(diagnosis)),
        ],
        repeat(record),
        look="measured",
        setup=subject_facts(record),
    )


def diagnosis_sentences(diagnosis: Diagnosis) -> list[str]:
    """State the results in words, the most important first."""
    return formats.sentences(
        *_of_adapter(diagnosis),
        _of_starts(diagnosis),
        _of_other_examples(diagnosis),
        _of_ranks(kind_rows(diagnosis)[-1]),
        _of_plan(diagnosis.plan),
        _of_missed(diagnosis),
        f"These shares describe {_step(diagnosis)} on these data; they do not predict the final result.",
    )


def _step(diagnosis: Diagnosis) -> str:
    if diagnosis.totals.adapter is None or diagnosis.plain_start:
        return "the first step of training"
    return "one step of training, from the adapter's present weights or from an initialization,"


def _of_adapter(diagnosis: Diagnosis) -> list[str]:
    totals, ranks = diagnosis.totals, formats.ranks(layer.rank for layer in diagnosis.layers)
    lora = formats.small_share(totals.starts.get("lora"))
    if diagnosis.plain_start and "lora" in totals.starts:
        return [f"Plain LoRA of {ranks} captures {lora} of the full gradient's energy at its initialization."]
    if totals.adapter is None:
        return []
    own = formats.ranks(layer.adapter.rank for layer in diagnosis.layers if layer.adapter)
    seen = formats.small_share(totals.adapter)
    return formats.sentences(
        f"The adapter, of {own}, captures {seen} of the full gradient's energy at its own weights.",
        f"Plain LoRA of {ranks} on the base model captures {lora}." if "lora" in totals.starts else None,
    )


def _of_starts(diagnosis: Diagnosis) -> str:
    totals = diagnosis.totals
    same = "this rank" if len({layer.rank for layer in diagnosis.layers}) <= 1 else "these ranks"
    most = f"no adapter of {same} can capture more than {formats.small_share(totals.reachable)}."
    others = sorted((start for start in totals.starts if start != "lora"), key=lambda s: -totals.starts[s])
    verbs = ["would capture ", *[""] * len(others)]
    seen = [
        f"{start_name(start).in_sentence} {verb}{formats.small_share(totals.starts[start])}"
        for start, verb in zip(others, verbs, strict=False)
    ]
    text = "; ".join([", ".join(seen), most] if seen else [most])
    return text[0].upper() + text[1:]


def _of_other_examples(diagnosis: Diagnosis) -> str | None:
    captured, starts = diagnosis.totals.held_out, gradient_starts(diagnosis.layers)
    if not captured or not starts:
        return None
    shares = [
        f"{formats.small_share(captured[start])} for {start_name(start).in_sentence}" for start in starts
    ]
    return f"On examples that were not used for the initialization, captured energy is {formats.listing(shares)}."


def _of_ranks(row: KindRow) -> str:
    # one rank may reach several shares: the largest says it all
    largest = {row.ranks_needed[share]: share for share in SHARES}
    parts = [
        f"{share} % of the energy "
        + (f"only beyond rank {row.known_rank}" if rank is None else f"from rank {rank} on")
        for rank, share in largest.items()
    ]
    return f"With one rank for all layers, adapters can capture {formats.listing(parts)}."


def _of_plan(plan: RankPlan) -> str:
    budget = f"{formats.count(plan.budget)} adapter parameters (rank {plan.r} in every layer)"
    if not plan.rank_pattern:
        return f"No other distribution of {budget} over layers is expected to capture more."
    spread = f"the rank plan (ranks {min(plan.ranks.values())} to {max(plan.ranks.values())})"
    shares = _plan_shares(plan)
    if plan.gain < _WORTH_IT:
        return f"Distributing {budget} differently gains little: {spread} could capture {shares}."
    text = f"With {budget}, {spread} could capture {shares}."
    if not plan.at_limit:
        return text
    return (
        f"{text} {formats.plural(len(plan.at_limit), 'layer')} got the largest examined rank; a larger "
        "num_values may increase it."
    )


def _plan_shares(plan: RankPlan) -> str:
    # what reads the same is said once
    planned, uniform = map(formats.tenths, (plan.captured_energy, plan.uniform_captured_energy))
    instead = f", as rank {plan.r} everywhere does" if planned == uniform else f" instead of {uniform}"
    return f"{planned} of the gradient's energy{instead}"


def _of_missed(diagnosis: Diagnosis) -> str:
    parts = [
        f"{layer.name} ({formats.small_share(diagnosis.missed_share(layer))})"
        for layer in diagnosis.worst_layers(3)
    ]
    whom = "the adapter" if diagnosis.totals.adapter is not None else "the first initialization"
    return (
        f"The energy missed by {whom} is largest in {formats.listing(parts)}, as shares of the whole "
        "gradient's energy."
    )


def _notes(diagnosis: Diagnosis) -> list[str]:
    totals, skipped = diagnosis.totals, diagnosis.skipped
    examples = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:5])
    estimated = (
        "Norms are estimates from random probes; relative standard error of the whole gradient's energy: "
        f"{formats.small_share(totals.energy_error)}."
    )
    cosine = (
        "Cosine: between the gradient and the step that plain LoRA gradients give; over all layers "
        f"{formats.significant(totals.cosine)}. The square root of the captured energy is the best possible."
    )
    return formats.sentences(
        _CAPTURED,
        _BEST,
        _SAMPLE,
        None if diagnosis.exact_norms else estimated,
        None if totals.cosine is None else cosine,
        f"Not examined: {formats.plural(len(skipped), 'layer')}: {examples}." if skipped else None,
    )


def views(diagnosis: Diagnosis) -> dict[str, tuple[str, _Read]]:
    """List what the heat map of captured energy can show: its name, and where it is read."""
    found: dict[str, tuple[str, _Read]] = {}
    if diagnosis.totals.adapter is not None:
        found["adapter"] = "the current adapter", attrgetter("adapter.captured_energy")
    for start in diagnosis.starts:
        found[start] = (
            f"{start_name(start).full} initialization",
            lambda layer, start=start: layer.starts[start],
        )
    for start in gradient_starts(diagnosis.layers):
        found[f"{start}/others"] = (
            f"{start_name(start).full} initialization, on other examples",
            lambda layer, start=start: layer.held_out and layer.held_out.starts[start],
        )
    found["reachable"] = "the best possible at the same rank", attrgetter("reachable")
    return found


def captured_figure(diagnosis: Diagnosis) -> go.Figure:
    """Draw the captured energy of every layer, by block and kind."""
    return _heat_maps(
        diagnosis,
        [
            (
                read,
                lambda value: f"{100 * value:.2g}" if value < 0.0995 else f"{100 * value:.0f}",
                {
                    "visible": index == 0,
                    "colorbar": {"title": {"text": "captured"}, "tickformat": ".0%"},
                    "zmin": 0.0,
                    "zmax": 1.0,
                    "hovertemplate": f"%{{customdata}}<br>{title}: %{{z:.2%}}<extra></extra>",
                },
            )
            for index, (title, read) in enumerate(views(diagnosis).values())
        ],
    )


def plan_figure(diagnosis: Diagnosis) -> go.Figure:
    """Draw the rank that the plan gives to every layer."""
    hover = "%{customdata}<br>rank %{z}<extra></extra>"
    options = {"colorbar": {"title": {"text": "rank"}}, "zmin": 0, "hovertemplate": hover}
    return _heat_maps(diagnosis, [(lambda layer: diagnosis.plan.ranks[layer.name], str, options)])


def _heat_maps(
    diagnosis: Diagnosis, shown: Iterable[tuple[_Read, Callable[[Any], str], dict[str, Any]]]
) -> go.Figure:
    # blocks in rows and kinds in columns, of which each map reads one value for each layer
    where = places(layer.name for layer in diagnosis.layers)
    at = {where[layer.name]: layer for layer in diagnosis.layers}
    blocks = sorted({place.block for place in where.values()}, key=natural)
    kinds = list(dict.fromkeys(place.kind for place in where.values()))
    stems = {block.rpartition(".")[0] for block in blocks if block}
    common = stems.pop() if len(stems) == 1 else ""
    figure = empty_figure("", common)
    figure.update_layout(height=_MARGIN + _ROW * len(blocks))
    figure.update_xaxes(type="category", side="top", showgrid=False)
    # Plotly draws the first row at the bottom
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    cells = [[at.get(LayerPlace(block, kind)) for kind in kinds] for block in blocks]
    for read, write, options in shown:
        figure.add_trace(
            go.Heatmap(
                x=[label_text(kind) for kind in kinds],
                y=[label_text(block.removeprefix(common).lstrip(".")) or "–" for block in blocks],
                z=[[layer and read(layer) for layer in row] for row in cells],
                text=[["" if layer is None else write(read(layer)) for layer in row] for row in cells],
                texttemplate="%{text}",
                customdata=[
                    ["" if layer is None else label_text(layer.name) for layer in row] for row in cells
                ],
                hoverongaps=False,
                colorscale=_COLORS,
                xgap=1,
                ygap=1,
                **options,
            )
        )
    return figure


def reach_panel(diagnosis: Diagnosis) -> Panel:
    """Draw how much of the gradient the best adapters of one rank could capture."""
    groups = group_by_kind(diagnosis)
    largest = sorted(groups, key=lambda kind: -sum(layer.gradient.energy for layer in groups[kind]))
    kept = [kind for kind in groups if kind in largest[:_MAX_CURVES]]
    looks = recipe_styles(kept) | {ALL: Style(GREY, "solid", "circle", 4)}
    shown = {kind: groups[kind] for kind in kept} | {ALL: diagnosis.layers}
    limit = known_rank([layer.gradient for layer in diagnosis.layers])
    series = []
    for name, layers in shown.items():
        shares, hover = [0.0, *reachable_shares([layer.gradient for layer in layers])], "rank %{x}: %{y:.1%}"
        series.append(Series(name, range(len(shares)), shares, style="smooth", look=looks[name], hover=hover))
    return Panel(
        "Energy captured at higher ranks",
        "rank",
        "share of the gradient",
        series,
        xrange=(0, 1.03 * limit),
        xwhole=True,
        layout={"height": 440, "showlegend": True, "yaxis": {"range": [0, 1.02], "tickformat": ".0%"}},
    )
