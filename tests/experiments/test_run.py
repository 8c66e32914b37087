"""Runs: every recipe trains, the adapter proves itself, and a killed run goes on as if nothing had happened."""

import json
import re
import time

import pytest
import torch
from safetensors.torch import load_file

from tangora import InputError, RunSettings, recipe, recipes, train
from tangora.experiments.run.execute import execute
from tangora.experiments.run.preparing import load_run_task
from tangora.experiments.run.saving import verify_adapter
from tangora.training.callbacks import last_checkpoint, read_history
from tests.experiments.small import after_step, have_same_weights, write_generator
from tests.processes import process

pytestmark = pytest.mark.filterwarnings(
    "ignore:step .* changes A of",
    "ignore:The following rank_pattern keys did not match",  # PEFT, loading an AdaLoRA adapter
    "ignore:Adapter .default.. \\d+ LoRA tensor",  # AdaLoRA takes some layers their whole rank
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in recipes() if entry.trains])
def test_every_recipe_trains_and_its_adapter_loads_on_the_untouched_base(classifier, tmp_path, name):
    settings = RunSettings(**classifier, recipe=name, steps=5, batch_size=8)
    task = load_run_task(settings)
    record = execute(settings, task, tmp_path, run_id="run")
    assert record.status == "finished", record.error
    assert len(record.history) == 5
    if recipe(name).search is None:  # which has two schedules
        assert record.history[-1].learning_rate < record.history[2].learning_rate  # the schedule runs
    assert record.memory.optimizer_state_bytes > 0
    assert record.time.forward_backward > 0
    assert record.time.optimizer > 0
    assert record.metrics["test"]["accuracy"] == pytest.approx(sum(record.correct) / len(record.correct))
    if recipe(name).adapter is not None:
        assert verify_adapter(settings, task, tmp_path).difference <= 1e-5


def test_one_step_is_a_start_without_training(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="one-step", batch_size=8)
    task = load_run_task(settings)
    record = execute(settings, task, tmp_path, run_id="run", before="always")
    assert record.status == "finished", record.error
    assert record.history == []
    assert record.metrics["test"]["loss"] != record.metrics["before"]["loss"]
    assert verify_adapter(settings, task, tmp_path).difference <= 1e-5


def test_a_rank_plan_gives_single_layers_their_own_rank(classifier, tmp_path):
    # as tangora diagnose writes it
    name = re.escape("bert.encoder.layer.0.attention.self.query")
    plan = {"rank_pattern": {f"^{name}": 1}, "alpha_pattern": {}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    settings = RunSettings(
        **classifier, recipe="lora", steps=1, batch_size=4, rank_plan=str(tmp_path / "plan.json")
    )
    train(settings, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    ranks = {name: factor.shape[0] for name, factor in saved.items() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "layer.0.attention.self.query" in name} == {1}
    assert {rank for name, rank in ranks.items() if "layer.0.attention.self.query" not in name} == {2}


def test_micro_batches_are_averaged(classifier, tmp_path):
    first = {}
    for accumulate in (1, 4):
        settings = RunSettings(
            **classifier, recipe="lora", steps=1, batch_size=8 // accumulate, accumulate=accumulate
        )
        train(settings, tmp_path / str(accumulate))
        (first[accumulate],) = read_history(tmp_path / str(accumulate) / "metrics.jsonl")
    # dropout differs, the batch does not; added up they would be four times as large
    assert first[4]["loss"] == pytest.approx(first[1]["loss"], rel=0.2)
    assert first[4]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=0.6)


@pytest.mark.parametrize(("key", "value"), [("r", 3), ("lora_alpha", 5), ("use_rslora", True)])
def test_a_rank_plan_for_other_settings_is_refused(classifier, tmp_path, key, value):
    plan = {"rank_pattern": {}, "alpha_pattern": {}, key: value}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    settings = RunSettings(**classifier, recipe="lora", steps=1, rank_plan=str(tmp_path / "plan.json"))
    with pytest.raises(InputError, match=f"rank_plan was made for {key} = {value}; got {key} = "):
        train(settings, tmp_path / "out")


def test_rank_and_alpha_are_the_plans_unless_given(tmp_path):
    plan = {"r": 4, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    path = str(tmp_path / "plan.json")
    assert (RunSettings(rank_plan=path).rank, RunSettings(rank_plan=path).alpha) == (4, 8)
    assert RunSettings(rank_plan=path, rank=2).rank == 2


def test_a_folder_in_which_nothing_was_done_is_free(classifier, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"rank_pattern": {}, "alpha_pattern": {}, "r": 3}))
    refused = RunSettings(**classifier, recipe="lora", steps=1, rank_plan=str(tmp_path / "plan.json"))
    with pytest.raises(InputError, match="rank_plan was made for"):
        train(refused, tmp_path / "out")
    train(RunSettings(**classifier, recipe="lora", steps=1), tmp_path / "out")
    with pytest.raises(InputError, match="belongs to another configuration: steps is 1 there and 2 here"):
        train(RunSettings(**classifier, recipe="lora", steps=2), tmp_path / "out")


