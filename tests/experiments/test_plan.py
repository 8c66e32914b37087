"""Which runs a comparison calls for, as a function of those that have ended."""

import copy
import math

import pytest
from pydantic import ValidationError

from tangora import CompareSettings, InputError, Resources, RunSettings, recipe
from tangora.experiments.comparison.plan import PlanSettings, chosen_tasks, read_plan
from tangora.experiments.comparison.sweep import due, planned
from tangora.report import MemoryUse, Record, TimeSplit

GRID = [1e-4, 1e-3, 1e-2]


def settings(**values):
    given = {"recipes": ["lora"], "learning_rates": {"lora": GRID}, "seeds": [0, 1, 2], "kind": "causal"}
    return CompareSettings(**given | values)


def ended(trial, loss):
    """Make the record of a run with a validation loss; None stands for divergence."""
    metrics = {} if loss is None else {"validation": {"loss": loss}, "test": {"loss": loss}}
    return Record(
        id=trial.id,
        recipe=trial.settings.recipe,
        learning_rate=trial.settings.peak_learning_rate,
        seed=trial.settings.seed,
        stage=trial.stage,
        status="finished" if metrics else "diverged",
        settings=trial.settings.model_dump(mode="json"),
        metrics=metrics,
        history=[],
        evaluations=[],
        time=TimeSplit(start=0, forward_backward=1, optimizer=0, evaluation=0),
        memory=MemoryUse(optimizer_state_bytes=0, adapter_bytes=0),
        trainable_parameters=1,
        versions={},
        machine="test",
        created="2026-01-01T00:00:00+00:00",
    )


def played(plan, loss_of):
    """Run a plan with losses given as a function of the learning rate; return all records."""
    records = []
    while trials := due(plan, records):
        assert planned(plan, records) >= len(records) + len(trials)
        records += [ended(trial, loss_of(trial.settings.peak_learning_rate)) for trial in trials]
    assert planned(plan, records) == len(records)
    return records


def parabola(best):
    return lambda rate: (math.log10(rate) - math.log10(best)) ** 2


def rates(records, stage="sweep"):
    return sorted({record.learning_rate for record in records if record.stage == stage})


def test_all_methods_are_measured_on_the_way_and_no_snapshots_kept():
    plan = settings(recipes=["full", "lora"], measure_every=5, measure_gradient=8)
    runs = [plan.run(name, 1e-3, 0) for name in plan.recipes]
    assert [(run.measure_every, run.measure_gradient) for run in runs] == [(5, 8), (5, 8)]
    assert not runs[0].snapshots


def test_the_best_of_the_grid_is_repeated_with_the_other_seeds():
    records = played(settings(), parabola(1e-3))
    assert rates(records) == GRID
    finals = [(r.learning_rate, r.seed) for r in records if r.stage == "final"]
    assert finals == [(1e-3, 1), (1e-3, 2)]


@pytest.mark.parametrize(("best", "added"), [(1e-6, [1e-5, 1e-6]), (1e0, [1e-1, 1e0]), (1e-3, [])])
def test_a_grid_is_extended_while_the_best_lies_at_its_end(best, added):
    records = played(settings(extend=2), parabola(best))
    assert rates(records) == pytest.approx(sorted([*GRID, *added]))
    assert rates(records, "final") == pytest.approx([best])


def test_divergence_brackets():
    records = played(settings(extend=3), lambda rate: None if rate > 1e-2 else -rate)
    assert rates(records) == pytest.approx([*GRID, 1e-1])


def test_refining_halves_the_distance_to_the_neighbours():
    records = played(settings(refine=1), parabola(1.1e-3))
    assert rates(records) == pytest.approx([1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2])
    twice = played(settings(refine=2), parabola(3e-3))
    assert rates(twice, "final") == [3.16e-3]
    assert len(rates(twice)) == 7


def test_a_single_rate_is_extended_upwards_and_a_coarse_grid_not_coarsely():
    one = played(settings(learning_rates={"lora": [1e-3]}, extend=1), parabola(1e-2))
    assert rates(one) == [1e-3, 3e-3]
    coarse = played(settings(learning_rates={"lora": [1e-6, 1e-2]}, extend=1), parabola(1e0))
    assert rates(coarse) == pytest.approx([1e-6, 1e-2, 1e-1])


def test_what_has_ended_is_never_due_again_and_the_order_of_ending_does_not_matter():
    plan = settings(
        extend=1, refine=1, recipes=["lora", "tangent"], learning_rates={"lora": GRID, "tangent": GRID}
    )
    whole = played(plan, parabola(3e-3))
    ids = {record.id for record in whole}
    for cut in range(len(whole)):
        part = whole[cut:] if cut % 2 else whole[:cut]
        left = due(plan, part)
        assert {trial.id for trial in left} <= ids - {record.id for record in part}
        assert left or len(part) == len(whole)
    assert not due(plan, whole[::-1])


