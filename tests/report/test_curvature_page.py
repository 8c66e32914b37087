"""Page, sentences, tables and pictures of a measurement of curvature that is made up: every number is known."""

import json
import math
from pathlib import Path

import pytest

from tangora.curvature import BatchCurvature, BatchNoise, Eigenvalue, LayerCurvature, Spread, TraceEstimate
from tangora.report import save_json
from tangora.report.curvature import (
    FACTORS,
    CurvatureRecord,
    Density,
    LandscapeRecord,
    Line,
    Plane,
    SharpnessRecord,
    Spectrum,
    curvature_sentences,
    curvature_tables,
    load_curvature,
    render_curvature,
    save_curvature_pictures,
)
from tangora.report.curvature.curvature_figures import figures
from tangora.report.curvature.curvature_page import (
    batch_table,
    eigenvalue_table,
    layer_curvature_table,
    space_table,
    with_error,
)
from tests.report.pages import Page, in_terminal, texts
from tests.report.synthetic import CREATED

ROOT = Path(__file__).parents[2]
NAMES = [f"bert.layer.{block}.{kind}" for block in range(3) for kind in ("query", "dense")] + ["pooler"]
SIZE = 1000


def estimated(value, error=None):
    return TraceEstimate(value, error, products=12)


def density(nodes=((-0.5, 0.001, 3.9), (-0.4, 0.002, 4.0)), weights=((0.01, 0.94, 0.05),) * 2):
    return Density(nodes=nodes, weights=weights, x=[-0.5, 0.0, 1.0, 4.0], smoothed=[0.1, 50.0, 0.0, 0.2])


def spectrum(space="tangent", operator="hessian", top=4.0, **changes):
    values = {
        "space": space,
        "operator": operator,
        "size": SIZE,
        "num_layers": len(NAMES),
        "gradient_norm": 0.25,
        "eigenvalues": [Eigenvalue(value=top / 2**i, residual=0.001 * (i + 1)) for i in range(3)],
        "converged": True,
        "trace": estimated(10.0, 0.5),
        "frobenius_norm": estimated(5.0, 0.3),
        "density": density(),
        "products": 70,
        "seconds": 12.0,
    }
    return Spectrum(**values | changes)


def layers(space="tangent"):
    return [
        LayerCurvature(
            name=name,
            space=space,
            size=100,
            largest=Eigenvalue(value=index + 0.5, residual=0.01),
            trace=estimated(2.0 * index + 1, 0.1),
            eigenvector_share=(index + 1) / 28,
        )
        for index, name in enumerate(NAMES)
    ]


def noise():
    batches = [
        BatchCurvature(
            weight=0.25,
            largest=Eigenvalue(value=4.0 + i, residual=0.01),
            trace=estimated(11.0 + i, 0.4),
            directional=2.5,
        )
        for i in range(4)
    ]
    return BatchNoise(
        space="tangent",
        batches=batches,
        largest=Spread(mean=5.5, deviation=1.29),
        trace=Spread(mean=12.5, deviation=1.3),
        whole=Eigenvalue(value=4.0, residual=0.01),
        variance=estimated(16.0, 1.0),
        batch_sharpness=2.5,
        overlap=0.8,
        chance_overlap=0.001,
    )


def landscape():
    steps = [-1.0, 0.0, 1.0]
    return LandscapeRecord(
        space="tangent",
        lines=[
            Line(direction=f"eigenvector {i}", steps=steps, losses=[1.0 + i, 0.5, math.inf]) for i in (1, 2)
        ],
        plane=Plane(
            directions=("eigenvector 1", "eigenvector 2"),
            x=steps,
            y=[-1.0, 1.0],
            losses=[[1.0, 2.0, 3.0], [2.0, 3.0, math.nan]],
        ),
    )


