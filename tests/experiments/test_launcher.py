"""Under a launcher every command stops before it reads or writes anything; workers of a comparison do not ask."""

import multiprocessing
import sys

import pytest
import torch

import tangora
from tangora._checks import InputError
from tangora.experiments.compare import compare_tasks
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings
from tangora.experiments.curvature.measure import measure_curvature
from tangora.experiments.curvature.settings import CurvatureSettings
from tangora.experiments.diagnose.measure import diagnose_task
from tangora.experiments.diagnose.settings import DiagnoseSettings
from tangora.experiments.launcher import check_one_process
from tangora.experiments.settings import RunSettings

pytestmark = pytest.mark.messages

COMPARED = CompareSettings(recipes=["lora"])
CALLS = {
    "train": lambda folder: tangora.train(RunSettings(), folder),
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


def in_a_group(rank, file, told):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        check_one_process("train")
    except InputError as error:
        told.put(str(error))
    else:
        told.put("went on")


def test_processes_that_a_script_has_joined_are_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    processes = [
        context.Process(target=in_a_group, args=(rank, tmp_path / "group", told), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = [told.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all("its process group has 2" in text for text in found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--output", "out"],
        ["compare", "--recipes", "lora", "--output", "out"],
        ["diagnose", "--output", "out"],
        ["curvature", "minilm-l6", "--output", "out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_command_line_ends_with_code_2(arguments, tmp_path, monkeypatch, capsys):
    from tangora import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["tangora", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "WORLD_SIZE" in (told := capsys.readouterr().err)
    assert told.count("\n") == 1
    assert not any(tmp_path.iterdir())