def test_more_seeds_choose_with_less_noise():
    plan = settings(sweep_seeds=2)
    # the first seed alone would choose 1e-4
    losses = {(1e-4, 0): 0.1, (1e-4, 1): 0.9, (1e-3, 0): 0.3, (1e-3, 1): 0.3, (1e-2, 0): 0.5, (1e-2, 1): 0.5}
    records, trials = [], due(plan, [])
    assert [(trial.settings.peak_learning_rate, trial.settings.seed) for trial in trials] == list(losses)
    for trial in trials:
        assert planned(plan, records) == 7
        records.append(ended(trial, losses[trial.settings.peak_learning_rate, trial.settings.seed]))
    (last,) = due(plan, records)
    assert (last.settings.peak_learning_rate, last.settings.seed, last.stage) == (1e-3, 2, "final")
    assert not due(settings(sweep_seeds=3), played(settings(sweep_seeds=3), parabola(1e-3)))


def test_trials_of_several_seeds_choose_by_their_mean():
    plan = settings(learning_rates={"lora": [1e-4, 1e-3]}, halving=2, steps=40, sweep_seeds=2)
    losses = {(1e-4, 0): 0.5, (1e-4, 1): 0.1, (1e-3, 0): 0.2, (1e-3, 1): 0.2}
    trials = due(plan, [])
    assert {trial.stage for trial in trials} == {"trial"}
    records = [
        ended(trial, losses[trial.settings.peak_learning_rate, trial.settings.seed]) for trial in trials
    ]
    assert {trial.settings.peak_learning_rate for trial in due(plan, records)} == {1e-3}


def test_halving_spends_full_budgets_on_survivors_only():
    plan = settings(learning_rates={"lora": [1e-5, 1e-4, 1e-3, 1e-2]}, halving=2, steps=40)
    records = played(plan, parabola(1e-3))
    trials = [(r.settings["steps"], r.learning_rate) for r in records if r.stage == "trial"]
    assert trials == [(10, 1e-5), (10, 1e-4), (10, 1e-3), (10, 1e-2), (20, 1e-4), (20, 1e-3)] or trials == [
        (10, 1e-5), (10, 1e-4), (10, 1e-3), (10, 1e-2), (20, 1e-3), (20, 1e-2)
    ]  # fmt: skip
    assert rates(records) == [1e-3]
    assert {r.settings["steps"] for r in records if r.stage != "trial"} == {40}


def test_a_recipe_whose_runs_all_diverge_comes_to_an_end():
    for plan in (settings(extend=2, refine=1), settings(halving=2)):
        records = played(plan, lambda rate: None)
        assert all(record.status == "diverged" for record in records)
    assert rates(played(settings(extend=2), lambda rate: None))[0] == pytest.approx(1e-6)


def test_a_recipe_without_training_has_no_rate_to_look_for():
    plan = settings(recipes=["one-step"], learning_rates={}, extend=2, refine=2)
    assert rates(played(plan, parabola(1e-3))) == [1.0]


def test_tasks_override_what_they_share_and_flags_override_both():
    values = {
        "title": "two",
        "recipes": ["lora"],
        "steps": 5,
        "tasks": {"a": {"steps": 7}, "b": {"model": "smollm2-135m"}},
    }
    plan = read_plan(values)
    assert isinstance(plan, PlanSettings)
    assert [(name, t.steps, t.model) for name, t in plan.tasks.items()] == [
        ("a", 7, "minilm-l6"),
        ("b", 5, "smollm2-135m"),
    ]
    flagged = read_plan(values, {"steps": 9})
    assert isinstance(flagged, PlanSettings)
    assert {task.steps for task in flagged.tasks.values()} == {9}
    assert list(chosen_tasks(plan, "b").tasks) == ["b"]  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(read_plan({"recipes": ["lora"]}), CompareSettings)


@pytest.mark.messages
def test_bad_plans_are_named():
    with pytest.raises(InputError, match=r"plan\.yaml: a: unknown key 'stepz'"):
        read_plan({"tasks": {"a": {"recipes": ["lora"], "stepz": 1}}}, source="plan.yaml")
    with pytest.raises(InputError, match="tasks must be settings by name"):
        read_plan({"tasks": ["a"]})
    with pytest.raises(InputError, match="tasks need names of letters"):
        read_plan({"tasks": {"../a": {"recipes": ["lora"]}}})
    with pytest.raises(InputError, match="sweep_seeds must be at most 1, all seeds; got 2"):
        read_plan({"recipes": ["lora"], "seeds": [0], "sweep_seeds": 2})
    with pytest.raises(InputError, match="`halving` cannot be combined"):
        read_plan({"recipes": ["lora"], "halving": 2, "refine": 1})
    with pytest.raises(InputError, match="seeds must differ"):
        read_plan({"recipes": ["lora"], "seeds": [0, 0]})
    plan = read_plan({"tasks": {"a": {"recipes": ["lora"]}}})
    with pytest.raises(InputError, match="tasks must be one of a; got 'b'"):
        chosen_tasks(plan, "b")
    with pytest.raises(InputError, match="tasks selects from a plan with several"):
        chosen_tasks(settings(), "a")


