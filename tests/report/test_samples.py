import numpy as np
import pytest
from scipy import stats

from tangora.report.statistics.intervals import estimate
from tangora.report.statistics.samples import Sample, contrast, gap_closed, sample
from tests.report.synthetic import make_record


def of(scores, seeds=None):
    scores = np.asarray(scores, dtype=np.float64)
    return Sample(tuple(seeds or range(len(scores))), scores)


def scattered(seed, mean, shape=(3, 40), **changes):
    return of(np.random.default_rng(seed).normal(mean, 1.0, shape), **changes)


def test_the_same_seeds_are_paired():
    ours, theirs = scattered(1, 2.0), scattered(2, 1.0)
    assert contrast((1.0, ours), (-1.0, theirs)) == estimate(ours.scores - theirs.scores)


def test_other_seeds_are_not_paired_but_their_examples_are():
    ours, theirs = scattered(1, 2.0), scattered(2, 1.0, seeds=(7, 8, 9))
    assert contrast((1.0, ours), (-1.0, theirs)) == estimate(ours.scores, -theirs.scores)


def test_without_examples_on_one_side_seeds_are_still_paired():
    ours, theirs = scattered(1, 2.0), scattered(2, 1.0, shape=(3, 1))
    expected = estimate(ours.scores.mean(axis=1, keepdims=True) - theirs.scores)
    assert contrast((1.0, ours), (-1.0, theirs)) == expected


def test_three_recipes_of_which_two_share_their_seeds():
    a, b, c = scattered(1, 0.0), scattered(2, 0.0), scattered(3, 0.0, seeds=(4, 5, 6))
    expected = estimate(a.scores - 0.4 * b.scores, -0.6 * c.scores)
    assert contrast((1.0, a), (-0.4, b), (-0.6, c)) == expected


def test_the_ends_of_the_share_are_where_what_remains_is_just_noise():
    lora, full, ours = scattered(1, 0.0), scattered(2, 3.0), scattered(3, 2.0)
    share, (low, high) = gap_closed(ours, lora, full)
    assert share == pytest.approx((ours.mean - lora.mean) / (full.mean - lora.mean))
    assert low < share < high
    for end in (low, high):
        found = contrast((1.0, ours), (-end, full), (end - 1.0, lora))
        assert abs(found.value) == pytest.approx(found.margin, rel=1e-3)
        assert found.p_value == pytest.approx(0.05, rel=1e-2)


def test_a_noiseless_gap_gives_the_interval_of_the_difference():
    lora, full = of(np.zeros((3, 1))), of(np.full((3, 1), 2.0))
    ours = of([[0.9], [1.0], [1.4]])
    share, interval = gap_closed(ours, lora, full)
    low, high = contrast((1.0, ours), (-1.0, lora)).interval
    assert share == pytest.approx(0.55)
    assert interval == pytest.approx((low / 2, high / 2), abs=1e-5)


def test_fiellers_formula_without_examples_and_without_correlation_to_the_recipe():
    # With one column the quantile is the same for every share, and the ends solve a quadratic equation.
    lora, full, ours = (
        of([[0.0], [0.1], [-0.1], [0.2]]),
        of([[2.0], [2.3], [1.9], [2.1]]),
        of([[1.0], [1.4], [1.2], [1.1]]),
    )
    d, g = (ours.scores - lora.scores)[:, 0], (full.scores - lora.scores)[:, 0]
    covariance = np.cov(d, g) / 4
    t = stats.t.ppf(0.975, 3)
    roots = np.roots(
        [
            g.mean() ** 2 - t**2 * covariance[1, 1],
            -2 * (d.mean() * g.mean() - t**2 * covariance[0, 1]),
            d.mean() ** 2 - t**2 * covariance[0, 0],
        ]
    )
    assert gap_closed(ours, lora, full)[1] == pytest.approx(tuple(sorted(roots)), abs=1e-5)


def test_a_share_that_is_the_same_for_every_seed_says_nothing_of_its_noise():
    lora, full = of([[0.0], [0.1]]), of([[1.0], [1.1]])
    assert gap_closed(of([[0.5], [0.6]]), lora, full) == (pytest.approx(0.5), None)
    assert gap_closed(lora, lora, full) == (pytest.approx(0.0), None)


ANSWERS = {"all right": 60, "all but one": 59, "half": 30, "none": 0}


@pytest.mark.parametrize("right", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_the_interval_of_an_accuracy_lies_in_its_bounds_and_has_a_width(num_seeds, right):
    answers = np.tile(np.arange(60) < right, (num_seeds, 1)).astype(float)
    low, high = contrast((1.0, Sample(tuple(range(num_seeds)), answers, (0.0, 1.0)))).interval
    assert 0 <= low <= right / 60 <= high + 1e-12
    assert high <= 1
    wilson = stats.binomtest(right, 60).proportion_ci(method="wilson")
    assert high - low == pytest.approx(wilson.high - wilson.low, rel=0.25)
    if right == 60:
        assert 0.91 < low < 0.95


@pytest.mark.parametrize("metric", ["accuracy", "exact_match"])
def test_right_answers_are_counted_over_seeds_and_examples(metric):
    answers = np.random.default_rng(5).random((3, 80)) < 0.4
    runs = [
        make_record(seed=seed, correct=row.tolist(), metrics={"test": {"loss": 1.2, metric: row.mean()}})
        for seed, row in enumerate(answers)
    ]
    found = sample(runs, metric)
    assert (found.scores == answers).all()
    assert found.bounds == (0.0, 1.0)
    alone = sample([run.model_copy(update={"correct": None}) for run in runs], metric)
    # three means show less of the noise than 240 answers
    (low, high), (least, most) = contrast((1.0, found)).interval, contrast((1.0, alone)).interval
    assert (low, high) != (least, most)
    assert (low, high) == contrast((1.0, Sample((0, 1, 2), answers.astype(float), (0.0, 1.0)))).interval


def test_differences_keep_to_the_bounds_of_their_metric():
    shares = (0.0, 1.0)
    ours, theirs = (
        Sample((0, 1), np.array([[0.9], [0.2]]), shares),
        Sample((0, 1), np.array([[0.1], [0.7]]), shares),
    )
    assert contrast((1.0, ours), (-1.0, theirs)).interval == (-1.0, 1.0)
    assert contrast((1.0, ours)).interval == shares
    losses = (0.0, np.inf)
    ours, theirs = Sample((0, 1), ours.scores, losses), Sample((0, 1), theirs.scores, losses)
    assert contrast((1.0, ours)).interval[0] == 0.0
    low, high = contrast((1.0, ours), (-1.0, theirs)).interval
    assert low < -1 < 1 < high


def test_equal_answers_leave_an_interval_about_zero():
    answers = of(np.random.default_rng(4).random((2, 60)) < 0.9)
    found = contrast((1.0, answers), (-1.0, answers))
    assert found.p_value == pytest.approx(1.0)
    assert -0.5 < found.interval[0] < 0 < found.interval[1] < 0.5


def test_a_single_seed_has_a_share_without_an_interval():
    lora, full = scattered(1, 0.0), scattered(2, 3.0)
    share, interval = gap_closed(scattered(3, 2.0, shape=(1, 40)), lora, full)
    assert 0.3 < share < 1
    assert interval is None
