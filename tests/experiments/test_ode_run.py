"""A run whose steps take several gradients each: recorded, interrupted, continued, saved."""

import pytest

from tangora import RunSettings, train
from tangora.training.callbacks import read_history
from tests.experiments.small import after_step, ctrl_c, have_same_weights


def test_an_interrupted_run_with_heuns_steps_goes_on_to_the_same_end(classifier, tmp_path):
    settings = RunSettings(
        **classifier, recipe="odelora-heun", steps=5, batch_size=4, accumulate=2, save_every=2
    )
    whole = train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut", progress=after_step(3, ctrl_c))
    record = train(settings, tmp_path / "cut")
    assert record.gradient_evaluations == whole.gradient_evaluations == 10
    assert have_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert read_history(tmp_path / "whole" / "metrics.jsonl") == read_history(
        tmp_path / "cut" / "metrics.jsonl"
    )


def test_other_methods_take_one_gradient_per_step(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="lora", steps=2, batch_size=4)
    assert train(settings, tmp_path / "out").gradient_evaluations == 2
