"""A run whose steps take several gradients each: recorded, interrupted, continued, saved."""

import pytest
import torch
from safetensors.torch import load_file

from tangora import RunSettings, train
from tangora.experiments.run.execute import Watcher
from tangora.training.callbacks import read_history
from tests.experiments.small import write_classifier


def stop_at(step):
    def hear(done, _loss):
        if done == step:
            raise KeyboardInterrupt

    return Watcher(step=hear)


def test_an_interrupted_run_with_heuns_steps_goes_on_to_the_same_end(tmp_path):
    small = write_classifier(tmp_path)
    settings = RunSettings(**small, recipe="odelora-heun", steps=5, batch_size=4, accumulate=2, save_every=2)
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut", watcher=stop_at(3))
    record = train(settings, tmp_path / "cut")
    assert record.gradient_evaluations == whole.gradient_evaluations == 10
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert read_history(tmp_path / "whole" / "metrics.jsonl") == read_history(
        tmp_path / "cut" / "metrics.jsonl"
    )


def test_other_methods_take_one_gradient_per_step(tmp_path):
    settings = RunSettings(**write_classifier(tmp_path), recipe="lora", steps=2, batch_size=4)
    assert train(settings, tmp_path / "out").gradient_evaluations == 2
