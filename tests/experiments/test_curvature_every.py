"""Runs whose curvature is recorded: they train as others do, go on after an interruption, and tell what cannot be."""

import json

import pytest

from tangora import InputError, RunSettings, train
from tangora.experiments.values import validated
from tangora.training.callbacks import read_history
from tangora.training.curvature import read_curvature
from tests.experiments.small import after_step, ctrl_c, have_same_weights

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")

BUDGET = {"steps": 5, "batch_size": 8, "curvature_examples": 6}


@pytest.fixture
def classifier(classifier):
    return classifier | {"target_modules": "query,value"}


@pytest.mark.parametrize("name", ["full", "tangent", "lora-pro"])
def test_measuring_changes_no_bit_of_training(classifier, tmp_path, name):
    settings = {**classifier, **BUDGET, "recipe": name}
    plain = train(RunSettings(**settings | {"curvature_examples": None}), tmp_path / "plain")
    measured = train(RunSettings(**settings, curvature_every=2, measure_every=5), tmp_path / "measured")
    assert measured.metrics == plain.metrics
    assert [step.loss for step in measured.history] == [step.loss for step in plain.history]
    file = "model/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    assert have_same_weights(tmp_path / "plain", tmp_path / "measured", file)
    assert plain.curvature == []
    assert not (tmp_path / "plain" / "curvature.jsonl").exists()
    points = read_curvature(tmp_path / "measured" / "curvature.jsonl")
    assert [point.step for point in points] == [0, 2, 4, 5]
    assert measured.curvature == [{"step": p.step} | p.known() for p in points]
    spaces = {"weights"} if name == "full" else {"tangent", "factors"}
    assert all(point.spaces.keys() == spaces for point in points)
    if name == "full":  # the layers that an adapter would have, one layer of hidden size 32
        assert points[0].spaces["weights"].size == 2 * 32 * 32
        assert points[0].captured_energy is None
    else:
        assert all(0 < point.captured_energy <= 1 for point in points)


def test_an_interrupted_run_measures_every_step_once(classifier, tmp_path):
    settings = RunSettings(
        **{**classifier, **BUDGET, "recipe": "lora", "curvature_every": 2, "save_every": 2}
    )
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut", progress=after_step(3, ctrl_c))
    with (tmp_path / "cut" / "curvature.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3}) + "\n")  # of the part that is taken again
    record = train(settings, tmp_path / "cut")
    one, other = (read_history(tmp_path / folder / "curvature.jsonl") for folder in ("whole", "cut"))
    assert one == other
    assert record.curvature == whole.curvature


@pytest.mark.messages
def test_settings_that_do_not_go_together(classifier, tmp_path):
    with pytest.raises(
        InputError, match=r"curvature_examples needs .*curvature_every; got only curvature_examples = 4"
    ):
        validated(RunSettings, {"curvature_examples": 4})
    with pytest.raises(
        InputError, match="curvature_every: input should be greater than or equal to 1; got 0"
    ):
        validated(RunSettings, {"curvature_every": 0})
    dora = RunSettings(**{**classifier, **BUDGET, "recipe": "dora", "curvature_every": 2})
    with pytest.raises(InputError, match="uses DoRA, which treats its norm as a constant"):
        train(dora, tmp_path / "out")
