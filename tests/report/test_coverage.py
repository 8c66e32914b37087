"""How often the intervals hold the truth, and how often no effect is called a win: 1000 simulated studies each."""

import numpy as np
import pytest
from scipy.special import ndtri

from tangora.report import summarize
from tangora.report.statistics.intervals import estimate, holm
from tangora.report.statistics.samples import Sample, contrast, gap_closed
from tangora.report.statistics.summary import leads
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


def covered(estimates, truth):
    return np.mean([abs(found.value - truth) <= found.margin for found in estimates])


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("regime", REGIMES)
def test_seeds_and_examples(regime, num_seeds):
    rng = np.random.default_rng(10)
    found = [estimate(0.3 + draw(rng, num_seeds, 100, REGIMES[regime])) for _ in range(TRIALS)]
    assert LOW <= covered(found, 0.3) <= HIGH
    if regime == "examples":  # few seeds do not widen what does not depend on them
        assert np.mean([estimated.margin for estimated in found]) < 1.05 * 1.96


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_one_number_per_seed(num_seeds):
    rng = np.random.default_rng(11)
    found = [estimate(rng.normal(0.3, 1.0, (num_seeds, 1))) for _ in range(TRIALS)]
    assert LOW <= covered(found, 0.3) <= HIGH


def test_other_seeds_for_both_methods():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(TRIALS):
        examples = rng.normal(0, 5, (1, 60))
        ours, theirs = (examples + draw(rng, size, 60, (0.5, 0.3, 0.2)) for size in (3, 4))
        found.append(estimate(ours, -theirs))
    assert LOW <= covered(found, 0.0) <= HIGH


def answers(rng, num_seeds, difficulty, accuracy, seed_effect):
    """0/1 scores, seeds x examples, of a known expected accuracy: a threshold on a sum of normal variables."""
    noise = 0.3
    total = np.sqrt(1 + seed_effect**2 + noise**2)
    seeds = rng.normal(0, seed_effect, (num_seeds, 1))
    latent = ndtri(accuracy) * total + difficulty + seeds + rng.normal(0, noise, (num_seeds, difficulty.size))
    return (latent > 0).astype(float)


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("seed_effect", [0.0, 0.1, 0.4])
def test_paired_accuracies(seed_effect, num_seeds):
    rng = np.random.default_rng(13)
    found, null = [], []
    for _ in range(TRIALS):
        difficulty = rng.normal(0, 1, 150)
        ours, theirs, same = (answers(rng, num_seeds, difficulty, a, seed_effect) for a in (0.93, 0.90, 0.90))
        found.append(estimate(ours - theirs))
        null.append(estimate(same - theirs))
    assert LOW <= covered(found, 0.03) <= HIGH
    assert np.mean([estimated.value > estimated.margin for estimated in null]) <= 0.05


@pytest.mark.parametrize("seed_effect", [0.0, 0.5])
def test_share_of_the_gap(seed_effect):
    rng = np.random.default_rng(14)
    shares = []
    for _ in range(TRIALS // 4):
        examples = rng.normal(0, 2, (1, 60))
        lora, full, ours = (
            Sample(
                (0, 1, 2),
                mean + examples + rng.normal(0, 0.5 * seed_effect, (3, 1)) + rng.normal(0, 1, (3, 60)),
            )
            for mean in (0.0, 3.0, 1.8)
        )
        gap = contrast((1.0, full), (-1.0, lora))
        if gap.interval[0] > 0:
            shares.append(gap_closed(ours, lora, full)[1])
    assert len(shares) > 0.9 * TRIALS // 4
    assert LOW <= np.mean([low <= 0.6 <= high for low, high in shares]) <= 0.99  # standard error: 1.4 %


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
        for _ in range(TRIALS)
    ]
    for recipe, truth in {"same": 0.0, "full": 0.1}.items():
        ends = [row[recipe].difference_interval for row in rows]
        assert LOW <= np.mean([low <= truth <= high for low, high in ends]) <= HIGH
    for recipe, truth in {"lora": 0.8, "same": 0.8, "full": 0.9}.items():
        ends = [row[recipe].interval for row in rows]
        assert LOW <= np.mean([low <= truth <= high for low, high in ends]) <= HIGH
    assert np.mean([leads(row["same"]) for row in rows]) <= 0.05
    assert np.mean([leads(row["full"]) for row in rows]) > 0.4  # and an effect is found


@pytest.mark.slow
def test_no_effect_on_several_tasks_is_no_win_anywhere():
    rng = np.random.default_rng(16)
    wins = []
    for _ in range(200):
        tasks = [comparison(rng, dict.fromkeys("abc", 0.8) | {"lora": 0.8}, title) for title in "xy"]
        found = matrix(tasks)
        wins.append(
            [
                any(duel.outcome in ("win", "loss") for duel in family)
                for family in (found.against_lora, found.pairs)
            ]
        )
    # standard error of 5 % over 200 trials: 1.5 %
    assert (np.mean(wins, axis=0) <= 0.08).all()


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