def record(spectra=None, **changes):
    values = {
        "title": "a model on data",
        "command": "tangora curvature out",
        "settings": {"top": 3, "nested": {"key": "value"}},
        "ranks": [8],
        "loss": 0.5,
        "num_examples": 32,
        "num_batches": 4,
        "split": "training",
        "differentiation": "exact",
        "dtype": "float32",
        "spectra": spectra or [spectrum("factors", top=400.0), spectrum()],
        "products": 140,
        "seconds": 75.0,
        "versions": {"torch": "2.13.0"},
        "machine": "two cores",
        "commit": "abc123",
        "created": CREATED,
    }
    return CurvatureRecord(**values | changes)


def whole():
    """Everything that can be measured."""
    return record(
        [
            spectrum("factors", top=400.0),
            spectrum(),
            spectrum("tangent", "gauss-newton", top=3.0),
            spectrum("tangent", "empirical-fisher", top=2.0),
        ],
        layers=layers(),
        batch_noise=noise(),
        sharpness=[SharpnessRecord(space="weights", radius=0.05, loss=0.5, rise=0.25, second_order=0.2)],
        landscape=landscape(),
    )


@pytest.fixture(scope="module")
def text():
    return render_curvature(whole())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_all_figures_are_there(page):
    plots = [attrs["id"] for _, attrs in page.tags if attrs.get("class") == "plot"]
    names = ["eigenvalues", "counts", "density", "layers", "batches", "lines", "plane"]
    assert [name for name in names if f"{name}-1" in plots] == names


def test_the_tables_hold_the_numbers(page):
    found = whole()
    for name, table in (
        ("spaces", space_table(found)),
        ("eigenvalue-numbers", eigenvalue_table(found)),
        ("layer-numbers", layer_curvature_table(found)),
        ("batch-numbers", batch_table(found)),
    ):
        assert page.tables[f"{name}-table"] == texts(table)
    header, first, *_ = page.tables["spaces-table"]
    cells = dict(zip(header, first, strict=True))
    assert cells["over"] == "tangent space"
    assert (cells["λ max"], cells["residual"], cells["trace"]) == ("4", "0.001", "10 ± 0.5")
    assert cells["lowest node"] == "−0.5"
    assert page.tables["batch-numbers-table"][-1][2:] == ["5.5 ± 1", "", "12.5 ± 1", "2.5"]


def test_the_factors_come_last_and_with_their_sentence(page):
    assert [row[0] for row in texts(space_table(whole()))[1:]] == [
        "tangent space",
        "tangent space, Gauss–Newton",
        "tangent space, empirical Fisher",
        "factors A, B",
    ]
    assert curvature_sentences(whole())[0].startswith("In the tangent space")
    assert sum(FACTORS in sentence for sentence in curvature_sentences(whole())) == 1
    assert "".join(page.text).count("Do not compare") >= 2
    for figure in figures(whole()):
        if len(figure.panels) > 1 and figure.panels[-1].title == "factors A, B":
            assert FACTORS in figure.caption
    without = record([spectrum()])
    assert all(FACTORS not in sentence for sentence in curvature_sentences(without))
    assert "Do not compare" not in render_curvature(without)


def test_factors_alone_are_no_record():
    with pytest.raises(ValueError, match="factors must be measured together"):
        record([spectrum("factors")])
    with pytest.raises(ValueError, match="more than once"):
        record([spectrum(), spectrum()])


def test_findings():
    sentences = curvature_sentences(whole())
    assert sentences[0] == (
        "In the tangent space (1.0 k directions) the largest curvature is 4 and the trace 10 ± 0.5; the 3 largest "
        "eigenvalues make up 70 % of it."
    )
    assert sentences[1] == (
        "The current weights are not a minimum: in some direction the curvature is negative, with size 0.5 or more, "
        "12 % of the largest curvature."
    )
    joined = " ".join(sentences)
    for words in (
        "the loss can rise from 0.5000 to at least 0.7500",
        "predict 0.7000",
        "In the tangent space the Gauss–Newton part alone has largest eigenvalue 3 and trace 10 ± 0.5.",
        "In the tangent space the empirical Fisher matrix has largest eigenvalue 2 and trace 10 ± 0.5.",
        "Over 4 mini-batches the largest curvature is 5.5 on average, with a standard deviation of 1.29",
        "mainly in pooler (25 %), bert.layer.2.dense (21 %) and bert.layer.2.query (18 %)",
        "All numbers are for 32 training examples.",
    ):
        assert words in joined
    assert "None" not in joined


