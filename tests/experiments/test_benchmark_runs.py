"""Runs with benchmarks of lm-eval: what the record and the folder hold, and what is refused before a run."""

import importlib.util
import json

import pytest

from tangora._checks import InputError
from tangora._folders import RunFolder
from tangora.experiments.comparison.plan import CompareSettings
from tangora.experiments.run.execute import execute
from tangora.experiments.run.preparing import load_run_task
from tangora.experiments.settings import RunSettings
from tangora.experiments.train import train
from tangora.experiments.values import validated
from tangora.report import load_record
from tests.experiments.lm_eval_tasks import RIGHT, skip_without_sandbox, write_tasks

pytest.importorskip("lm_eval", reason="needs the extra eval, lm-eval")

SHORT = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}
EACH = ["full", "lora", "lora-pro"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tasks(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(autouse=True)
def _data_in_a_folder_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.mark.parametrize("name", EACH)
def test_the_record_holds_them(generator, folder, tmp_path, name):
    settings = RunSettings(**generator, **SHORT, recipe=name, benchmarks="tiny_sums", benchmark_path=folder)
    record = train(settings, tmp_path / "out")
    assert record.status == "finished", record.error
    found = load_record(RunFolder(tmp_path / "out").record).benchmarks["tiny_sums"]
    assert found == record.benchmarks["tiny_sums"]
    assert found.metric == "acc,none"
    assert {"acc,none", "acc_norm,none"} == found.metrics.keys() == found.stderr.keys()
    assert found.value == sum(found.scores) / 12
    assert found.num_examples == 12
    assert train(settings, tmp_path / "out").benchmarks == record.benchmarks


def test_programs_are_written_and_run_only_if_that_is_wanted(generator, folder, tmp_path, call):
    skip_without_sandbox()
    command = ["--benchmarks", "tiny_code,tiny_sums", "--benchmark-path", folder, "--benchmark-limit", "3"]
    flags = [
        part
        for key, value in {**generator, **SHORT}.items()
        for part in (f"--{key.replace('_', '-')}", value)
    ]
    for execute_code, verdicts in ((False, [None] * 3), (True, RIGHT[:3])):
        out = tmp_path / f"out-{execute_code}"
        more = ["--execute-code"] if execute_code else []
        code, shown, errors = call("train", *flags, *command, *more, "--recipe", "lora", "--output", out)
        assert code == 0, errors
        file = RunFolder(out).benchmarks / "tiny_code.jsonl"
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        assert [sample["passed"] for sample in samples] == verdicts
        found = load_record(RunFolder(out).record).benchmarks
        assert found["tiny_code"].value == (sum(RIGHT[:3]) / 3 if execute_code else None)
        assert found["tiny_sums"].num_examples == 3
        assert ("--execute-code" in shown) is not execute_code
        assert "it/s" not in errors


def test_shorter_trials_have_none(generator, folder, tmp_path):
    settings = RunSettings(
        **generator, **SHORT, recipe="lora", benchmarks=["tiny_sums"], benchmark_path=folder
    )
    task = load_run_task(settings)
    record = execute(settings, task, tmp_path / "run", run_id="run", stage="trial")
    assert record.status == "finished", record.error
    assert record.benchmarks == {}


@pytest.mark.messages
def test_nothing_is_run_where_a_benchmark_cannot_be(generator, classifier, folder, tmp_path):
    def refused(match, small=generator, **more):
        with pytest.raises(InputError, match=match):
            train(RunSettings(**small, **SHORT, recipe="lora", **more), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(r"'hellaswagg' \(did you mean hellaswag\?\)", benchmarks=["hellaswagg"])
    refused(
        "benchmark_path must be a folder", benchmarks=["tiny_sums"], benchmark_path=str(tmp_path / "none")
    )
    refused("benchmarks is about .* of causal models", classifier, benchmarks=["tiny_sums"])


@pytest.mark.messages
def test_settings(monkeypatch):
    def refused(match, **values):
        with pytest.raises(InputError, match=match):
            validated(RunSettings, values)

    refused("benchmark_limit needs benchmarks", benchmark_limit=3)
    refused("execute_code needs benchmarks", execute_code=True)
    refused("benchmark_path needs benchmarks", benchmark_path="somewhere")
    refused("got boolq twice", benchmarks="boolq,piqa,boolq")
    shared = CompareSettings(recipes=["lora"], benchmarks="boolq, piqa", benchmark_limit=4)
    assert shared.run("lora", 1e-3, 0).benchmarks == ["boolq", "piqa"]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find_spec(name, *more)
    )
    refused(r"benchmarks needs lm_eval, .*'tangora\[eval\]'", benchmarks=["boolq"])
