import math
from dataclasses import replace

import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tangora._checks import InputError
from tangora.report import (
    EvaluationRecord,
    StepRecord,
    TimeSplit,
    best_learning_rate,
    summarize,
    sweep_points,
)
from tests.report.synthetic import (
    NUM_EXAMPLES,
    diverged,
    make_comparison,
    make_record,
    realistic,
    realistic_rows,
)


def row_of(records, recipe="lora", **changes):
    return next(row for row in summarize(make_comparison(records, **changes)) if row.recipe == recipe)


def sweep(validation, **changes):
    """One run per learning rate 1e-4, 2e-4, …"""
    return [
        make_record("lora", (index + 1) * 1e-4, validation=value, **changes)
        for index, value in enumerate(validation)
    ]


def steps(number):
    return {"history": [StepRecord(step=number, loss=1.0, learning_rate=1e-4)], "evaluations": []}


def run(rate, validation, seed=0, **changes):
    return make_record("lora", rate, seed, validation=validation, **changes)


FAILED = {"status": "failed", "error": "bug"}
CHOICES = {
    "validation decides, not test": (
        [run(1e-4, 0.90, test=0.99), run(2e-4, 0.91, test=0.5), run(4e-4, 0.89)],
        2e-4,
    ),
    "by the mean over seeds": ([run(1e-4, 0.9), run(2e-4, 1.0), run(2e-4, 0.7, 1)], 1e-4),
    "ties go to the smaller one": (sweep([0.9, 0.9, 0.9]), 1e-4),
    "diverged runs never win": ([*sweep([0.8, 0.7]), diverged("lora", 1e-2)], 1e-4),
    "survivors do not speak for diverged seeds": (
        [run(1e-4, 0.8), run(2e-4, 0.95), diverged("lora", 2e-4, 1)],
        1e-4,
    ),
    "unless nothing better is left": ([run(2e-4, 0.95), diverged("lora", 2e-4, 1)], 2e-4),
    "no metric is no win": ([*sweep([0.8]), run(9e-4, math.nan)], 1e-4),
    "trials do not choose": ([*sweep([0.8, 0.7]), run(1e-3, 0.99, stage="trial")], 1e-4),
    "nor do final runs": ([run(1e-4, 0.9), run(2e-4, 0.95), run(2e-4, 0.5, 1, stage="final")], 2e-4),
}


@pytest.mark.parametrize(("records", "rate"), CHOICES.values(), ids=CHOICES)
def test_the_choice_of_the_learning_rate(records, rate):
    assert row_of(records).learning_rate == rate


def test_lower_may_be_better():
    row = row_of(sweep([0.9, 0.95, 0.8]), metric="loss", higher_is_better=False)
    assert row.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("records", "edge"),
    [
        (sweep([0.9, 0.8, 0.7]), "low"),
        (sweep([0.7, 0.8, 0.9]), "high"),
        (sweep([0.7, 0.9, 0.8]), None),
        (sweep([0.9]), None),
        ([*sweep([0.8, 0.9]), diverged("lora", 1e-3)], None),  # which brackets, and a failure does not
        ([*sweep([0.8, 0.9]), run(1e-3, 0.9, **FAILED)], "high"),
    ],
)
def test_edge_of_the_grid(records, edge):
    assert row_of(records).edge == edge


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_all_runs_are_counted(status):
    records = [*sweep([0.8, 0.9]), run(1e-3, 0.9, status=status, error="bug"), diverged("lora", 1e-2)]
    row = row_of([*records, run(1e-3, 0.99, stage="trial")])
    assert (row.num_runs, row.num_diverged, row.num_failed, row.num_learning_rates) == (5, 1, 1, 4)
    assert row.num_out_of_memory == (status == "out_of_memory")


def test_nothing_finished():
    row = row_of([diverged("lora", 1e-4), make_record("full", status="failed", error="bug", metrics={})])
    assert (row.learning_rate, row.test, row.interval, row.time, row.num_seeds) == (None, None, None, None, 0)
    assert row.num_diverged == 1


def test_final_runs_are_judged_with_the_sweep_run_of_another_seed():
    final = [make_record("lora", 1e-4, seed, test=0.6, stage="final") for seed in (1, 2)]
    row = row_of([make_record("lora", 1e-4, 0, test=0.9), *final])
    assert (row.num_seeds, row.test) == (3, pytest.approx(0.7))


def test_a_final_run_replaces_the_sweep_run_of_its_seed():
    records = [
        make_record("lora", 1e-4, 0, test=0.5),
        *(make_record("lora", 1e-4, seed, test=0.7, stage="final") for seed in (0, 1)),
    ]
    assert row_of(records).test == pytest.approx(0.7)


def test_shorter_sweep_runs_do_not_count_as_seeds():
    records = [
        make_record("lora", 1e-4, 0, test=0.5, **steps(10)),
        *(make_record("lora", 1e-4, seed, test=0.7, stage="final", **steps(100)) for seed in (1, 2)),
    ]
    row = row_of(records)
    assert (row.num_seeds, row.test) == (2, pytest.approx(0.7))


