"""`compare --curvature`: what is measured at the end of a run, and that nothing else changes."""

import json

import pytest

from tangora import InputError
from tangora.experiments.compare import CompareSettings, compare
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train
from tangora.experiments.values import validated
from tangora.report import load_comparison, load_record
from tests.experiments.small import have_same_weights

BUDGET = {"steps": 2, "batch_size": 8, "curvature": True, "curvature_examples": 8}


@pytest.fixture(scope="module")
def compared(classifier, tmp_path_factory):
    """A comparison of three methods, measured at their ends."""
    methods = {"recipes": ["full", "lora", "lora-ga"], "seeds": [0]}
    rates = {"learning_rates": {name: [1e-3] for name in methods["recipes"]}}
    folder = tmp_path_factory.mktemp("compared") / "out"
    settings = validated(CompareSettings, classifier | BUDGET | methods | rates)
    return folder, settings, compare(settings, folder)


def test_every_method_is_measured_over_the_same_weights(compared):
    flats = {record.recipe: record.flatness for record in compared[2].comparison.records}
    assert {flat.missing for flat in flats.values()} == {None}
    assert set(flats["full"].spaces) == {"weights"}
    assert set(flats["lora"].spaces) == set(flats["lora-ga"].spaces) == {"weights", "tangent", "factors"}
    assert len({flat.spaces["weights"].size for flat in flats.values()}) == 1
    assert flats["lora"].spaces["tangent"].size < flats["lora"].spaces["weights"].size
    assert all(flat.rise > 0 and flat.num_examples == 8 for flat in flats.values())
    # what the adapter can reach is a part of all weights
    for name in ("lora", "lora-ga"):
        spaces = flats[name].spaces
        assert spaces["tangent"].top_eigenvalue <= spaces["weights"].top_eigenvalue * 1.02


def test_losses_are_those_of_the_record(compared):
    for record in compared[2].comparison.records:
        assert record.flatness.test_loss == record.metrics["test"]["loss"]
        assert record.flatness.gap == pytest.approx(record.flatness.test_loss - record.flatness.train_loss)


def test_the_report_shows_them(compared):
    folder, _, _ = compared
    assert 'id="flatness-table"' in (folder / "report.html").read_text()
    assert load_comparison(folder).records[0].flatness is not None


def test_records_without_it_are_continued(compared):
    folder, settings, _ = compared
    paths = sorted((folder / "records").iterdir())
    contents = [json.loads(path.read_text()) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        del content["flatness"]
        for key in ("curvature", "curvature_examples", "curvature_layers"):
            del content["settings"][key]
        path.write_text(json.dumps(content))
    again = compare(settings, folder)
    assert all(record.flatness is None for record in again.comparison.records)
    assert 'id="flatness-table"' not in (folder / "report.html").read_text()


def test_nothing_else_changes(classifier, tmp_path):
    run = classifier | {"steps": 3, "batch_size": 8, "recipe": "lora", "seed": 1}
    plain = train(validated(RunSettings, run), tmp_path / "plain")
    measured = train(validated(RunSettings, run | BUDGET | {"steps": 3}), tmp_path / "measured")
    assert plain.flatness is None
    assert measured.flatness is not None
    assert measured.metrics == plain.metrics
    assert measured.history == plain.history
    assert have_same_weights(tmp_path / "plain", tmp_path / "measured")
    assert load_record(tmp_path / "measured" / "record.json") == measured


def test_what_has_no_hessian_says_why(classifier, tmp_path):
    record = train(validated(RunSettings, classifier | BUDGET | {"recipe": "dora"}), tmp_path / "out")
    assert record.status == "finished"
    assert record.flatness.spaces == {}
    assert "dora" in record.flatness.missing.lower()
    assert record.flatness.test_loss == record.metrics["test"]["loss"]


@pytest.mark.messages
def test_examples_need_the_measurement(classifier):
    with pytest.raises(
        InputError, match="curvature_examples needs curvature or curvature_every; got 8 alone"
    ):
        validated(RunSettings, classifier | {"curvature_examples": 8})


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_the_weights_of_some_layers_alone(classifier, tmp_path, recipe):
    one = classifier | BUDGET | {"recipe": recipe, "seed": 1}
    whole = train(validated(RunSettings, one), tmp_path / "whole").flatness
    part = train(
        validated(RunSettings, one | {"curvature_layers": "*.layer.0.*"}), tmp_path / "part"
    ).flatness
    assert part.weight_layers == "*.layer.0.*"
    assert part.spaces["weights"].size < whole.spaces["weights"].size
    assert part.spaces["weights"].top_eigenvalue < whole.spaces["weights"].top_eigenvalue  # a diagonal block
    for space in part.spaces.keys() - {"weights"}:
        assert part.spaces[space] == whole.spaces[space]
    with pytest.raises(InputError, match="curvature_layers must name layers"):  # known before the training
        train(validated(RunSettings, one | {"curvature_layers": "*.nowhere.*"}), tmp_path / "none")
