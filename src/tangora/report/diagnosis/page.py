"""A diagnosis as one HTML page that needs no network and nothing beside it."""

import json
from pathlib import Path

from tangora.diagnostics import Diagnosis
from tangora.report import formats
from tangora.report.diagnosis.figures import captured_figure, plan_figure, reach_figure, view_names
from tangora.report.diagnosis.record import DiagnosisRecord
from tangora.report.diagnosis.summary import findings
from tangora.report.diagnosis.tables import kind_table, layer_table
from tangora.report.files import write_atomic
from tangora.report.layout import Chart, flat, plain, render
from tangora.report.subject import subject_facts

_TEMPLATE = "diagnosis.html.j2"
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


def write_diagnosis(record: DiagnosisRecord, path: str | Path) -> Path:
    """Write the page of a diagnosis."""
    return write_atomic(path, render_diagnosis(record))


def render_diagnosis(record: DiagnosisRecord) -> str:
    """Make the page of a diagnosis; the same record gives the same text."""
    diagnosis = record.diagnosis
    return render(
        _TEMPLATE,
        record.title,
        record=record,
        findings=findings(diagnosis),
        num_layers=formats.plural(len(diagnosis.layers), "layer"),
        kinds=kind_table(diagnosis),
        layers=layer_table(diagnosis),
        views=view_names(diagnosis),
        captured=Chart(
            "captured",
            "What each layer's adapter captures",
            "Share of the energy of each layer's gradient that an adapter captures, in percent. The table of all "
            "layers below has the same numbers.",
            plain(captured_figure(diagnosis)),
        ),
        reach=Chart(
            "reach",
            "What a higher rank would capture",
            "Share of the gradient's energy that the best adapters of one rank could capture: the first 2 × rank "
            "singular values of each gradient, squared.",
            plain(reach_figure(diagnosis)),
        ),
        plan=Chart(
            "plan",
            "Rank plan",
            _plan_caption(diagnosis),
            plain(plan_figure(diagnosis)),
        ),
        plan_config=json.dumps(diagnosis.plan.config(), indent=1),
        notes=_notes(diagnosis),
        setup=subject_facts(record.settings, record.model_description),
        settings=flat(record.settings),
        versions=sorted(record.versions.items()),
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