def test_what_did_not_converge_is_said():
    assert any("Not all" in sentence for sentence in curvature_sentences(record([spectrum(converged=False)])))
    assert all("Not all" not in sentence for sentence in curvature_sentences(record([spectrum()])))
    finite = render_curvature(record([spectrum()], differentiation="finite_difference"))
    assert "finite differences" in finite
    assert "finite differences" not in render_curvature(record([spectrum()]))


def test_counts_are_those_of_the_quadrature():
    found = next(figure for figure in figures(record([spectrum()])) if figure.name == "counts")
    up, down = found.panels[0].series
    assert (up.name, down.name) == ("upwards", "downwards")
    assert up.y[0] == pytest.approx(SIZE * 0.99)  # all nodes above zero
    assert down.y[0] == pytest.approx(SIZE * 0.01)
    assert up.y[-1] == pytest.approx(SIZE * 0.05 / 2)  # only one of two probes reaches the largest node
    assert (up.low[-1], up.high[-1]) == (0.0, pytest.approx(SIZE * 0.05))
    assert max(down.x) == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in zip(up.y, up.y[1:], strict=False))


def test_the_density_has_gaps_where_nothing_was_seen():
    found = next(figure for figure in figures(record([spectrum()])) if figure.name == "density")
    assert found.panels[0].series[0].y == (0.1, 50.0, None, 0.2)


def test_layers_outside_of_blocks_stand_first():
    found = next(figure for figure in figures(whole()) if figure.name == "layers")
    series = {one.name: one for one in found.panels[1].series}
    assert (series["pooler"].x, series["pooler"].y) == ((-1,), (13.0,))
    assert (series["query"].x, series["query"].y) == ((0, 1, 2), (1.0, 5.0, 9.0))


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_tables(width):
    shown = in_terminal(*curvature_tables(whole()), width=width)
    spaces = shown.split("Largest eigenvalues")[0]
    assert all(text in spaces for text in ("tangent", "factors", "λ max", "residual", "10 ± 0.5", "products"))
    assert "pooler" in shown
    assert max(map(len, shown.splitlines())) <= width


def test_errors_are_written_without_exponents():
    assert with_error(145.3, 29.0) == "145 ± 30"
    assert with_error(1.5, 0.0123) == "1.5 ± 0.01"
    assert with_error(1.5, None) == with_error(1.5, 0.0) == "1.5"


@pytest.mark.parametrize("name", ["curvature_minilm", "curvature_smollm2"])
def test_old_records_are_read_with_their_keys(name, tmp_path):
    path = ROOT / "benchmarks" / f"{name}.json"
    again = json.loads(save_json(load_curvature(path), tmp_path / "again.json").read_text())

    def without_samples(value):  # records of older versions do not tell from how many samples an error comes
        if isinstance(value, dict):
            return {key: without_samples(part) for key, part in value.items() if key != "samples"}
        return [without_samples(part) for part in value] if isinstance(value, list) else value

    old = json.loads(path.read_text())
    younger = {"model_description": None, "processes": 1, "launcher": None}
    assert without_samples(again) == younger | old


def test_pictures_are_the_same_again(tmp_path):
    found = record([spectrum()])
    first = save_curvature_pictures(found, tmp_path / "first")
    assert sorted(path.name for path in first) == [
        f"{name}.{kind}" for name in ("counts", "density", "eigenvalues") for kind in ("png", "svg")
    ]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    again = save_curvature_pictures(found, tmp_path / "again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
