import pytest

from tangora.report import (
    TimeSplit,
    formats,
    recommendation,
    recommendation_sentence,
    summarize,
    verdict,
)
from tangora.report.run_records import MachineLoad, MemoryUse
from tests.report.synthetic import diverged, make_comparison, make_record


def sentences(records, **changes):
    found = verdict(summarize(make_comparison(records, **changes)))
    assert 2 <= len(found) <= 4
    assert all(sentence.endswith(".") for sentence in found)
    return found


def runs(recipe, values, rates=(1e-4, 2e-4, 4e-4), **changes):
    """A sweep best in the middle, and there one run per value."""
    edges = [make_record(recipe, rate, validation=0.1) for rate in (rates[0], rates[2])]
    return edges + [
        make_record(recipe, rates[1], seed, test=value, **changes) for seed, value in enumerate(values)
    ]


CLEAR = [0.90, 0.91, 0.92]
BETTER = [0.951, 0.959, 0.97]
NOISY = [0.85, 0.99, 0.92]


def test_a_clear_win():
    records = runs("lora", CLEAR) + runs("tangent", BETTER)
    row = summarize(make_comparison(records))[0]
    against, best, caution = sentences(records)
    noise = formats.interval(row.difference_interval, sign=True)
    assert against == (
        f"tangent (+0.0500, 95 % interval {noise}, corrected {formats.p_value(row.p_corrected)}) is significantly "
        "better than lora."
    )
    assert best == (
        f"tangent has the best test accuracy, 0.9600 (95 % interval {formats.interval(row.interval)}, 3 seeds), "
        "significantly better than lora (+0.0500)."
    )
    assert caution == "Every chosen learning rate is inside its grid, and no run diverged or failed."


def test_a_win_that_does_not_stand_up_to_correction():
    records = runs("lora", CLEAR) + runs("tangent", [0.915, 0.935, 0.945])
    assert "significantly better than lora" in sentences(records)[0]
    others = [run for name in "abcdefgh" for run in runs(name, [0.91, 0.90, 0.92])]
    against, best, _ = sentences(records + others)
    assert against.startswith(
        "No recipe is significantly different from lora; the best of the others: tangent ("
    )
    assert "not significant after correction for the number of recipes" in against
    assert best.startswith("tangent has the best")


def test_one_seed_claims_nothing():
    found = sentences(runs("lora", [0.90]) + runs("tangent", [0.95]) + runs("full", [0.94]))
    assert (
        "no difference from lora can be separated from noise; the best of the others: tangent (+0.0500)"
        in found[0]
    )
    assert "1 seed, no interval" in found[1]
    assert "one seed per recipe cannot separate this from noise" in found[2]


def test_better_and_worse_are_both_named():
    against = sentences(runs("lora", CLEAR) + runs("good", BETTER) + runs("bad", [0.809, 0.811, 0.82]))[0]
    better, worse = against.split("; ")
    assert better.startswith("good (")
    assert better.endswith("is significantly better than lora")
    assert worse.startswith("bad (")


def test_a_tie_names_all_with_their_intervals():
    tied = runs("a", NOISY) + runs("b", [0.92, 0.92, 0.92]) + runs("c", [0.92])
    rows = {row.recipe: row for row in summarize(make_comparison(runs("lora", CLEAR) + tied))}
    against, best, _ = sentences(runs("lora", CLEAR) + tied)
    assert all(f"{name} (+0.0100" in against for name in "abc")
    assert best.startswith("a, b and c share the best test accuracy, 0.9200 (")
    assert f"a: 95 % interval {formats.interval(rows['a'].interval)}, 3 seeds; b: " in best
    assert "c: 1 seed, no interval" in best
    assert best.endswith(", not significantly different from lora (+0.0100).")


def test_no_recommendation_of_a_single_rate():
    one_rate = [
        make_record(recipe, 1e-4, seed, test=value)
        for recipe, values in (("lora", CLEAR), ("tangent", BETTER))
        for seed, value in enumerate(values)
    ]
    found = recommendation(make_comparison(one_rate))
    assert not found.swept
    assert "try more learning rates first" in recommendation_sentence(found)


def test_times_of_a_busy_machine_decide_nothing():
    records = runs("lora", CLEAR) + runs("tangent", [0.91, 0.90, 0.92])
    busy = MachineLoad(before=9.0, after=9.0, processors=2)
    records = [record.model_copy(update={"load": busy}) for record in records]
    found = recommendation(make_comparison(records))
    assert found.seconds is None
    assert "too busy to compare times" in recommendation_sentence(found)


