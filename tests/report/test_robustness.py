import pytest

from tangora.report.comparison.learning_rates import rate_verdict, robustness, sweep_section
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


def test_the_metric_at_three_times_the_best_rate_is_shown_beside_no_divergence():
    judged = judge(make_comparison(sweep("x", {1e-4: 0.9, 3e-4: 0.1})))
    assert robustness(judged)["x"].tripled_value == 0.1
    table = sweep_section(judged).table
    (row,) = table.rows
    assert row[list(table.headers).index("at 3 times its best")].lines == [
        "no divergence",
        "3e-4",
        "accuracy 0.1000",
    ]


def test_bars_are_mentioned_only_where_there_are_any():
    one = sweep("x", {1e-4: 0.9, 3e-4: 0.1})
    assert "bars" not in sweep_section(judge(make_comparison(one))).charts[0].caption
    two = [*one, *sweep("x", {1e-4: 0.8}, seed=1)]
    assert "bars" in sweep_section(judge(make_comparison(two))).charts[0].caption


def test_sentences():
    grid = {1e-4: 0.9, 3e-4: 0.9, 9e-4: 0.1}
    records = [
        *sweep("full", {3e-5: 0.1, 1e-4: 0.9, 3e-4: 0.89, 9e-4: 0.1}),
        *sweep("lora", {1e-4: 0.1, 3e-4: 0.9, 9e-4: 0.1}),
        *sweep("a", {1e-4: 0.1, 3e-4: 0.9, 9e-4: 0.1}),
        *sweep("b", grid),
    ]
    width, carried, tripled = rate_verdict(measured(records))
    assert width == (
        "full has the widest range of learning rates within 2 % of its best result: the largest is 3 times the "
        "smallest. lora has no second learning rate within 2 % of its best result."
    ) or width.startswith("b has the widest range")
    assert carried == (
        "At the best learning rate of full, b is within 2 % of its own best result and a and lora are not."
    )
    assert tripled == (
        "At about 3 times its own best learning rate, no recipe diverges (4 recipes tried there)."
    )
    only_far = rate_verdict(measured([run for run in records if run.recipe != "b"]))[1]
    assert only_far == (
        "At the best learning rate of full, a and lora are not within 2 % of their own best result."
    )
    wild = rate_verdict(measured([*sweep("a", {1e-4: 0.9}), diverged("a", 3e-4), *sweep("b", grid)]))[-1]
    assert ", a diverges (2 recipes tried there)" in wild
