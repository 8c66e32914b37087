"""What any cluster's machines are given, and the options that a comparison takes for them."""

import pickle

import pytest

from tangora import InputError, Resources
from tangora._folders import ComparisonFolder
from tangora.experiments.compare import engine_for
from tangora.experiments.comparison.cluster import Refusal, RemoteRun
from tangora.experiments.comparison.sweep import due
from tangora.experiments.comparison.worker import Limits, run_trial
from tangora.experiments.run.preparing import load_run_task
from tangora.experiments.values import validated
from tests.experiments.cluster_runs import plan, times_made

pytestmark = pytest.mark.messages


def test_a_machine_that_does_not_see_the_folder_says_so(classifier, tmp_path):
    trial, *_ = due(plan(classifier), [])
    folder = ComparisonFolder(tmp_path / "elsewhere")
    remote = RemoteRun(trial, folder, folder.cluster / "data.pickle", str(tmp_path), Limits())
    found = remote()
    assert isinstance(found, Refusal)
    assert (
        f"does not see the output folder {folder.path}: choose an --output on a file system" in found.reason
    )
    assert not folder.path.exists()


def test_a_run_with_a_record_is_not_made_again(classifier, tmp_path):
    trial, *_ = due(plan(classifier, steps=2), [])
    task, folder = load_run_task(trial.settings), ComparisonFolder(tmp_path)
    first = run_trial(trial, task, folder)
    data = tmp_path / "data.pickle"
    data.write_bytes(pickle.dumps(task))
    assert RemoteRun(trial, folder, data, str(tmp_path), Limits(1))() == first
    assert times_made(tmp_path) == {trial.id: 1}
    assert not folder.lock_of(trial.id).exists()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"cluster": "condor"}, "cluster must be one of ray, slurm; got 'condor'"),
        ({"cluster_options": "time=5"}, "cluster_options need cluster"),
        ({"cluster": "slurm"}, "needs a time limit for the job of one run: cluster_options time=MINUTES"),
        (
            {"cluster": "slurm", "cluster_options": "time"},
            "must be KEY=VALUE, separated by commas; got 'time'",
        ),
        ({"cluster": "slurm", "cluster_options": "time=1:00"}, "cluster_options: time: .*; got '1:00'"),
        ({"cluster": "ray", "cluster_options": "gpu=1"}, "unknown key 'gpu'.*gpus.*; allowed: address, gpus"),
        ({"cluster": "ray", "cluster_options": "gpus=2"}, "gpus: .* less than or equal to 1; got '2'"),
        ({"cluster": "ray", "max_hours": 2}, "max_hours needs jobs with a cluster"),
        ({"cluster": "slurm", "cluster_options": "time=5", "max_memory": 2}, "give cluster_options mem="),
    ],
)
def test_wrong_options_are_named(given, error):
    with pytest.raises(InputError, match=error):
        validated(Resources, given)


def test_options_are_read_from_the_command_line():
    slurm = Resources(cluster="slurm", cluster_options="time=60,gres=gpu:a100:1,gpus=0,exclude=n[1,2]").slurm
    assert (slurm.time, slurm.gpus, slurm.executor) == (60, 0, "slurm")
    assert slurm.model_extra == {"gres": "gpu:a100:1", "exclude": "n[1,2]"}
    assert Resources(cluster="ray", cluster_options={"gpus": 0.5}).ray.gpus == 0.5


def test_a_device_of_this_machine_is_refused(classifier):
    with pytest.raises(InputError, match="device 'cuda:1' is one of this machine's"):
        engine_for(Resources(cluster="ray"), [plan(classifier, device="cuda:1")])
