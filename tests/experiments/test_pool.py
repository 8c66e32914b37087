"""Runs in processes of their own: killed, out of memory, out of space, cut off and continued."""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tangora import CompareSettings, InputError, compare
from tangora._folders import ComparisonFolder
from tangora.experiments.comparison import worker
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.comparison.sweep import due
from tangora.experiments.comparison.worker import DiskFullError, run_trial
from tangora.experiments.run.preparing import load_run_task
from tangora.report import load_comparison, load_record
from tests.experiments.small import after_step
from tests.models import tiny_bert, tiny_tokenizer
from tests.processes import process

RATES = {"lora": [1e-3, 3e-3], "tangent": [1e-3, 3e-3]}


def plan(classifier, **values):
    given = {
        "recipes": ["lora", "tangent"],
        "learning_rates": RATES,
        "seeds": [0, 1],
        "steps": 4,
        "batch_size": 8,
    }
    return CompareSettings(**classifier | given | values, kind="classification")


def content_of(record):
    """Return a record without times, memory, dates and what else the machine did."""
    content = json.loads(record.model_dump_json(exclude={"time", "created", "load"}))
    content["memory"].pop("peak_bytes")
    return content


def what_was_found(folder):
    return {record.id: content_of(record) for record in load_comparison(folder).records}


