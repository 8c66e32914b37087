"""A machine with several GPUs, no launcher: a run uses one, with the batch that was asked for, and its log says so."""

import pytest
import torch

import tangora
from tangora.experiments.settings import RunSettings

pytestmark = pytest.mark.messages


@pytest.mark.parametrize("recipe", ["full", "lora", "tangent"])
def test_a_run_is_the_same_as_with_one(classifier, tmp_path, monkeypatch, recipe):
    settings = RunSettings(**classifier, recipe=recipe, steps=3, batch_size=4, evaluate_every=2)
    one = tangora.train(settings, tmp_path / "one")
    # they are counted, but none can be used here: the run stays on the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    many = tangora.train(settings, tmp_path / "many")
    assert many.status == "finished"
    assert [step.loss for step in many.history] == [step.loss for step in one.history]
    assert many.metrics == one.metrics
    told = (tmp_path / "many" / "log.txt").read_text()
    assert told.count("4 GPUs are visible; only cpu") == 1
    assert "GPUs" not in (tmp_path / "one" / "log.txt").read_text()
