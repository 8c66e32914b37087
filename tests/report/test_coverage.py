"""How often the intervals hold the truth, and how often no effect is called a win: as in benchmarks/intervals.py."""

import numpy as np
import pytest
from scipy.special import ndtri

from tangora.report import summarize
from tangora.report.statistics.intervals import estimate, holm, mixture, tail
from tangora.report.statistics.judgement import judge
from tangora.report.statistics.samples import Sample, contrast, gap_closed
from tangora.report.statistics.tasks import matrix
from tests.report.synthetic import make_comparison, make_record

TRIALS = 1000
# Standard error of a share of 0.95 over 1000 trials: 0.7 %; the promise is about the true coverage.
LOW, HIGH = 0.92, 0.98

# Shares of the variance of the mean that are due to seeds, examples, and neither.
REGIMES = {
    "seeds": (1.0, 0.0, 0.0),
    "examples": (0.0, 1.0, 0.0),
    "both": (0.5, 0.5, 0.0),
    "neither": (0.0, 0.0, 1.0),
    "all": (1 / 3, 1 / 3, 1 / 3),
    "some examples": (0.9, 0.1, 0.0),
    "some seeds": (0.1, 0.9, 0.0),
}


def draw(rng, num_seeds, num_examples, shares):
    """Scores of mean 0, with a standard error of the mean of 1."""
    seeds, examples, rest = np.sqrt(shares)
    return (
        seeds * rng.normal(0, np.sqrt(num_seeds), (num_seeds, 1))
        + examples * rng.normal(0, np.sqrt(num_examples), (1, num_examples))
        + rest * rng.normal(0, np.sqrt(num_seeds * num_examples), (num_seeds, num_examples))
    )


def p_values(scores, truth=0.0):
    """Of many simulations at once: below 0.05 exactly where the interval does not hold the truth."""
    variances, weights = mixture(scores)
    return tail(np.abs(scores.mean(axis=(1, 2)) - truth), variances, weights, max(scores.shape[2] - 1, 1))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("regime", REGIMES)
def test_seeds_and_examples(regime, num_seeds):
    rng = np.random.default_rng(10)
    held = np.mean(
        [p_values(draw(rng, num_seeds, 100, REGIMES[regime])[None]) >= 0.05 for _ in range(TRIALS)]
    )
    assert held >= LOW
    if regime == "seeds":  # no more than it must
        assert held <= HIGH


