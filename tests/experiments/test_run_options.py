"""Options of a run that Hugging Face users know: each does what it says, alone, in a comparison and after a restart."""

import importlib.util
import json

import pytest
import torch

from tangora import InputError
from tangora.experiments.compare import compare
from tangora.experiments.comparison.plan import CompareSettings, read_plan
from tangora.experiments.comparison.sweep import due
from tangora.experiments.export_run import export
from tangora.experiments.settings import RunSettings
from tangora.experiments.settings_files import run_settings
from tangora.experiments.train import train
from tangora.experiments.values import validated
from tests.experiments.small import after_step, ctrl_c

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


def run(task, folder, **changes):
    common = {"recipe": "lora", "batch_size": 8, "learning_rate": 1e-3}
    steps = {} if "epochs" in changes else {"steps": 3}
    return train(RunSettings(**task, **common, **steps, **changes), folder)


def losses(record):
    return [step.loss for step in record.history]


# --- epochs ---


@pytest.mark.parametrize(
    ("epochs", "num_train", "batch_size", "accumulate", "steps"),
    [
        (1, 200, 8, 1, 25),
        (1, 201, 8, 1, 26),  # the last batch is smaller
        (3, 201, 8, 4, 21),  # and so is the last step of an epoch
        (0.5, 200, 8, 1, 13),
        (2, 5, 8, 4, 2),
        (1e-3, 200, 8, 1, 1),
    ],
)
def test_epochs_are_as_many_steps_as_they_take(epochs, num_train, batch_size, accumulate, steps):
    settings = RunSettings(epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    assert settings.num_steps(num_train) == steps


def test_an_epoch_sees_every_example_once(classifier, tmp_path):
    settings = {"accumulate": 3, "num_train": 61, "warmup": 0.5}
    lengths = set()
    record = train(
        RunSettings(**{**classifier, **settings}, recipe="lora", batch_size=8, learning_rate=1e-3, epochs=2),
        tmp_path / "epochs",
        progress=lambda _what, _done, total: lengths.add(total),
    )
    assert lengths == {6}
    assert len(record.history) == 2 * 3  # eight batches in steps of three
    assert record.settings["epochs"] == 2
    assert record.settings["steps"] is None
    # the schedule, too, is that of so many steps
    same = train(
        RunSettings(
            **{**classifier, **settings},
            recipe="lora",
            batch_size=8,
            learning_rate=1e-3,
            steps=len(record.history),
        ),
        tmp_path / "steps",
    )
    assert losses(same) == losses(record)
    # and the folder is its own afterwards
    assert run_settings(tmp_path / "epochs").epochs == 2
    assert losses(run({**classifier, **settings}, tmp_path / "epochs", epochs=2)) == losses(record)


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(InputError, match="steps and epochs exclude each other; got steps = 5 and epochs = 2"):
        validated(RunSettings, {"steps": 5, "epochs": 2})
    with pytest.raises(InputError, match="steps must be a number"):
        validated(RunSettings, {"steps": None})
    for bad in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="epochs"):
            validated(RunSettings, {"epochs": bad})


def test_flags_replace_the_duration_of_a_plan():
    plan = {"recipes": ["lora"], "steps": 5, "tasks": {"a": {}, "b": {"max_steps": 7}}}
    by_epochs = read_plan(plan, {"num_train_epochs": 2.0})
    assert {(own.steps, own.epochs) for own in by_epochs.tasks.values()} == {(None, 2.0)}
    by_steps = read_plan({"recipes": ["lora"], "epochs": 2}, {"steps": 3})
    assert (by_steps.steps, by_steps.epochs) == (3, None)


def test_trials_of_a_halving_are_parts_of_the_epochs():
    settings = CompareSettings(
        recipes=["lora"], learning_rates=[1e-4, 1e-3], epochs=2, halving=2, kind="classification"
    )
    trials = due(settings, [])
    assert [trial.settings.epochs for trial in trials] == [1.0, 1.0]
    assert [trial.id for trial in trials] == ["lora-lr0.0001-seed0-epochs1", "lora-lr0.001-seed0-epochs1"]


