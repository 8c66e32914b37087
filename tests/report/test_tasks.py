import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tangora.report.comparison.study import tasks_verdict
from tangora.report.statistics import tasks as over_tasks
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import diverged, make_comparison, make_record

SEEDS = 4


def task(title, means, noise=0.01, num_seeds=SEEDS, **changes):
    rng = np.random.default_rng(sum(map(ord, title)))
    records = [
        make_record(recipe, seed=seed, test=mean + noise * rng.standard_normal())
        for recipe, mean in means.items()
        for seed in range(num_seeds)
    ]
    return make_comparison(records, title=title, **changes)


def matrix(comparisons):
    return over_tasks.matrix({comparison.title: judge(comparison) for comparison in comparisons})


MEANS = {"lora": 0.5, "good": 0.9, "bad": 0.1, "same": 0.5}


def values(comparison, recipe):
    return [record.metrics["test"]["accuracy"] for record in comparison.records if record.recipe == recipe]


def test_wins_ties_and_losses_against_lora():
    found = matrix([task("x", MEANS), task("y", MEANS)])
    assert list(found.tasks) == ["x", "y"]
    assert found.count_against_lora("good") == {"win": 2, "tie": 0, "loss": 0}
    assert found.count_against_lora("bad") == {"win": 0, "tie": 0, "loss": 2}
    assert found.count_against_lora("same") == {"win": 0, "tie": 2, "loss": 0}
    assert {duel.theirs for duel in found.against_lora} == {"lora"}


def test_p_values_are_those_of_the_paired_t_test_corrected_over_the_family():
    tasks = [task("x", MEANS, noise=0.2), task("y", MEANS, noise=0.2)]
    found = matrix(tasks)
    assert len(found.against_lora) == 2 * 3
    assert len(found.pairs) == 2 * 6
    by_title = {comparison.title: comparison for comparison in tasks}
    for family in (found.against_lora, found.pairs):
        raw = [
            stats.ttest_rel(
                values(by_title[duel.task], duel.ours), values(by_title[duel.task], duel.theirs)
            ).pvalue
            for duel in family
        ]
        assert [duel.p_value for duel in family] == pytest.approx(raw, rel=1e-6)
        corrected = multipletests(raw, method="holm")[1]
        assert [duel.p_corrected for duel in family] == pytest.approx(list(corrected), rel=1e-6)


def test_a_duel_reads_in_both_directions():
    found = matrix([task("x", MEANS, noise=0.001)])
    ours, theirs = found.duel("x", "good", "bad"), found.duel("x", "bad", "good")
    assert (ours.outcome, theirs.outcome) == ("win", "loss")
    assert ours.difference == -theirs.difference
    assert ours.interval == (-theirs.interval[1], -theirs.interval[0])
    assert ours.p_corrected == theirs.p_corrected
    assert found.count("good", "bad")["win"] == found.count("bad", "good")["loss"] == 1
    assert found.duel("x", "good", "unknown") is None


def test_the_smaller_loss_wins():
    lower = {"metric": "loss", "higher_is_better": False}
    found = matrix([task("x", MEANS, **lower)])  # the synthetic loss is 1 - accuracy
    assert found.count_against_lora("good")["win"] == 1
    assert found.duel("x", "good", "lora").difference < 0
    assert found.mean_ranks["good"] == 1


def test_tasks_may_differ_in_metric_and_recipes():
    second = task("y", {"lora": 0.5, "good": 0.9}, metric="loss", higher_is_better=False)
    found = matrix([task("x", MEANS), second])
    assert found.count_against_lora("good")["win"] == 2
    assert found.count_against_lora("bad")["loss"] == 1
    assert found.mean_ranks == {"good": 1.0, "lora": 2.0}  # only where both tasks have a result
    assert found.recipes[:2] == ("good", "lora")
    assert set(found.recipes) == set(MEANS)


def test_a_single_seed_is_neither_win_nor_tie():
    found = matrix([task("x", MEANS, num_seeds=1)])
    assert {duel.outcome for duel in found.pairs} == {None}
    assert found.count_against_lora("good") == {"win": 0, "tie": 0, "loss": 0}
    assert found.mean_ranks["good"] == 1
    assert "at least two seeds" in tasks_verdict(found)[0]


def test_ranks_and_friedman():
    rng = np.random.default_rng(1)
    tasks = [task(str(index), {name: rng.random() for name in "abcd"}) for index in range(6)]
    found = matrix(tasks)
    means = np.array([[np.mean(values(comparison, name)) for name in "abcd"] for comparison in tasks])
    ranks = stats.rankdata(-means, axis=1).mean(axis=0)
    assert [found.mean_ranks[name] for name in "abcd"] == pytest.approx(list(ranks))
    assert [*found.mean_ranks] == sorted("abcd", key=lambda name: found.mean_ranks[name])
    assert found.rank_p_value == pytest.approx(stats.friedmanchisquare(*means.T).pvalue)
    assert matrix(tasks[:4]).rank_p_value is None


def test_recipes_that_tie_everywhere_share_a_rank():
    tasks = [task(str(index), dict.fromkeys("abc", 0.5), noise=0.0) for index in range(5)]
    found = matrix(tasks)
    assert found.mean_ranks == dict.fromkeys("abc", 2.0)
    assert found.rank_p_value == 1.0
    assert {duel.outcome for duel in found.pairs} == {None}  # equal numbers say nothing of the noise


def test_recipes_without_a_result_take_no_part():
    records = [*task("x", MEANS).records, diverged("none", 1e-4)]
    assert "none" not in matrix([make_comparison(records, title="x")]).recipes


def test_sentences():
    found = tasks_verdict(matrix([task("x", MEANS, noise=1e-3), task("y", MEANS, noise=1e-3)]))
    assert found[0] == (
        "Against lora, corrected for 6 comparisons (Holm): good wins on 2 tasks; bad loses on 2 tasks; 2 ties."
    )
    assert found[1] == (
        "Of 12 pairs of recipes on a task, 10 differ significantly after correction for all of them."
    )
    assert found[2].startswith("Mean ranks over 2 tasks: good 1.0, ")
    assert found[2].endswith("; fewer than 5 tasks are too few to separate such ranks from chance.")
    same = tasks_verdict(matrix([task(t, dict.fromkeys(("lora", "a", "b"), 0.5)) for t in "vwxyz"]))
    assert "no recipe wins or loses; 10 ties" in same[0]
    assert "no more than chance explains (Friedman, p = " in same[2]
    clear = tasks_verdict(matrix([task(t, MEANS | {"same": 0.6}) for t in "vwxyz"]))
    assert "more than chance explains (Friedman, p = 0.0018)" in clear[2]
