import pytest

from tangora.report import summarize
from tangora.report.comparison.learning_rates import rate_verdict
from tangora.report.statistics.robustness import robustness
from tests.report.synthetic import diverged, make_comparison, make_record, realistic, realistic_rows


def sweep(recipe, values, **changes):
    return [make_record(recipe, rate, validation=value, **changes) for rate, value in values.items()]


def measured(records, **changes):
    comparison = make_comparison(records, **changes)
    return robustness(comparison, summarize(comparison))


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


@pytest.mark.parametrize(
    ("at_full_rate", "rate", "expected"),
    [(0.89, 1e-4, True), (0.80, 1e-4, False), (0.89, 1.25e-4, True), (0.89, 1.4e-4, None)],
)
def test_full_fine_tunings_rate(at_full_rate, rate, expected):
    found = measured([*sweep("full", {1e-4: 0.95}), *sweep("x", {rate: at_full_rate, 1e-3: 0.90})])
    assert found["x"].full_carries_over is expected
    assert found["x"].full_rate == (None if expected is None else rate)
    assert found["full"].full_carries_over is None


def test_full_fine_tunings_rate_may_diverge():
    records = [*sweep("full", {1e-4: 0.95}), diverged("x", 1e-4), *sweep("x", {1e-5: 0.9})]
    assert measured(records)["x"].full_carries_over is False
    assert measured(sweep("x", {1e-5: 0.9}))["x"].full_carries_over is None


def test_stability_at_three_times_the_best():
    best = sweep("x", {1e-4: 0.9})
    assert measured(best)["x"].tripled == "not tried"
    assert measured([*best, *sweep("x", {3e-4: 0.1})])["x"].tripled == "finished"
    assert measured([*best, diverged("x", 3e-4)])["x"].tripled == "diverged"
    assert measured([*best, *sweep("x", {3e-4: 0.1}), diverged("x", 3e-4, 1)])["x"].tripled == "diverged"
    near = measured([*best, *sweep("x", {2.4e-4: 0.1}), diverged("x", 3.5e-4)])["x"]
    assert (near.tripled, near.tripled_rate) == ("diverged", 3.5e-4)
    far = measured([*best, *sweep("x", {2e-4: 0.1}), diverged("x", 4e-4)])["x"]
    assert (far.tripled, far.tripled_rate) == ("not tried", None)
    failed = make_record("x", 3e-4, status="failed", error="bug", metrics={})
    assert measured([*best, failed])["x"].tripled == "not tried"


def test_a_trial_may_diverge_but_not_finish():
    best = sweep("x", {1e-4: 0.9})
    assert measured([*best, diverged("x", 3e-4, stage="trial")])["x"].tripled == "diverged"
    assert measured([*best, *sweep("x", {3e-4: 0.1}, stage="trial")])["x"].tripled == "not tried"


def test_only_recipes_with_a_learning_rate():
    assert [*measured([*sweep("x", {1e-4: 0.9}), diverged("y", 1e-4)])] == ["x"]


def test_sentences():
    wide = sweep("wide", {1e-4: 0.9, 3e-4: 0.9, 1e-3: 0.5})
    narrow = [*sweep("lora", {1e-4: 0.5, 3e-4: 0.9}), diverged("lora", 1e-3)]
    full = sweep("full", {1e-4: 0.9, 2e-5: 0.5, 2e-4: 0.5})
    widths, carried, tripled = rate_verdict(measured([*wide, *narrow, *full]))
    assert widths == (
        "wide has the widest range of learning rates within 2 % of its best result: at least a factor of 3; lora: the "
        "best one only."
    )
    assert carried == (
        "At the best learning rate of full, wide is within 2 % of the best result and lora is worse than that."
    )
    assert tripled == "At about 3 times the best learning rate, lora of 2 recipes tried diverges."
    assert rate_verdict(measured(sweep("x", {1e-4: 0.9}))) == []
    assert rate_verdict(measured(sweep("x", {1e-4: 0.9, 2e-4: 0.5}))) == [
        "No recipe is within 2 % of its best result at any other learning rate that was tried."
    ]


def test_realistic():
    found = robustness(realistic(), realistic_rows())
    assert found["lora-pro"].full_carries_over
    assert {item.width for item in found.values()} == {1.0}
