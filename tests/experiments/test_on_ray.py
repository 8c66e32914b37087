"""Comparisons on a real Ray of two workers: the records of two jobs, whatever is killed."""

import signal

import pytest

from tangora import CompareSettings, InputError, Resources, compare
from tangora.report import load_comparison
from tests.experiments.cluster_runs import (
    Killer,
    command,
    contents,
    killed_after_a_record,
    plan,
    process_called,
    times_made,
)
from tests.experiments.small import ctrl_c
from tests.experiments.test_pool import what_was_found

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.messages


@pytest.fixture(scope="module")
def cluster():
    """Start Ray with two cores; return its address."""
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.mark.slow
def test_records_are_those_of_two_jobs_though_all_was_interrupted_and_a_worker_killed(
    cluster, classifier, tmp_path
):
    settings = plan(classifier)
    compare(settings, tmp_path / "jobs", resources=Resources(jobs=2))

    def interrupt(what, done, total):
        if ": loss" in what:
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        compare(settings, tmp_path / "ray", progress=interrupt, resources=Resources(cluster="ray"))
    kept = contents(tmp_path / "ray")
    assert len(kept) < 3
    killer = Killer(lambda name: process_called(f"ray::{name}"))
    outcome = compare(settings, tmp_path / "ray", progress=killer, resources=Resources(cluster="ray"))
    assert killer.victim
    assert what_was_found(tmp_path / "ray") == what_was_found(tmp_path / "jobs")
    assert set(times_made(tmp_path / "ray").values()) == {1}
    assert kept.items() <= contents(tmp_path / "ray").items()
    assert outcome.proven
    assert not (tmp_path / "ray" / "cluster").exists()


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_what_dies_for_good_is_recorded(cluster, classifier, tmp_path):
    settings = plan(classifier, steps=250)
    once = Resources(cluster="ray", cluster_options={"address": cluster, "retries": 0})
    kept = killed_after_a_record(command(settings, tmp_path / "out", once), tmp_path / "out")
    assert 0 < len(kept) < 3
    killer = Killer(lambda name: process_called(f"ray::{name}"))
    compare(settings, tmp_path / "out", progress=killer, resources=once)
    records = {record.id: record for record in load_comparison(tmp_path / "out").records}
    dead = records.pop(killer.victim)
    assert dead.status == "failed"
    assert "its Ray task ended without a record" in dead.error
    assert {record.status for record in records.values()} == {"finished"}
    assert kept.items() <= contents(tmp_path / "out").items()
    assert set(times_made(tmp_path / "out").values()) == {1}


def test_a_scheduler_can_still_interrupt(monkeypatch):
    from tangora.experiments.comparison.on_ray import RayEngine

    def init(*args, **kwargs):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    try:
        with RayEngine(Resources(cluster="ray"), None):
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_is_not_there_is_named(monkeypatch, tmp_path):
    def init(address, **kwargs):
        raise ConnectionError(f"nobody at\n {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    away = Resources(cluster="ray", cluster_options={"address": "far:1"})
    with pytest.raises(InputError, match="^Ray far:1 cannot be reached: nobody at far:1$"):
        compare(CompareSettings(recipes=["lora"]), tmp_path / "out", resources=away)
    assert not (tmp_path / "out").exists()