class Killer:
    """Kills the process of the first run at its second step."""

    victim = None

    def __call__(self, what, done, total):
        name, _, note = what.partition(": ")
        if note:
            self.victim = self.victim or name
        if name == self.victim and note.startswith("loss") and done == 2:
            (number,) = (p.pid for p in multiprocessing.active_children() if p.name == name)
            os.kill(number, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_run_is_recorded_and_the_others_go_on(classifier, tmp_path):
    killer = Killer()
    wanted = plan(classifier, recipes=["tangent"], steps=12, seeds=[0])
    outcome = compare(wanted, tmp_path / "out", progress=killer)
    records = {record.id: record for record in outcome.comparison.records}
    dead = records[killer.victim]
    assert dead.status == "failed"
    assert "signal 9" in dead.error
    assert 2 <= len(dead.history) < 12
    assert sum(record.status == "finished" for record in records.values()) == len(records) - 1

    again = compare(wanted, tmp_path / "out")
    assert {r.id: r.status for r in again.comparison.records} == {i: r.status for i, r in records.items()}
    healed = compare(wanted, tmp_path / "out", resources=Resources(retry=True))
    assert {record.status for record in healed.comparison.records} == {"finished"}


def test_a_run_that_does_not_fit_into_memory_is_recorded_and_the_others_go_on(classifier, tmp_path):
    wide = plan(
        classifier, recipes=["lora", "full"], learning_rates={"lora": [1e-3], "full": [1e-3]}, seeds=[0]
    )
    # 51 MB of position vectors: frozen they fit, with their gradient and moments they need 200
    tiny_bert(num_hidden_layers=1, max_position_embeddings=400_000).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    wide = wide.model_copy(update={"model": str(tmp_path / "wide")})
    outcome = compare(wide, tmp_path / "out", resources=Resources(max_memory=0.17))
    found = {record.recipe: record for record in outcome.comparison.records}
    assert found["lora"].status == "finished"
    assert found["full"].status == "out_of_memory"
    assert load_record(tmp_path / "out" / "records" / "full-lr0.001-seed0.json").error == found["full"].error
    assert "1 ran out of memory (full)" in outcome.report.read_text()


@pytest.mark.slow
def test_side_by_side_gives_what_one_after_the_other_does(classifier, tmp_path):
    one = plan(classifier, recipes=["tangent"], learning_rates={"tangent": RATES["tangent"]})
    compare(one, tmp_path / "one", resources=Resources(jobs=1))
    compare(one, tmp_path / "two", resources=Resources(jobs=2))
    alone, beside = what_was_found(tmp_path / "one"), what_was_found(tmp_path / "two")
    for found in (*alone.values(), *beside.values()):
        found.pop("machine")  # names the number of threads
    assert alone.keys() == beside.keys()
    for name, found in alone.items():
        assert [s["loss"] for s in found["history"]] == pytest.approx(
            [s["loss"] for s in beside[name]["history"]], rel=1e-4
        )


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_repeats_nothing(classifier, tmp_path):
    grid = {"recipes": ["tangent"], "learning_rates": {"tangent": [1e-3]}}
    wanted, folder = plan(classifier, **grid, steps=8), tmp_path / "cut"
    compare(wanted, tmp_path / "whole")
    cut = process(compare, wanted, folder)
    while not list(folder.glob("records/*.json")):
        assert cut.is_alive()
        time.sleep(0.02)
    cut.kill()
    cut.join()
    time.sleep(0.5)  # its runs end with it
    kept = {path.name: path.read_bytes() for path in folder.glob("records/*.json")}
    time.sleep(0.5)
    assert {path.name for path in folder.glob("records/*.json")} == kept.keys()
    compare(wanted, folder)
    for name, content in kept.items():
        assert (folder / "records" / name).read_bytes() == content
    assert what_was_found(folder) == what_was_found(tmp_path / "whole")


class CutOff(BaseException):
    """What no run survives."""


def cut_off():
    raise CutOff


def test_a_run_with_checkpoints_goes_on_from_the_last_and_counts_all_its_time(classifier, tmp_path):
    grid = {"recipes": ["tangent"], "learning_rates": {"tangent": [1e-3]}, "seeds": [0]}
    (trial,) = due(plan(classifier, **grid, steps=8, save_every=3, evaluate_every=2), [])
    task = load_run_task(trial.settings)
    folders = {name: ComparisonFolder(tmp_path / name) for name in ("whole", "cut")}
    for folder in folders.values():
        folder.path.mkdir()
    whole = run_trial(trial, task, folders["whole"])

    with pytest.raises(CutOff):
        run_trial(trial, task, folders["cut"], after_step(5, cut_off))
    kept = tmp_path / "cut" / "runs" / trial.id / "checkpoints" / "checkpoint-3" / "seconds.json"
    seconds = json.loads(kept.read_text())
    assert min(seconds["forward_backward"], seconds["optimizer"], seconds["evaluation"]) > 0
    kept.write_text(json.dumps({"forward_backward": 1000.0, "optimizer": 2000.0, "evaluation": 3000.0}))
    steps = []
    rest = run_trial(
        trial, task, folders["cut"], lambda what, done, _: steps.append(done) if "loss" in what else None
    )
    assert steps == [4, 5, 6, 7, 8]
    assert content_of(rest) == content_of(whole)
    spent = rest.time
    assert [s // 1000 for s in (spent.forward_backward, spent.optimizer, spent.evaluation)] == [1, 2, 3]


def test_a_full_disk_stops_the_comparison_and_is_no_fault_of_the_run(classifier, tmp_path, monkeypatch):
    wanted = plan(classifier)
    trial, *_ = due(wanted, [])
    task, folder = load_run_task(trial.settings), ComparisonFolder(tmp_path)

    def full(*args, **kwargs):
        raise RuntimeError("serializing failed") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(worker, "execute", full)
    with pytest.raises(DiskFullError, match="no space left"):
        run_trial(trial, task, folder)
    assert not folder.record_of(trial.id).exists()

    def broken(*args, **kwargs):
        raise KeyError("lost")

    monkeypatch.setattr(worker, "execute", broken)
    record = run_trial(trial, task, folder)
    assert (record.status, record.error) == ("failed", "KeyError: 'lost'")


def test_what_torch_says_of_memory_is_understood(classifier, tmp_path, monkeypatch):
    trial, *_ = due(plan(classifier), [])

    def large(*args, **kwargs):
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr(worker, "execute", large)
    record = run_trial(trial, load_run_task(trial.settings), ComparisonFolder(tmp_path))
    assert record.status == "out_of_memory"
    assert "allocate" in record.error


def test_no_run_begins_when_the_time_is_over(classifier, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--max-hours is too small"):
        compare(plan(classifier), tmp_path / "out", resources=Resources(max_hours=0.0))

    looks = iter(range(10**6))  # the first at the beginning, then one before every run
    module = sys.modules[compare.__module__]  # the package has a function of that name
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 1000.0 * next(looks)))
    outcome = compare(plan(classifier), tmp_path / "out", resources=Resources(max_hours=2500 / 3600))
    assert len(outcome.comparison.records) == 2
    assert len(outcome.comparison.missing) == 3  # the chosen rate has been found to need another seed
    assert outcome.report.exists()
    assert outcome.adapter is None


@pytest.mark.messages
def test_a_comparison_in_which_nothing_works_says_why(classifier, tmp_path):
    wrong = plan(classifier, target_modules=["nothing"], seeds=[0])
    with pytest.raises(InputError, match=r"target_modules must name .* dense, key, .*; got 'nothing'"):
        compare(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()