def test_a_folder_of_an_older_version_goes_on(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="lora", steps=1)
    record = train(settings, tmp_path / "out")
    path = tmp_path / "out" / "settings.json"
    older = json.loads(path.read_text())
    del older["head_learning_rate"], older["clip"]  # unknown then, and as they are by default now
    path.write_text(json.dumps(older))
    assert train(settings, tmp_path / "out") == record
    path.write_text(json.dumps(older))
    with pytest.raises(InputError, match=r"clip is 1\.0 there and 0\.5 here"):
        train(settings.model_copy(update={"clip": 0.5}), tmp_path / "out")


def test_training_improves_and_says_so(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="tangent", learning_rate=3e-3, steps=40, batch_size=16)
    record = train(settings, tmp_path / "out")
    assert record.metrics["test"]["loss"] < record.metrics["before"]["loss"]
    lines = read_history(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert train(settings, tmp_path / "out") == record  # a finished run is not repeated


def test_full_fine_tuning_saves_its_model(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="full", steps=2, batch_size=4)
    train(settings, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_causal_run_with_exact_match(tmp_path):
    small = write_generator(tmp_path)
    settings = RunSettings(**small, recipe="lora-pro", steps=3, batch_size=4, exact_match=True)
    record = train(settings, tmp_path / "out")
    for split in ("validation", "test"):
        assert {"loss", "perplexity", "exact_match"} <= record.metrics[split].keys()
    assert len(record.correct) == len(load_run_task(settings).test)
    assert record.metrics["test"]["exact_match"] == sum(record.correct) / len(record.correct)


def test_the_same_settings_give_the_same_run(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="tangent", steps=4, batch_size=4)
    one, other = (train(settings, tmp_path / name) for name in ("one", "other"))
    assert [step.loss for step in one.history] == [step.loss for step in other.history]


def test_methods_start_from_the_same_loss(classifier, tmp_path):
    losses = {}
    for name in ("full", "lora", "tangent", "lora-pro"):
        settings = RunSettings(**classifier, recipe=name, steps=1, batch_size=16)
        losses[name] = train(settings, tmp_path / name).metrics["before"]["loss"]
    assert len(set(losses.values())) == 1


def test_a_diverging_run_is_recorded(classifier, tmp_path):
    settings = RunSettings(**classifier, recipe="full", learning_rate=1e4, steps=20, batch_size=8)
    record = train(settings, tmp_path / "out")
    assert record.status == "diverged"
    assert "step" in record.error


def train_until_killed(settings, folder):
    torch.set_num_threads(1)
    train(RunSettings(**settings), folder, progress=after_step(6, lambda: time.sleep(600)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tangent", "lora-pro", "lora"])
def test_resume_after_kill_equals_an_uninterrupted_run(classifier, tmp_path, name):
    settings = {**classifier, "recipe": name, "steps": 12, "batch_size": 8, "save_every": 4, "accumulate": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cut = process(train_until_killed, settings, str(killed))
    while len(read_history(killed / "metrics.jsonl")) < 6:
        assert cut.is_alive()
        time.sleep(0.02)
    cut.kill()
    cut.join()
    assert last_checkpoint(killed / "checkpoints").name == "checkpoint-4"
    for folder in (killed, whole):  # in this process, which knows nothing of the killed one
        train(RunSettings(**settings), folder)
    assert have_same_weights(whole, killed)
    assert read_history(whole / "metrics.jsonl") == read_history(killed / "metrics.jsonl")


def test_evaluations_change_nothing_of_training_and_of_its_history(classifier, tmp_path):
    found = []
    for every in (2, None):
        settings = RunSettings(**classifier, recipe="tangent", steps=5, batch_size=4, evaluate_every=every)
        found.append(train(settings, tmp_path / str(every)))
    assert [step.step for step in found[0].history] == [1, 2, 3, 4, 5]
    assert found[0].history == found[1].history
    assert [each.step for each in found[0].evaluations] == [2, 4, 5]


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    for step, sealed in ((4, True), (8, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if sealed:
            (folder / "complete").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / "checkpoint-8").exists()