def test_interval_over_seeds_needs_two():
    assert row_of([make_record()]).interval is None
    row = row_of([make_record(seed=seed, test=0.8 + seed / 100) for seed in range(5)])
    assert row.interval_over == "seeds"
    values = [0.8, 0.81, 0.82, 0.83, 0.84]
    assert row.interval == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval()))


def test_interval_over_examples():
    correct = [True] * 90 + [False] * 10
    row = row_of([make_record(test=0.9, correct=correct)])
    assert row.interval_over == "examples"
    assert row.interval[0] < 0.9 < row.interval[1]
    row = row_of([make_record(seed=seed, test=0.9, correct=correct) for seed in (0, 1)])
    assert row.interval_over == "seeds and examples"


@pytest.mark.parametrize(
    "correct", [[[True] * 10, [True] * 9], [[True] * 5 + [False] * 5] * 2, [[True] * 10, None], [[], []]]
)
def test_answers_that_do_not_fit_the_metric_are_not_resampled(correct):
    records = [
        make_record(seed=seed, test=1.0 - 0.01 * seed, correct=answers)
        for seed, answers in enumerate(correct)
    ]
    assert row_of(records).interval_over == "seeds"


def test_equal_numbers_of_all_seeds_have_no_interval():
    row = row_of([make_record(seed=seed, test=0.9) for seed in range(3)])
    assert (row.test, row.interval, row.interval_over, row.num_seeds) == (pytest.approx(0.9), None, None, 3)


def losses(seed, count=8):
    """Losses of test examples, which differ more than the seeds do."""
    return [0.1 * example + 0.001 * seed * (-1) ** example for example in range(count)]


def test_losses_of_single_examples_are_used_where_the_loss_decides():
    runs = [
        make_record(seed=seed, test=1 - sum(losses(seed)) / 8, scores=losses(seed), correct=[True] * 8)
        for seed in range(3)
    ]
    on_loss = {"metric": "loss", "higher_is_better": False}
    row = row_of(runs, **on_loss)
    assert row.interval_over == "seeds and examples"
    assert row.test == pytest.approx(0.35)
    assert row.interval[0] < 0.25 < 0.45 < row.interval[1]
    assert row_of(runs).interval_over != "seeds and examples"  # they are no accuracies
    broken = [run.model_copy(update={"scores": [math.nan] * 8}) for run in runs]
    assert row_of(broken, **on_loss).interval_over != "seeds and examples"


def noisy(recipe, values, **changes):
    return [make_record(recipe, seed=seed, test=value, **changes) for seed, value in enumerate(values)]


LORA = noisy("lora", [0.80, 0.82, 0.81, 0.79])


def test_p_values_are_corrected_for_the_recipes_but_not_for_full_fine_tuning():
    better = [[0.83, 0.84, 0.84, 0.83], [0.80, 0.84, 0.82, 0.80], [0.82, 0.83, 0.83, 0.82]]
    records = LORA + [run for index, values in enumerate(better) for run in noisy(f"r{index}", values)]
    records += noisy("full", [0.85, 0.88, 0.86, 0.86])
    rows = {row.recipe: row for row in summarize(make_comparison(records))}
    raw = [rows[name].p_value for name in ("r0", "r1", "r2")]
    assert raw == pytest.approx(
        [stats.ttest_rel(values, [0.80, 0.82, 0.81, 0.79]).pvalue for values in better], rel=1e-6
    )
    expected = multipletests(raw, method="holm")[1]
    assert [rows[name].p_corrected for name in ("r0", "r1", "r2")] == pytest.approx(list(expected))
    assert rows["full"].p_corrected == rows["full"].p_value
    assert rows["lora"].p_value is None


def test_a_win_needs_the_corrected_p_value():
    alone = LORA + noisy("a", [0.81, 0.84, 0.825, 0.80])
    row = row_of(alone, "a")
    assert row.p_value < 0.05
    assert row.side == 1
    among = alone + [run for index in range(9) for run in noisy(f"r{index}", [0.79, 0.83, 0.80, 0.80])]
    row = row_of(among, "a")
    assert row.p_value < 0.05 < row.p_corrected
    assert row.difference_interval[0] > 0
    assert row.side == 0


def test_a_single_seed_never_wins():
    records = [
        make_record("lora", test=0.2, correct=[True] * 20 + [False] * 80),
        make_record("a", test=0.9, correct=[True] * 90 + [False] * 10),
    ]
    row = row_of(records, "a")
    assert row.difference_interval[0] > 0.5  # by what the examples say
    assert row.p_value is None
    assert row.side == 0


