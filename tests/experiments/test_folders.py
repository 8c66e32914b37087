"""Output folders: one process at a time, one origin, nothing left by what did nothing, nothing lost on a full disk."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch

from tangora import CompareSettings, InputError, RunSettings, compare, export, train
from tangora._folders import ComparisonFolder
from tangora.experiments.comparison.sweep import due
from tangora.experiments.comparison.worker import Limits, died
from tangora.experiments.curvature.measurement import measure_curvature
from tangora.experiments.folders import claimed, locked
from tangora.experiments.measurement_settings import CurvatureSettings
from tangora.experiments.provenance import model_fingerprint
from tangora.experiments.run import execute as run_module
from tangora.experiments.run.preparing import load_base, load_run_task
from tangora.experiments.run.saving import Proof, check_space, verify_adapter
from tangora.experiments.train import last_step
from tangora.report import load_comparison
from tangora.training.callbacks import last_checkpoint, read_history
from tests.experiments.small import after_step, ctrl_c, write_classifier
from tests.processes import process


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return write_classifier(folder)


def settings_of(small, **changes):
    return RunSettings(**small | {"recipe": "lora", "steps": 4, "batch_size": 4} | changes)


def change_data(small):
    path = small["data"]
    with open(path) as file:
        rows = file.readlines()
    with open(path, "w") as file:
        file.writelines(rows[5:])


def change_model(small):
    path = f"{small['model']}/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({key: 1.01 * each for key, each in tensors.items()}, path, {"format": "pt"})


# --- whose a folder is


@pytest.mark.messages
@pytest.mark.parametrize(("change", "name"), [(change_data, "data"), (change_model, "model")])
def test_a_finished_run_is_not_told_again_for_other_data_or_another_model(small, tmp_path, change, name):
    settings = settings_of(small)
    record = train(settings, tmp_path / "out")
    assert train(settings, tmp_path / "out") == record
    change(small)
    with pytest.raises(InputError, match=f"the {name} changed since .*out was created"):
        train(settings, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    del kept[f"{name}_fingerprint"]  # an older version kept the data's in the record alone
    (tmp_path / "out" / "settings.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=f"the {name} changed since"):
        train(settings, tmp_path / "out")


@pytest.mark.messages
@pytest.mark.parametrize("change", [change_data, change_model])
def test_a_run_does_not_go_on_with_other_data_or_another_model(small, tmp_path, change):
    settings = settings_of(small, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "out", progress=after_step(3, ctrl_c))
    assert last_step(tmp_path / "out") == 2
    change(small)
    with pytest.raises(InputError, match="changed since"):
        train(settings, tmp_path / "out")
    assert last_step(tmp_path / "out") == 2


@pytest.mark.messages
def test_a_comparison_never_mixes_data(small, tmp_path):
    settings = CompareSettings(
        **small, recipes=["lora"], learning_rates={"lora": [1e-3]}, seeds=[0], steps=2, batch_size=4
    )
    compare(settings, tmp_path / "out")
    older = tmp_path / "older"
    shutil.copytree(tmp_path / "out", older)
    kept = json.loads((older / "settings.json").read_text())
    (older / "settings.json").write_text(
        json.dumps({key: kept[key] for key in kept if "fingerprint" not in key})
    )
    change_data(small)
    for folder in (tmp_path / "out", older):
        with pytest.raises(InputError, match="the data changed since"):
            compare(settings.model_copy(update={"seeds": [0, 1]}), folder)
    (record,) = (older / "records").iterdir()
    other = json.loads(record.read_text())
    other |= {"id": "lora-other", "seed": 1}
    other["settings"]["data_fingerprint"] = "0" * 64
    (older / "records" / "lora-other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="the data changed between its runs"):
        load_comparison(older)
    del other["settings"]["data_fingerprint"]  # a version that kept none
    (older / "records" / "lora-other.json").write_text(json.dumps(other))
    assert len(load_comparison(older).records) == 2


@pytest.mark.messages
def test_the_curvature_of_a_run_is_measured_on_its_own_data(small, tmp_path):
    train(settings_of(small), tmp_path / "out")
    change_data(small)
    with pytest.raises(InputError, match="the data changed since"):
        measure_curvature(CurvatureSettings(source=str(tmp_path / "out")), tmp_path / "curvature")
    assert not (tmp_path / "curvature").exists()


def test_a_fingerprint_is_of_the_content(tmp_path, small):
    model, before = small["model"], model_fingerprint(small["model"])
    shutil.copytree(model, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == before
    change_model(small)
    assert model_fingerprint(model) != before
    assert model_fingerprint("minilm-l6") is None
    large = tmp_path / "large.gguf"
    content = torch.arange(3 * 10**6).numpy().tobytes()
    large.write_bytes(content)
    one = model_fingerprint(str(large))
    large.write_bytes(bytes(each ^ 1 for each in content))
    assert model_fingerprint(str(large)) != one


# --- one process at a time


def hold(folder, told):
    with claimed(folder, RunSettings()):
        told.send("held")
        time.sleep(600)


@pytest.mark.messages
def test_a_second_process_stops_at_once_and_a_killed_one_holds_nothing(tmp_path):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    holder = process(hold, tmp_path / "out", theirs)
    try:
        assert ours.recv() == "held"
        began = time.monotonic()
        with (
            pytest.raises(InputError, match="is in use by another tangora process"),
            locked(tmp_path / "out"),
        ):
            pass
        with (
            pytest.raises(InputError, match="is in use by another tangora process"),
            claimed(tmp_path / "out", RunSettings(steps=3)),
        ):
            pass
        assert time.monotonic() - began < 5
    finally:
        holder.kill()
        holder.join()
    with claimed(tmp_path / "out", RunSettings(steps=3)):
        assert json.loads((tmp_path / "out" / "settings.json").read_text())["steps"] == 3
        (tmp_path / "out" / "result").write_text("something")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"settings.json", "result"}


# --- nothing left by what did nothing


class RefusedError(Exception):
    pass


def refuse(folder, settings, *write):
    def work():
        with claimed(folder, settings):
            for name, content in write:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(content)
            raise RefusedError

    with pytest.raises(RefusedError):
        work()


def test_a_folder_in_which_nothing_was_done_is_as_it_was(tmp_path):
    idle = [("log.txt", "a warning"), ("metrics.jsonl", ""), ("checkpoints/checkpoint-1", "half")]
    refuse(tmp_path / "a" / "b" / "c", RunSettings(), *idle)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    refuse(tmp_path / "there", RunSettings(), *idle)
    assert list((tmp_path / "there").iterdir()) == []
    before = {"settings.json": json.dumps({"steps": 9}), "log.txt": "earlier\n"}
    for name, content in before.items():
        (tmp_path / "there" / name).write_text(content)
    refuse(tmp_path / "there", RunSettings(), *idle)
    assert {path.name: path.read_text() for path in (tmp_path / "there").iterdir()} == before


def test_a_folder_in_which_something_was_done_stays(tmp_path):
    refuse(tmp_path / "out", RunSettings(), ("metrics.jsonl", "{}\n"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"settings.json", "metrics.jsonl"}


# --- the disk is full


def full_below(monkeypatch, *folders, after=0):
    """Let safetensors write nothing more below some folders, after so many files."""
    original, count = safetensors.torch.save_file, [0]

    def save(tensors, filename, *args, **kwargs):
        count[0] += 1
        if count[0] > after and any(str(filename).startswith(str(folder)) for folder in folders):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        return original(tensors, filename, *args, **kwargs)

    for name in ("peft.peft_model.safe_save_file", "tangora.adapters.saved_factors.save_file"):
        monkeypatch.setattr(name, save)


@pytest.mark.messages
def test_a_full_disk_loses_no_trained_adapter(small, tmp_path, monkeypatch):
    settings = settings_of(small, recipe="tangent", learning_rate=1e-2)
    train(settings, tmp_path / "whole")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with monkeypatch.context() as patch:
        full_below(patch, tmp_path / "out", tmp_path / "temporary" / "nothing")
        with pytest.raises(
            InputError, match=r"no space left on device; the current weights are in .*adapter"
        ):
            train(settings, tmp_path / "out")
    (kept,) = (tmp_path / "temporary").glob("*/adapter")
    one, other = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for folder in (kept, tmp_path / "whole" / "adapter")
    )
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert train(settings, tmp_path / "out").status == "finished"


@pytest.mark.messages
def test_a_full_disk_leaves_the_checkpoint_before(small, tmp_path, monkeypatch):
    settings = settings_of(small, save_every=1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    original = torch.save

    def save(content, file, *args, **kwargs):
        if "checkpoint-3" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(content, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(InputError, match="the same command continues from step 2"):
            train(settings, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out" / "checkpoints").name == "checkpoint-2"
    assert train(settings, tmp_path / "out").status == "finished"
    train(settings_of(small), tmp_path / "whole")
    history = [read_history(tmp_path / name / "metrics.jsonl") for name in ("out", "whole")]
    assert history[0] == history[1]


@pytest.mark.messages
def test_a_full_disk_is_known_before_the_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(InputError, match="no space left on device: this run will write about"):
        train(settings_of(small), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_space(tmp_path, torch.nn.Linear(2, 2), keeps_model=True, checkpoints=False)
    with pytest.raises(InputError, match="free some"):
        check_space(tmp_path, torch.nn.Linear(2, 2), keeps_model=True, checkpoints=True)


@pytest.mark.messages
def test_export_to_a_full_disk_leaves_nothing(small, tmp_path, monkeypatch):
    train(settings_of(small), tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        full_below(patch, tmp_path)
        with pytest.raises(InputError, match="no space left on device"):
            export(tmp_path / "out", tmp_path / "deep" / "small", rank=1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.messages
def test_export_to_another_base_is_refused(small, tmp_path):
    train(settings_of(small), tmp_path / "out")
    change_data(small)  # which an adapter does not need
    export(tmp_path / "out", tmp_path / "small", rank=1)
    change_model(small)
    with pytest.raises(InputError, match="the model changed since"):
        export(tmp_path / "out", tmp_path / "merged", merge=True)


# --- what cannot work, and what came out


def test_one_step_trains(small, tmp_path):
    record = train(settings_of(small, steps=1, learning_rate=0.1), tmp_path / "out")
    assert record.history[0].learning_rate == 0.1
    assert record.metrics["test"]["loss"] != record.metrics["before"]["loss"]


def test_a_crash_after_the_training_loses_no_adapter(small, tmp_path, monkeypatch):
    def crash(*_args, **_kwargs):
        raise RefusedError

    monkeypatch.setattr(run_module, "validation_metrics", crash)
    with pytest.raises(RefusedError):
        train(settings_of(small), tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_the_proof_fails_for_another_base(small, tmp_path):
    settings = settings_of(small, learning_rate=0.05)
    train(settings, tmp_path / "out")
    task = load_run_task(settings)
    assert verify_adapter(settings, task, tmp_path / "out").holds
    change_model(small)
    assert not verify_adapter(settings, task, tmp_path / "out").holds
    assert not Proof(float("nan"), 1.0).holds


def test_an_abort_under_a_limit_is_a_lack_of_memory(small, tmp_path):
    settings = CompareSettings(**small, recipes=["lora"], kind="classification")
    trial = due(settings, [])[0]
    task = load_run_task(trial.settings)
    folder = ComparisonFolder(tmp_path)
    limited = Limits(gigabytes=0.01)
    assert died(trial, task, folder, -signal.SIGABRT, limited).status == "out_of_memory"
    assert "max_memory" in died(trial, task, folder, -signal.SIGABRT, limited).error
    assert died(trial, task, folder, -signal.SIGABRT, Limits()).status == "failed"
    assert died(trial, task, folder, -signal.SIGKILL, limited).status == "failed"


@pytest.mark.messages
def test_a_rank_plan_of_another_model_is_refused(small, tmp_path):
    plan = {"rank_pattern": {"layers.7.q_proj": 1}, "alpha_pattern": {}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="rank_plan is of another model"):
        train(settings_of(small, rank_plan=str(tmp_path / "plan.json")), tmp_path / "out")


def test_checks_leave_the_model_alone(small):
    from tangora.experiments.run.preparing import check_recipes

    settings = settings_of(small)
    task = load_run_task(settings)
    loaded = load_base(settings, task)
    before = {name: each.clone() for name, each in loaded.model.state_dict().items()}
    state = torch.get_rng_state()
    check_recipes([settings, settings.model_copy(update={"recipe": "dora"})], task, loaded)
    assert torch.equal(state, torch.get_rng_state())
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