PUBLISHED = {"source": "a paper", "results": {"one": {"lora": 80.1}, "Second": {"lora": 70.0, "full": 71}}}
PLAN = {
    "title": "two",
    "recipes": ["lora"],
    "text_column": "text",
    "tasks": {"one": {"steps": 7}, "two": {"title": "second"}},
    "paper": PUBLISHED,
}


def papers(plan):
    assert isinstance(plan, PlanSettings)
    return {name: task.paper and task.paper.results for name, task in plan.tasks.items()}


def test_published_results_go_to_the_tasks_they_name_and_are_no_setting():
    plan = read_plan(PLAN)
    assert papers(plan) == {"one": {"one": {"lora": 80.1}}, "two": {"Second": {"lora": 70.0, "full": 71.0}}}
    assert papers(chosen_tasks(plan, "two")) == {"two": {"Second": {"lora": 70.0, "full": 71.0}}}
    alone = read_plan({"recipes": ["lora"], "paper": PUBLISHED | {"notes": "of another year"}})
    assert isinstance(alone, CompareSettings)
    assert alone.paper is not None
    assert (alone.paper.notes, [*alone.paper.results]) == (["of another year"], ["one", "Second"])
    assert "paper" not in alone.model_dump()


def test_a_stand_in_takes_the_place_of_what_it_names():
    plan = read_plan(PLAN | {"tiny": {"max_steps": 2, "text_column": None}}, {"rank": 3}, tiny=True)
    assert isinstance(plan, PlanSettings)
    assert [(t.steps, t.text_column, t.rank, t.paper) for t in plan.tasks.values()] == [
        (2, None, 3, None)
    ] * 2
    assert plan.title == "two (stand-in)"
    tasks = {"small": {"data": "digits", "title": "small"}}
    other = read_plan(PLAN | {"tiny": {"title": "tiny", "tasks": tasks, "steps": 3}}, tiny=True)
    assert isinstance(other, PlanSettings)
    assert [(name, t.data, t.steps, t.text_column) for name, t in other.tasks.items()] == [
        ("small", "digits", 3, "text")
    ]
    assert other.title == "tiny"
    assert isinstance(read_plan(PLAN | {"tiny": {"tasks": None}}, tiny=True), CompareSettings)
    assert read_plan(PLAN | {"tiny": {"rank": 2}}) == read_plan(PLAN)


def test_a_stand_in_does_not_change_the_plan():
    plan = PLAN | {"tiny": {"steps": 2, "tasks": None}}
    before = copy.deepcopy(plan)
    read_plan(plan, tiny=True)
    assert plan == before


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tiny": None}, r"plan\.yaml: tiny needs a block `tiny`"),
        ({"tiny": [1]}, r"plan\.yaml: tiny must be settings by name, .*; got \[1\]"),
        ({"tiny": {"paper": {}}}, "without `tiny` and `paper`"),
        ({"tiny": {"stepz": 2}}, r"plan\.yaml: one: unknown key 'stepz' \(did you mean steps\?\)"),
        ({"paper": {"source": "x"}}, r"plan\.yaml: paper: results must be given"),
        ({"paper": PUBLISHED | {"sorce": "x"}}, r"plan\.yaml: paper: unknown key 'sorce' .*source"),
        (
            {"paper": PUBLISHED | {"results": {"three": {"lora": 1}}}},
            r"plan\.yaml: paper: .*\(one, two\); got 'three'",
        ),
        ({"paper": PUBLISHED | {"results": {"two": {}, "second": {}}}}, "two columns for task two"),
    ],
)
def test_bad_blocks_are_named(changed, message):
    with pytest.raises(InputError, match=message):
        read_plan(PLAN | changed, source="plan.yaml", tiny="tiny" in changed)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RunSettings, {"learningrate": 1}, r"^unknown key 'learningrate' \(did you mean learning_rate\?\)$"),
        (RunSettings, {"recipe": "tangnt"}, "^recipe must be one of .*did you mean tangent"),
        (RunSettings, {"steps": "x"}, "^steps: input should be a valid integer.*; got 'x'$"),
        (RunSettings, {"recipe": recipe("lora")}, "^recipe: .* names of recipes.*'lora'"),
        (
            CompareSettings,
            {"recipes": ["lora", recipe("tangent")]},
            "^recipes: .* names of recipes.*'tangent'",
        ),
        (Resources, {"job": 1}, r"^unknown key 'job' \(did you mean jobs\?\); allowed: jobs, cluster"),
        (PlanSettings, {"tasks": {"a": {"recipes": ["lora"], "stepz": 1}}}, "^unknown key 'stepz'"),
    ],
)
def test_settings_made_in_python_have_the_errors_of_the_command_line(kind, values, message):
    with pytest.raises(InputError, match=message) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_settings_can_be_made_by_pydantic():
    assert RunSettings.model_validate({"lr": 1e-3, "steps": 3}) == RunSettings(learning_rate=1e-3, steps=3)
    assert RunSettings.model_validate_json('{"max_steps": 3}').steps == 3
    with pytest.raises(ValidationError, match="unknown key 'stepz'"):
        RunSettings.model_validate({"stepz": 3})
