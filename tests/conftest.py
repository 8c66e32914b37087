import functools
import gc
import importlib.util
import sys
from pathlib import Path

import huggingface_hub.constants
import jinja2
import pytest
import torch
import typer.main

torch.set_num_threads(1)  # also where torch was there before this package

TESTS = Path(__file__).parent
SHAPED = [
    *(TESTS / name for name in ("geometry", "optim", "init", "adapters", "curvature", "diagnostics")),
    *(TESTS / "training" / f"test_{name}.py" for name in ("metrics", "images")),
    TESTS / "reproductions",
]
"""Tests of functions whose annotations have shapes."""


def pytest_ignore_collect(collection_path, config):
    """Leave out all other tests where annotations are checked: not all that they import can be."""
    if not config.getoption("--jaxtyping-packages") or not collection_path.is_relative_to(TESTS):
        return None
    holds_tests = collection_path.is_dir() or collection_path.name.startswith("test_")
    near = any(p.is_relative_to(collection_path) or collection_path.is_relative_to(p) for p in SHAPED)
    return True if holds_tests and not near else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Mark what runs with jaxtyping's checks, which take more time than the tests: one case of each test."""
    marked = set()
    for item in items:
        unchecked = item.get_closest_marker("slow") or item.get_closest_marker("messages")
        test = item.path, getattr(item, "originalname", item.name)
        if not unchecked and test not in marked and any(map(item.path.is_relative_to, SHAPED)):
            item.add_marker("shaped")
            marked.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what an older torch lacks, such as Muon, if the error says so."""
    try:
        return (yield)
    except ValueError as error:
        if "needs torch" in str(error):
            pytest.skip(str(error))
        raise


def pytest_collection_finish():
    """Take what the imports left out of garbage collection: every run of a Trainer collects all there is."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _templates_compiled_once():
    """PEFT compiles the template of its card at every saving, which takes longer than the saving."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.cache(jinja2.Environment.compile))
        yield


@pytest.fixture(autouse=True, scope="session")
def _commands_built_once():
    """The command line reads the signatures of all commands at every call, which takes longer than to refuse one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True, scope="session")
def _the_same_four_bit_layers_on_every_cpu():
    """Where a CPU has AVX512-BF16, bitsandbytes would compute plain 4-bit layers in bfloat16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """Switch the hub off, also where it was imported before this folder's tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process; return exit code, output and errors."""
    from tangora import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tangora", *map(str, arguments)])
        capsys.readouterr()  # what was shown while a model was written
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
