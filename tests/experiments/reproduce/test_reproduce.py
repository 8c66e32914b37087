"""`tangora reproduce`: what it writes, says and ends with. The experiment here is made up and takes no time."""

import json
import sys
from types import MappingProxyType

import pytest

from tangora._checks import InputError
from tangora.experiments.reproduce import registry
from tangora.experiments.reproduce.experiment import Experiment, Parts
from tangora.experiments.reproduce.registry import EXPERIMENTS, settings_of
from tangora.experiments.reproduce.run import PAGE, RECORD, reproduce
from tangora.experiments.values import Settings
from tangora.report.reproduction import (
    Check,
    Figure,
    Panel,
    Result,
    Series,
    Table,
    load_reproduction,
)


class FakeSettings(Settings):
    seed: int = 0
    bound: float = 1.0
    size: int = 10


def fake_run(settings, progress):
    progress(1, 1)
    figure = Figure("curve", "Curve", "A curve.", [Panel("p", "x", "y", [Series("a", [1, 2], [3, 4])])])
    table = Table("Numbers", ("name", "value"), [("size", settings.size)])
    check = Check("The seed is small.", settings.seed, None, settings.bound, "nowhere")
    return Result([f"The seed is {settings.seed}."], [table], [figure], [check])


FAKE_PARTS = Parts(("All of it.",), FakeSettings, {"size": 2}, fake_run)
FAKE = Experiment("fake", "A fake", "nowhere", lambda: FAKE_PARTS, "no time")


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line with the fake experiment; return exit code, output and errors."""
    from tangora import cli

    everything = MappingProxyType({**EXPERIMENTS, "fake": FAKE})
    monkeypatch.setattr(registry, "EXPERIMENTS", everything)
    monkeypatch.setattr(cli.listing, "EXPERIMENTS", everything)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tangora", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), captured.err

    return run


def test_run_leaves_record_page_and_pictures(call, tmp_path):
    code, out, err = call("reproduce", "fake", "--output", tmp_path / "out")
    assert code == 0, err
    assert "The seed is 0." in out
    assert "The seed is small." in out
    assert "The only check agrees with the source." in out
    record = load_reproduction(tmp_path / "out" / RECORD)
    assert record.name == "fake"
    assert record.settings == {"seed": 0, "bound": 1.0, "size": 10}
    assert record.command.startswith("tangora reproduce fake")
    assert record.versions["torch"]
    assert record.stand_ins == ("All of it.",)
    assert (tmp_path / "out" / PAGE).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_failed_check_of_a_full_run_gives_exit_code_1(call, tmp_path):
    code, out, _ = call("reproduce", "fake", "--seed", 5, "--output", tmp_path / "full")
    assert code == 1
    assert "1 of 1 check disagrees with the source." in out
    # what was found is kept all the same
    assert not load_reproduction(tmp_path / "full" / RECORD).result.passed


def test_failed_check_of_a_quick_run_is_said_only(call, tmp_path):
    code, out, _ = call("reproduce", "fake", "--seed", 5, "--quick", "--output", tmp_path / "quick")
    assert code == 0
    assert "disagrees" in out
    assert "quick size" in out
    assert load_reproduction(tmp_path / "quick" / RECORD).quick


def test_settings_change_quick_and_defaults():
    assert settings_of(FAKE, {}).size == 10
    assert settings_of(FAKE, {}, quick=True).size == 2
    assert settings_of(FAKE, {"size": 7}, quick=True, seed=3) == FakeSettings(seed=3, size=7)


def test_set_reads_numbers_and_lists(call, tmp_path):
    assert call("reproduce", "fake", "--set", "seed=5", "--set", "bound=1e1", "-o", tmp_path)[0] == 0
    record = load_reproduction(tmp_path / RECORD)
    assert (record.settings["seed"], record.settings["bound"]) == (5, 10.0)
    wanted = settings_of(EXPERIMENTS["linear-shift"], {"conditions": [1, "1e2"]})
    assert wanted.conditions == (1.0, 100.0)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "did you mean"),
        (["nothing-like-it"], "fake"),
        (["fake", "--set", "speed=1"], "allowed: seed, bound, size"),
        (["fake", "--set", "size"], "KEY=VALUE"),
        (["fake", "--set", "size=[1"], "YAML"),
        (["fake", "--set", "size=many"], "size"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(call, tmp_path, arguments, message):
    name, *rest = arguments
    code, _, err = call("reproduce", "toi" if name == "nonsense" else name, *rest, "-o", tmp_path / "out")
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_folder_of_other_settings_is_refused(tmp_path):
    reproduce(FAKE, FakeSettings(), tmp_path / "out")
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        reproduce(FAKE, FakeSettings(seed=1), tmp_path / "out")


def test_seed_needs_a_setting():
    class Seedless(Settings):
        size: int = 1

    seedless = Experiment("s", "s", "s", lambda: Parts((), Seedless, {}, fake_run))
    with pytest.raises(InputError, match="takes no seed; allowed: size"):
        settings_of(seedless, {}, seed=1)


@pytest.mark.parametrize("command", [["reproduce"], ["list"]])
def test_experiments_are_listed(call, command):
    code, out, _ = call(*command)
    assert code == 0
    assert all(name in out for name in EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_described(name):
    entry = EXPERIMENTS[name]
    assert entry.name == name
    assert entry.title
    assert entry.source
    assert entry.duration
    assert isinstance(settings_of(entry, {}, quick=True, seed=3), Settings)
    assert all(field.description for field in entry.parts.settings.model_fields.values())


def test_record_is_strict_json(tmp_path):
    result = Result(["x"], [], [], [Check("c", float("nan"), 0, None, "s")], {"a": [float("inf")]})
    entry = Experiment("e", "e", "e", lambda: Parts((), FakeSettings, {}, lambda *_: result))
    path = reproduce(entry, FakeSettings(), tmp_path / "out").record_path

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["result"]["checks"][0]["value"] is None
    assert load_reproduction(path).result == result