LORA, LORA_BEST = runs("lora", CLEAR), runs("lora", BETTER)
SAID = {
    "within noise": ([LORA, runs("x", NOISY)], 0, "x is not significantly different from lora (+0.0100, "),
    "the best, within noise": (
        [LORA, runs("x", NOISY)],
        1,
        ", not significantly different from lora (+0.0100).",
    ),
    "a tie with lora": ([LORA, runs("x", [0.91, 0.90, 0.92])], 1, "lora and x share the best test accuracy"),
    "lora wins": (
        [LORA_BEST, runs("x", CLEAR)],
        0,
        "No recipe is significantly better than lora; x (−0.0500, ",
    ),
    "the next is worse": ([LORA_BEST, runs("x", CLEAR)], 1, "the next, x, is significantly worse (−0.0500)."),
    "the next is not": ([LORA_BEST, runs("x", NOISY)], 1, "the next, x, is not significantly different ("),
    "the next of one seed": ([runs("lora", [0.9]), runs("x", [0.8])], 1, "one seed per recipe cannot tell"),
    "apart, without lora": ([runs("a", BETTER), runs("b", CLEAR)], 0, "does not overlap that of the next, b"),
    "level, without lora": ([runs("a", BETTER), runs("b", NOISY)], 0, "overlaps that of the next, b"),
    "one seed, without lora": ([runs("a", BETTER), runs("b", [0.8])], 0, "one seed cannot tell"),
    "a single recipe": ([runs("a", BETTER)], 0, "no other recipe to compare"),
    "a gap that nothing closes": (
        [LORA, runs("full", BETTER), runs("a", [0.886, 0.904, 0.907])],
        2,
        "no other recipe closes any of that gap",
    ),
    "full alone differs": (
        [LORA, runs("full", BETTER), runs("a", NOISY), runs("b", NOISY)],
        0,
        "No recipe except full fine-tuning is significantly different from lora; ",
    ),
    "full is worse": ([LORA_BEST, runs("full", CLEAR)], 1, "there is no gap to close"),
    "full is level": ([LORA, runs("full", NOISY)], 1, "no share of that gap is shown"),
    "one rate": ([[make_record("full")]], -1, "only one learning rate was tried for full"),
}


@pytest.mark.parametrize(("groups", "index", "words"), SAID.values(), ids=SAID)
def test_what_is_said(groups, index, words):
    assert words in sentences([record for group in groups for record in group])[index]


def test_the_gap():
    middle = [0.9305, 0.9345, 0.945]
    against, best, gap, _ = sentences(runs("lora", CLEAR) + runs("full", BETTER) + runs("tangent", middle))
    assert against.startswith("tangent (")
    assert best.startswith("full has the best")
    assert gap.startswith("Full fine-tuning is significantly better than lora (+0.0500, 95 % interval ")
    assert "; tangent closes 53 % (" in gap


def test_caution():
    records = [
        make_record("lora", 1e-4, validation=0.9),
        make_record("lora", 2e-4, validation=0.8),
        make_record("x", 1e-4),
        diverged("lora", 4e-4),
        make_record("x", 3e-4, status="failed", error="bug"),
        make_record("full", 1e-4, status="out_of_memory", error="too big"),
    ]
    caution = sentences(records)[-1]
    assert "lora (low end), whose best learning rate is at its end" in caution
    assert "of 6 runs, 1 diverged (lora), 1 ran out of memory (full) and 1 failed (x)" in caution


def test_nothing_finished():
    found = sentences([diverged("lora", 1e-4), diverged("full", 1e-4)])
    assert found[0] == "No recipe has a test result, so nothing can be compared."
    assert "of 2 runs, 2 diverged (full and lora)" in found[1]
    assert recommendation(make_comparison([diverged("lora", 1e-4)])) is None
    assert recommendation_sentence(None) is None


def taking(seconds):
    return TimeSplit(start=1.0, forward_backward=seconds - 1.0, optimizer=0.0, evaluation=0.0)


def advised(*records):
    return recommendation(make_comparison([run for group in records for run in group]))


def test_the_cheapest_of_those_not_significantly_worse_is_recommended():
    found = advised(
        runs("best", NOISY, time=taking(30)),
        runs("cheap", CLEAR, time=taking(10)),
        runs("bad", [0.5, 0.51, 0.52], time=taking(1)),
    )
    assert (found.recipe, found.learning_rate, found.decided) == ("cheap", 2e-4, True)
    assert (found.best, found.candidates, found.seconds) == ("best", ("cheap", "best"), 10)
    low, high = found.difference_interval
    assert found.difference == pytest.approx(-0.01)
    assert low < -0.01 < 0 < high
    assert found.choice == ("cheap", "time", 2)
    assert recommendation_sentence(found) == (
        "Recommendation: use cheap at 2e-4. It is not significantly worse than the best, best (difference −0.0100, "
        f"95 % interval {formats.interval((low, high), sign=True)}). Of these 2 recipes it is the fastest "
        "(10.0 s per run)."
    )


def test_the_best_may_be_the_cheapest_or_the_only_one_left():
    found = advised(runs("best", NOISY, time=taking(5)), runs("dear", CLEAR, time=taking(10)))
    assert (found.recipe, found.best, found.difference) == ("best", "best", None)
    assert recommendation_sentence(found) == (
        "Recommendation: use best at 2e-4. It has the best test result; 1 other recipe is not significantly "
        "worse. Of these 2 recipes it is the fastest (5.0 s per run)."
    )
    found = advised(runs("a", BETTER, time=taking(9)), runs("b", [0.5, 0.51, 0.52], time=taking(1)))
    assert (found.candidates, found.choice) == (("a",), None)
    assert recommendation_sentence(found).startswith("Recommendation: use a at 2e-4, the best; ")


