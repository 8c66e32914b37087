"""The page, the sentences and the tables of a diagnosis that is made up, so that every number is known."""

import html
import json
from dataclasses import replace

import pytest

from tangora.diagnostics import (
    AdapterState,
    Diagnosis,
    HeldOut,
    LayerDiagnosis,
    LayerGradient,
    Totals,
    plan_ranks,
)
from tangora.diagnostics.rank_plan import required_rank
from tangora.report import (
    DiagnosisRecord,
    diagnosis_sentences,
    diagnosis_tables,
    render_diagnosis,
)
from tangora.report.diagnosis.diagnosis_page import captured_figure, plan_figure, reach_panel, views
from tangora.report.diagnosis.diagnosis_tables import kind_rows, kind_table, layer_table
from tangora.report.drawing.charts import panel_figure
from tangora.report.layer_places import natural, places
from tests.report.pages import Page, in_terminal, texts
from tests.report.synthetic import HOSTILE

NEW = {"lora-ga": 0.4, "lora-one": 0.6}
STARTS = ("lora", "orthogonal", "pissa", "lora-ga", "lora-one")
NAMES = [f"model.layers.{i}.{kind}" for i in range(11) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def layer(name, *, energy=100.0, lora=0.02, adapter=None, values=(8, 4, 2, 1), error=0.0):
    gradient = LayerGradient(16, 24, tuple(map(float, values)), energy, error)
    shares = dict(zip(STARTS, (lora, 0.05, 0.1, 0.8, 0.7), strict=True))
    return LayerDiagnosis(
        name=name,
        m=16,
        n=24,
        rank=2,
        gradient=gradient,
        adapter=adapter,
        starts=shares,
        reachable=0.85,
        ranks_needed={str(share): required_rank(gradient, share / 100) for share in (50, 80, 90)},
    )


def state(captured, gradient, *, B=None):
    error = ((1 - captured) * gradient.energy) ** 0.5
    return AdapterState(
        2, 2.0, gradient, captured, error, 0.123, 1.5, B, 3.0, 1.0 if B is None else 0.25, 1.7
    )


def diagnosis(names=NAMES, *, adapter=0.02, plain=True, error=0.0, held_out=False, **changes):
    layers = []
    for index, name in enumerate(names):
        one = layer(name, energy=100.0 + index, error=error, values=(8 + index / 10, 4, 2, 1))
        if adapter is not None:
            one = replace(one, adapter=state(adapter, one.gradient, B=None if plain else 4.0))
        if held_out:
            one = replace(one, held_out=HeldOut(90.0, 0.0, one.starts | NEW))
        layers.append(one)
    shares = dict(zip(STARTS, (0.02, 0.05, 0.1, 0.8, 0.7), strict=True))
    totals = Totals(
        shares,
        shares | NEW if held_out else None,
        0.85,
        adapter,
        None if adapter is None else 0.123,
        error / 1000,
        0.0,
    )
    plan = plan_ranks({each.name: each.gradient for each in layers}, 1)
    values = {
        "layers": tuple(layers),
        "totals": totals,
        "plan": plan,
        "plain_start": plain,
        "exact_norms": not error,
        "num_batches": 8,
        "loss": 1.0,
        "adapter_loss": None if adapter is None else 0.5,
        "skipped": {},
        "seconds": 1.0,
    }
    return Diagnosis(**values | changes)


def record(found=None, **changes):
    values = {
        "title": "a model on data",
        "command": "tangora diagnose --output out",
        "settings": {"rank": 2, "nested": {"key": "value"}},
        "diagnosis": found or diagnosis(),
        "versions": {"torch": "2.13.0"},
        "machine": "two cores",
        "commit": "abc123",
        "created": "2026-01-01T10:00:00+00:00",
    }
    return DiagnosisRecord(**values | changes)


@pytest.fixture(scope="module")
def text():
    return render_diagnosis(record())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_tables_hold_the_numbers(page):
    found = diagnosis()
    assert page.tables["kinds-table"] == texts(kind_table(found))
    assert page.tables["layers-table"] == texts(layer_table(found))
    header, first, *_ = page.tables["layers-table"]
    cells = dict(zip(header, first, strict=True))
    assert cells["layer"] == NAMES[0]
    assert cells["m × n"] == "16 × 24"
    assert cells["‖G‖"] == "10"
    assert cells["plain LoRA initialization"] == cells["adapter"] == "2.0 %"
    assert cells["LoRA-GA initialization"] == "80 %"
    assert (cells["rank for 50 %"], cells["rank for 90 %"]) == ("1", "> 2")
    assert cells["planned rank"] == str(found.plan.ranks[NAMES[0]])
    assert "cond BᵀB" not in header  # B is zero


def test_a_trained_adapter_has_its_own_columns():
    header, *rows = texts(layer_table(diagnosis(adapter=0.4, plain=False)))
    cells = dict(zip(header, rows[0], strict=True))
    assert (cells["adapter"], cells["cond BᵀB"], cells["imbalance"]) == ("40 %", "4", "25 %")
    assert "adapter" in kind_table(diagnosis(adapter=0.4, plain=False)).headers
    assert "adapter" not in kind_table(diagnosis()).headers


def test_the_plan_is_there(text):
    assert json.dumps(diagnosis().plan.config(), indent=1) in html.unescape(text)


def test_every_view_can_be_chosen(page):
    options = [attrs["value"] for tag, attrs in page.tags if tag == "option"]
    assert options == list(views(diagnosis())) == ["adapter", *STARTS, "reachable"]
    figure = captured_figure(diagnosis())
    assert len(figure.data) == len(options)
    assert [trace.visible for trace in figure.data] == [True] + [False] * 6
    assert "adapter" not in views(diagnosis(adapter=None))


def test_findings():
    plain = diagnosis_sentences(diagnosis())
    assert (
        plain[0] == "Plain LoRA of rank 2 captures 2.0 % of the full gradient's energy at its initialization."
    )
    assert plain[1] == (
        "LoRA-GA would capture 80 %, LoRA-One 70 %, PiSSA 10 %, a random orthogonal initialization 5.0 %; no adapter "
        "of this rank can capture more than 85 %."
    )
    trained = diagnosis_sentences(diagnosis(adapter=0.4, plain=False))
    assert trained[0].startswith("The adapter, of rank 2, captures 40 %")
    assert trained[1] == "Plain LoRA of rank 2 on the base model captures 2.0 %."
    assert diagnosis_sentences(diagnosis(adapter=None))[0] == plain[0]
    assert all("None" not in sentence for sentence in plain + trained)


def test_a_trained_adapter_is_not_at_its_first_step():
    for found, first in ((diagnosis(), True), (diagnosis(adapter=None), True)):
        assert ("the first step of training on" in diagnosis_sentences(found)[-1]) == first
    trained = diagnosis_sentences(diagnosis(adapter=0.4, plain=False))[-1]
    assert "the first step" not in trained
    assert "the adapter's present weights" in trained


def test_different_ranks_are_not_called_one():
    found = diagnosis()
    layers = tuple(replace(each, rank=1 + index % 2) for index, each in enumerate(found.layers))
    assert "no adapter of these ranks can capture" in diagnosis_sentences(replace(found, layers=layers))[1]
    assert "no adapter of this rank can capture" in diagnosis_sentences(found)[1]


@pytest.mark.parametrize(
    ("uniform", "planned", "shown"),
    [
        (0.9991, 0.9993, "99.9 % of the gradient's energy, as rank "),
        (0.5, 0.503, "50.3 % of the gradient's energy instead of 50.0 %"),
        (0.5, 0.6, "60.0 % of the gradient's energy instead of 50.0 %"),
    ],
)
def test_equal_shares_are_written_once(uniform, planned, shown):
    found = diagnosis()
    plan = replace(
        found.plan, uniform_captured_energy=uniform, captured_energy=planned, rank_pattern={"a": 1}
    )
    found = replace(found, plan=plan)
    (sentence,) = [each for each in diagnosis_sentences(found) if "adapter parameters (rank " in each]
    assert shown in sentence
    assert shown in html.unescape(render_diagnosis(record(found)))


def test_a_start_that_pages_have_no_name_for_is_written_by_its_own():
    found = diagnosis()
    layers = tuple(replace(each, starts=each.starts | {"new": 0.75}) for each in found.layers)
    totals = replace(found.totals, starts=found.totals.starts | {"new": 0.75})
    found = replace(found, layers=layers, totals=totals)
    assert "new 75 %" in diagnosis_sentences(found)[1]
    assert "new" in kind_table(found).headers
    assert views(found)["new"][0] == "new initialization"
    assert len(diagnosis_tables(found)) == 2


def test_other_examples():
    found = diagnosis(held_out=True)
    assert diagnosis_sentences(found)[2] == (
        "On examples that were not used for the initialization, captured energy is 40 % for LoRA-GA and 60 % for "
        "LoRA-One."
    )
    assert list(views(found))[-3:] == ["lora-ga/others", "lora-one/others", "reachable"]
    header, *rows = texts(kind_table(found))
    assert rows[0][header.index("LoRA-GA") : header.index("LoRA-GA") + 4] == ["80 %", "40 %", "70 %", "60 %"]
    header, *rows = texts(layer_table(found))
    assert rows[0][header.index("LoRA-One on other examples")] == "60 %"
    assert captured_figure(found).data[-2].z[0][0] == 0.6
    assert Page(render_diagnosis(record(found))).open == []
    assert "80|40" in in_terminal(*diagnosis_tables(found))


def test_shares_of_one_rank_are_merged():
    assert "80 % of the energy from rank 1 on and 90 % of the energy only beyond rank 2." in " ".join(
        diagnosis_sentences(diagnosis(NAMES[:1]))
    )
    (sharp,) = diagnosis(NAMES[:1]).layers
    sharp = replace(sharp, gradient=LayerGradient(16, 24, (9.9, 1.0), 99.0, 0.0))
    (sentence,) = [
        s for s in diagnosis_sentences(diagnosis(NAMES[:1], layers=(sharp,))) if s.startswith("With one rank")
    ]
    assert sentence == "With one rank for all layers, adapters can capture 90 % of the energy from rank 1 on."


def test_model_and_data_come_first():
    settings = {"model": "smollm2-135m", "data": "reviews.csv", "rank": 2, "adapter": None}
    shown = render_diagnosis(record(settings=settings))
    for part in ("SmolLM2-135M-Instruct, dequantized from Q4_1", "reviews.csv"):
        assert shown.index(part) < shown.index("Findings")
    assert ">null<" not in shown
    assert "of the makers" in render_diagnosis(record(settings=settings, model_description="of the makers"))


def test_kinds_are_weighted_with_their_energy():
    rows = {row.kind: row for row in kind_rows(diagnosis())}
    assert list(rows) == ["q_proj", "up_proj", "all layers"]
    assert rows["all layers"].num_layers == 22
    assert rows["q_proj"].energy_share + rows["up_proj"].energy_share == pytest.approx(1.0)
    found = diagnosis(NAMES[:2])
    heavy = replace(found.layers[0], starts=found.layers[0].starts | {"lora": 0.5})
    row = kind_rows(replace(found, layers=(heavy, found.layers[1])))[-1]
    assert row.totals.starts["lora"] == pytest.approx((100 * 0.5 + 101 * 0.02) / 201)
    # 64 + 16 of 100, then 4 + 1 more
    first = kind_rows(diagnosis(NAMES[:1]))[-1]
    assert first.ranks_needed == {50: 1, 80: 1, 90: None}
    assert first.known_rank == 2


def test_terminal_tables():
    shown = in_terminal(*diagnosis_tables(diagnosis()), width=100)
    assert "q_proj" in shown
    assert "model.layers.10.mlp.up_proj" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_estimates_show_their_error():
    found = diagnosis(error=4.0)
    assert texts(layer_table(found))[1][2] == "10 ± 0.2"
    assert "standard error" in render_diagnosis(record(found))
    assert "standard error" not in render_diagnosis(record())


def test_hostile_names_stay_text_in_figures():
    found = diagnosis(
        [f"layers.{index}.{HOSTILE.replace('.', '')}" for index in range(2)] + ["%{x}</script>"]
    )
    reach = panel_figure(reach_panel(found), {}).update_traces(meta=None)  # which is not drawn
    for figure in (captured_figure(found), plan_figure(found), reach):
        assert "<script" not in (figure.to_json() or "").replace("\\u003c", "<").replace("&lt;", "")


def test_little_is_enough():
    nothing = layer("only", energy=0.0, values=(0, 0))
    found = diagnosis(["only"], adapter=None)
    found = replace(found, layers=(nothing,), totals=Totals({}, None, 0.0, None, None, 0.0, 0.0))
    found = replace(found, layers=(replace(nothing, starts={}),))
    assert Page(render_diagnosis(record(found, versions={}, commit=None, settings={}))).open == []


def test_places():
    llama = places(NAMES)
    assert llama[NAMES[1]] == ("model.layers.0", "up_proj")
    bert = places([f"bert.encoder.layer.0.{end}" for end in ("attention.output.dense", "output.dense")])
    assert [place.kind for place in bert.values()] == ["attention.output.dense", "output.dense"]
    t5 = places(
        [f"{side}.block.3.layer.{i}.{end}" for side in ("encoder", "decoder") for i, end in enumerate("qw")]
    )
    assert t5["decoder.block.3.layer.1.w"] == ("decoder.block.3", "w")
    experts = places([f"layers.0.experts.{i}.up" for i in range(3)])
    assert experts["layers.0.experts.2.up"] == ("layers.0.experts.2", "up")
    assert places(["0", "2"]) == {"0": ("", "0"), "2": ("", "2")}
    assert places(["bert.pooler.dense"])["bert.pooler.dense"].block == ""
    odd = places(["a.0.b", "a.0.1.b", "a.0.1.2.b"])
    assert len(set(odd.values())) == 3
    assert sorted(["layers.10", "layers.9", ""], key=natural) == ["", "layers.9", "layers.10"]
