import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tangora.report.statistics.intervals import estimate, holm


def interval(found):
    """Ends that hold no bounds, as Student's."""
    return pytest.approx(tuple(found.confidence_interval()), rel=1e-6)


@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_seeds_only_is_students_t(num_seeds):
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.9, 0.02, (2, num_seeds, 1))
    found = estimate(ours - theirs)
    expected = stats.ttest_rel(ours[:, 0], theirs[:, 0])
    assert found.over == "seeds"
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.interval == interval(expected)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_seeds_that_differ_much_leave_students_t_over_seeds(num_seeds):
    rng = np.random.default_rng(2)
    scores = 30 * rng.normal(0, 1, (num_seeds, 1)) + rng.normal(0, 1, (num_seeds, 2000))
    low, high = estimate(scores).interval
    expected = stats.ttest_1samp(scores.mean(axis=1), 0).confidence_interval()
    assert (low, high) == pytest.approx(tuple(expected), rel=0.01)


def test_many_seeds_leave_the_classical_two_way_variance():
    rng = np.random.default_rng(3)
    scores = 0.5 * rng.normal(0, 1, (200, 1)) + rng.normal(0, 2, (1, 400)) + rng.normal(0, 1, (200, 400))
    by_seed, by_example = scores.mean(axis=1).var(ddof=1) / 200, scores.mean(axis=0).var(ddof=1) / 400
    residual = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    variance = by_seed + by_example - (residual**2).sum() / (199 * 399) / scores.size
    assert estimate(scores).margin == pytest.approx(1.97 * math.sqrt(variance), rel=0.01)


def test_one_seed_is_students_t_over_examples():
    scores = np.random.default_rng(2).normal(0, 1, (1, 500))
    found = estimate(scores)
    assert found.over == "examples"
    # two further examples are counted in
    assert found.interval == pytest.approx(
        tuple(stats.ttest_1samp(scores[0], 0).confidence_interval()), rel=0.01
    )
    assert found.p_value is None  # another seed may say something else


def test_few_seeds_cost_nothing_where_only_examples_vary():
    examples = np.random.default_rng(4).normal(0, 1, 300)
    found = estimate(np.tile(examples, (3, 1)))
    expected = stats.ttest_1samp(examples, 0).confidence_interval()
    assert 2 * found.margin == pytest.approx(expected.high - expected.low, rel=0.01)


def test_one_seed_agrees_with_the_binomial():
    answers = (np.arange(500) % 10 != 0).astype(float)[None, :]
    expected = stats.binom(500, 0.9).ppf([0.025, 0.975]) / 500
    assert estimate(answers).interval == pytest.approx(tuple(expected), abs=0.002)


def discrete(seed, shape=(3, 60)):
    """Differences of right and wrong answers, on most examples zero."""
    return np.random.default_rng(seed).choice([-1.0, 0.0, 0.0, 0.0, 1.0, 1.0], shape)


@pytest.mark.parametrize(
    "scores", [discrete(5), discrete(6, (2, 100)), np.random.default_rng(7).normal(1, 1, (4, 9))]
)
def test_neither_order_nor_scale_nor_sign_matters(scores):
    rng = np.random.default_rng(8)
    found = estimate(scores)
    shuffled = estimate(rng.permutation(rng.permutation(scores, axis=0), axis=1))
    assert (shuffled.p_value, shuffled.margin) == (pytest.approx(found.p_value), pytest.approx(found.margin))
    scaled = estimate(-100 * scores)
    assert (scaled.p_value, scaled.margin) == (
        pytest.approx(found.p_value),
        pytest.approx(100 * found.margin),
    )


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (2, 60), (5, 200)])
def test_the_p_value_is_below_the_level_exactly_when_zero_is_outside(shape, shift):
    rng = np.random.default_rng(9)
    for _ in range(10):
        found = estimate(shift + rng.normal(0, 1, (shape[0], 1)) / 3 + rng.normal(0, 1, shape))
        low, high = found.interval
        assert (found.p_value < 0.05) == (not low <= 0 <= high)
        assert 0 < found.p_value <= 1
        edge = replace(found, value=found.margin)
        assert edge.p_value == pytest.approx(0.05, rel=1e-6)