def test_one_slow_run_does_not_make_a_recipe_dear():
    records = runs("x", NOISY, time=taking(10))
    records[-1] = records[-1].model_copy(update={"time": taking(500)})
    assert advised(records, runs("y", CLEAR, time=taking(20))).recipe == "x"


def needing(peak, state=1):
    return MemoryUse(peak_bytes=peak, optimizer_state_bytes=state, adapter_bytes=1)


BUSY = MachineLoad(before=9.0, after=9.0, processors=2)
DECIDED = {
    "time": ({"a": (10, 900), "b": (20, 100), "c": (30, 100)}, ("a", "time", 3), "it is the fastest (10.0 s"),
    "memory": (
        {"a": (10.0, 900), "b": (10.4, 100), "c": (11.0, 1)},
        ("b", "memory", 2),
        "The 2 cheapest of these 3 recipes need the same time (within 5 %); it needs the least memory (100 B ",
    ),
    "memory of all": (
        {"a": (10.0, 900), "b": (10.4, 100), "c": (10.2, 800)},
        ("b", "memory", 3),
        "These 3 recipes need the same time (within 5 %); it needs the least memory (100 B peak memory)",
    ),
    "test result": (
        {"a": (10.0, 722), "b": (10.4, 710), "c": (11.0, 1)},
        ("a", "test result", 2),
        "The 2 cheapest of these 3 recipes need the same time and memory (within 5 %); it has the best test result",
    ),
    "test result of all": (
        {"a": (10.0, 722), "b": (10.4, 710), "c": (10.2, 715)},
        ("a", "test result", 3),
        "These 3 recipes need the same time and memory (within 5 %); it has the best test result",
    ),
    "busy, memory": (
        {"a": (None, 900), "b": (None, 100), "c": (None, 800)},
        ("b", "memory", 3),
        "Of these 3 recipes it needs the least memory (100 B peak memory). The machine was too busy",
    ),
    "busy, test result": (
        {"a": (None, 722), "b": (None, 710), "c": (None, 715)},
        ("a", "test result", 3),
        "the same memory (within 5 %); it has the best test result of them. The machine was too busy",
    ),
    "busy, test result of some": (
        {"a": (None, 722), "b": (None, 710), "c": (None, 900)},
        ("a", "test result", 2),
        "The 2 cheapest of these 3 recipes need the same memory (within 5 %); it has the best test result",
    ),
}


@pytest.mark.parametrize(("costs", "choice", "words"), DECIDED.values(), ids=DECIDED)
def test_what_decided_is_what_is_said(costs, choice, words):
    tests = {"a": NOISY, "b": [0.915, 0.91, 0.92], "c": CLEAR}
    found = advised(*(
        runs(
            name,
            tests[name],
            time=taking(seconds or 10),
            load=BUSY if seconds is None else None,
            memory=needing(peak),
        )
        for name, (seconds, peak) in costs.items()
    ))  # fmt: skip
    assert found.choice == choice
    assert found.recipe == found.candidates[0] == choice[0]
    assert words in recommendation_sentence(found)


def test_where_no_peak_is_known_the_optimizer_state_is_compared():
    found = advised(
        runs("a", NOISY, time=taking(10), memory=needing(None, 2_000_000)),
        runs("b", CLEAR, time=taking(10), memory=needing(None, 1_000_000)),
    )
    assert found.choice == ("b", "memory", 2)
    assert "it needs the least memory (1.0 MB optimizer state)" in recommendation_sentence(found)


def test_significantly_worse_is_meant_after_correction():
    pair = [
        runs("best", [0.901, 0.911, 0.921], time=taking(9)),
        runs("x", [0.888, 0.89, 0.904], time=taking(1)),
    ]
    assert advised(*pair).recipe == "best"
    many = [runs(name, [0.91, 0.90, 0.92], time=taking(9)) for name in "abcdefgh"]
    assert advised(*pair, *many).recipe == "x"


def test_one_seed_cannot_decide():
    found = advised(
        [make_record("a", validation=0.8, test=0.99)], [make_record("b", 3e-3, validation=0.9, test=0.1)]
    )
    assert (found.recipe, found.decided, found.candidates) == ("b", False, ())
    sentence = recommendation_sentence(found)
    assert "impossible with one seed" in sentence
    assert "b at 3e-3" in sentence
    # a recipe with one seed is no candidate beside others with several
    assert advised(runs("a", CLEAR), runs("b", [0.99])).candidates == ("a",)


def test_lower_may_be_better():
    records = [
        make_record(
            name, seed=seed, metrics={"validation": {"loss": loss}, "test": {"loss": loss + 0.01 * seed}}
        )
        for name, loss in (("a", 0.5), ("b", 0.9))
        for seed in range(3)
    ]
    changes = {"metric": "loss", "higher_is_better": False}
    assert recommendation(make_comparison(records, **changes)).best == "a"
    assert recommendation(make_comparison(records[::3], **changes)).recipe == "a"