def test_other_seeds_for_both_methods():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(TRIALS // 2):
        examples = rng.normal(0, 5, (1, 60))
        ours, theirs = (examples + draw(rng, size, 60, (0.5, 0.3, 0.2)) for size in (3, 4))
        found.append(estimate(ours, -theirs).p_value)
    assert np.mean(np.array(found) >= 0.05) >= LOW


def answers(rng, num_seeds, difficulty, accuracy, seed_effect):
    """0/1 scores, seeds x examples, of a known expected accuracy: a threshold on a sum of normal variables."""
    noise = 0.3
    total = np.sqrt(1 + seed_effect**2 + noise**2)
    seeds = rng.normal(0, seed_effect, (num_seeds, 1))
    latent = ndtri(accuracy) * total + difficulty + seeds + rng.normal(0, noise, (num_seeds, difficulty.size))
    return (latent > 0).astype(float)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_effect", [0.0, 0.1, 0.4])
def test_paired_accuracies(seed_effect, num_seeds):
    rng = np.random.default_rng(13)
    found, null = [], []
    for _ in range(TRIALS):
        difficulty = rng.normal(0, 1, 150)
        ours, theirs, same = (answers(rng, num_seeds, difficulty, a, seed_effect) for a in (0.93, 0.90, 0.90))
        found.append(ours - theirs)
        null.append(same - theirs)
    assert np.mean(p_values(np.array(found), 0.03) >= 0.05) >= LOW
    assert np.mean(p_values(np.array(null)) < 0.05) <= 1 - LOW


@pytest.mark.parametrize("num_examples", [60, 200])
@pytest.mark.parametrize("accuracy", [0.9, 0.97])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_effect", [0.0, 0.3])
def test_none_of_equal_methods_differs_from_lora(seed_effect, num_seeds, accuracy, num_examples):
    """Few answers differ, in whole numbers, so that seeds agree by chance."""
    rng = np.random.default_rng(18)
    shape = (500, num_seeds, num_examples)
    easy, base = rng.random((500, 1, num_examples)) < 0.8, rng.random((500, 1, num_examples)) < accuracy

    def method():
        threshold = ndtri(accuracy) * np.sqrt(1 + seed_effect**2) + seed_effect * rng.normal(
            size=(*shape[:2], 1)
        )
        return np.where(easy, base, rng.standard_normal(shape) < threshold).astype(float)

    lora = method()
    found = np.array([p_values(method() - lora) for _ in range(13)])
    for others in (1, 3, 13):  # as Holm: the smallest
        assert np.mean(found[:others].min(axis=0) * others < 0.05) <= 0.05 + 2 * 0.0097


@pytest.mark.parametrize(("num_seeds", "least"), [(3, 0.4), (5, 0.85)])
def test_an_effect_is_found(num_seeds, least):
    rng = np.random.default_rng(19)
    shape = (300, num_seeds, 400)
    ours, theirs = (rng.random(shape) < accuracy for accuracy in (0.95, 0.85))
    assert np.mean(3 * p_values(ours.astype(float) - theirs) < 0.05) > least


@pytest.mark.parametrize("accuracy", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_mean_accuracies(num_seeds, accuracy):
    rng = np.random.default_rng(20)
    held = []
    for _ in range(300):
        scores = answers(rng, num_seeds, rng.normal(0, 1, 100), accuracy, 0.1)
        low, high = contrast((1.0, Sample(tuple(range(num_seeds)), scores, (0.0, 1.0)))).interval
        assert 0 <= low < high <= 1
        held.append(low <= accuracy <= high)
    assert np.mean(held) >= 0.95 - 2 * 0.0126


@pytest.mark.parametrize("seed_effect", [0.0, 0.5])
def test_share_of_the_gap(seed_effect):
    rng = np.random.default_rng(14)
    held, trials = [], TRIALS // 10
    for _ in range(trials):
        examples = rng.normal(0, 2, (1, 60))
        lora, full, ours = (
            Sample(
                (0, 1, 2),
                mean + examples + rng.normal(0, 0.5 * seed_effect, (3, 1)) + rng.normal(0, 1, (3, 60)),
            )
            for mean in (0.0, 3.0, 1.8)
        )
        if contrast((1.0, full), (-1.0, lora)).interval[0] > 0:
            low, high = gap_closed(ours, lora, full)[1]
            held.append(low <= 0.6 <= high)
    assert len(held) > 0.8 * trials
    assert np.mean(held) >= 0.9  # standard error: 2 %


TEMPLATE = make_record(history=[], evaluations=[])


def comparison(rng, accuracies, title="task", num_seeds=3):
    """Records with the answers to the same examples."""
    difficulty = rng.normal(0, 1, 60)
    records = []
    for recipe, accuracy in accuracies.items():
        for seed, row in enumerate(answers(rng, num_seeds, difficulty, accuracy, 0.1) > 0):
            metrics = {"validation": {"accuracy": 0.5}, "test": {"accuracy": row.mean()}}
            changes = {"id": f"{recipe}-{seed}", "recipe": recipe, "seed": seed, "correct": row.tolist()}
            records.append(TEMPLATE.model_copy(update=changes | {"metrics": metrics}))
    return make_comparison(records, title=title)


@pytest.mark.slow
def test_records_with_a_known_effect():
    rng = np.random.default_rng(15)
    rows = [
        {row.recipe: row for row in summarize(comparison(rng, {"lora": 0.8, "same": 0.8, "full": 0.9}))}
        for _ in range(TRIALS // 4)
    ]
    for recipe, truth in {"same": 0.0, "full": 0.1}.items():
        ends = [row[recipe].difference_interval for row in rows]
        assert np.mean([low <= truth <= high for low, high in ends]) >= LOW
    for recipe, truth in {"lora": 0.8, "same": 0.8, "full": 0.9}.items():
        ends = [row[recipe].interval for row in rows]
        assert np.mean([low <= truth <= high for low, high in ends]) >= LOW
    assert np.mean([row["same"].side > 0 for row in rows]) <= 0.05
    assert np.mean([row["full"].side > 0 for row in rows]) > 0.3  # and an effect is found


@pytest.mark.slow
def test_no_effect_on_several_tasks_is_no_win_anywhere():
    rng = np.random.default_rng(16)
    wins = []
    for _ in range(60):
        tasks = [comparison(rng, dict.fromkeys("abc", 0.8) | {"lora": 0.8}, title) for title in "xy"]
        found = matrix({task.title: judge(task) for task in tasks})
        wins.append(
            [
                any(duel.outcome in ("win", "loss") for duel in family)
                for family in (found.against_lora, found.pairs)
            ]
        )
    # standard error of 5 % over 60 trials: 2.8 %
    assert (np.mean(wins, axis=0) <= 0.1).all()


def test_without_correction_some_of_many_recipes_would_win():
    rng = np.random.default_rng(17)
    raw, corrected = [], []
    for _ in range(200):
        scores = rng.normal(0, 1, (11, 3, 1))
        p_values = [estimate(ours - scores[0]).p_value for ours in scores[1:]]
        raw.append(min(p_values) < 0.05)
        corrected.append(min(holm(p_values)) < 0.05)
    assert np.mean(raw) > 0.15
    assert np.mean(corrected) <= 0.05 + 2 * 0.0154
