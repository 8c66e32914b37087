"""`tangora diagnose` on models and data from the disk: files, numbers, and errors that name what is wrong."""

import json

import pytest
from peft import LoraConfig

from tangora import InputError, find_pairs, load_adapter, recipe, save_adapter
from tangora.diagnostics import Diagnosis
from tangora.experiments.diagnose_task import diagnose_task
from tangora.experiments.measurement_settings import DiagnoseSettings
from tangora.experiments.values import validated
from tangora.report import load_diagnosis
from tangora.training.models import load_model


def of(small, **changes):
    keep = ("model", "data", "num_validation", "num_test", "max_length", "rank")
    return {key: small[key] for key in keep} | {"num_examples": 10} | changes


@pytest.fixture(scope="module")
def adapter(classifier, tmp_path_factory):
    """A saved LoRA-GA adapter, which has twice the rank it was made with."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    base = load_model(classifier["model"], kind="classification", num_labels=3).model
    model = recipe("lora").prepare(base, r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=1)
    for pair in find_pairs(model):
        pair.B.data.normal_(std=0.1)
    save_adapter(model, folder)
    return folder


def test_the_files_say_the_same(classifier, tmp_path):
    heard = []
    settings = validated(DiagnoseSettings, of(classifier))
    done = diagnose_task(
        settings, tmp_path / "out", command="tangora diagnose …", progress=lambda *seen: heard.append(seen)
    )
    names = ["diagnosis.html", "diagnosis.json", "log.txt", "rank_plan.json", "settings.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert load_diagnosis(done.record_path) == done.record
    found = done.record.diagnosis
    assert isinstance(found, Diagnosis)
    assert found.plain_start
    assert found.num_batches == 3
    assert heard[-1] == ("gradient", 23, 23)  # 5 passes over 3 batches, and 8 more of other examples
    assert json.loads(done.plan.read_text()) == found.plan.config()
    assert found.totals.held_out["lora-ga"] < found.totals.starts["lora-ga"]
    assert found.totals.adapter == found.totals.starts["lora"] < found.totals.starts["lora-ga"]


def test_the_plan_makes_the_adapter_it_promises(generator, tmp_path):
    done = diagnose_task(validated(DiagnoseSettings, of(generator, alpha=5)), tmp_path / "out")
    plan = json.loads(done.plan.read_text())
    base = load_model(generator["model"], kind="causal").model
    base.add_adapter(LoraConfig(**plan, target_modules="all-linear"))
    ranks = {pair.name: pair.shape[2] for pair in find_pairs(base)}
    assert ranks == done.record.diagnosis.plan.ranks
    assert {pair.scaling for pair in find_pairs(base)} == {2.5}


def test_again_and_another_configuration(classifier, tmp_path):
    settings = validated(DiagnoseSettings, of(classifier, starts="lora", power_iterations=0, num_held_out=0))
    first = diagnose_task(settings, tmp_path / "out").record
    assert first.diagnosis.starts == ("lora",)
    assert first.diagnosis.totals.held_out is None
    again = diagnose_task(settings, tmp_path / "out").record
    assert again.diagnosis.totals == first.diagnosis.totals
    other = validated(DiagnoseSettings, of(classifier, starts="lora", seed=1))
    with pytest.raises(InputError, match="another configuration: num_held_out is 0 there and 32 here"):
        diagnose_task(other, tmp_path / "out")


def test_a_saved_adapter_is_looked_at_where_it_ended(classifier, adapter, tmp_path):
    settings = validated(DiagnoseSettings, of(classifier, adapter=str(adapter), rank=None))
    found = diagnose_task(settings, tmp_path / "out").record.diagnosis
    assert not found.plain_start
    assert found.adapter_loss != found.loss
    assert {layer.adapter.rank for layer in found.layers} == {2}
    base = load_model(classifier["model"], kind="classification", num_labels=3).model
    names = {pair.name.removeprefix("base_model.model.") for pair in find_pairs(load_adapter(base, adapter))}
    assert {layer.name for layer in found.layers} == names


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_rank": 0}, "budget_rank: .*greater than or equal to 1; got 0"),
        ({"rank": 33}, "rank must be at most 32"),
        ({"budget_rank": 33}, "budget_rank must be at most 32"),
        ({"text_column": "sentence"}, "sentence"),
        ({"adapter": "/nowhere"}, "/nowhere contains no adapter"),
        ({"starts": "lora,olora"}, "starts must be one of"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"num_validation": 10**6}, "too few for --num-validation 1000000"),
    ],
)
def test_errors(classifier, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        diagnose_task(validated(DiagnoseSettings, of(classifier, **changes)), tmp_path / "out")


def flags(values):
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def test_command(call, classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = call("diagnose", *flags(of(classifier)), "--output", tmp_path / "out")
    assert code == 0, err
    assert "Plain LoRA of rank 2 captures" in out
    assert "all layers" in out
    assert "query" in out
    assert "rank_plan.json" in out.replace("\n", "")
    assert (tmp_path / "out" / "diagnosis.html").stat().st_size > 1e6
