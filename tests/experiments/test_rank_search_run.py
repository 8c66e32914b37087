"""Runs whose first phase finds the ranks: interrupted in either phase, proven by plain PEFT, counted, or refused."""

import importlib.util
import re

import pytest
from peft import PeftModel

from tangora import InputError, RunSettings, find_pairs, train
from tangora.experiments.compare import compare
from tangora.experiments.comparison.plan import CompareSettings, read_plan
from tangora.experiments.run.preparing import load_base, load_run_task
from tangora.experiments.run.saving import verify_adapter
from tangora.experiments.values import validated
from tangora.training.callbacks import read_history
from tests.experiments.small import after_step, ctrl_c, have_same_weights

NAME = "adalora+tangent-muon"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:step .* changes A of",
    "ignore:Adapter .default.. \\d+ LoRA tensor",  # PEFT, of a layer that has lost its whole rank
)


@pytest.fixture(scope="module")
def whole(classifier, tmp_path_factory):
    """Settings of a run, its folder and its record."""
    settings = RunSettings(**classifier, recipe=NAME, steps=12, batch_size=8, save_every=2, evaluate_every=4)
    folder = tmp_path_factory.mktemp("whole")
    return settings, folder, train(settings, folder / "out")


@pytest.mark.parametrize("step", [3, 4, 5, 9])  # the first phase has four steps
def test_a_run_that_is_interrupted_in_either_phase_is_the_uninterrupted_one(whole, tmp_path, step):
    settings, folder, record = whole
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "out", progress=after_step(step, ctrl_c))
    resumed = train(settings, tmp_path / "out")
    assert have_same_weights(folder / "out", tmp_path / "out")
    assert resumed.history == record.history
    assert resumed.evaluations == record.evaluations
    assert resumed.metrics == record.metrics


def test_plain_peft_reads_the_ranks_that_were_found(whole):
    settings, folder, record = whole
    task = load_run_task(settings)
    assert verify_adapter(settings, task, folder / "out").difference <= 1e-5
    read = PeftModel.from_pretrained(load_base(settings, task).model, folder / "out" / "adapter")
    assert read.peft_config["default"].peft_type == "LORA"
    ranks = [pair.shape[2] for pair in find_pairs(read)]
    assert len(set(ranks)) > 1
    assert set(read.peft_config["default"].rank_pattern.values()) < set(ranks)
    assert sum(ranks) <= settings.rank * len(ranks) + ranks.count(1)
    assert [step.step for step in record.history] == list(range(1, 13))
    assert [each.step for each in record.evaluations] == [4, 8, 12]
    pairs = sum(pair.A.numel() + pair.B.numel() for pair in find_pairs(read))
    head = sum(p.numel() for n, p in read.named_parameters() if "modules_to_save" in n)
    assert record.trainable_parameters == pairs + head


def test_time_of_both_phases_is_counted_once(classifier, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("tangora.training.callbacks.time.perf_counter", lambda: float(next(clock)))
    spent = {}
    for name in ("tangent-muon", NAME):
        settings = RunSettings(**classifier, recipe=name, steps=8, batch_size=8, save_every=2)
        spent[name] = train(settings, tmp_path / name).time
    assert spent[NAME].forward_backward > 0
    for part in ("forward_backward", "optimizer"):
        assert getattr(spent[NAME], part) == getattr(spent["tangent-muon"], part)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "lora_dropout": 0.1},
        {"gradient_checkpointing": True, "accumulate": 2, "epochs": 1, "steps": None},
        pytest.param({"load_in_4bit": True}, marks=needs_bitsandbytes),
    ],
)
def test_other_bases_work(generator, tmp_path, options):
    given = {"steps": 5, "batch_size": 8, "recipe": "adalora+lora-pro"} | options
    settings = RunSettings(**generator, **given)
    assert train(settings, tmp_path / "out").status == "finished"
    assert verify_adapter(settings, load_run_task(settings), tmp_path / "out").holds


@pytest.mark.slow
def test_it_takes_part_in_a_comparison(classifier, tmp_path):
    plan = CompareSettings(
        **classifier, recipes=["lora", NAME], learning_rates="1e-2", seeds="0", steps=6, batch_size=8
    )
    outcome = compare(plan, tmp_path / "out")
    records = {record.recipe: record for record in outcome.comparison.records}
    assert {record.status for record in records.values()} == {"finished"}
    assert {len(record.history) for record in records.values()} == {6}
    assert len(read_history(tmp_path / "out" / "runs" / records[NAME].id / "metrics.jsonl")) == 6


@pytest.mark.messages
def test_what_changing_ranks_forbid_is_refused(classifier, tmp_path):
    for key in ("measure_every", "curvature_every"):
        with pytest.raises(InputError, match=f"{key} cannot be used with recipe {re.escape(NAME)}, whose"):
            validated(RunSettings, {"recipe": NAME, key: 1})
        with pytest.raises(InputError, match=f"{key} cannot be used with recipe {re.escape(NAME)}, whose"):
            read_plan({"recipes": ["lora", NAME], key: 1})
    with pytest.raises(InputError, match="fsdp cannot be used with recipe"):
        validated(RunSettings, {"recipe": NAME, "fsdp": True})
    plan = {"rank_pattern": {}, "alpha_pattern": {}}
    with pytest.raises(InputError, match="rank_plan cannot be used with recipe"):
        train(RunSettings(**classifier, recipe=NAME, steps=5, rank_plan=plan), tmp_path / "out")
    with pytest.raises(InputError, match="at least 4 optimizer steps; got 2"):
        train(RunSettings(**classifier, recipe=NAME, steps=2), tmp_path / "out")
