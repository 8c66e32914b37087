"""Comparisons: the plan, the choice of learning rate, resuming, and the files they leave."""

import json
import shutil

import pytest

from tangora import CompareSettings, InputError, compare
from tangora._folders import ComparisonFolder
from tangora._names import MODELS
from tangora.experiments.compare import write_report
from tangora.experiments.comparison.plan import PlanSettings, read_plan
from tangora.experiments.folders import claimed
from tangora.experiments.provenance import provenance
from tangora.experiments.settings_files import PRESETS, preset
from tangora.report import load_comparison, summarize
from tangora.training.data import is_hub_data, load_task
from tangora.training.models import PACKAGED_MODELS
from tests.experiments.small import write_classifier, write_generator


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    small = write_classifier(tmp_path_factory.mktemp("data"))
    return CompareSettings(
        **small,
        recipes=["full", "lora", "tangent"],
        learning_rates={"full": [1e-3, 3e-3], "lora": [3e-3, 1e-2], "tangent": [1e-3, 1e2]},
        seeds=[0, 1],
        steps=6,
        batch_size=8,
        measure_every=3,
        measure_gradient=8,
    )


class Log:
    """Progress of a comparison: the runs that were made, with their status, and the number of all."""

    def __init__(self):
        self.made, self.done, self.total = {}, 0, 0

    def __call__(self, what, done, total):
        if what == "runs":
            self.done, self.total = done, total
        else:
            name, _, self.made[name] = what.partition(": ")


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    folder, log = tmp_path_factory.mktemp("compare") / "out", Log()
    return settings, folder, compare(settings, folder, command="test", progress=log), log


def test_every_method_is_swept_and_repeated(done):
    _, _, outcome, log = done
    assert log.done == log.total == 6 + 3
    assert log.made == {record.id: record.status for record in outcome.comparison.records}
    assert len(outcome.comparison.records) == 9
    stages = [(r.recipe, r.stage, r.seed) for r in outcome.comparison.records]
    assert stages.count(("tangent", "sweep", 0)) == 2
    assert stages.count(("tangent", "final", 1)) == 1
    wild = next(r for r in outcome.comparison.records if r.learning_rate == 1e2)
    rows = {row.recipe: row for row in summarize(outcome.comparison)}
    assert rows["tangent"].learning_rate == 1e-3
    assert wild.status in ("diverged", "finished")


def test_alignment_is_recorded_and_drawn(done):
    _, folder, outcome, _ = done
    for record in (run for run in outcome.comparison.records if run.status == "finished"):
        captured = [point["step"] for point in record.trajectory if "captured_energy" in point]
        assert captured == ([] if record.recipe == "full" else [0, 3, 6])
        assert [point["step"] for point in record.trajectory if "gradient_norm" in point] == [0, 3, 6]
    page = (folder / "report.html").read_text()
    assert 'id="alignment"' in page
    assert 'id="through-training"' in page


def test_files(done):
    _, folder, outcome, _ = done
    for name in ("settings.json", "comparison.json", "summary.csv", "report.html", "picture.png", "log.txt"):
        assert (folder / name).stat().st_size > 0 or name == "log.txt"
    assert (outcome.adapter / "adapter_config.json").exists()
    assert outcome.proof.difference <= 1e-5
    advised = outcome.recommendation.recipe
    assert outcome.adapter_recipe == advised or advised == "full"
    assert outcome.adapter_recipe in ("lora", "tangent")


def test_records_say_on_what_they_ran_and_how_busy_the_machine_was(done):
    settings, _, outcome, _ = done
    for record in (run for run in outcome.comparison.records if run.status == "finished"):
        sizes = {
            "train": settings.num_train,
            "validation": settings.num_validation,
            "test": settings.num_test,
        }
        assert record.num_examples == sizes
        assert record.load.processors >= 1
        assert min(record.load.before, record.load.after) >= 0
        assert record.model_description is None
    assert provenance("smollm2-135m")["model_description"].startswith("SmolLM2-135M-Instruct, dequantized")
    assert set(MODELS) == set(PACKAGED_MODELS)


def test_the_default_title_says_what_was_compared(done):
    settings, folder, outcome, _ = done
    unnamed = settings.model_copy(update={"title": None})
    assert unnamed.heading == f"{', '.join(settings.recipes)} on data.jsonl with model"
    many = CompareSettings(recipes=["full", "lora", "lora-ga", "lora-pro", "tangent", "dora"])
    assert many.heading == "6 recipes on bbc-news with minilm-l6"
    assert CompareSettings(recipes=["lora"], title="Mine").heading == "Mine"
    # the same comparison under another title
    log = Log()
    again = compare(settings.model_copy(update={"title": "Other"}), folder, command="test", progress=log)
    assert (again.comparison.title, log.made) == ("Other", {})
    assert again.recommendation == outcome.recommendation
    compare(settings, folder, command="test")


def test_same_data_order_for_every_method(done):
    _, _, outcome, _ = done
    first = {r.history[0].loss for r in outcome.comparison.records if r.seed == 0}
    assert len(first) == 1


def test_a_second_call_repeats_nothing_and_a_missing_run_is_made_up(done):
    settings, folder, outcome, _ = done
    victim = folder / "records" / f"{outcome.comparison.records[2].id}.json"
    victim.unlink()
    log = Log()
    again = compare(settings, folder, command="test", progress=log)
    assert log.made == {victim.stem: "finished"}
    losses = [[[s.loss for s in r.history] for r in o.comparison.records] for o in (outcome, again)]
    assert losses[0] == losses[1]


