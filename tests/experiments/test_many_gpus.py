"""A machine with several GPUs, no launcher: a run uses one, with the batch that was asked for, and its log says so."""

import os
from types import SimpleNamespace

import pytest
import torch

import tangora
from tangora import CompareSettings, Resources
from tangora.experiments.compare import engine_for
from tangora.experiments.comparison import pool
from tangora.experiments.settings import RunSettings
from tangora.training.devices import visible_gpus
from tests.experiments.seen_gpu import only_tells_its_gpu

pytestmark = pytest.mark.messages


@pytest.mark.parametrize("recipe", ["full", "lora", "tangent"])
def test_a_run_is_the_same_as_with_one(classifier, tmp_path, monkeypatch, recipe):
    settings = RunSettings(**classifier, recipe=recipe, steps=3, batch_size=4, evaluate_every=2)
    one = tangora.train(settings, tmp_path / "one")
    # they are counted, but none can be used here: the run stays on the CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    many = tangora.train(settings, tmp_path / "many")
    assert many.status == "finished"
    assert [step.loss for step in many.history] == [step.loss for step in one.history]
    assert many.metrics == one.metrics
    told = (tmp_path / "many" / "log.txt").read_text()
    assert told.count("4 GPUs are visible; only cpu") == 1
    assert "GPUs" not in (tmp_path / "one" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        (None, 0, []),
        ("3,1", 2, ["3", "1"]),
        ("GPU-8e1f, MIG-02af", 2, ["GPU-8e1f", "MIG-02af"]),
        ("0,-1,2", 1, ["0"]),  # CUDA reads up to what it does not know
        ("", 0, []),
    ],
)
def test_visible_gpus_have_the_names_that_the_user_gave(monkeypatch, variable, count, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == names


def dummy(name, *, any_gpu=True):
    return SimpleNamespace(id=name, settings=SimpleNamespace(any_gpu=any_gpu, steps=1))


def test_every_run_sees_one_gpu_and_more_runs_share_them_evenly(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pool, "work", only_tells_its_gpu)
    # nothing that a new process would import torch for
    with pool.Pool(jobs=4, limits=SimpleNamespace(), gpus=["3", "GPU-8e1f"]) as runs:
        for name in "abc":
            runs.start(dummy(name), None, tmp_path)
        runs.start(dummy("d", any_gpu=False), None, tmp_path)
        assert not runs.has_room
        for run in runs._running.values():
            run.process.join()
        runs._running.pop("b")
        runs._jobs = 5
        runs.start(dummy("e"), None, tmp_path)
        runs._running["e"].process.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "3",
        "b": "GPU-8e1f",
        "c": "3",
        "d": "none",
        "e": "GPU-8e1f",  # a device that has become free
    }
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("gpus", "device", "jobs", "expected"),
    [
        (8, None, None, 8),
        (8, "cuda", None, 8),
        (8, None, 3, 3),
        (8, "cpu", None, 1),
        (8, "cuda:5", None, 1),
        (0, None, None, 1),
    ],
)
def test_there_are_as_many_jobs_as_gpus_unless_it_is_said_otherwise(
    monkeypatch, gpus, device, jobs, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = engine_for(Resources(jobs=jobs), [CompareSettings(recipes=["lora"], device=device)])
    assert made._jobs == expected
