import pytest

from tangora.report.comparison.learning_rates import robustness
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import diverged, make_comparison, make_record


def sweep(recipe, values, **changes):
    return [make_record(recipe, rate, validation=value, **changes) for rate, value in values.items()]


def measured(records, **changes):
    return robustness(judge(make_comparison(records, **changes)))


def test_width_is_the_unbroken_range_within_two_percent():
    # 2 % of 0.90 are 0.018: 0.882 is inside, 0.881 is not
    found = measured(sweep("x", {1e-5: 0.89, 3e-5: 0.881, 1e-4: 0.882, 3e-4: 0.90, 1e-3: 0.895, 3e-3: 0.5}))[
        "x"
    ]
    assert (found.learning_rate, found.low, found.high) == (3e-4, 1e-4, 1e-3)
    assert found.width == pytest.approx(10.0)
    assert not found.open_low
    assert not found.open_high


def test_two_percent_of_a_loss():
    # the synthetic loss is 1 - validation: best 0.50, so up to 0.51
    records = sweep("x", {1e-4: 0.5, 2e-4: 0.49, 4e-4: 0.489})
    found = measured(records, metric="loss", higher_is_better=False)["x"]
    assert (found.low, found.high) == (1e-4, 2e-4)
    assert found.open_low
    # as an accuracy of 0.5 the same is one point
    assert measured(records)["x"].high == 2e-4


def test_a_range_that_ends_with_the_grid_is_open():
    found = measured(sweep("x", {1e-4: 0.5, 2e-4: 0.9, 4e-4: 0.9}))["x"]
    assert (found.low, found.high, found.open_low, found.open_high) == (2e-4, 4e-4, False, True)
    alone = measured(sweep("x", {1e-4: 0.9}))["x"]
    assert (alone.width, alone.open_low, alone.open_high) == (1.0, True, True)


def test_divergence_ends_the_range_but_a_failure_does_not():
    records = [
        *sweep("x", {1e-4: 0.9, 4e-4: 0.9}),
        make_record("x", 2e-4, status="failed", error="bug", metrics={}),
        diverged("x", 8e-4),
    ]
    found = measured(records)["x"]
    assert (found.low, found.high, found.open_high) == (1e-4, 4e-4, False)


def test_a_learning_rate_at_which_one_seed_diverged_is_outside():
    records = [*sweep("x", {1e-4: 0.9, 2e-4: 0.9}), diverged("x", 2e-4, seed=1)]
    assert measured(records)["x"].high == 1e-4
