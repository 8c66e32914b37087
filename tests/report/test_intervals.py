import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from tangora.report.statistics.intervals import Estimate, estimate, holm


@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_seeds_only_is_students_t(num_seeds):
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.9, 0.02, (2, num_seeds, 1))
    found = estimate(ours - theirs)
    expected = stats.ttest_rel(ours[:, 0], theirs[:, 0])
    assert found.over == "seeds"
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_one_seed_is_students_t_over_examples():
    scores = np.random.default_rng(2).normal(0, 1, (1, 50))
    found = estimate(scores)
    assert found.over == "examples"
    assert found.interval == pytest.approx(tuple(stats.ttest_1samp(scores[0], 0).confidence_interval(0.95)))
    assert found.p_value is None  # another seed may say something else


def test_one_seed_agrees_with_the_binomial():
    answers = (np.arange(500) % 10 != 0).astype(float)[None, :]
    expected = stats.binom(500, 0.9).ppf([0.025, 0.975]) / 500
    assert estimate(answers).interval == pytest.approx(tuple(expected), abs=0.002)


def test_the_variance_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(3)
    scores = rng.normal(0, 1, (4, 1)) + rng.normal(0, 2, (1, 12)) + rng.normal(0, 1, (4, 12))
    seed, example = np.indices(scores.shape)
    table = anova_lm(
        ols(
            "score ~ C(seed) + C(example)",
            {"score": scores.ravel(), "seed": seed.ravel(), "example": example.ravel()},
        ).fit()
    )
    seeds, examples, rest = table["mean_sq"]
    found = estimate(scores)
    assert found.parts[0] == (pytest.approx(seeds / scores.size), 3)
    assert found.parts[1] == (pytest.approx((examples - rest) / scores.size), 11)
    assert found.standard_error == pytest.approx(math.sqrt((seeds + examples - rest) / scores.size))


def test_no_example_effect_leaves_students_t_over_seeds():
    scores = np.array([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0], [2.0, 0.0, 0.0, 2.0]])
    found = estimate(scores)
    assert found.parts[1][0] == 0  # examples vary less than the rest
    assert found.interval == pytest.approx(
        tuple(stats.ttest_1samp(scores.mean(axis=1), 0).confidence_interval())
    )


def test_few_seeds_cost_nothing_where_only_examples_vary():
    examples = np.random.default_rng(4).normal(0, 1, 300)
    found = estimate(np.tile(examples, (3, 1)))
    assert found.interval == pytest.approx(tuple(stats.ttest_1samp(examples, 0).confidence_interval()))
    assert found.p_value == pytest.approx(stats.ttest_1samp(examples, 0).pvalue, rel=1e-6)


def test_the_quantile_lies_between_that_of_seeds_and_that_of_examples():
    half = Estimate(1.0, ((0.5, 2), (0.5, 99)), "seeds and examples")
    expected = (stats.t.ppf(0.975, 2) + stats.t.ppf(0.975, 99)) / 2
    assert half.margin == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.3, 2.0, 8.0, 200.0])
def test_the_p_value_is_below_the_level_exactly_when_zero_is_outside(value):
    found = Estimate(value, ((0.9, 2), (0.1, 199)), "seeds and examples")
    assert (found.p_value < 0.05) == (found.interval[0] > 0)
    # by its definition: at the p-value's own quantile the interval ends at zero
    quantile = 0.9 * stats.t.isf(found.p_value / 2, 2) + 0.1 * stats.t.isf(found.p_value / 2, 199)
    assert quantile == pytest.approx(value, rel=1e-6)


def test_extreme_p_values():
    sure = Estimate(1.0, ((0.0, 2), (1e-9, 199)), "seeds and examples")
    assert sure.p_value < 1e-50
    assert Estimate(0.0, ((1.0, 2),), "seeds").p_value == pytest.approx(1.0)
    assert Estimate(1.0, ((0.0, 2),), "seeds").p_value == 0.0
    assert Estimate(0.0, ((0.0, 2),), "seeds").p_value == 1.0


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(5)
    ours = rng.normal(0, 1, (3, 200))
    assert estimate(ours + 0.1 - ours).interval == pytest.approx((0.1, 0.1))
    unpaired = estimate(ours + 0.1, -ours)
    assert unpaired.interval[0] < 0 < unpaired.interval[1]


def test_groups_of_other_seeds_share_their_examples():
    rng = np.random.default_rng(6)
    examples = rng.normal(0, 10, (1, 200))  # cancels in the difference
    ours, theirs = examples + rng.normal(1, 0.1, (4, 200)), examples + rng.normal(0, 0.1, (3, 200))
    low, high = estimate(ours, -theirs).interval
    assert 0.9 < low < 1 < high < 1.1


def test_groups_of_other_seeds_without_examples_add_their_variances():
    ours, theirs = np.random.default_rng(7).normal(0, 1, (2, 5, 1))
    found = estimate(ours, -theirs[:3])
    assert found.standard_error == pytest.approx(
        stats.ttest_ind(ours, theirs[:3], equal_var=False).statistic[0] ** -1
        * (ours.mean() - theirs[:3].mean())
    )
    # never fewer than the smaller sample's degrees of freedom, never more than Welch's
    welch = stats.ttest_ind(ours[:, 0], theirs[:3, 0], equal_var=False).confidence_interval()
    assert found.interval[1] - found.interval[0] >= 0.99 * (welch.high - welch.low)


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
