"""Under a launcher commands but train stop before they read or write anything; workers of a comparison do not ask."""

import multiprocessing
import os
import socket

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import tangora
from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora.experiments.compare import compare_tasks
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings
from tangora.experiments.comparison.sweep import due
from tangora.experiments.comparison.worker import Limits, work
from tangora.experiments.curvature.measurement import measure_curvature
from tangora.experiments.diagnose_task import diagnose_task
from tangora.experiments.measurement_settings import CurvatureSettings, DiagnoseSettings
from tangora.experiments.process import check_one_process
from tangora.experiments.run.preparing import load_run_task
from tangora.report import load_record
from tests.processes import process

pytestmark = pytest.mark.messages

COMPARED = CompareSettings(recipes=["lora"])
CALLS = {
    "compare": lambda folder: tangora.compare(COMPARED, folder),
    "compare several": lambda folder: compare_tasks(PlanSettings(tasks={"one": COMPARED}), folder),
    "diagnose": lambda folder: diagnose_task(DiagnoseSettings(), folder),
    "curvature": lambda folder: measure_curvature(CurvatureSettings(), folder),
    "export": lambda folder: tangora.export(folder / "run", folder / "small"),
}
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@pytest.mark.parametrize("name", CALLS)
def test_several_processes_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "out"
    with pytest.raises(
        InputError, match=f"{name.split()[0]} runs in one process, but WORLD_SIZE is 2"
    ) as error:
        CALLS[name](folder)
    assert "\n" not in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize("variable", SIZES)
def test_all_launchers_that_accelerate_knows(variable, monkeypatch):
    monkeypatch.setenv(variable, "8")
    with pytest.raises(InputError, match=f"{variable} is 8"):
        check_one_process("train")


@pytest.mark.parametrize("size", ["", "0", "1", "many"])
def test_one_process_is_not_refused(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    check_one_process("train")


def test_a_process_group_that_a_script_has_made_is_refused():
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(InputError, match="its process group has 2"):
            check_one_process("train")
    finally:
        torch.distributed.destroy_process_group()
    check_one_process("train")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--recipes", "lora", "--output", "out"],
        ["diagnose", "--output", "out"],
        ["curvature", "minilm-l6", "--output", "out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_command_line_ends_with_code_2(arguments, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(*arguments)
    assert code == 2
    assert "WORLD_SIZE" in err
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_what_processes_cannot_share_is_refused_before_they_meet(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("train", "--batch-size", "7", "--output", "out")
    assert code == 2
    assert "multiple of their number, 2" in err
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "compare"])
@pytest.mark.parametrize(
    "variable", ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"]
)
def test_accelerates_configuration_is_refused_by_one_process_too(name, variable, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "bf16" if variable.endswith("PRECISION") else "true")
    code, _, err = call(name, "--output", "out", *(["--recipes", "lora"] if name == "compare" else []))
    assert code == 2
    assert f"sets {variable} to" in err
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def launched(port, *arguments):
    one = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(one, MASTER_PORT=str(port))
    work(*arguments)


@pytest.mark.slow
def test_a_run_of_a_comparison_does_not_use_the_port_of_a_launcher_with_one_process(classifier, tmp_path):
    settings = CompareSettings(
        **classifier, steps=1, batch_size=4, recipes=["lora"], kind="classification", learning_rates="1e-3"
    )
    (trial, *_), folder = due(settings, []), ComparisonFolder(tmp_path)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # as by a run beside it
        port = taken.getsockname()[1]
        run = process(launched, port, trial, load_run_task(trial.settings), folder, Limits(), theirs)
        run.join()
    ours.close()
    record = load_record(folder.record_of(trial.id))
    assert record.status == "finished", record.error
