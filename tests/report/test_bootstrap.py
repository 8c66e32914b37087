import numpy as np
import pytest
from scipy import stats

from tangora.report.bootstrap import difference_interval, mean_interval


@pytest.mark.parametrize("num_seeds", [3, 8, 20])
def test_seeds_only_agrees_with_scipy(num_seeds):
    scores = np.random.default_rng(1).normal(0.9, 0.02, (num_seeds, 1))
    theirs = stats.bootstrap(
        (scores[:, 0],), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert mean_interval(scores) == pytest.approx(tuple(theirs), abs=0.05 * np.ptp(scores))


def test_one_seed_agrees_with_the_binomial():
    answers = (np.arange(500) % 10 != 0).astype(float)[None, :]
    low, high = mean_interval(answers)
    expected = stats.binom(500, 0.9).ppf([0.025, 0.975]) / 500
    assert (low, high) == pytest.approx(tuple(expected), abs=0.004)


def test_seeds_and_examples_add_their_variances():
    rng = np.random.default_rng(3)
    seeds, examples = rng.normal(0, 1, (40, 1)), rng.normal(0, 3, (1, 300))
    low, high = mean_interval(seeds + examples)
    expected = np.sqrt(seeds.var() / 40 + examples.var() / 300)
    assert (high - low) / (2 * 1.96) == pytest.approx(expected, rel=0.05)


def test_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    intervals = [mean_interval(rng.normal(0, 1, (20, 1)), seed=trial) for trial in range(200)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.98  # the percentile bootstrap is a little too narrow for 20 values


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(5)
    ours = rng.normal(0, 1, (3, 200))
    low, high = difference_interval(ours + 0.1, ours, paired=True)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)
    low, high = difference_interval(ours + 0.1, ours, paired=False)
    assert low < 0 < high


def test_unpaired_may_differ_in_shape():
    rng = np.random.default_rng(6)
    low, high = difference_interval(rng.normal(1, 0.1, (5, 1)), rng.normal(0, 0.1, (3, 50)), paired=False)
    assert 0.7 < low < 1 < high < 1.3


def test_a_single_number_has_no_interval():
    one = np.array([[0.9]])
    assert mean_interval(one) is None
    assert difference_interval(one, one, paired=True) is None
    assert difference_interval(one, np.array([[0.9], [0.8]]), paired=False) is None


def test_same_seed_same_interval():
    scores = np.random.default_rng(7).normal(size=(3, 100))
    assert mean_interval(scores, seed=1) == mean_interval(scores, seed=1)
    assert mean_interval(scores, seed=1) != mean_interval(scores, seed=2)