# --- dropout ---


def test_dropout_is_the_adapters(classifier, tmp_path):
    plain, dropped = run(classifier, tmp_path / "a"), run(classifier, tmp_path / "b", lora_dropout=0.4)
    config = json.loads((tmp_path / "b" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.4
    assert losses(plain) != losses(dropped)
    # B = 0 at the start: what is dropped then changes nothing that is added
    assert plain.metrics["before"] == dropped.metrics["before"]


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_dropout_is_a_probability(bad):
    with pytest.raises(InputError, match="lora_dropout"):
        validated(RunSettings, {"lora_dropout": bad})


# --- checkpointing ---


@pytest.mark.parametrize("recipe", ["tangent", "orthogonal+tangent", "full"])
def test_checkpointing_changes_no_loss(classifier, tmp_path, recipe):
    # the base has dropout of its own, which must be drawn alike when activations are computed again
    task = {**classifier, "recipe": recipe, "batch_size": 8, "learning_rate": 1e-3, "steps": 3}
    plain = train(RunSettings(**task), tmp_path / "a")
    again = train(RunSettings(**task, gradient_checkpointing=True), tmp_path / "b")
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)


def test_checkpointing_is_switched_on(generator, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    asked = []
    enable = LlamaForCausalLM.gradient_checkpointing_enable
    monkeypatch.setattr(
        LlamaForCausalLM,
        "gradient_checkpointing_enable",
        lambda model, *options, **more: (asked.append(options or more), enable(model, *options, **more))[1],
    )
    measured = {"measure_every": 1, "measure_gradient": 8, "curvature_every": 2, "curvature_examples": 8}
    plain = run(generator, tmp_path / "a", **measured)
    assert not asked
    again = run(generator, tmp_path / "b", gradient_checkpointing=True, **measured)
    assert asked
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)
    for ours, theirs in ((again.trajectory, plain.trajectory), (again.curvature, plain.curvature)):
        for here, there in zip(ours, theirs, strict=True):
            assert here == pytest.approx(there, rel=1e-3, nan_ok=True)


def test_a_model_without_checkpointing_is_refused(classifier, tmp_path, monkeypatch):
    from transformers import BertForSequenceClassification

    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="gradient_checkpointing cannot be used with model"):
        run(classifier, tmp_path / "out", gradient_checkpointing=True)


# --- 4 bits ---


@needs_bitsandbytes
@pytest.mark.parametrize("task", ["classifier", "generator"])
@pytest.mark.parametrize("recipe", ["lora", "lora-ga+tangent"])
def test_the_base_is_quantized_and_the_head_is_not(task, recipe, tmp_path, request):
    from bitsandbytes.nn import Linear4bit

    from tangora.experiments.run.preparing import load_base, load_run_task
    from tangora.experiments.run.saving import verify_adapter

    task = request.getfixturevalue(task)
    settings = RunSettings(
        **task, recipe=recipe, steps=3, batch_size=8, learning_rate=1e-3, load_in_4bit=True
    )
    data = load_run_task(settings)
    modules = dict(load_base(settings, data).model.named_modules())
    quantized = {name for name, module in modules.items() if isinstance(module, Linear4bit)}
    whole = {name for name, module in modules.items() if type(module) is torch.nn.Linear}
    assert quantized
    assert whole == ({"classifier"} if "classifier" in modules else {"lm_head"})
    record = train(settings, tmp_path / "out")
    assert record.status == "finished"
    assert record.settings["load_in_4bit"]
    assert verify_adapter(settings, data, tmp_path / "out").difference < 1e-5
    # merged, it is a plain model
    export(tmp_path / "out", tmp_path / "merged", merge=True)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@needs_bitsandbytes
