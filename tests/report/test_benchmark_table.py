"""Benchmarks by recipe: means over seeds, intervals over seeds and examples, and where they stand."""

import csv
import io

import numpy as np
import pytest

from tangora.report import load_record, save_json
from tangora.report.comparison.benchmark_table import (
    benchmark_scores,
    benchmarks_section,
    rich_benchmarks,
    write_benchmarks,
)
from tangora.report.comparison.comparison_page import render_page
from tangora.report.comparison.published import published_section
from tangora.report.run_records import Benchmark, Published, Record
from tangora.report.statistics.intervals import estimate, holm
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import make_comparison, make_record

RECIPES = {"full": 0.7, "lora": 0.5, "lora-pro": 0.65, "tangent": 0.52}
SEEDS = (0, 1, 2)


def scored(right, metric="acc,none", **changes) -> Benchmark:
    values = {} if metric is None else {metric: float(np.mean(right))}
    fields = {
        "metric": metric,
        "metrics": values,
        "stderr": {},
        "higher_is_better": True,
        "num_examples": len(right),
        "scores": list(right),
        "num_fewshot": 0,
        "version": "1",
    }
    return Benchmark(**fields | changes)


def answers(recipe: str, seed: int, task: str, number: int = 60) -> list[float]:
    difficulty = np.random.default_rng(len(task)).random(number)  # the same for all
    noise = np.random.default_rng([seed, *map(ord, recipe)]).normal(0, 0.05, number)
    return (difficulty + noise < RECIPES[recipe]).astype(float).tolist()


def compared(
    benchmarks=lambda recipe, seed: {
        name: scored(answers(recipe, seed, name)) for name in ("boolq", "piqa_")
    },
):
    return make_comparison([
        make_record(recipe, 1e-4, seed, test=0.9 + 0.001 * seed, benchmarks=benchmarks(recipe, seed))
        for recipe in RECIPES
        for seed in SEEDS
    ])  # fmt: skip


def table(recipe, name):
    return np.array([answers(recipe, seed, name) for seed in SEEDS])


def test_means_and_intervals_are_over_seeds_and_examples():
    found = {(score.recipe, score.benchmark): score for score in benchmark_scores(judge(compared()))}
    assert len(found) == len(RECIPES) * 3
    for recipe in RECIPES:
        for name in ("boolq", "piqa_"):
            score, ours = found[recipe, name], table(recipe, name)
            assert score.value == pytest.approx(ours.mean())
            assert score.interval[0] < ours.mean() < score.interval[1]
            assert (score.metric, score.num_seeds, score.num_examples) == ("acc", 3, 60)
            if recipe != "lora":
                difference = ours - table("lora", name)
                expected = estimate(
                    difference, unit=max(np.sqrt((x**2).mean()) for x in (ours, table("lora", name)))
                )
                assert score.difference == pytest.approx(difference.mean())
                assert score.difference_interval == pytest.approx(expected.interval)
    pairs = [(recipe, name) for name in ("boolq", "piqa_") for recipe in ("lora-pro", "tangent")]
    p_values = [
        estimate(
            table(recipe, name) - table("lora", name),
            unit=max(np.sqrt((table(each, name) ** 2).mean()) for each in (recipe, "lora")),
        ).p_value
        for recipe, name in pairs
    ]
    averages = [
        estimate(
            sum(table(recipe, name).mean(1) - table("lora", name).mean(1) for name in ("boolq", "piqa_"))[
                :, None
            ]
            / 2
        ).p_value
        for recipe in ("lora-pro", "tangent")
    ]
    corrected = holm([*p_values, *averages])
    assert [found[pair].p_corrected for pair in pairs] == pytest.approx(corrected[: len(pairs)], rel=1e-6)


def test_the_average_over_benchmarks():
    found = {(score.recipe, score.benchmark): score for score in benchmark_scores(judge(compared()))}
    for recipe in RECIPES:
        average = found[recipe, "average"]
        assert average.value == pytest.approx(
            np.mean([found[recipe, name].value for name in ("boolq", "piqa_")])
        )
        assert average.num_examples is None
    # of perplexities there is none, and none of a single benchmark
    mixed = {"piqa_": {}, "ppl": {"higher_is_better": False}}
    others = compared(
        lambda recipe, seed: {n: scored(answers(recipe, seed, n), **more) for n, more in mixed.items()}
    )
    alone = compared(lambda recipe, seed: {"boolq": scored(answers(recipe, seed, "boolq"))})
    for comparison in (others, alone):
        assert "average" not in {score.benchmark for score in benchmark_scores(judge(comparison))}