def test_a_comparison_grows_by_recipes_and_seeds(done, tmp_path):
    settings, folder, outcome, _ = done
    grown_folder, log = tmp_path / "grown", Log()
    shutil.copytree(folder, grown_folder)
    grids = settings.learning_rates | {"pissa": [3e-3]}
    more = {"recipes": ["pissa", *settings.recipes], "learning_rates": grids, "seeds": [0, 1, 2]}
    grown = settings.model_copy(update=more)
    records = compare(grown, grown_folder, progress=log).comparison.records
    before = {record.id for record in outcome.comparison.records}
    assert set(log.made).isdisjoint(before)
    assert {record.id for record in records} == before | set(log.made)
    assert {(r.recipe, r.seed) for r in records} == {(n, k) for n in grown.recipes for k in (0, 1, 2)}


def test_exact_answers_may_decide(tmp_path):
    small = write_generator(tmp_path)
    grids = {"full": [1e-3, 3e-3], "lora": [1e-2]}
    shared = {"recipes": ["full", "lora"], "learning_rates": grids, "seeds": [0, 1], "steps": 3}
    settings = CompareSettings(**small, **shared, judge_by="exact_match")
    found = compare(settings, tmp_path / "out").comparison
    assert (found.metric, found.higher_is_better) == ("exact_match", True)
    row = next(row for row in summarize(found) if row.recipe == "full")
    runs = [r for r in found.records if r.recipe == "full" and r.learning_rate == row.learning_rate]
    assert row.test == pytest.approx(sum(sum(run.correct) for run in runs) / 40)
    with pytest.raises(InputError, match="judge_by must be one of loss, exact_match; got 'accuracy'"):
        compare(CompareSettings(**small, **shared, judge_by="accuracy"), tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "there", "here"),
    [
        ("recipes", ["full", "lora"], ["lora"]),
        ("seeds", [0, 1], [2, 0, 1]),
        ("seeds", [0, 1], [0]),
        ("learning_rates", {"lora": [1e-3]}, {"lora": [1e-3, 3e-3]}),
        ("learning_rates", {"lora": [1e-3]}, {}),
    ],
)
def test_what_a_comparison_has_is_not_changed(tmp_path, key, there, here):
    usual = {"recipes": ["full", "lora"], "seeds": [0, 1]}
    with claimed(tmp_path / "out", CompareSettings(**usual | {key: there})):
        (tmp_path / "out" / "records").mkdir()
        (tmp_path / "out" / "records" / "one.json").write_text("{}")
    with (
        pytest.raises(InputError, match=f"belongs to another configuration: {key} is"),
        claimed(tmp_path / "out", CompareSettings(**usual | {key: here})),
    ):
        pass


def test_the_report_can_be_written_again(done, tmp_path):
    _, folder, outcome, _ = done
    loaded = load_comparison(folder)
    assert {r.id for r in loaded.records} == {r.id for r in outcome.comparison.records}
    assert write_report(loaded, ComparisonFolder(tmp_path)).exists()


def tasks_of(name, *, tiny=False):
    plan = read_plan(preset(name), tiny=tiny)
    return list(plan.tasks.values()) if isinstance(plan, PlanSettings) else [plan]


STAND_INS = [name for name in PRESETS if "tiny" in preset(name)]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    for task in tasks_of(name):
        assert set(task.learning_rates) <= set(task.recipes)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("paper-")])
def test_presets_of_papers_have_published_numbers_and_a_stand_in(name):
    stand_ins = tasks_of(name, tiny=True)
    for task in tasks_of(name):
        if name == "paper-commonsense":  # none of whose sources has its table
            assert task.paper is None
            continue
        assert task.paper is not None
        assert all(0 < number < 100 for column in task.paper.results.values() for number in column.values())
        assert {*task.recipes} & {*next(iter(task.paper.results.values()))}
    assert len(stand_ins[0].recipes) >= 3


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins_need_no_hub(name):
    for task in tasks_of(name, tiny=True):
        assert task.model in MODELS
        assert not is_hub_data(task.data)
        assert task.test_data is None
        assert task.paper is None


def test_the_generated_data_of_presets_exists():
    pytest.importorskip("reasoning_gym")
    for name in PRESETS:
        for task in [*tasks_of(name), *(tasks_of(name, tiny=True) if name in STAND_INS else ())]:
            if task.data.startswith("reasoning-gym:"):
                assert len(load_task(task.data, num_train=2, num_validation=2, num_test=2).test) == 2


def test_the_quickstart_compares_what_matters():
    quick = read_plan(preset("quickstart"))
    assert isinstance(quick, CompareSettings)
    assert len(quick.seeds) >= 3
    assert {"full", "lora", "lora-pro", "tangent", "tangent-muon"} <= set(quick.recipes)


@pytest.mark.messages
def test_bad_input_is_named(done):
    settings, folder, _, _ = done
    with pytest.raises(InputError, match=r"preset must be one of .*quickstart, smoke.*; got 'quick'"):
        preset("quick")
    other = settings.model_copy(update={"steps": 7})
    with pytest.raises(InputError, match="steps is 6 there and 7 here"):
        compare(other, folder)
    (folder / "records" / "broken.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(InputError, match=r"broken\.json"):
        load_comparison(folder)
    (folder / "records" / "broken.json").unlink()