def test_difference_from_full_fine_tuning():
    ours, full = [0.83, 0.84, 0.84, 0.83], [0.85, 0.88, 0.86, 0.86]
    row = row_of(LORA + noisy("a", ours) + noisy("full", full), "a")
    assert row.versus_full == pytest.approx(-0.0275)
    assert row.versus_full_interval == pytest.approx(tuple(stats.ttest_rel(ours, full).confidence_interval()))
    assert row_of(noisy("full", full), "full").versus_full is None


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (LORA + noisy("a", [0.9] * 4), "full or lora has no test result"),
        (LORA[:1] + noisy("a", [0.9]) + noisy("full", [0.95]), "a single seed"),
        (LORA + noisy("a", [0.9] * 4) + noisy("full", [0.9, 0.92, 0.91, 0.89]), "the same difference"),
        (LORA + noisy("a", [0.9] * 4) + noisy("full", [0.5, 0.51, 0.52, 0.5]), "is worse than lora"),
        (LORA + noisy("a", [0.9] * 4) + noisy("full", [0.7, 0.9, 0.8, 0.9]), "not significantly better"),
    ],
)
def test_why_there_is_no_share(records, reason):
    row = row_of(records, "a")
    assert row.gap_closed is None
    assert row.gap_closed_interval is None
    assert reason in row.gap_closed_missing


def gap(full, lora, other, num_seeds=3):
    """Three recipes whose seeds differ from each other by some 0.001."""
    return [
        make_record(recipe, seed=seed, test=value + (seed if recipe == "lora" else seed**2 % 3) / 1000)
        for recipe, value in {"full": full, "lora": lora, "tangent": other}.items()
        for seed in range(num_seeds)
    ]


def test_share_of_the_gap():
    records = gap(0.95, 0.90, 0.93)
    rows = {row.recipe: row for row in summarize(make_comparison(records))}
    tangent = rows["tangent"]
    assert tangent.difference == pytest.approx(0.03, abs=0.001)
    for (low, high), middle in ((tangent.difference_interval, 0.03), (tangent.gap_closed_interval, 0.6)):
        assert 0.9 * middle < low < middle < high < 1.1 * middle
    assert tangent.gap_closed == pytest.approx(0.6, abs=0.01)
    assert rows["full"].gap_closed == pytest.approx(1.0)
    assert rows["full"].gap_closed_interval is None
    assert rows["lora"].gap_closed is None
    assert rows["lora"].difference is None


def test_share_of_the_gap_when_lower_is_better():
    rows = {
        row.recipe: row
        for row in summarize(make_comparison(gap(0.95, 0.90, 0.93), metric="loss", higher_is_better=False))
    }
    assert rows["tangent"].difference == pytest.approx(-0.03, abs=0.001)
    assert rows["tangent"].gap_closed == pytest.approx(0.6, abs=0.01)
    assert [*rows] == ["full", "tangent", "lora"]


def test_costs_are_means_at_the_chosen_learning_rate():
    slow = TimeSplit(start=2.0, forward_backward=10.0, optimizer=1.0, evaluation=3.0)
    fast = TimeSplit(start=0.0, forward_backward=6.0, optimizer=0.2, evaluation=1.0)
    row = row_of(
        [
            make_record(seed=0, time=slow, **steps(20)),
            make_record(seed=1, time=fast, **steps(20)),
            make_record(
                learning_rate=9e-4, validation=0.1, time=TimeSplit(**dict.fromkeys(dict(slow), 99.0))
            ),
        ]
    )
    assert row.time == TimeSplit(start=1.0, forward_backward=8.0, optimizer=0.6, evaluation=2.0)
    assert row.time.total == pytest.approx(11.6)
    assert row.step_milliseconds == pytest.approx(1000 * 1.2 / 40)
    assert row.validation_loss == pytest.approx(0.1)
    assert row.peak_bytes is None


def test_steps_may_be_known_from_evaluations_only():
    record = make_record(history=[], evaluations=[EvaluationRecord(step=8, metrics={})])
    assert row_of([record]).step_milliseconds == pytest.approx(50.0)
    assert row_of([make_record(history=[], evaluations=[])]).step_milliseconds is None


def test_rows_are_sorted_and_deterministic():
    comparison = realistic()
    rows = realistic_rows()
    assert [row.test for row in rows] == sorted((row.test for row in rows), reverse=True)
    shuffled = comparison.model_copy(update={"records": comparison.records[::-1]})
    assert summarize(shuffled) == rows


def test_summary_agrees_with_the_records():
    row = next(row for row in realistic_rows() if row.recipe == "tangent")
    runs = [r for r in realistic().records if r.recipe == "tangent" and r.learning_rate == row.learning_rate]
    assert row.num_seeds == len(runs) == 3
    assert row.test == pytest.approx(sum(sum(run.correct) for run in runs) / (3 * NUM_EXAMPLES))


def test_the_rule_can_be_used_while_a_comparison_runs():
    points = sweep_points([*sweep([0.7, 0.9, 0.8]), diverged("lora", 1e-2)], "accuracy")
    assert [point.learning_rate for point in points] == [1e-4, 2e-4, pytest.approx(3e-4), 1e-2]
    assert points[3].num_diverged == 1
    assert best_learning_rate(points, higher_is_better=True) == 2e-4
    assert best_learning_rate([], higher_is_better=True) is None
    assert best_learning_rate([replace(points[0], validation=())], higher_is_better=True) is None


@pytest.mark.messages
def test_what_cannot_be_summarized():
    with pytest.raises(InputError, match="has no records yet"):
        summarize(make_comparison([]))
    with pytest.raises(InputError, match=r"metric must be one .* \(accuracy, loss\); got 'f1'"):
        summarize(make_comparison([make_record()], metric="f1"))
