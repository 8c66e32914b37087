import math

import pytest

from tangora.report import EvaluationRecord, StepRecord, TimeSplit
from tangora.report.comparison.speed import speeds
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import make_comparison, make_record

TIME = TimeSplit(start=10.0, forward_backward=60.0, optimizer=40.0, evaluation=1000.0)


def run(recipe, losses, seed=0, **changes):
    """One second of training per step when there are 100 steps."""
    history = [StepRecord(step=s, loss=loss, learning_rate=1e-4) for s, loss in enumerate(losses, 1)]
    return make_record(recipe, seed=seed, **{"history": history, "evaluations": [], "time": TIME} | changes)


def validated(recipe, losses, seed=0, every=25):
    evaluations = [
        EvaluationRecord(step=every * index, metrics={"loss": loss}) for index, loss in enumerate(losses, 1)
    ]
    return run(recipe, [1.0] * 100, seed, evaluations=evaluations)


def measured(*records):
    return speeds(judge(make_comparison(records)))


def falling(slope, start=2.0):
    return [start - slope * step for step in range(1, 101)]


def test_steps_and_seconds_to_the_training_loss():
    found = measured(run("lora", falling(0.01)), run("fast", falling(0.02)))
    # LoRA ends at the mean of its last 5 losses, 1.02; at twice the slope the mean of 5 gets there 2 steps after 49
    assert found["fast"].quality == "training loss"
    assert found["fast"].target == pytest.approx(1.02)
    assert found["fast"].steps == 51
    assert found["fast"].seconds == pytest.approx(10 + 51)  # the start counts, evaluation does not
    assert (found["fast"].num_reached, found["fast"].num_seeds) == (1, 1)
    assert found["lora"].steps == 100


def test_one_lucky_batch_is_not_there_yet():
    losses = falling(0.01)
    losses[9] = 0.9
    assert measured(run("lora", falling(0.01)), run("x", losses))["x"].steps == 100


def test_the_first_full_window_counts():
    assert measured(run("lora", falling(0.01)), run("x", [0.5] * 100))["x"].steps == 5


def test_never_reached():
    found = measured(run("lora", falling(0.01)), run("slow", falling(0.005)))["slow"]
    assert (found.steps, found.seconds, found.num_reached, found.num_seeds) == (None, None, 0, 1)


def test_mean_over_the_seeds_that_get_there():
    lora = [run("lora", falling(0.01), seed) for seed in range(3)]
    x = [run("x", falling(slope), seed) for seed, slope in enumerate((0.02, 0.01, 0.005))]
    found = measured(*lora, *x)["x"]
    assert (found.num_reached, found.num_seeds) == (2, 3)
    assert found.steps == pytest.approx((51 + 100) / 2)


def test_the_target_is_the_mean_over_loras_seeds():
    found = measured(*(run("lora", [loss] * 100, seed) for seed, loss in enumerate((1.0, 2.0, 3.0))))
    assert found["lora"].target == pytest.approx(2.0)
    assert found["lora"].num_reached == 2


def test_validation_loss_goes_before_training_loss():
    found = measured(validated("lora", [0.9, 0.8, 0.7, 0.6]), validated("x", [0.8, 0.6, 0.7, 0.7]))
    assert found["x"].quality == "validation loss"
    assert found["x"].target == pytest.approx(0.6)
    assert (found["x"].steps, found["x"].seconds) == (50, pytest.approx(60.0))
    assert found["lora"].steps == 100


def test_evaluations_that_some_run_lacks_are_not_compared():
    found = measured(validated("lora", [0.9, 0.8, 0.7, 0.6]), run("x", [0.5] * 100))
    assert found["x"].quality == "training loss"
    once = measured(validated("lora", [0.6], every=100), validated("x", [0.5], every=100))
    assert once["x"].quality == "training loss"


def test_a_loss_that_is_not_finite_is_not_low():
    losses = falling(0.02)
    losses[48:52] = [math.nan, math.inf, 1.0, 1.0]
    assert measured(run("lora", falling(0.01)), run("x", losses))["x"].steps == 55
