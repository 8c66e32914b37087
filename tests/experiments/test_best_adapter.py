"""The adapter that a comparison hands on is that of the recipe that its report recommends."""

from pathlib import Path

from tangora.cli.results import adapter_words
from tangora.experiments.compare import Outcome
from tangora.experiments.comparison.best_adapter import by_preference
from tangora.report import recommendation
from tangora.report.comparison.recommendation import recommend
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import diverged, make_comparison, make_record
from tests.report.test_verdict import BETTER, CLEAR, NOISY, runs, taking


def preferred(*records):
    judged = judge(make_comparison([run for group in records for run in group]))
    return by_preference(judged, recommend(judged))


def test_the_recommended_recipe_comes_before_a_better_test_result():
    found = preferred(
        runs("best", NOISY, time=taking(30)),
        runs("cheap", CLEAR, time=taking(10)),
        runs("bad", [0.5, 0.51, 0.52], time=taking(1)),
    )
    assert list(dict.fromkeys(run.recipe for run in found)) == ["cheap", "best", "bad"]
    assert {run.learning_rate for run in found} == {2e-4}


def test_of_one_recipe_the_seed_with_the_best_validation_metric_comes_first():
    validations = [0.90, 0.95, 0.92]
    records = [
        make_record("lora", 1e-4, seed, validation=value, test=1 - value)
        for seed, value in enumerate(validations)
    ]
    assert [run.seed for run in preferred(records)] == [1, 2, 0]
    losses = [
        make_record("lora", seed=seed, metrics={"validation": {"loss": value}, "test": {"loss": value}})
        for seed, value in enumerate(validations)
    ]
    judged = judge(make_comparison(losses, metric="loss", higher_is_better=False))
    assert [run.seed for run in by_preference(judged, recommend(judged))] == [0, 2, 1]


def test_with_one_seed_validation_data_decide_as_in_the_report():
    found = preferred(
        [make_record("a", test=0.8, validation=0.95)], [make_record("b", test=0.9, validation=0.9)]
    )
    assert [run.recipe for run in found] == ["a", "b"]
    assert preferred([diverged("lora", 1e-4)]) == []


def test_the_printed_line_says_why_it_is_not_the_recommended_one():
    comparison = make_comparison([*runs("lora", CLEAR), *runs("full", BETTER)])
    assert recommendation(comparison).recipe == "full"
    assert adapter_words(Outcome(comparison, Path("p"), Path("a"), "full")) == "full"
    said = adapter_words(Outcome(comparison, Path("p"), Path("a"), "lora"))
    assert said.startswith("lora; full, ")
    one_seed = make_comparison([make_record("a"), make_record("b")])
    assert adapter_words(Outcome(one_seed, Path("p"), Path("a"), "b")) == "b"