def test_a_comparison_on_a_quantized_base_that_goes_on(generator, tmp_path):
    options = {"epochs": 0.5, "lora_dropout": 0.1, "load_in_4bit": True, "gradient_checkpointing": True}
    common = {**generator, **options, "recipes": "lora,tangent", "learning_rates": "1e-3", "batch_size": 8}
    compare(CompareSettings(**common, seeds="0"), tmp_path / "out")
    outcome = compare(CompareSettings(**common, seeds="0,1"), tmp_path / "out")
    records = outcome.comparison.records
    assert len(records) == 4
    assert {len(record.history) for record in records} == {5}
    assert all(record.settings[key] == value for record in records for key, value in options.items())


@pytest.mark.parametrize("option", [{"load_in_4bit": True}, {"lora_dropout": 0.1}])
def test_what_is_an_adapters_is_refused_without_one(option):
    if "load_in_4bit" in option:
        pytest.importorskip("bitsandbytes")
    (key,) = option
    with pytest.raises(InputError, match=f"{key} cannot be used with recipe full"):
        validated(RunSettings, {"recipe": "full", **option})
    with pytest.raises(InputError, match=f"{key} cannot be used with recipe full"):
        read_plan({"recipes": ["lora", "full"], **option})


def test_without_bitsandbytes_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(InputError, match=r"load_in_4bit needs bitsandbytes, .*: pip install bitsandbytes"):
        validated(RunSettings, {"load_in_4bit": True})


# --- interrupted and resumed ---


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1.5, "accumulate": 2, "lora_dropout": 0.3, "gradient_checkpointing": True},
        pytest.param({"epochs": 1, "load_in_4bit": True, "lora_dropout": 0.3}, marks=needs_bitsandbytes),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(generator, tmp_path, options):
    settings = RunSettings(**generator, **options, recipe="tangent", batch_size=8, save_every=3)

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut", progress=after_step(5, ctrl_c))
    resumed, whole = (train(settings, tmp_path / name) for name in ("cut", "whole"))
    assert len(whole.history) == settings.num_steps(80)
    assert losses(resumed) == losses(whole)
    assert resumed.metrics == whole.metrics


# --- devices ---


@pytest.mark.parametrize("bad", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_devices_have_names(bad):
    with pytest.raises(InputError, match="device must be cpu, cuda, cuda:N or mps"):
        validated(RunSettings, {"device": bad})


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    name, classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    nowhere = {**classifier, "data": "./nowhere.jsonl"}
    with pytest.raises(InputError, match=f"device '{name}' is not available: no GPU is visible"):
        run(nowhere, tmp_path / "out", device=name)
    with pytest.raises(InputError, match=f"device '{name}' is not available"):
        compare(CompareSettings(**nowhere, recipes=["lora"], device=name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    from tangora.training.devices import check_device

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_device("cuda:1")
    check_device("cuda")
    with pytest.raises(InputError, match="device 'cuda:2' is not available: cuda:0 to cuda:1 are visible"):
        check_device("cuda:2")


def test_a_run_stays_on_the_cpu_and_may_go_on_elsewhere(classifier, tmp_path):
    record = run(classifier, tmp_path / "out", device="cpu")
    assert record.settings["device"] == "cpu"
    # where a run was computed is no part of what it is
    assert losses(run(classifier, tmp_path / "out")) == losses(record)
    assert run_settings(tmp_path / "out").device is None


def test_a_trainer_keeps_to_the_gpu_it_is_given(tmp_path, monkeypatch):
    import transformers

    from tangora.training.devices import keep_to

    chosen = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path))
    keep_to(arguments, "cuda:1")
    device = torch.device("cuda:1")
    assert (arguments.device, arguments.n_gpu, arguments.distributed_state.device) == (device, 1, device)
    assert chosen == [device]
    before = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    keep_to(before, "cpu")
    assert before.device == torch.device("cpu")