ODD = {
    "the same difference for every seed": np.roll(np.eye(3, 20), 1, axis=1) + np.eye(3, 20),
    "all seeds and examples the same": np.ones((2, 60)),
    "no difference": np.zeros((3, 60)),
    "one answer": np.eye(2, 60)[:1].repeat(2, axis=0),
    "as many gained as lost": np.eye(3, 60) - np.roll(np.eye(3, 60), 1, axis=1),
}


@pytest.mark.parametrize("scores", ODD.values(), ids=ODD)
def test_no_agreement_by_chance_makes_an_estimate_certain(scores):
    found = estimate(scores)
    assert 0 < found.p_value <= 1
    assert found.margin > 0
    assert found.p_value > 0.05 or abs(found.value) == 1


def test_seeds_that_agree_say_no_more_than_the_answers():
    # 12 + 1 answers gained and 10 lost, the same balance for all three seeds
    rows = [np.roll(np.repeat([1.0, -1.0, 0.0], [11, 10, 79]), 9 * seed) for seed in range(3)]
    found = estimate(np.array(rows))
    assert np.ptp([row.mean() for row in rows]) == 0
    assert found.p_value > 0.5


def test_an_effect_on_most_examples_is_found_with_three_seeds():
    rng = np.random.default_rng(10)
    better = (rng.random((3, 400)) < 0.95).astype(float) - (rng.random((3, 400)) < 0.75)
    assert estimate(better).p_value < 0.01


@pytest.mark.parametrize("value", [1.0, 0.0, 0.3])
def test_single_numbers_that_agree_say_nothing_of_the_noise(value):
    assert estimate(np.full((3, 1), value)) is None
    rounded = np.full((3, 1), value) + np.array([[1e-9], [0.0], [0.0]])
    assert estimate(rounded, unit=0.9) is None


def test_extreme_p_values():
    sure = np.array([[1.0], [1.0 + 1e-4], [1.0 - 1e-4]])
    assert 0 < estimate(sure).p_value < 1e-6
    assert estimate(sure - 1.0).p_value == pytest.approx(1.0)
    assert 0 < estimate(5.0 + np.random.default_rng(11).normal(0, 1e-3, (3, 5000))).p_value < 1e-4


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(5)
    ours = rng.normal(0, 1, (3, 200))
    theirs = ours - 0.1 + rng.normal(0, 0.05, (3, 200))
    assert estimate(ours - theirs).interval[0] > 0
    unpaired = estimate(ours, -theirs)
    assert unpaired.interval[0] < 0 < unpaired.interval[1]


def test_groups_of_other_seeds_share_their_examples():
    rng = np.random.default_rng(6)
    examples = rng.normal(0, 10, (1, 200))  # cancels in the difference
    ours, theirs = examples + rng.normal(1, 0.1, (4, 200)), examples + rng.normal(0, 0.1, (3, 200))
    low, high = estimate(ours, -theirs).interval
    assert 0.85 < low < 1 < high < 1.15


def test_groups_of_other_seeds_without_examples_add_their_variances():
    ours, theirs = np.random.default_rng(7).normal(0, 1, (2, 5, 1))
    found = estimate(ours, -theirs[:3])
    # by simulation of the sum of two Student's t
    rng = np.random.default_rng(12)
    parts = [group.std(ddof=1) / math.sqrt(len(group)) for group in (ours, theirs[:3])]
    drawn = sum(part * rng.standard_t(df, 1_000_000) for part, df in zip(parts, (4, 2), strict=True))
    assert found.margin == pytest.approx(np.quantile(np.abs(drawn), 0.95), rel=0.01)


def test_a_single_number_has_no_estimate():
    one = np.array([[0.9]])
    assert estimate(one) is None
    assert estimate(one, np.array([[0.9], [0.8]])) is None


def test_one_seed_in_one_group_leaves_examples():
    rng = np.random.default_rng(8)
    assert estimate(rng.normal(size=(1, 20)), rng.normal(size=(3, 20))).over == "examples"


@pytest.mark.parametrize("size", [0, 1, 2, 7, 40])
def test_holm_agrees_with_statsmodels(size):
    p_values = (np.random.default_rng(9).random(size) ** 4).tolist()
    p_values += p_values[:2]  # ties
    expected = multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(list(expected))