def test_a_metric_that_is_no_mean_has_an_interval_over_seeds():
    def benchmarks(recipe, seed):
        value = RECIPES[recipe] + 0.01 * seed
        return {"f1": scored([0.0] * 9, metrics={"acc,none": value}, scores=None)}

    found = {score.recipe: score for score in benchmark_scores(judge(compared(benchmarks)))}
    values = np.array([[0.5], [0.51], [0.52]])
    assert found["lora"].value == pytest.approx(0.51)
    assert found["lora"].interval == pytest.approx(estimate(values).interval)


def test_page_terminal_and_csv(tmp_path):
    comparison = compared()
    judged = judge(comparison)
    section = benchmarks_section(judged)
    assert list(section.table.headers) == ["recipe", "boolq acc", "piqa_ acc", "average"]
    assert [row[0].lines[0] for row in section.table.rows] == [row.recipe for row in judged.rows]
    assert 'id="benchmarks-table"' in render_page(comparison)
    assert len(rich_benchmarks(judged).rows) == len(RECIPES)
    write_benchmarks(judged, tmp_path / "benchmarks.csv")
    text = (tmp_path / "benchmarks.csv").read_text()
    assert section.downloads["benchmarks.csv"] == text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 3 * len(RECIPES)
    line = next(line for line in lines if (line["recipe"], line["benchmark"]) == ("tangent", "boolq"))
    assert float(line["value"]) == table("tangent", "boolq").mean()
    assert float(line["interval_low"]) < float(line["value"]) < float(line["interval_high"])
    assert "boolq_acc,none" in benchmarks_runs(comparison)[0]


def benchmarks_runs(comparison):
    from tangora.report.comparison.runs_table import runs_section

    return list(csv.DictReader(io.StringIO(runs_section(judge(comparison)).downloads["runs.csv"])))


def test_programs_that_were_not_run_have_no_score(tmp_path):
    comparison = compared(lambda recipe, seed: {"humaneval": scored([0.0] * 5, metric=None, scores=None)})
    section = benchmarks_section(judge(comparison))
    assert section.table is None
    assert "humaneval" in section.sentences[0]
    assert rich_benchmarks(judge(comparison)) is None
    write_benchmarks(judge(comparison), tmp_path / "benchmarks.csv")
    assert not (tmp_path / "benchmarks.csv").exists()
    assert "humaneval" in render_page(comparison)


def test_published_numbers_stand_beside_the_benchmark_of_that_name():
    paper = Published(source="a paper", results={"BoolQ": {"lora": 61.5}, "loss": {"lora": 0.3}})

    def column(comparison, header):
        section = published_section([comparison.model_copy(update={"paper": paper})])
        index = list(section.table.headers).index(header)
        return [row[index].value for row in section.table.rows]

    measured = compared().model_copy(update={"settings": {"benchmarks": ["boolq", "piqa_"]}})
    assert column(measured, "BoolQ, here") == [pytest.approx(100 * table("lora", "boolq").mean())]
    unjudged = compared(lambda recipe, seed: {"boolq": scored([0.0] * 5, metric=None, scores=None)})
    assert column(unjudged.model_copy(update={"settings": {"benchmarks": ["boolq"]}}), "BoolQ, here") == [
        None
    ]


def test_no_benchmarks_no_section():
    assert benchmarks_section(judge(compared(lambda recipe, seed: {}))) is None


def test_records_keep_them_and_older_ones_have_none(tmp_path):
    record = make_record(benchmarks={"boolq": scored([1.0, 0.0])})
    save_json(record, tmp_path / "record.json")
    assert load_record(tmp_path / "record.json") == record
    old = record.model_dump(mode="json")
    del old["benchmarks"]
    assert Record(**old).benchmarks == {}
