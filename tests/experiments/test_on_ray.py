"""Comparisons on a real Ray of two workers: the records of two jobs, whatever is killed."""

import os
import signal

import pytest

from tangora import CompareSettings, InputError, Resources, compare
from tangora._folders import ComparisonFolder
from tangora.experiments.comparison.sweep import due
from tangora.experiments.run.preparing import load_run_task
from tangora.report import load_comparison, load_record
from tests.experiments.cluster_runs import (
    Killer,
    command,
    contents,
    killed_after_a_record,
    plan,
    process_called,
    times_made,
)
from tests.experiments.test_pool import what_was_found

ray = pytest.importorskip("ray")
on_ray = pytest.importorskip("tangora.experiments.comparison.on_ray")
pytestmark = pytest.mark.messages


@pytest.fixture(scope="module")
def cluster():
    """Start Ray with two cores; return its address."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else other tests on these cores stop its workers
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.mark.slow
def test_records_are_those_of_two_jobs_though_a_worker_was_killed(cluster, classifier, tmp_path):
    settings = plan(classifier, steps=300)
    compare(settings, tmp_path / "jobs", resources=Resources(jobs=2))
    killer = Killer(lambda name: process_called(f"ray::{name}"))
    outcome = compare(settings, tmp_path / "ray", progress=killer, resources=Resources(cluster="ray"))
    assert killer.victim
    assert what_was_found(tmp_path / "ray") == what_was_found(tmp_path / "jobs")
    assert outcome.proven
    assert not (tmp_path / "ray" / "cluster").exists()


@pytest.mark.slow
def test_a_killed_comparison_goes_on(cluster, classifier, tmp_path):
    settings, folder = plan(classifier, steps=250), tmp_path / "out"
    there = Resources(cluster="ray", cluster_options={"address": cluster})
    kept = killed_after_a_record(command(settings, folder, there), folder)
    assert 0 < len(kept) < 3
    compare(settings, folder, resources=there)
    records = load_comparison(folder).records
    assert {record.status for record in records} == {"finished"}
    assert kept.items() <= contents(folder).items()
    assert {times_made(folder)[name.removesuffix(".json")] for name in kept} == {1}


@pytest.mark.slow
def test_a_run_whose_worker_dies_is_made_again_so_often_and_then_recorded(
    cluster, classifier, tmp_path, monkeypatch
):
    def dies(remote):
        with (remote.folder.path / "deaths").open("a") as deaths:
            deaths.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(on_ray, "_made_apart", dies)
    trial, *_ = due(plan(classifier), [])
    task, folder = load_run_task(trial.settings), ComparisonFolder(tmp_path)
    once = Resources(cluster="ray", cluster_options={"retries": 1})
    with on_ray.RayEngine(once, None) as engine:
        engine.start(trial, task, folder)
        (record,) = engine.wait()
    assert (tmp_path / "deaths").read_text() == "xx"
    assert record == load_record(folder.record_of(trial.id))
    assert record.status == "failed"
    assert record.error.startswith("its Ray task ended without a record: ")


def test_a_scheduler_can_still_interrupt(monkeypatch):
    def init(*args, **kwargs):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    try:
        with on_ray.RayEngine(Resources(cluster="ray"), None):
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_is_not_there_is_named(monkeypatch, tmp_path):
    def init(address, **kwargs):
        raise ConnectionError(f"nobody at\n {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    away = Resources(cluster="ray", cluster_options={"address": "far:1"})
    with pytest.raises(InputError, match=r"^Ray far:1 cannot be reached: nobody at far:1$"):
        compare(CompareSettings(recipes=["lora"]), tmp_path / "out", resources=away)
    assert not (tmp_path / "out").exists()
