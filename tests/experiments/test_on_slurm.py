"""Comparisons as Slurm's jobs: submitit's own processes on this machine, and a Slurm that only takes notes."""

import json
import os
import sys

import pytest

from tangora import Resources, compare
from tangora._folders import ComparisonFolder
from tangora.experiments.comparison import on_slurm as module_of_slurm
from tangora.experiments.comparison.sweep import due
from tangora.experiments.run.preparing import load_run_task
from tangora.report import load_comparison
from tests.experiments.cluster_runs import command, contents, killed_after_a_record, plan, times_made

submitit = pytest.importorskip("submitit")
pytestmark = pytest.mark.messages

LOCAL = Resources(cluster="slurm", cluster_options="time=5,gpus=0,cpus=1,executor=local")


@pytest.mark.slow
def test_jobs_outlive_a_killed_comparison_and_are_not_made_twice(classifier, tmp_path):
    settings = plan(classifier, learning_rates={"lora": [1e-3], "tangent": [1e-3]}, steps=60)
    kept = killed_after_a_record(command(settings, tmp_path / "out", LOCAL), tmp_path / "out")
    assert kept
    records = compare(settings, tmp_path / "out", resources=LOCAL).comparison.records
    assert {record.status for record in records} == {"finished"}
    assert kept.items() <= contents(tmp_path / "out").items()
    assert times_made(tmp_path / "out") == {record.id: 1 for record in records}
    assert [record.id for record in load_comparison(tmp_path / "out").records] == [r.id for r in records]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put commands of a Slurm on the PATH that write down what they are given; return their folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "queue").touch()
    programs = {
        "srun": "",
        "scancel": 'echo "$@" >> {0}/cancelled',
        "squeue": "cat {0}/queue",
        "sbatch": 'cat "$1" >> {0}/submitted\necho x >> {0}/count\necho Submitted batch job $(grep -c x {0}/count)',
    }
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text.format(folder)}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module_of_slurm, "_ASK_EVERY", -1.0)
    return folder


def started(settings, folder, jobs=None):
    """Start an engine with all runs of a comparison."""
    options = "time=90,cpus=4,setup=module load cuda,partition=gpu,exclude=node[1,2]"
    engine = module_of_slurm.SlurmEngine(
        Resources(cluster="slurm", cluster_options=options, jobs=jobs, max_hours=jobs), None
    )
    trials = due(settings, [])
    task = load_run_task(trials[0].settings)
    for trial in trials:
        engine.start(trial, task, folder)
    return engine


def test_runs_are_one_array_of_jobs_with_the_options_that_were_given(slurm, classifier, tmp_path):
    folder = ComparisonFolder(tmp_path / "out")
    with started(plan(classifier, save_every=5), folder, jobs=2) as engine:
        engine._submit_kept()
        assert not engine.has_room
        text = (slurm / "submitted").read_text()
    for line in (
        "--time=90",
        "--cpus-per-task=4",
        "--gpus-per-node=1",
        "--partition=gpu",
        "--exclude='node[1,2]'",
        "--requeue",
        "--array=0-2%2",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "\nmodule load cuda\n" in text
    assert len((slurm / "cancelled").read_text().split()) == 3
    (task,) = folder.cluster.glob("*.pickle")
    remote = submitit.SlurmJob(folder.cluster / "jobs", "1_0").submission().function
    assert remote.data == task
    assert remote.checkpoint().function == remote


def test_jobs_that_are_still_queued_are_taken_up_and_those_that_ended_are_not(slurm, classifier, tmp_path):
    folder = ComparisonFolder(tmp_path / "out")
    started(plan(classifier), folder)._submit_kept()  # and its comparison is killed
    (slurm / "queue").write_text("1_0 RUNNING\n1_1 PENDING\n1_2 CANCELLED\n")
    again = started(plan(classifier), folder)
    again._submit_kept()
    assert (slurm / "count").read_text().count("x") == 2
    numbers = json.loads((folder.cluster / "jobs.json").read_text())
    assert sorted(numbers.values()) == ["1_0", "1_1", "2"]


def test_a_job_that_ends_without_a_record_is_recorded_with_its_state(
    slurm, classifier, tmp_path, monkeypatch
):
    folder = ComparisonFolder(tmp_path / "out")
    engine = started(plan(classifier), folder)
    engine._submit_kept()
    (slurm / "queue").write_text("1_0 OUT_OF_MEMORY\n1_1 RUNNING\n")
    monkeypatch.setattr(module_of_slurm, "_PATIENCE", -1.0)
    errors = {record.id: record.error for record in engine.wait()}
    running = due(plan(classifier), [])[1].id
    assert engine.running == {running}
    assert "state OUT_OF_MEMORY" in errors[due(plan(classifier), [])[0].id]
    assert set(errors) == {trial.id for trial in due(plan(classifier), [])} - {running}
    assert folder.record_of(next(iter(errors))).exists()


@pytest.mark.parametrize("engine", ["ray", "submitit"])
def test_without_the_package_one_sentence_names_the_extra(engine, classifier, tmp_path, monkeypatch):
    cluster = {"ray": "ray", "submitit": "slurm"}[engine]
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, f"tangora.experiments.comparison.on_{cluster}", raising=False)
    options = {"time": 5} if cluster == "slurm" else {}
    with pytest.raises(
        ValueError, match=rf"^cluster '{cluster}' needs .*: pip install 'tangora\[cluster\]'$"
    ):
        compare(
            plan(classifier), tmp_path / "out", resources=Resources(cluster=cluster, cluster_options=options)
        )
    monkeypatch.delitem(sys.modules, f"tangora.experiments.comparison.on_{cluster}", raising=False)
